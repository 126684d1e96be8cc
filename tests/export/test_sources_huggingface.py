"""Checkpoint folders of transformers as sources: the same logits, what comes along, and every way to be wrong."""

import json
import os
import socket
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from tfinfer.errors import MissingDependencyError, SourceError  # noqa: E402
from tfinfer.export.sources import load_source  # noqa: E402
from tfinfer.export.sources.source import from_module  # noqa: E402

pytestmark = pytest.mark.hf

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=48),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2),
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """One thread, and no network: whoever tries it fails."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def refuse(*args, **kwargs):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    torch.set_num_threads(before)


def make_model(family="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<pad>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["def main(): return main"] * 3, trainer)
    return tokenizer


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def refused(folder, *parts, error=SourceError, **options):
    with pytest.raises(error) as caught:
        load_source(str(folder), **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "family, longest", [("llama", 64), ("qwen3", 64), ("mistral", 64), ("gpt2", 48), ("bloom", None)]
)
def test_a_folder_computes_what_the_original_does(tmp_path, family, longest, capfd):
    model = make_model(family)
    model.save_pretrained(tmp_path / family)
    capfd.readouterr()
    source = load_source(str(tmp_path / family))
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(source.module(ids), model(ids).logits)
    assert (source.kind, source.reference, source.max_length) == ("huggingface", family, longest)
    assert source.versions == {"torch": torch.__version__, "transformers": transformers.__version__}
    assert not source.module.training
    assert source.tokenizer is None
    assert all(0 <= token < VOCAB for token in source.eos_ids)  # the default of a class may lie outside
    assert capfd.readouterr() == ("", "")


def test_the_reference_is_the_folders_own_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_source(".").reference == "tiny-llama"


def test_half_precision_shards_become_float32(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "m", max_shard_size="10KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    assert {p.dtype for p in load_source(str(tmp_path / "m")).module.parameters()} == {torch.float32}


def test_torch_files_are_read_where_there_is_nothing_else(folder):
    before = load_source(str(folder)).module
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ids = torch.arange(5)[None]
    torch.testing.assert_close(load_source(str(folder)).module(ids), before(ids))


class Dangerous:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_dangerous_torch_file_is_never_run(folder, tmp_path):
    dangerous = {"lm_head.weight": Dangerous(tmp_path / "ran")}
    torch.save(dangerous, folder / "pytorch_model.bin")
    load_source(str(folder))  # safetensors come first
    (folder / "model.safetensors").unlink()
    message = refused(folder, "the file of weights holds posix.mkdir", "nothing of it was run")
    assert "weights_only" not in message  # torch advises to switch it off
    torch.save(dangerous, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_all_listed(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    state |= {"lm_head.weight": torch.zeros(3, 3), "extra.weight": torch.zeros(1)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        folder,
        "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "1 not in the module: extra.weight",
        "1 of another shape: lm_head.weight is [3, 3], expected [300, 16]",
    )


def test_broken_and_missing_weights_are_refused(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for broken in (b"", content[:100], content[:-5]):
        path.write_bytes(broken)
        refused(folder)
    path.unlink()
    refused(folder, "model.safetensors")
    path.write_bytes(content)
    load_source(str(folder))


def test_a_shard_outside_the_folder_is_refused(folder):
    (folder / "model.safetensors").unlink()
    edit(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": "../other.safetensors"})
    refused(folder, "outside")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "nothing-known"}', '{"model_type": 3}'])
def test_broken_configs_are_refused(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, "config.json")


def test_weights_of_another_model_are_refused(folder):
    transformers.T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=1).save_pretrained(folder)
    refused(folder, "do not fit T5ForConditionalGeneration", "missing: decoder.")


def test_remote_code_is_refused_and_not_run(folder, tmp_path):
    (folder / "modeling_x.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.Y"})
    refused(folder, "auto_map", "not run")
    edit(folder / "config.json", auto_map=...)
    load_source(str(folder))
    assert not (tmp_path / "ran").exists()


def test_quantised_weights_and_adapters_are_refused(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "quantised")
    edit(folder / "config.json", quantization_config=...)
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/model")
    refused(folder, "adapter")


def test_a_kernel_named_in_the_config_is_not_fetched(folder):
    edit(folder / "config.json", attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    assert load_source(str(folder)).module(torch.arange(4)[None]).shape == (1, 4, VOCAB)


def test_a_folder_takes_no_other_weights(folder, tmp_path):
    refused(folder, "its own weights", weights=tmp_path / "w.safetensors")


def test_without_transformers_the_command_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder, "pip install 'tfinfer[export,hf]'", error=MissingDependencyError)


def test_tokenizer_template_ids_and_defaults_come_along(folder):
    content = train_tokenizer().to_str()
    (folder / "tokenizer.json").write_text(content)
    edit(folder / "tokenizer_config.json", bos_token="<s>", eos_token={"content": "</s>"}, pad_token="<pad>")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit(folder / "config.json", bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    edit(folder / "generation_config.json", eos_token_id=[3, 1, 3], temperature=0.6, bos_token_id=...)
    source = load_source(str(folder))
    assert source.tokenizer == content.encode()
    assert source.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert (source.bos_id, source.eos_ids, source.pad_id) == (0, (3, 1), 2)
    assert source.chat_template == "{{ messages }}"
    assert source.generation_config["temperature"] == 0.6


def test_ids_come_from_the_config_and_then_the_tokenizer(folder):
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=3, bos_token_id=None)
    (folder / "tokenizer.json").write_text(train_tokenizer().to_str())
    edit(folder / "special_tokens_map.json", eos_token="</s>", bos_token="<s>")
    source = load_source(str(folder))
    assert (source.eos_ids, source.bos_id, source.generation_config) == ((3,), 0, None)


def test_another_tokenizer_may_be_given(folder, tmp_path):
    (folder / "tokenizer.json").write_text("broken")
    train_tokenizer().save(str(tmp_path / "other.json"))
    assert load_source(str(folder), tokenizer=tmp_path / "other.json").tokenizer
    refused(folder, "expected the content of a tokenizer.json")


def test_broken_files_beside_the_model_are_refused(folder):
    (folder / "generation_config.json").write_text("{")
    refused(folder, "generation_config.json")


def test_an_older_tokenizer_is_converted(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    trained = train_tokenizer()
    trained.add_special_tokens(["<|endoftext|>"])
    trained.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    edit(tmp_path / "vocab.json", **{"<|endoftext|>": len(vocabulary)})
    source = load_source(str(tmp_path))
    converted = Tokenizer.from_str(source.tokenizer.decode())
    assert converted.encode("def main").ids == trained.encode("def main").ids
    assert source.special_tokens["eos_token"] == "<|endoftext|>"
    assert source.eos_ids == (len(vocabulary),)


def test_a_tokenizer_that_cannot_be_converted_leaves_ids_and_says_so(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer", chat_template="x")
    (folder / "tokenizer.model").write_bytes(b"broken")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = load_source(str(folder))
    assert source.tokenizer is None
    assert any("takes ids alone" in str(warning.message) for warning in caught)


def test_a_live_model_of_transformers_becomes_a_function_of_ids():
    model = make_model().train()
    source = from_module(model)
    ids = torch.arange(6)[None]
    assert source.reference == "LlamaForCausalLM"
    assert model.training
    torch.testing.assert_close(source.module(ids), model.eval()(ids).logits)
