"""Fixtures of the exporter's tests: torch on one thread, the zoo importable, torch's own warnings aside."""

import sys
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner

from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "zoo"))

# onnxruntime keeps this operator in the domain of ONNX, whose checker does not know it.
T = onnx.defs.OpSchema.FormalParameter
onnx.defs.register_schema(
    onnx.defs.OpSchema(
        "SimplifiedLayerNormalization", "", 1,
        inputs=[T("X", "T"), T("scale", "T")], outputs=[T("Y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            onnx.defs.OpSchema.Attribute("axis", onnx.defs.OpSchema.AttrType.INT, "", required=False),
            onnx.defs.OpSchema.Attribute("epsilon", onnx.defs.OpSchema.AttrType.FLOAT, "", required=False),
        ],
    )
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """A second thread only spins beside modules this small."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """torch.export and its tree functions warn about themselves; what warns in our own code is still an error."""
    for item in items:
        for category in ("FutureWarning", "DeprecationWarning", "UserWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}:(torch|copyreg|onnx_ir)"))


@pytest.fixture
def asked_by_command(tmp_path, monkeypatch):
    """What `tfinfer export` with some flags asks `export_model` for, which is not run."""
    asked = {}

    def export(module, out, **options):
        asked.update(options)
        raise InputError("enough")

    def ask(*flags):
        asked.clear()
        done = CliRunner().invoke(
            cli, ["export", "tests/zoo/python_writer.py:build", "-o", str(tmp_path / "out"), *flags]
        )
        assert done.exit_code == 2, done.output
        return dict(asked)

    monkeypatch.setattr("tfinfer.export.export_model", export)
    return ask
