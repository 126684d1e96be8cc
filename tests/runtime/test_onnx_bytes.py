"""Graphs written byte by byte are what onnxruntime reads: sizes, names, and numbers of either sign and any length."""

import numpy as np
import pytest

from tfinfer.session import onnx_bytes as onnx
from tfinfer.session.providers import open_session
from tfinfer.session.threads import Threads


@pytest.mark.parametrize("axis", [-2, -1, 0, 1])
def test_numbers_of_nodes_and_of_constants_have_a_sign(axis):
    numbers = [-1, 0, 127, 128, 300, -(2**40)]
    graph = onnx.model(
        [onnx.node("Concat", ["given", "held"], ["both"], axis=axis)],
        [onnx.value("given", onnx.INT64, [2, 3])],
        [onnx.value("both", onnx.INT64, ["rows", "columns"])],
        [onnx.constant("held", [2, 3], numbers)],
    )
    session = open_session(graph, device="cpu", threads=Threads(1, "1: a test")).session
    given, held = np.arange(6).reshape(2, 3), np.array(numbers).reshape(2, 3)
    (both,) = session.run(["both"], {"given": given})
    np.testing.assert_array_equal(both, np.concatenate([given, held], axis))


@pytest.mark.parametrize(
    "value, told", [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), (1 << 40, "808080808020")]
)
def test_integers_are_written_as_protobuf_has_them(value, told):
    assert onnx.field(1, value).hex() == f"08{told}"
    assert onnx.field(16, b"ab").hex() == "8201026162"
