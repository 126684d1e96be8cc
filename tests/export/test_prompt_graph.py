"""The graph that reads long prompts of a decoder with weights of few bits: what is in it, and that it is proved."""

import json

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import ProofError
from tfinfer.export import export_model, small
from tfinfer.export.modules import Decoder, TransformerConfig
from tfinfer.manifest import load_manifest

LONG = 150


def decoder():
    torch.manual_seed(0)
    return Decoder(
        TransformerConfig(
            vocab_size=120, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, position="rotary",
            norm="rms_norm", activation="swiglu", max_length=200,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module", params=["int8", "int4"])
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    export_model(decoder(), out, dtype=request.param, quantiser="rtn")
    return out


@pytest.fixture
def session(folder):
    with tfinfer.load(folder, threads=1) as model:
        yield model.decoder


def test_it_gives_the_caches_alone_by_products_in_float32(folder):
    graph = onnx.load(folder / "prompt.onnx", load_external_data=False).graph
    assert {value.name.split(".")[0] for value in graph.output} == {"present"}
    assert "logits_to_keep" not in {value.name for value in graph.input}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    # Of the last layer nothing but its keys and values is wanted, and of the head nothing at all.
    layers = load_manifest(folder).graphs["decoder"].layers
    assert len(products) == sum(layer.count * layer.operators["MatMulNBits"] for layer in layers[:-1])
    assert {a.i for node in products for a in node.attribute if a.name == "accuracy_level"} == {0}


def test_it_reads_the_weights_of_the_decoder(folder):
    places = [_places(folder / name) for name in ("prompt.onnx", "decoder.onnx")]
    assert places[0] < places[1]


def _places(path):
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {tuple(entry.value for entry in tensor.external_data) for tensor in tensors if tensor.external_data}


def read(decoder, ids, keep=1, least=None):
    """The logits of a prompt and of a step behind it; least: from how many positions the second graph reads."""
    decoder.prompts.least = least
    cache = decoder.open_cache(1, 200)
    slot = cache.acquire()
    logits = decoder.prefill(cache, slot, ids, keep=keep)
    return logits, decoder.step(cache, [slot], [3]).copy(), cache


def cosine(one, other):
    return float(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("keep", [0, 1, 7])
def test_a_long_prompt_gives_what_the_decoder_gives(session, keep):
    ids = np.random.default_rng(0).integers(0, 120, LONG)
    plain, behind, _ = read(session, ids, keep)
    assert session.prompts._session is None
    logits, step, cache = read(session, ids, keep, least=96)
    assert session.prompts._session is not None
    assert cache.length(0) == LONG + 1
    assert cache.ids[0] == [*ids, 3]
    assert logits.shape == plain.shape == (keep, 120)
    assert cosine(step, behind) > 0.99
    if keep:
        assert cosine(logits, plain) > 0.99
    assert not np.array_equal(step, behind)  # it really was read by other products


def test_a_short_prompt_does_not_open_it(session):
    read(session, range(95), least=96)
    assert session.prompts._session is None


def test_it_does_not_open_after_the_model_was_closed(folder):
    model = tfinfer.load(folder, threads=1)
    session = model.decoder
    model.close()
    assert session.prompts.session is None


def test_the_proof_has_it_read_prompts(folder):
    names = [case.name for case in load_manifest(folder).proof.cases]
    assert "a prompt at once, products in float32" in names
    assert "one token, products in float32" not in names  # it would read nothing


@pytest.mark.parametrize(("least", "said"), [(96, "prompt.onnx reads those of 96 tokens and more"), (None, "decoder")])
def test_inspect_says_which_graph_reads_prompts_here(folder, monkeypatch, least, said):
    monkeypatch.setattr("tfinfer.session.prompt.least_here", lambda: least)
    shown = CliRunner().invoke(cli, ["inspect", str(folder)]).stdout
    assert said in next(line for line in shown.splitlines() if line.startswith("prompts "))
    told = json.loads(CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).stdout)
    assert told["prompts_from"] == least


def test_a_graph_that_reads_something_else_is_no_proof(tmp_path, monkeypatch):
    made = small.prompt_graph

    def wrong(model):
        graph = made(model)
        norm = next(node for node in graph.graph if node.op_type == "SimplifiedLayerNormalization")
        node = next(iter(norm.outputs[0].uses())).node  # its product
        node.replace_input_with(0, norm.inputs[0])  # of what was not normalised
        return graph

    monkeypatch.setattr(small, "prompt_graph", wrong)
    out = tmp_path / "out"
    with pytest.raises(ProofError, match="products in float32"):
        export_model(decoder(), out, dtype="int8")
    assert not out.exists()


@pytest.mark.parametrize("how", [{}, {"dtype": "fp16"}, {"dtype": "int8", "activations": "fp16"}])
def test_other_widths_have_none(tmp_path, how):
    out = tmp_path / "out"
    export_model(decoder(), out, **how)
    assert not (out / "prompt.onnx").exists()
    with tfinfer.load(out, threads=1) as model:
        assert model.decoder.prompts is None


def test_a_batcher_asks_for_logits_of_the_last_piece_alone(session, folder):
    asked = []
    with tfinfer.load(folder, threads=1) as model:
        prefill = model.decoder.prefill
        model.decoder.prefill = lambda *given, keep=1: asked.append(keep) or prefill(*given, keep=keep)
        with model.batcher(slots=2, piece=64) as batcher:
            batcher.generate(list(range(100)), max_tokens=2, stop_ids=[])
    assert asked == [0, 1]
