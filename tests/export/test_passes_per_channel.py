"""Products of whole numbers: what they compute of each row, which products become some, and whole folders of them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from small_graph import Graph, run, weights

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError
from tfinfer.export import export_model
from tfinfer.export.modules import Decoder, TransformerConfig
from tfinfer.export.passes import per_channel, quantise
from tfinfer.export.passes.blocks import quantised
from tfinfer.export.passes.quantise import Recipe
from tfinfer.manifest import load_manifest
from tfinfer.proof.prove import verify_folder

RECIPE = Recipe(8, 8, 32, per_channel=True)
ROUNDING = {"Abs": 1, "ReduceMax": 1, "Div": 1, "QuantizeLinear": 1}  # of rows
PRODUCT = {"MatMulIntegerToFloat": 1, "Mul": 1}


def types(model):
    return Counter(node.op_type for node in model.graph)


def product(matrix, rows, transposed=False):
    """The graph of one product by channel, and what it is fed."""
    g = Graph()
    g.feeds["x"] = np.ascontiguousarray(rows)
    x = g.emit.input("x", ir.DataType.FLOAT, ["batch", "seq", matrix.shape[0]])
    weight = g.emit.weight(torch.from_numpy(np.ascontiguousarray(matrix.T if transposed else matrix)), "up")
    more = {"transB": 1, "domain": "com.microsoft"} if transposed else {}
    model = g.model(g.emit.op("FusedMatMul" if transposed else "MatMul", x, weight, **more))
    assert quantise.run(model, RECIPE) == 1
    assert types(model) == ROUNDING | PRODUCT
    return model, g.feeds


def by_hand(matrix, rows):
    """Rows rounded to 127 levels of their largest number, columns to 7 bits, summed up in whole numbers."""
    numbers, scales = per_channel.operands(quantised(matrix, per_channel.BITS, len(matrix)))
    largest = np.abs(rows).max(-1, keepdims=True)
    rounded = np.rint(rows / largest / np.float32(1 / 127)).astype(np.int64)
    return (rounded @ numbers.astype(np.int64)) * scales * largest / 127


@pytest.mark.parametrize(("k", "n"), [(36, 34), (96, 34), (131, 65), (512, 192)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 17)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_that_of_rounded_rows_and_rounded_columns(k, n, shape, transposed):
    matrix, rows = weights(k, n, scale=0.05), weights(*shape, k, seed=1, scale=3.0)
    (got,) = run(*product(matrix, rows, transposed))
    expected = by_hand(matrix, rows)
    np.testing.assert_allclose(got, expected, atol=3e-4 * np.abs(expected).max())  # a number at a half may go both ways
    np.testing.assert_allclose(got, rows @ matrix, atol=0.04 * np.abs(expected).max())


def test_sums_of_the_largest_numbers_do_not_saturate():
    """Without VNNI two products of bytes are added in 16 bits."""
    matrix = np.full((96, 40), -0.5, np.float32)
    (got,) = run(*product(matrix, np.ones((1, 1, 96), np.float32)))
    np.testing.assert_allclose(got, np.full((1, 1, 40), -48.0), rtol=1e-5)


def test_a_row_comes_out_the_same_whatever_stands_beside_it():
    matrix, rows = weights(96, 40), weights(2, 5, 96, seed=1)
    rows[1, 2] *= 1e4
    model, feeds = product(matrix, rows)
    (together,) = run(model, feeds)
    for batch, at in np.ndindex(2, 5):
        (alone,) = run(model, {"x": rows[batch : batch + 1, at : at + 1]})
        np.testing.assert_array_equal(alone[0, 0], together[batch, at])


@pytest.mark.parametrize("k", [32, 45, 131])
def test_a_row_of_zeros_gives_zeros(k):
    rows = weights(1, 3, k)
    rows[0, 1] = 0
    (got,) = run(*product(weights(k, 33), rows))
    assert not got[0, 1].any()
    assert np.isfinite(got).all()
    assert got[0, 0].any()


def test_rows_that_several_products_read_are_rounded_once():
    g = Graph()
    x = g.rows("x", 64)
    products = [g.MatMul(x, g.emit.weight(torch.from_numpy(weights(64, 64, seed=i)), f"{i}")) for i in range(3)]
    model = g.model(*products)
    expected = run(model, g.feeds)
    assert quantise.run(model, RECIPE) == 3
    assert types(model) == ROUNDING | dict.fromkeys(PRODUCT, 3)
    for before, after in zip(expected, run(model, g.feeds), strict=True):
        np.testing.assert_allclose(after, before, atol=0.03 * np.abs(before).max())


def test_wider_ones_get_blocks_and_kept_ones_stay():
    g = Graph()
    x = g.rows("x", 64)
    products = [g.MatMul(x, g.emit.weight(torch.from_numpy(weights(64, 64, seed=i)), f"{i}.up")) for i in range(3)]
    model = g.model(*products)
    recipe = Recipe(8, 8, 32, per_channel=True, wider=("1.*",), keep=("2.*",))
    assert quantise.run(model, recipe) == 2
    assert types(model) == ROUNDING | PRODUCT | {"MatMulNBits": 1, "MatMul": 1}


def test_of_int4_the_head_alone_goes_by_channel():
    g = Graph()
    x = g.rows("x", 64)
    up = g.MatMul(x, g.emit.weight(torch.from_numpy(weights(64, 64)), "up"))
    logits = g.MatMul(up, g.emit.weight(torch.from_numpy(weights(64, 96, seed=1)), "head"))
    model = g.model(logits)
    model.graph.outputs[0].name = "logits"
    recipe = Recipe(4, 8, 32, per_channel=True)
    assert [found.k for found in quantise.narrow(model, recipe)] == [64]
    expected = run(model, g.feeds)
    widened = model.clone()
    assert quantise.run(model, recipe) == 2
    assert types(model) == ROUNDING | PRODUCT | {"MatMulNBits": 1}
    assert next(node for node in model.graph if node.op_type == "MatMulNBits").attributes["bits"].value == 4
    (got,) = run(model, g.feeds)
    np.testing.assert_allclose(got, expected[0], atol=0.15 * np.abs(expected[0]).max())
    assert quantise.run(widened, replace(recipe, wider=("head",))) == 2
    assert types(widened) == {"MatMulNBits": 2}
    assert sorted(node.attributes["bits"].value for node in widened.graph) == [4, 8]


# -- folders ----------------------------------------------------------------------------------------------------------
def decoder(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 256}
    kinds = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "max_length": 80}
    return Decoder(TransformerConfig(**(sizes | kinds | changes))).eval()


GPT2 = {"position": "learned", "norm": "layer_norm", "activation": "gelu"}


@pytest.mark.parametrize(("changes", "products"), [({}, 4), ({"tie_embeddings": True}, 4), (GPT2, 4)])
def test_a_decoder_by_channel_says_what_it_costs_and_verifies(changes, products, tmp_path):
    report = export_model(decoder(**changes), tmp_path / "out", dtype="int8", per_channel=True, attention=False)
    told = load_manifest(tmp_path / "out").weights
    assert told == report.manifest.weights
    assert (told.per_channel, told.bits, told.head_bits, told.quantiser) == (True, 8, 8, "rtn")
    assert told.agreement >= 0.9
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    assert (found["MatMulIntegerToFloat"], found["MatMulNBits"], found["MatMul"]) == (2 * products + 1, 0, 0)
    assert not (tmp_path / "out" / "prompt.onnx").exists()  # these products read prompts as fast as those of float32
    with tfinfer.load(tmp_path / "out") as model:
        again = verify_folder(model.decoder, tmp_path / "out")
        assert again.passed
        assert again.dtype == "int8"
        assert len(model.generate([1, 2, 3], max_tokens=20, stop_ids=[]).token_ids) == 20
    said = " ".join(CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")]).output.split())
    assert "int8 by channel, embedding in blocks of 128; " in said


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
def test_int4_with_its_head_by_channel_verifies_and_reads_prompts_by_its_own_graph(changes, tmp_path):
    given = {"dtype": "int4", "block_size": 32, "attention": False}
    export_model(decoder(**changes), tmp_path / "blocks", **given)
    made = export_model(decoder(**changes), tmp_path / "out", per_channel=True, **given).manifest.weights
    assert (made.per_channel, made.bits, made.head_bits, made.quantiser) == (True, 4, 8, "gptq")
    blocks, out = (onnx.load(tmp_path / name / "decoder.onnx").graph for name in ("blocks", "out"))
    found = Counter(node.op_type for node in out.node)
    assert (found["MatMulNBits"], found["MatMulIntegerToFloat"], found["MatMul"]) == (8, 1, 0)
    before, after = ({t.name: t.raw_data for t in graph.initializer if ".int4." in t.name} for graph in (blocks, out))
    assert len(after) == 16
    assert before == after  # data and scales, to the byte: the matrices of 4 bits are rounded for their inputs as ever
    assert (tmp_path / "out" / "prompt.onnx").exists()
    with tfinfer.load(tmp_path / "out") as model:
        assert verify_folder(model.decoder, tmp_path / "out").passed
        assert len(model.generate(list(range(1, 40)), max_tokens=20, stop_ids=[]).token_ids) == 20
    said = " ".join(CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")]).output.split())
    assert "int4 in blocks of 32, head int8 by channel, embedding int8, " in said


def test_two_texts_at_once_give_what_each_gives_alone(tmp_path):
    export_model(decoder(), tmp_path / "out", dtype="int8", per_channel=True, attention=False)
    prompts = [[1, 2, 3], [7, 6, 5, 4, 3, 2, 9]]
    with tfinfer.load(tmp_path / "out") as model:
        alone = [model.generate(prompt, max_tokens=24, stop_ids=[]).token_ids for prompt in prompts]
        together = model.generate(prompts, max_tokens=24, stop_ids=[])
    assert [found.token_ids for found in together] == alone


def test_rounding_for_inputs_goes_by_channel_too(tmp_path):
    for quantiser in ("rtn", "gptq"):
        given = {"dtype": "int8", "per_channel": True, "quantiser": quantiser, "attention": False}
        made = export_model(decoder(), tmp_path / quantiser, **given).manifest.weights
        assert (made.quantiser, made.per_channel) == (quantiser, True)
    rtn, gptq = (tmp_path / name / "weights.bin" for name in ("rtn", "gptq"))
    assert rtn.stat().st_size == gptq.stat().st_size
    assert rtn.read_bytes() != gptq.read_bytes()


def test_an_agreement_is_held_by_blocks_before_float32(tmp_path):
    given = {"dtype": "int8", "per_channel": True, "attention": False}
    plain = export_model(decoder(), tmp_path / "plain", **given).manifest.weights
    assert plain.agreement < 0.995
    held = export_model(decoder(), tmp_path / "held", keep_agreement=plain.agreement + 0.004, **given).manifest.weights
    assert held.agreement > plain.agreement
    assert held.wider > 0
    assert held.kept == 0
    said = " ".join(CliRunner().invoke(cli, ["inspect", str(tmp_path / "held")]).output.split())
    assert f", {held.wider} of them in int8 by blocks, 0 in float32" in said
    with tfinfer.load(tmp_path / "held") as model:
        assert verify_folder(model.decoder, tmp_path / "held").passed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int4", "head_bits": 4}, "leave out either per_channel or head_bits"),
        ({"dtype": "fp32"}, "give the dtype int8 or int4, not fp32"),
        ({"dtype": "int8", "symmetric": False}, "leave out either per_channel or asymmetric"),
        ({"dtype": "int8", "activations": "fp16"}, "leave out either per_channel or the fp16 activations"),
    ],
)
def test_what_does_not_go_by_channel_is_refused(options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        export_model(decoder(), tmp_path / "out", per_channel=True, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_asks_for_it(asked_by_command):
    assert asked_by_command("--dtype", "int8")["per_channel"] is False
    assert asked_by_command("--dtype", "int8", "--per-channel")["per_channel"] is True
