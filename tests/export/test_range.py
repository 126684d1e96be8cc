"""Values that float16 does not hold stay float32: found by running the float32 graph, told by report and manifest.

onnxruntime computes most of a float16 graph in float32 on a CPU, and leaves out a Cast and the one back behind it, so
that nothing overflows there: ONNX's own evaluator computes every node in its width.
"""

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import handwritten  # noqa: E402
import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export import export_model, narrow  # noqa: E402
from tfinfer.export.calibration import Magnitudes  # noqa: E402
from tfinfer.export.calibration.magnitudes import _largest  # noqa: E402
from tfinfer.export.capture.emitter import Emitter  # noqa: E402
from tfinfer.export.passes import half  # noqa: E402
from tfinfer.manifest import load_manifest  # noqa: E402

PROMPT = [1, 2, 3, 4, 5]


def overflowing(size=3e5):
    """A decoder whose first feed-forward block is `size` times as large inside, and its result what it was."""
    torch.manual_seed(0)
    module = handwritten.Learned().eval()
    with torch.no_grad():
        module.ffn[0][0].weight *= size
        module.ffn[0][0].bias *= size
        module.ffn[0][2].weight /= size
    return module


def exported(folder):
    """With ONNX's own operators, for its evaluator."""
    return export_model(overflowing(), folder / "out", dtype="fp16", flavor="standard", max_length=48)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("range"))


def evaluated(report):
    """The logits of a prompt, every node in the width that the graph gives it."""
    fed = {
        "input_ids": np.array([PROMPT]),
        "attention_mask": np.ones((1, len(PROMPT)), np.int64),
        "position_ids": np.arange(len(PROMPT))[None],
        "logits_to_keep": np.array([len(PROMPT)]),
    }
    for entry in report.manifest.cache:
        fed[entry.past] = np.zeros((1, entry.num_kv_heads, 16, entry.head_dim), np.float16)
    evaluator = ReferenceEvaluator(onnx.load(report.folder / "decoder.onnx"))
    with np.errstate(all="ignore"):
        return evaluator.run(["logits"], {name: fed[name] for name in evaluator.input_names if name in fed})[0][0]


def expected():
    return overflowing()(torch.tensor([PROMPT]))[0].detach().numpy()


def test_a_block_that_overflows_is_right(report):
    np.testing.assert_allclose(evaluated(report), expected(), atol=0.02)


def test_without_the_scan_it_is_nonsense_which_a_cpu_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(narrow, "magnitudes", lambda *given: Magnitudes(0, "nothing"))
    report = exported(tmp_path)
    assert report.manifest.proof.device == "cpu"
    assert not np.isfinite(evaluated(report)).all()


def test_the_rest_stays_narrow(report):
    """The product behind the block narrows again, and so do its neighbours' weights."""
    graph = ir.load(report.folder / "decoder.onnx").graph
    wide = {
        str(v.name) for v in graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.const_value.size > 99
    }
    assert wide == {"ffn.0.0.weight", "ffn.0.2.weight"}


def test_report_and_manifest_tell(report):
    found = report.manifest.range
    assert load_manifest(report.folder).range == found
    assert 65504 < found.largest < 1e7
    assert found.limit == 65504 / 4
    assert 2 <= found.kept <= 6
    assert (found.tokens, found.origin) == (2 * 4 * 48, "its own text and random ids")
    (line,) = [note for note in report.notes if "float32" in note and "operators" in note]
    assert line.startswith(f"{found.kept} operators stay float32: values of up to ")


@pytest.mark.parametrize("dtype, scanned", [("fp16", True), ("bf16", False)])
def test_what_fits_stays_as_it_was(dtype, scanned, tmp_path):
    report = export_model(handwritten.Learned(), tmp_path / "out", dtype=dtype, max_length=48)
    found = report.manifest.range
    assert (found is not None) is scanned
    if scanned:
        assert found.kept == 0
        assert 0 < found.largest < found.limit
    assert not [note for note in report.notes if "operators stay float32" in note]


def test_a_cache_that_overflows_is_refused_and_says_what_to_do(tmp_path):
    torch.manual_seed(0)
    module = handwritten.Rotary().eval()
    with torch.no_grad():
        module.v[0].weight *= 1e6
        module.out[0].weight /= 1e6
    with pytest.raises(InputError, match=r"fp16 holds numbers up to 65,504, and attention .* meets .*--dtype bf16"):
        export_model(module, tmp_path / "out", dtype="fp16", max_length=48)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hidden", [-1e4, -1e9, float(np.finfo(np.float32).min)])
def test_hidden_scores_are_no_values(hidden):
    scores = np.array([3.0, -7.0, hidden, hidden + 5, -np.inf, np.nan], np.float32)
    assert _largest(scores, np.array([hidden])) == 7
    assert _largest(np.array([hidden, 2 * -hidden, 8.0]) if hidden > -1e38 else scores, np.array([hidden])) > 6


def test_a_size_is_that_of_either_sign_and_nothing_has_none():
    assert _largest(np.array([-9.0, 1.0], np.float32), np.array([])) == 9
    assert _largest(np.zeros((1, 0, 4), np.float32), np.array([])) == 0


def test_the_largest_of_all_runs_counts_and_ids_do_not(tmp_path, monkeypatch):
    export_model(handwritten.Learned(), tmp_path / "out", attention=False, max_length=48)
    pieces = []

    def watch(manifest, folder, names, given, take):
        pieces.extend(given)
        for array in (np.float32([1, -2]), np.float32([7, -9]), np.float32([3])):
            take("a", array)
        take("ids", np.array([10**9]))

    magnitudes = sys.modules["tfinfer.export.calibration.magnitudes"]  # the package has a function of this name
    monkeypatch.setattr(magnitudes, "watch", watch)
    graph = ir.load(tmp_path / "out" / "decoder.onnx").graph
    found = magnitudes.magnitudes(load_manifest(tmp_path / "out"), tmp_path / "out", graph)
    assert found.largest == {"a": 9}
    assert sum(piece.size for piece in pieces) == found.tokens == 2 * magnitudes.ROWS * 48


def test_who_makes_and_who_reads_a_large_value_stays_float32_and_nobody_else():
    emit, rng = Emitter(), np.random.default_rng(0)

    def matrix(name, size):
        return emit.weight(torch.from_numpy(rng.normal(size=(16, 16)).astype(np.float32) * size), name)

    x = emit.input("x", ir.DataType.FLOAT, (2, 16))
    up = emit.op("MatMul", x, matrix("up", 1e5))
    relu = emit.op("Relu", up)
    down = emit.op("MatMul", relu, matrix("down", 1e-5))
    emit.output(emit.op("MatMul", down, matrix("head", 1.0)), "logits", ir.DataType.FLOAT, (2, 16))
    model = emit.model("test", 21)

    def computed(fed):
        proto = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"x": fed})[0]

    fed = rng.normal(size=(2, 16)).astype(np.float32)
    expected = computed(fed)
    converted = half.convert(model, ir.DataType.FLOAT16, {str(up.name), str(relu.name)})
    assert (converted.narrow, converted.kept) == (1, 3)
    assert {name for name, v in model.graph.initializers.items() if v.dtype is ir.DataType.FLOAT} == {"up", "down"}
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(computed(fed.astype(np.float16)), expected, atol=0.05 * np.abs(expected).max())
