"""Weights of a few bits with half-width activations, as CUDA wants them: quantised first, narrowed then."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

import handwritten  # noqa: E402
import onnx_ir as ir  # noqa: E402
from click.testing import CliRunner  # noqa: E402

import tfinfer  # noqa: E402
from tfinfer.cli.main import tfinfer as cli  # noqa: E402
from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export import export_model  # noqa: E402

HALF = ir.DataType.FLOAT16


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("activations") / "out"
    return export_model(handwritten.Rotary(), out, dtype="int4", activations="fp16", max_length=48)


def test_products_read_small_weights_and_half_width_activations(report):
    graph = ir.load(report.folder / "decoder.onnx").graph
    small = [node for node in graph if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    assert len(small) == report.manifest.weights.matrices
    for node in small:
        data, scales = [value for value in node.inputs if value is not None and value.const_value is not None][:2]
        assert (data.dtype, scales.dtype) == (ir.DataType.UINT8, HALF)
    assert {value.dtype for value in graph.inputs if value.name.startswith("past")} == {HALF}
    assert {entry.dtype for entry in report.manifest.cache} == {"float16"}
    assert report.manifest.dtype == "float16"


def test_it_is_proved_as_it_is_and_generates(report):
    whole, small, narrow = report.verdicts
    assert (whole.dtype, small.dtype, narrow.dtype) == ("float32", "int4", "int4")
    assert report.manifest.weights.agreement == round(narrow.agreement, 4)
    assert report.manifest.range.kept == 0
    with tfinfer.load(report.folder, threads=1) as model:
        assert len(model.generate([1, 2, 3], max_tokens=8, stop_ids=[]).token_ids) == 8


@pytest.mark.parametrize(
    "given, said",
    [
        ({"dtype": "fp32", "activations": "fp16"}, "give the dtype int8 or int4 with fp16 activations"),
        ({"dtype": "bf16", "activations": "fp16"}, "not bf16"),
        ({"dtype": "int4", "activations": "int8"}, "unknown activations 'int8': expected one of fp32, fp16, bf16"),
    ],
)
def test_what_does_not_go_together_is_told(given, said, tmp_path):
    with pytest.raises(InputError, match=said):
        export_model(handwritten.Rotary(), tmp_path / "out", **given)


def test_the_command_tells_too(tmp_path):
    source = "tests/zoo/python_writer.py:build"
    files = ["--weights", "tests/zoo/python_writer/model.safetensors", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, ["export", source, *files, "--activations", "fp16"], prog_name="tfinfer")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: activations are for weights of a few bits")
    assert not (tmp_path / "out").exists()
