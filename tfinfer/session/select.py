"""The few largest logits of each row, found where they lie, so that a vocabulary of them is not copied for one id.

On a CPU this does not pay: there is nothing to copy, and numpy finds the best of 150,000 in less than a run takes.
Knows nothing of tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.session import onnx_bytes as onnx
from tfinfer.session.failures import run_bound
from tfinfer.session.memory import ELEMENT_TYPES, Buffer
from tfinfer.session.providers import open_session
from tfinfer.session.threads import Threads

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

WORTH = 4096  # logits of a row below which all of them are copied
MOST = 248  # that are asked for at once
SPARE = 8  # more than asked for, to see where equal ones end
PARTS = 128  # a row is searched in up to so many parts, since older kernels give a whole one to one block of threads


class Selecting:
    """A session that finds the largest of rows of `num_logits` numbers on a device."""

    def __init__(self, num_logits: int, dtype: str, device: str, threads: Threads) -> None:
        """Raises ProviderError and IncompatibleModelError where the device does not take it."""
        graph = selection_graph(num_logits, ELEMENT_TYPES[dtype])
        self.device, self.num_logits = device, num_logits
        self.session: Any = open_session(graph, device=device, threads=threads).session

    def takes(self, count: int) -> bool:
        """Whether so many may be asked for."""
        return 1 <= count <= min(MOST, self.num_logits - SPARE)

    def bind(self, logits: Buffer, count: int) -> Selection:
        """The `count` largest of every row of a buffer (rows, 1, num_logits), whatever it holds when it runs."""
        return Selection(self, logits, count)


class Selection:
    """One buffer and one count, bound once."""

    def __init__(self, selecting: Selecting, logits: Buffer, count: int) -> None:
        rows, self.count, self.selecting = logits.shape[0], count, selecting
        asked = np.array([count + SPARE], np.int64)
        self.values = np.empty((rows, count + SPARE), np.float32)
        self.ids = np.empty((rows, count + SPARE), np.int64)
        self.sums = np.empty((rows, 1), np.float32)
        self._held = (logits, asked)  # what is bound lives as long as this
        self.binding = selecting.session.io_binding()
        kind = ELEMENT_TYPES[logits.dtype]
        self.binding.bind_input("logits", selecting.device, 0, kind, logits.shape, logits.pointer)
        self.binding.bind_cpu_input("count", asked)
        for name, array in (("values", self.values), ("ids", self.ids), ("sums", self.sums)):
            self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> tuple[Logits, Ids] | None:
        """(rows, count): the largest logits, falling, the lowest id first among equals, and their ids.

        None where that cannot be told from so few: a row with NaN in it, or equal ones that may go on behind the last.
        """
        run_bound(self.selecting.session, self.binding, "the best logits", self.selecting.device)
        if np.isnan(self.sums).any() or (self.values[:, self.count - 1] == self.values[:, -1]).any():
            return None
        order = np.lexsort((self.ids, -self.values), axis=-1)[:, : self.count]
        values = np.take_along_axis(self.values, order, axis=1)
        return values, np.take_along_axis(self.ids, order, axis=1)


def selection_graph(num_logits: int, element_type: int) -> bytes:
    """logits (rows, 1, num_logits) and count (1,) to values and ids (rows, count), and the sum of each row.

    The largest of each part, then the largest of these. A sum is NaN where any logit is.
    """
    parts = _parts(num_logits)
    width = num_logits // parts
    nodes = [
        onnx.node("Cast", ["logits"], ["wide"], to=ELEMENT_TYPES["float32"]),
        onnx.node("ReduceSum", ["wide", "last"], ["row_sums"]),
        onnx.node("Reshape", ["row_sums", "by_sum"], ["sums"]),
        onnx.node("Reshape", ["wide", "by_part"], ["cut"]),
        onnx.node("TopK", ["cut", "count"], ["part_values", "part_places"]),
        onnx.node("Add", ["part_places", "starts"], ["part_ids"]),
        onnx.node("Reshape", ["part_values", "by_row"], ["row_values"]),
        onnx.node("Reshape", ["part_ids", "by_row"], ["row_ids"]),
        onnx.node("TopK", ["row_values", "count"], ["values", "places"]),
        onnx.node("GatherElements", ["row_ids", "places"], ["ids"], axis=1),
    ]
    constants = [
        onnx.constant("last", [1], [2]),
        onnx.constant("by_sum", [2], [-1, 1]),
        onnx.constant("by_part", [3], [-1, parts, width]),
        onnx.constant("by_row", [2], [0, -1]),
        onnx.constant("starts", [1, parts, 1], [part * width for part in range(parts)]),
    ]
    inputs = [onnx.value("logits", element_type, ["rows", 1, num_logits]), onnx.value("count", onnx.INT64, [1])]
    floats = ELEMENT_TYPES["float32"]
    outputs = [
        onnx.value("values", floats, ["rows", "count"]),
        onnx.value("ids", onnx.INT64, ["rows", "count"]),
        onnx.value("sums", floats, ["rows", 1]),
    ]
    return onnx.model(nodes, inputs, outputs, constants)


def _parts(num_logits: int) -> int:
    """The most equal parts of a row that are each wide enough to hold all that may be asked for."""
    most = min(PARTS, num_logits // (MOST + SPARE))
    return next((parts for parts in range(most, 1, -1) if num_logits % parts == 0), 1)
