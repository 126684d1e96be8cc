"""Buffers of which every slot has one row of a fixed size, copied, exchanged and zeroed whole: states, and sources.

Knows neither what the bytes mean nor which row belongs to which slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tfinfer.session.memory import Buffer, CudaMemory, HostMemory

Bytes = npt.NDArray[np.uint8]


class FixedRows:
    """One buffer of (slots, *shape) for each of `shapes`, zeros at first.

    shapes: of one row. dtypes: of each, by the manifest's names.
    """

    def __init__(
        self, memory: HostMemory | CudaMemory, slots: int, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]
    ) -> None:
        self.memory, self.slots = memory, slots
        self.buffers = [memory.allocate((slots, *shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def pointers(self, row: int) -> list[int]:
        """The address of `row` in every buffer."""
        return [buffer.pointer + row * self._size(buffer) for buffer in self.buffers]

    def zero(self, row: int) -> None:
        for buffer, pointer in zip(self.buffers, self.pointers(row)):
            self.memory.zero(pointer, self._size(buffer))

    def copy(self, source: int, target: int) -> int:
        """Let row `target` be as row `source`; returns how many bytes that was."""
        for buffer in self.buffers:
            size = self._size(buffer)
            self.memory.copy(buffer, target * size, buffer, source * size, size)
        return self.nbytes // self.slots

    def swap(self, one: int, other: int) -> int:
        """Exchange two rows; returns how many bytes were copied."""
        spare = self.taken(one)
        copied = self.copy(other, one)
        self.put(other, spare)
        return 3 * copied

    def taken(self, row: int) -> list[Buffer]:
        """A copy of a row, one buffer of bytes for each buffer."""
        copies = []
        for buffer in self.buffers:
            size = self._size(buffer)
            copies.append(self.memory.allocate((size,), "uint8"))
            self.memory.copy(copies[-1], 0, buffer, row * size, size)
        return copies

    def put(self, row: int, taken: Sequence[Buffer]) -> None:
        """Let a row be again what `taken` gave."""
        for buffer, copy in zip(self.buffers, taken, strict=True):
            self.memory.copy(buffer, row * self._size(buffer), copy, 0, self._size(buffer))

    def read(self, row: int) -> list[Bytes]:
        """The bytes of a row of every buffer, on the host."""
        return [self.memory.read(copy) for copy in self.taken(row)]

    def write(self, row: int, held: Sequence[Bytes]) -> None:
        """Let a row be what `read` gave."""
        arrays = [np.ascontiguousarray(array) for array in held]
        self.put(row, [Buffer(array.ctypes.data, array.shape, "uint8", array.nbytes, array) for array in arrays])

    def _size(self, buffer: Buffer) -> int:
        """Bytes of one row."""
        return buffer.nbytes // self.slots
