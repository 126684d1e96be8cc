"""`model.attention`: the weights that PyTorch computes, at lengths that were never traced, from the same weights."""

import itertools

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tfinfer  # noqa: E402
from tfinfer.errors import InputError, LengthError  # noqa: E402
from tfinfer.export import export_model  # noqa: E402
from tfinfer.export.sources import load_source  # noqa: E402

WORDS, LONGEST, LAYERS = 60, 40, 3
LENGTHS = (1, 2, 6, 23, LONGEST)
WIDE = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": LONGEST,
}  # fmt: skip
PAIRED = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads":
    4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": LONGEST,
}  # fmt: skip
ALONE = {
    "BertModel": WIDE,
    "GPT2LMHeadModel": {"vocab_size": WORDS, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": LONGEST},
    "LlamaForCausalLM": {**WIDE, "num_key_value_heads": 2},
}
PAIRS = {
    "T5ForConditionalGeneration": {
        "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": PAIRED,
}  # fmt: skip
hf = pytest.mark.hf


def checkpoint(name, sizes, folder):
    """A random model and its folder of weights, such that attention is far from uniform."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and "T5" not in name:  # whose weights are large as they are
                parameter.mul_(8)
    model.save_pretrained(folder)
    return model


def ids_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, WORDS, length).tolist()


def assert_are(got, layers):
    """(layers, heads, query, key), each row a distribution, as PyTorch's (1, heads, query, key) of each layer."""
    wanted = torch.cat(list(layers)).numpy()
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5, rtol=0)


@hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALONE)
def test_one_stack(name, tmp_path):
    model = checkpoint(name, ALONE[name], tmp_path / "checkpoint")
    report = export_model(load_source(str(tmp_path / "checkpoint")), tmp_path / "out", max_length=LONGEST)
    assert [(entry.name, len(entry.outputs)) for entry in report.manifest.maps] == [("self", LAYERS)]
    with tfinfer.load(tmp_path / "out", threads=1) as loaded:
        for length in LENGTHS:
            ids = ids_of(length)
            with torch.no_grad():
                wanted = model(torch.tensor([ids]), output_attentions=True).attentions
            got = loaded.attention(ids)
            assert got.shape == (LAYERS, 4, length, length)
            assert_are(got, wanted)
        assert got.max() > 3 / LONGEST
        if name != "BertModel":
            assert not np.triu(got, 1).any()
        with pytest.raises(InputError, match="a target is for encoder-decoders"):
            loaded.attention(ids, [1])
        with pytest.raises(LengthError, match=f"longest length, {LONGEST}"):
            loaded.attention(ids_of(LONGEST + 1))
        with pytest.raises(InputError, match="ids must be from 0"):
            loaded.attention([WORDS])
        np.testing.assert_array_equal(loaded.attention(ids), got)


@hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAIRS)
def test_three_stacks_of_an_encoder_decoder(name, tmp_path):
    model = checkpoint(name, PAIRS[name], tmp_path / "checkpoint")
    options = {"max_length": LONGEST, "max_source_length": LONGEST}
    report = export_model(load_source(str(tmp_path / "checkpoint")), tmp_path / "out", **options)
    (start,) = report.manifest.token_ids.decoder_start

    def check(got, source, target):
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]), output_attentions=True
            )
        assert set(got) == {"encoder", "decoder", "cross"}
        assert got["cross"].shape == (LAYERS, 4, len(target), len(source))
        assert_are(got["encoder"], out.encoder_attentions)
        assert_are(got["decoder"], out.decoder_attentions)
        assert_are(got["cross"], out.cross_attentions)

    with tfinfer.load(tmp_path / "out", threads=1) as loaded:
        for source_length, target_length in itertools.chain(zip(LENGTHS, reversed(LENGTHS)), [(5, 5)]):
            source, target = ids_of(source_length), ids_of(target_length - 1, seed=1)
            check(loaded.attention(source, target), source, [start, *target])
        said = loaded.generate(source, max_tokens=LONGEST - 1).token_ids
        check(loaded.attention(source), source, [start, *said])
        found = loaded.attention_maps(source, target)
        assert [(len(m.query_tokens), len(m.key_tokens)) for m in found if m.name == "cross"] == [(5, 5)]


class Reader(nn.Module):
    """A decoder as a textbook writes it: no transformers, and weights of some hundred kB."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(256, 96), nn.Embedding(64, 96)
        self.parts = nn.ModuleList(nn.ModuleList([nn.Linear(96, 288), nn.Linear(96, 96)]) for _ in range(2))
        self.head = nn.Linear(96, 256)

    def forward(self, ids, seen=None):
        n = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(n, device=ids.device))
        hidden = torch.triu(torch.ones(n, n, dtype=torch.bool, device=ids.device), 1)
        for qkv, out in self.parts:
            q, k, v = (part.unflatten(-1, (4, 24)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            weights = (q @ k.transpose(-1, -2) * 24**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
            if seen is not None:
                seen.append(weights)
            x = x + out((weights @ v).transpose(1, 2).flatten(-2))
        return self.head(x)


def external(path):
    """What a graph keeps elsewhere: of each tensor its file, and where in it."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (place["location"], int(place["offset"]), int(place["length"]))
    return found


def test_the_graph_of_weights_shares_the_file_of_weights(tmp_path):
    module = Reader().eval()
    export_model(module, tmp_path / "with", max_length=64)
    export_model(module, tmp_path / "without", max_length=64, attention=False)
    assert not (tmp_path / "without" / "attention.onnx").exists()
    own, decoder = (external(tmp_path / "with" / f"{name}.onnx") for name in ("attention", "decoder"))
    assert {place for place, _, _ in own.values()} == {"weights.bin"}
    assert set(own.values()) <= set(decoder.values())  # all of it is the decoder's
    sizes = {name: (tmp_path / name / "weights.bin").stat().st_size for name in ("with", "without")}
    assert sizes["without"] > 400_000
    assert sizes["with"] == sizes["without"]
    whole = {name: sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in sizes}
    assert whole["with"] < 1.03 * whole["without"]
    with tfinfer.load(tmp_path / "with", threads=1) as loaded, tfinfer.load(tmp_path / "without", threads=1) as bare:
        for length in (1, 17, 64):
            seen, ids = [], np.random.default_rng(0).integers(0, 256, length).tolist()
            with torch.no_grad():
                module(torch.tensor([ids]), seen)
            assert_are(loaded.attention(ids), seen)
        with pytest.raises(InputError, match="no graph of attention's weights"):
            bare.attention(ids)
        assert bare.generate(ids[:3], max_tokens=9).token_ids == loaded.generate(ids[:3], max_tokens=9).token_ids
