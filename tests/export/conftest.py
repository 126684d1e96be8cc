"""Fixtures of the exporter's tests: torch on one thread, the zoo importable, torch's own warnings aside."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "zoo"))


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
