"""Finds out whether a device really computes, by one addition.

Knows nothing of model folders.
"""

import numpy as np

from tfinfer.errors import TfinferError
from tfinfer.session.onnx_bytes import field
from tfinfer.session.providers import open_session
from tfinfer.session.threads import Threads

_FLOAT = 1


def probe(device: str) -> str | None:
    """Add two numbers on `device`; None when the sum is right, else one line that says why not."""
    try:
        session = open_session(addition_graph(), device=device, threads=Threads(1, "1: a probe")).session
        (total,) = session.run(None, {"x": np.array([1.5], np.float32)})
    except TfinferError as refusal:
        return str(refusal)
    except Exception as failure:  # onnxruntime's classes have no common root
        return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    return None if total.tolist() == [3.0] else f"{device}: 1.5 + 1.5 came out as {total.tolist()}"


def addition_graph(opset: int = 17) -> bytes:
    """An ONNX model with one node, y = x + x, for one float; the numbers are those of onnx.proto."""
    node = field(1, b"x") + field(1, b"x") + field(2, b"y") + field(4, b"Add")
    graph = field(1, node) + field(2, b"probe") + field(11, _one_float(b"x")) + field(12, _one_float(b"y"))
    ir_version, version = 8, field(1, b"") + field(2, opset)
    return field(1, ir_version) + field(7, graph) + field(8, version)


def _one_float(name: bytes) -> bytes:
    dimension = field(1, 1)
    shape = field(1, dimension)
    tensor = field(1, _FLOAT) + field(2, shape)
    return field(1, name) + field(2, field(1, tensor))
