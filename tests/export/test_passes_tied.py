"""A head tied to the embedding reads it transposed, by an operator of the flavor, and the file has it once."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

import onnxruntime as ort  # noqa: E402

from tfinfer.export import export_model  # noqa: E402
from tfinfer.export.capture.emitter import CONTRIB, DECODER, Emitter  # noqa: E402
from tfinfer.export.modules import Decoder, TransformerConfig  # noqa: E402
from tfinfer.export.passes import dead_nodes, half, tied_head  # noqa: E402

VOCAB, WIDTH = 30, 16


def graph(*, tied=True, looked_up=True, contrib=True):
    """ids -> their vectors -> logits over the vocabulary."""
    emit = Emitter(DECODER)
    matrix = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))
    held = matrix if tied else matrix.clone()
    ids = emit.given("input_ids")
    x = emit.op("Gather", emit.weight(matrix, "embedding"), ids, axis=0)
    if not looked_up:  # a product with it instead
        counts = emit.cast(emit.op("Unsqueeze", ids, emit.constant([2])), torch.float32)
        wide = emit.op("MatMul", counts, emit.weight(torch.ones(1, VOCAB), "ones"))
        x = emit.op("MatMul", wide, emit.weight(matrix, "embedding"))
    if contrib:
        x = emit.op("QuickGelu", x, domain=CONTRIB)
    logits = emit.op("MatMul", x, emit.weight(held.T, "head"))
    emit.output(logits, "logits", ir.DataType.FLOAT, ("batch", "seq", VOCAB))
    return emit.model("test", 21)


def results(model):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"input_ids": np.array([[1, 5, 0], [29, 2, 2]])})[0]


@pytest.mark.parametrize(("contrib", "operator"), [(True, "FusedMatMul"), (False, "Transpose")])
def test_a_tied_head_reads_the_embedding(contrib, operator):
    model = graph(contrib=contrib)
    before = results(model)
    assert tied_head.run(model) == 1
    dead_nodes.run(model)
    np.testing.assert_allclose(results(model), before, rtol=1e-5, atol=1e-6)
    assert operator in {node.op_type for node in model.graph}
    assert [name for name, value in model.graph.initializers.items() if value.dtype is ir.DataType.FLOAT] == [
        "embedding"
    ]
    assert tied_head.run(model) == 0
    half.run(model, ir.DataType.FLOAT16)
    assert model.graph.outputs[0].dtype is ir.DataType.FLOAT
    assert {v.dtype for v in model.graph.initializers.values()} <= {ir.DataType.FLOAT16, ir.DataType.INT64}


@pytest.mark.parametrize("options", [{"tied": False}, {"looked_up": False}])
def test_other_matrices_stay(options):
    model = graph(**options)
    dead_nodes.run(model)
    before = [node.op_type for node in model.graph]
    assert tied_head.run(model) == 0
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_the_file_of_a_tied_decoder_has_its_embedding_once(flavor, tmp_path):
    sizes = []
    for tied in (True, False):
        torch.manual_seed(0)
        config = TransformerConfig(
            vocab_size=400, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, max_length=32,
            tie_embeddings=tied,
        )  # fmt: skip
        out = tmp_path / str(tied)
        report = export_model(Decoder(config).eval(), out, max_length=32, attention=False, flavor=flavor)
        sizes.append(report.manifest.files["weights.bin"].bytes)
        domains = {node.domain for node in ir.load(out / "decoder.onnx").graph}
        assert (CONTRIB in domains) == (flavor == "ort")
    assert 400 * 32 * 4 <= sizes[1] - sizes[0] < 400 * 32 * 4 + 8192
