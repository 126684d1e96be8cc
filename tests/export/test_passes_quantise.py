"""Weights of 8 and 4 bits: the numbers that onnxruntime reads, what becomes small, and what that costs."""

from collections import Counter

import numpy as np
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
from tfinfer.export.passes import quantise
from tfinfer.export.passes.blocks import quantised
from tfinfer.export.passes.quantise import Recipe
from tfinfer.proof.prove import verify_folder


def heavy_tailed(k, n):
    return (np.random.default_rng(3).standard_t(4, (k, n)) * 0.05).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_product_with_small_weights_is_one_with_the_numbers_that_they_stand_for(bits, block_size, symmetric):
    """K is no multiple of the blocks, and the number of blocks is odd."""
    matrix = heavy_tailed(36 if block_size == 32 else 96, 34)
    blocks = quantised(matrix, bits, block_size, symmetric=symmetric)
    g = Graph()
    x = g.rows("x", len(matrix))
    operands = [blocks.data, blocks.scales, *([] if blocks.zeros is None else [blocks.zeros])]
    shape = {"K": blocks.k, "N": matrix.shape[1], "bits": bits, "block_size": block_size}
    y = g.emit.op("MatMulNBits", x, *(g.emit.constant(o) for o in operands), domain="com.microsoft", **shape)
    (got,) = run(g.model(y), g.feeds)
    np.testing.assert_allclose(got, g.feeds["x"] @ blocks.dense(), atol=1e-4)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.012), (4, 0.17)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_blocks_stand_for_is_near_the_matrix_and_a_search_comes_nearer(bits, most, symmetric):
    matrix = heavy_tailed(256, 40)

    def error(search):
        away = quantised(matrix, bits, 64, symmetric=symmetric, search=search).dense() - matrix
        return float(np.linalg.norm(away) / np.linalg.norm(matrix))

    assert error(search=True) < most
    assert error(search=True) < error(search=False) if bits == 4 else error(search=True) <= error(search=False)


def test_blocks_of_zeros_stay_zeros():
    assert not quantised(np.zeros((64, 8), np.float32), 4, 32).dense().any()
    assert not quantised(np.zeros((64, 8), np.float32), 8, 32, symmetric=False).dense().any()


def test_names_that_are_kept_narrow_matrices_and_computed_ones_stay():
    g = Graph()
    x = g.rows("x", 64)
    kept = g.emit.weight(torch.from_numpy(weights(64, 64)), "layers.0.gate")
    small = g.emit.weight(torch.from_numpy(weights(64, 64, seed=1)), "layers.0.up")
    narrow = g.emit.weight(torch.from_numpy(weights(64, 8, seed=2)), "router")
    parts = [g.MatMul(x, kept), g.MatMul(x, small), g.MatMul(x, narrow), g.MatMul(x, g.Transpose(x, perm=[0, 2, 1]))]
    model = g.model(*parts)
    assert quantise.run(model, Recipe(4, 8, 32, keep=("*.gate",))) == 1
    assert Counter(node.op_type for node in model.graph) == {"MatMul": 3, "MatMulNBits": 1, "Transpose": 1}
    assert "layers.0.up" not in model.graph.initializers


@pytest.mark.parametrize("width", [64, 96, 45])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("wider", [(), ("embedding",)])
def test_rows_of_a_small_embedding_are_those_that_its_numbers_stand_for(width, symmetric, wider):
    """Blocks of an odd number, and rows of an odd number, two of which would share a byte."""
    table, bits = heavy_tailed(50, width), 8 if wider else 4
    g = Graph()
    ids = g.emit.input("input_ids", ir.DataType.INT64, ["batch", "seq"])
    g.feeds["input_ids"] = np.array([[0, 7, 49], [3, 3, 1]])
    model = g.model(g.Gather(g.emit.weight(torch.from_numpy(table), "embedding"), ids))
    assert quantise.run(model, Recipe(4, 4, 32, symmetric=symmetric, wider=wider)) == 1
    (gathered,) = (node for node in model.graph if node.op_type == "GatherBlockQuantized")
    assert gathered.attributes["bits"].as_int() == bits
    dense = quantised(table.T, bits, 32, symmetric=symmetric, search=bits < 8).dense().T
    (got,) = run(model, g.feeds)
    np.testing.assert_allclose(got, dense[g.feeds["input_ids"]], atol=1e-6)


