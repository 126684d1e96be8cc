"""What the encoder made of every slot's source: written once for each slot, then read by all of its steps.

All rows are laid out for one number of source positions, so that neighbouring rows are one block that a step can bind.
What lies behind a shorter source is zeros. Knows nothing of graphs and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tfinfer.errors import InputError
from tfinfer.manifest import CrossSpec
from tfinfer.session.fixed import FixedRows
from tfinfer.session.memory import Buffer, CudaMemory, HostMemory

# Beside what the encoder makes, which source positions of a row there are.
_MASK = CrossSpec("", "int64", ("batch", "source"))


class Sources:
    """The sources of `slots` rows, of up to `capacity` positions.

    marks: (slots,) int64, different for every source that was placed, the same in copies of it; 0 where there is none.
    """

    def __init__(self, specs: Sequence[CrossSpec], memory: HostMemory | CudaMemory, slots: int, capacity: int) -> None:
        if capacity < 1:
            raise InputError(f"expected room for at least one source position, got {capacity}")
        self.specs, self.memory, self.slots, self.capacity = (_MASK, *specs), memory, slots, capacity
        self.rows = self._allocate(capacity)
        self.marks = np.zeros(slots, np.int64)
        self._placed = 0

    def _allocate(self, capacity: int) -> FixedRows:
        shapes = [sized(spec, capacity)[1:] for spec in self.specs]
        return FixedRows(self.memory, self.slots, shapes, [spec.dtype for spec in self.specs])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.rows.nbytes

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """The shape of so many rows in every buffer, that of the mask, (rows, capacity), first."""
        return [(rows, *sized(spec, self.capacity)[1:]) for spec in self.specs]

    def lay_out(self, capacity: int) -> bool:
        """Have room for exactly `capacity` source positions; returns whether pointers changed.

        Sources that are there already stay; raises InputError where they might not fit.
        """
        if capacity == self.capacity:
            return False
        if capacity < self.capacity and self.marks.any():
            raise InputError(f"sources of up to {self.capacity} positions are in use: there is no room in {capacity}")
        old, new = self.rows, self._allocate(capacity)
        if self.marks.any():
            for spec, target, source in zip(self.specs, new.buffers, old.buffers):
                before, width = blocks(spec, self.capacity, source.nbytes // self.slots)
                pitch = stretched(spec, width, self.capacity, capacity)
                self.memory.copy_2d(target.pointer, pitch, source.pointer, width, width, self.slots * before)
        self.rows, self.capacity = new, capacity
        return True

    def place(self, row: int, made: Sequence[Buffer], length: int) -> None:
        """Copy into a row what the encoder made of one source of `length` positions; made: (1, ...) for each spec."""
        assert 0 < length <= self.capacity
        self.rows.zero(row)
        there = np.ones(length, np.int64)
        pointers = [there.ctypes.data, *(buffer.pointer for buffer in made)]
        sizes = [there.nbytes, *(buffer.nbytes for buffer in made)]
        for spec, target, pointer, size in zip(self.specs, self.rows.pointers(row), pointers, sizes, strict=True):
            before, width = blocks(spec, length, size)
            self.memory.copy_2d(target, stretched(spec, width, length, self.capacity), pointer, width, width, before)
        self._placed += 1
        self.marks[row] = self._placed

    def forget(self, row: int) -> None:
        """The row has no source any more."""
        self.marks[row] = 0

    def copy(self, source: int, target: int) -> int:
        """Let row `target` have the source of row `source`; returns how many bytes were copied: none if it has it."""
        if self.marks[source] == self.marks[target]:
            return 0
        self.marks[target] = self.marks[source]
        return self.rows.copy(source, target)

    def swap(self, one: int, other: int) -> int:
        """Exchange the sources of two rows; returns how many bytes were copied."""
        if self.marks[one] == self.marks[other]:
            return 0
        self.marks[[one, other]] = self.marks[[other, one]]
        return self.rows.swap(one, other)


def sized(spec: CrossSpec, length: int) -> tuple[int, ...]:
    """The shape of one row, (1, ...), with `length` source positions."""
    known = {"batch": 1, "source": length}
    return tuple(known[size] if isinstance(size, str) else size for size in spec.shape)


def blocks(spec: CrossSpec, length: int, nbytes: int) -> tuple[int, int]:
    """Of one row of `nbytes`: how many blocks there are of all source positions, and the bytes of each."""
    if "source" not in spec.shape:
        return 1, nbytes
    before = math.prod(sized(spec, length)[: spec.shape.index("source")])
    return before, nbytes // before


def stretched(spec: CrossSpec, width: int, length: int, capacity: int) -> int:
    """The bytes of a block of `width`, which holds `length` source positions, where it has room for `capacity`."""
    return width // length * capacity if "source" in spec.shape else width
