"""Encoders of transformers as checkpoints of toy size: every output, and the mean of ragged texts, are PyTorch's."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402

import tfinfer  # noqa: E402
from tfinfer.cli.main import tfinfer as cli  # noqa: E402
from tfinfer.errors import InputError, LengthError  # noqa: E402
from tfinfer.export import export_model  # noqa: E402
from tfinfer.export.sources import load_source  # noqa: E402
from tfinfer.manifest import PoolingSpec  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

WORDS, LONGEST = 60, 40
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": LONGEST, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2, "mask_token_id": 3,
}  # fmt: skip
FUSED, FULL = "MultiHeadAttention", "full, padding masked"
PLAIN = [(FUSED, FULL, 2)]
# Positions that count up from behind the id of padding, as those of all that came of RoBERTa.
SHIFTED = {"pad_token_id": 1, "bos_token_id": 0, "cls_token_id": 0, "max_position_embeddings": LONGEST + 2}
# Class, what its config needs beside the sizes, and how its attentions were written.
ENCODERS = {
    "BertModel": ({}, PLAIN),
    "RobertaModel": ({**SHIFTED, "type_vocab_size": 1}, PLAIN),
    "XLMRobertaModel": ({**SHIFTED, "type_vocab_size": 1}, PLAIN),
    "MPNetModel": (SHIFTED, [(FUSED, f"{FULL}, a bias by distance", 2)]),
    "DistilBertModel": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, PLAIN),
    "ElectraModel": ({"embedding_size": 16}, PLAIN),
    "AlbertModel": ({"embedding_size": 16}, PLAIN),
    "ModernBertModel": (
        {"local_attention": 8, "global_attn_every_n_layers": 2},
        [(FUSED, FULL, 1), (FUSED, f"{FULL}, a bias by distance", 1)],
    ),
    "EsmModel": ({**SHIFTED, "position_embedding_type": "rotary", "token_dropout": True}, PLAIN),
    "DebertaV2Model": (
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        [("torch's own translation", "as written", 1)],
    ),
}
TEXTS = ["w7", "w9 w30 w11 w12 w41 w13 w50 w8 w21", "w33 w34 w35", " ".join(f"w{5 + i}" for i in range(38)), "w9 w7"]


def make(name, **changes):
    """A random model of a class of transformers; larger than usual weights, so that attention is not uniform."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**(SIZES | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def write_tokenizer(folder, config):
    """One id for each word; a text begins with [CLS] and ends with [SEP]."""
    ids = dict(zip(SPECIAL, (config.pad_token_id, SIZES["cls_token_id"], 2, 3, 4)))
    if config.pad_token_id == 1:
        ids["[CLS]"] = 0
    inner = Tokenizer(models.WordLevel(ids | {f"w{i}": i for i in range(5, WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(SPECIAL))
    ends = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LONGEST}))


def checkpoint(folder, name, **changes):
    model = make(name, **changes)
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config)
    return model


def export(folder, out, **options):
    return export_model(load_source(str(folder)), out, attention=False, **options)


