"""Folders of sentence-transformers as sources: where the checkpoint lies, its pooling, and what is warned of."""

import json
import shutil
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tfinfer.errors import SourceError  # noqa: E402
from tfinfer.export.sources import load_source  # noqa: E402
from tfinfer.manifest import PoolingSpec  # noqa: E402

pytestmark = pytest.mark.hf

IDS = torch.tensor([[3, 1, 4, 1, 5]])
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def save(folder, name):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**(T5 if "T5" in name else SIZES))).eval()
    model.save_pretrained(folder)
    return model


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def refused(folder, *parts):
    with pytest.raises(SourceError) as caught:
        load_source(str(folder))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def warned(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = load_source(str(folder))
    return source, " ".join(str(w.message) for w in caught if str(folder) in str(w.message))


def steps(folder, *names, path=""):
    """Write modules.json with a Transformer in `path` and these behind it."""
    kinds = [("Transformer", path), *((name, f"{i}_{name}") for i, name in enumerate(names, 1))]
    entries = [{"idx": i, "path": p, "type": f"sentence_transformers.models.{k}"} for i, (k, p) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(entries))


@pytest.fixture
def sentences(tmp_path):
    save(tmp_path, "BertModel")
    steps(tmp_path, "Pooling")
    (tmp_path / "1_Pooling").mkdir()
    edit(tmp_path / "1_Pooling" / "config.json", word_embedding_dimension=16, pooling_mode_mean_tokens=True)
    return tmp_path


@pytest.mark.parametrize(
    "config, mode",
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode": "mean", "pooling_mode_mean_tokens": ...}, "mean"),
    ],
)
def test_pooling_comes_along(sentences, config, mode):
    edit(sentences / "1_Pooling" / "config.json", **config)
    source = load_source(str(sentences))
    assert (source.says, source.pooling) == ("encoder", PoolingSpec(mode, False))
    steps(sentences, "Pooling", "Normalize")
    edit(sentences / "sentence_bert_config.json", max_seq_length=20, do_lower_case=False)
    source = load_source(str(sentences))
    assert (source.pooling, source.max_length) == (PoolingSpec(mode, True), 20)


def test_other_poolings_and_steps_are_warned_of(sentences):
    edit(sentences / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    source, message = warned(sentences)
    assert source.pooling is None
    assert "pooling_mode_mean_tokens and pooling_mode_max_tokens is left out" in message
    steps(sentences, "Pooling", "Dense")
    edit(sentences / "sentence_bert_config.json", do_lower_case=True)
    edit(sentences / "config_sentence_transformers.json", default_prompt_name="query")
    source, message = warned(sentences)
    assert source.pooling is None
    assert all(part in message for part in ("Dense of modules.json is left out", "lower case", "the prompt 'query'"))


def test_the_checkpoint_may_lie_in_a_folder_of_its_own(sentences):
    inner = sentences / "0_Transformer"
    inner.mkdir()
    shutil.move(sentences / "config.json", inner)
    shutil.move(sentences / "model.safetensors", inner)
    edit(inner / "sentence_bert_config.json", max_seq_length=16)
    steps(sentences, "Pooling", path="0_Transformer")
    source = load_source(str(sentences))
    assert (source.pooling, source.max_length, source.reference) == (PoolingSpec("mean", False), 16, sentences.name)
    shutil.move(inner, sentences.parent / "outside")
    for path in ("../outside", str(sentences.parent / "outside")):
        steps(sentences, "Pooling", path=path)
        refused(sentences, "within its own folder", "outside")
    steps(sentences, "Pooling", path="1_Pooling/..")
    refused(sentences, "has no config.json")


def test_a_sentence_folder_has_no_head_whatever_its_config_names(sentences):
    for name in "LlamaForCausalLM", "BertForMaskedLM", "T5EncoderModel":
        model = save(sentences, name)
        source, message = warned(sentences)
        assert source.says == "encoder"
        assert ("pooler_output" in message) == (name == "BertForMaskedLM")
        torch.testing.assert_close(source.module(IDS)["last_hidden_state"], model.base_model(IDS).last_hidden_state)


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[3]", '[{"type": "x.Transformer"}]'])
def test_a_broken_modules_file_is_refused(sentences, content):
    (sentences / "modules.json").write_text(content)
    refused(sentences, "modules.json")