def decoder(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 256}
    kinds = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "max_length": 80}
    return Decoder(TransformerConfig(**(sizes | kinds | changes))).eval()


@pytest.mark.parametrize(("dtype", "share", "agreement"), [("int8", 0.33, 0.9), ("int4", 0.27, 0.7)])
def test_a_decoder_with_small_weights_says_what_they_cost_and_verifies(dtype, share, agreement, tmp_path):
    module = decoder()
    export_model(module, tmp_path / "wide")
    report = export_model(module, tmp_path / "small", dtype=dtype)
    sizes = [(tmp_path / name / "weights.bin").stat().st_size for name in ("wide", "small")]
    assert sizes[1] < share * sizes[0]
    told = report.manifest.weights
    assert (told.bits, told.head_bits) == (int(dtype[3:]), 8)
    assert told.agreement >= agreement
    strict, rough = report.verdicts  # proved in float32 before, measured afterwards
    assert (strict.dtype, rough.dtype) == ("float32", dtype)
    with tfinfer.load(tmp_path / "small") as model:
        again = verify_folder(model.decoder, tmp_path / "small")
        assert again.passed
        assert again.dtype == dtype
        assert again.agreement == pytest.approx(told.agreement, abs=0.02)
        assert len(model.generate([1, 2, 3], max_tokens=20, stop_ids=[]).token_ids) == 20
    types = Counter(node.op_type for node in ir.load(tmp_path / "small" / "decoder.onnx").graph)
    assert types["MatMulNBits"] == told.matrices - 1
    assert (types["GatherBlockQuantized"], types["MatMul"]) == (1, 0)


@pytest.mark.parametrize("k, size", [(256, 128), (576, 64), (96, 32), (80, 128)])
def test_rows_are_filled_by_the_largest_blocks_that_can(k, size):
    assert quantise.filling(k, 128) == size
    assert quantise.filling(k, 32) == 32


@pytest.mark.parametrize("hidden", [128, 96])
def test_a_table_that_is_embedding_and_head_is_stored_once_whatever_its_width(hidden, tmp_path):
    module = decoder(vocab_size=3000, hidden_size=hidden, intermediate_size=64, num_layers=1)
    export_model(module, tmp_path / "out", dtype="int8", attention=False)
    of_table = 3000 * hidden * (1 + 4 / quantise.filling(hidden, 128))  # bytes and float32 scales
    assert of_table < (tmp_path / "out" / "weights.bin").stat().st_size < 1.6 * of_table


def test_inspect_tells_how_weights_were_made_small(tmp_path):
    export_model(decoder(), tmp_path / "out", dtype="int4")
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")])
    said = " ".join(told.output.split())
    assert "int4 in blocks of 128, head and embedding int8, gptq on 2560 tokens of its own text; " in said


def test_small_weights_that_are_damaged_fail_their_proof(tmp_path):
    export_model(decoder(), tmp_path / "out", dtype="int4")
    with tfinfer.load(tmp_path / "out") as model:
        states = model.decoder
        good = verify_folder(states, tmp_path / "out")
    path = tmp_path / "out" / "weights.bin"
    broken = bytearray(path.read_bytes())
    broken[: len(broken) // 2] = b"\x5a" * (len(broken) // 2)
    path.write_bytes(bytes(broken))
    from tfinfer.manifest import load_manifest
    from tfinfer.session.decoder import Decoder as Session

    session = Session(load_manifest(tmp_path / "out"), tmp_path / "out")
    try:
        assert good.passed
        assert not verify_folder(session, tmp_path / "out").passed
    finally:
        session.close()


def test_small_weights_need_operators_that_are_not_onnxs_own(tmp_path):
    with pytest.raises(InputError, match="leave the flavor at 'ort'"):
        export_model(decoder(), tmp_path / "out", dtype="int4", flavor="standard")