def alone(model, ids, **given):
    """What PyTorch computes for one text without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **given)


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_mean_pooling_of_ragged_texts_is_that_of_each_alone(name, tmp_path):
    changes, attention = ENCODERS[name]
    model = checkpoint(tmp_path / "checkpoint", name, **changes)
    report = export(tmp_path / "checkpoint", tmp_path / "out")
    assert [(a.operator, a.pattern, a.count) for a in report.manifest.attention] == attention
    assert report.manifest.max_length == LONGEST
    with tfinfer.load(tmp_path / "out") as loaded:
        rows = [loaded.tokenize(text) for text in TEXTS]
        assert len(rows[3]) == LONGEST
        rows.append([5, 9, model.config.pad_token_id, 11])  # what stands for padding elsewhere, in a text
        wanted = [alone(model, row).last_hidden_state[0].numpy() for row in rows]
        close(loaded.encode([*TEXTS, rows[-1]]), np.stack([w.mean(0) for w in wanted]))
        for got, one in zip(loaded.encode(rows, pooling="none"), wanted):
            close(got, one)
        with pytest.raises(LengthError, match=f"longest length, {LONGEST}"):
            loaded.encode("w5 " * LONGEST)


def test_a_length_that_no_file_says_is_found(tmp_path):
    """Its positions are counted from the ids, so that no table shows how many there are."""
    checkpoint(tmp_path / "checkpoint", "RobertaModel", **ENCODERS["RobertaModel"][0])
    (tmp_path / "checkpoint" / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=f"at most {LONGEST} tokens"):
        export(tmp_path / "checkpoint", tmp_path / "out", max_length=LONGEST + 1)
    assert export(tmp_path / "checkpoint", tmp_path / "out").manifest.max_length == LONGEST


@pytest.mark.parametrize("written", ["sdpa", "eager"])
def test_it_does_not_matter_how_attention_was_written(written, tmp_path):
    model = make("BertModel", attn_implementation=written)
    assert model.config._attn_implementation == written
    report = export_model(model, tmp_path / "out", attention=False)
    assert [(a.operator, a.pattern, a.count) for a in report.manifest.attention] == [(FUSED, FULL, 2)]
    rows = [[1, 5, 9, 2], [1, 30, 2], [1, *range(5, 43), 2]]
    with tfinfer.load(tmp_path / "out") as loaded:
        wanted = [alone(model, row) for row in rows]
        close(loaded.encode(rows), np.stack([o.last_hidden_state[0].mean(0).numpy() for o in wanted]))
        close(loaded.encode(rows, pooling="pooled"), np.stack([o.pooler_output[0].numpy() for o in wanted]))


def test_its_attention_is_not_uniform():
    """Else none of this would see a wrong mask or wrong positions."""
    model = make("BertModel", attn_implementation="eager")
    weights = alone(model, [1, *range(5, 14), 2], output_attentions=True).attentions
    assert max(layer.max().item() for layer in weights) > 3 / 11


@pytest.mark.parametrize(
    "name, outputs",
    [
        ("BertModel", ["last_hidden_state", "pooler_output"]),
        ("BertForMaskedLM", ["logits"]),
        ("BertForSequenceClassification", ["logits"]),
        ("BertForTokenClassification", ["logits"]),
        pytest.param(
            "BertForQuestionAnswering",
            ["start_logits", "end_logits"],
        ),
    ],
)
def test_every_output_keeps_its_name(name, outputs, tmp_path):
    model = checkpoint(tmp_path / "checkpoint", name, num_labels=2 if "Question" in name else 3)
    report = export(tmp_path / "checkpoint", tmp_path / "out")
    assert report.manifest.kind == "encoder"
    assert [tensor.name for tensor in report.manifest.graphs["encoder"].outputs] == outputs
    lengths, rng = (11, 1, 23), np.random.default_rng(0)
    ids, mask, types = (np.zeros((3, 23), np.int64) for _ in range(3))
    for row, n in enumerate(lengths):
        ids[row, :n], mask[row, :n], types[row, n // 2 : n] = rng.integers(5, WORDS, n), 1, 1
    with tfinfer.load(tmp_path / "out") as loaded:
        got = loaded.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
        assert list(got) == outputs
        for row, n in enumerate(lengths):
            wanted = alone(model, ids[row, :n].tolist(), token_type_ids=torch.from_numpy(types[row : row + 1, :n]))
            for key in outputs:
                one, own = wanted[key][0].numpy(), got[key][row]
                close(own[:n] if len(own) == 23 else own, one)
        if name == "BertModel":
            pair = ("w7 w8 w9", "w30 w5")  # of token types 0 and 1
            wanted = alone(model, [1, 7, 8, 9, 2, 30, 5, 2], token_type_ids=torch.tensor([[0] * 5 + [1] * 3]))
            close(loaded.encode([pair])[0], wanted.last_hidden_state[0].mean(0))
        else:
            with pytest.raises(InputError, match="hidden states"):
                loaded.encode("w7")


def test_a_sentence_folder_brings_its_pooling_and_length_through_the_command_line(tmp_path):
    folder = tmp_path / "sentences"
    model = checkpoint(folder, "BertModel")
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 32}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    out, runner = tmp_path / "out", CliRunner()
    exported = runner.invoke(cli, ["export", str(folder), "-o", str(out), "--no-attention", "--json"])
    assert exported.exit_code == 0, exported.output
    manifest = json.loads(exported.stdout)["manifest"]
    assert manifest["pooling"] == {"mode": "cls", "normalize": True}
    assert manifest["max_length"] == 12
    texts = [TEXTS[0], TEXTS[2], "w9 w30 w11 w12 w41 w13 w50 w8 w21"]
    with tfinfer.load(out) as loaded:
        assert loaded.pooling() == PoolingSpec("cls", True)
        states = [alone(model, loaded.tokenize(text)).last_hidden_state[0] for text in texts]
        wanted = torch.nn.functional.normalize(torch.stack([state[0] for state in states])).numpy()
        close(loaded.encode(texts), wanted)
        means = np.stack([state.mean(0).numpy() for state in states])
        close(loaded.encode(texts, pooling="mean", normalize=False), means)
    lines = runner.invoke(cli, ["encode", str(out), *texts]).stdout.splitlines()
    close([json.loads(line)["vector"] for line in lines], wanted)
    assert runner.invoke(cli, ["verify", str(out)]).exit_code == 0
