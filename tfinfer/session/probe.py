"""Finds out whether a device really computes, by one addition.

Knows nothing of model folders. The graph is written here byte by byte, since the runtime has no `onnx` package.
"""

import numpy as np

from tfinfer.errors import TfinferError
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
    node = _field(1, b"x") + _field(1, b"x") + _field(2, b"y") + _field(4, b"Add")
    graph = _field(1, node) + _field(2, b"probe") + _field(11, _one_float(b"x")) + _field(12, _one_float(b"y"))
    ir_version, version = 8, _field(1, b"") + _field(2, opset)
    return _field(1, ir_version) + _field(7, graph) + _field(8, version)


def _one_float(name: bytes) -> bytes:
    dimension = _field(1, 1)
    shape = _field(1, dimension)
    tensor = _field(1, _FLOAT) + _field(2, shape)
    return _field(1, name) + _field(2, _field(1, tensor))


def _field(number: int, value: bytes | int) -> bytes:
    """A protobuf field: an integer, or bytes with their length in front."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the top bit set on all but the last."""
    low = b""
    while value > 0x7F:
        low += bytes([value & 0x7F | 0x80])
        value >>= 7
    return low + bytes([value])
