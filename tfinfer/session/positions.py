"""Buffers of which every slot has one row of positions: copied in part, shifted, widened, read and written.

This alone knows where a position lies. Knows neither what the bytes mean nor which row belongs to which slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tfinfer.manifest import CacheSpec
from tfinfer.session.fixed import Bytes
from tfinfer.session.memory import Buffer, CudaMemory, HostMemory, Part


class PositionRows:
    """One buffer of (slots, num_kv_heads, capacity, head_dim) for each of `specs`."""

    def __init__(self, specs: Sequence[CacheSpec], memory: HostMemory | CudaMemory, slots: int, capacity: int) -> None:
        self.specs, self.memory, self.slots, self.capacity = specs, memory, slots, capacity
        self.buffers = self._allocate(capacity)

    def _allocate(self, capacity: int) -> list[Buffer]:
        return self.memory.allocate_all([_part(spec, self.slots, capacity) for spec in self.specs])

    def _spare(self, spec: CacheSpec, positions: int) -> Buffer:
        """Room for some positions of one row."""
        return self.memory.allocate(*_part(spec, 1, positions))

    def _each(self) -> Iterator[tuple[CacheSpec, Buffer, int, int]]:
        """Of every entry: what it is, its buffer, the bytes of one head of one row and of one position of a head."""
        for spec, buffer in zip(self.specs, self.buffers):
            head = buffer.nbytes // (self.slots * spec.num_kv_heads)
            yield spec, buffer, head, head // self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def pointers(self, row: int) -> list[int]:
        """The address of `row` in every buffer."""
        return [buffer.pointer + row * (buffer.nbytes // self.slots) for buffer in self.buffers]

    def copy(self, source: int, target: int, start: int, end: int) -> int:
        """Let a row hold what another does at these places of the buffers; returns how many bytes that was."""
        copied = 0
        for spec, buffer, head, position in self._each():
            row = head * spec.num_kv_heads
            first, width = buffer.pointer + start * position, (end - start) * position
            self.memory.copy_2d(first + target * row, head, first + source * row, head, width, spec.num_kv_heads)
            copied += width * spec.num_kv_heads
        return copied

    def swap(self, one: int, other: int, end: int) -> int:
        """Exchange the first `end` places of two rows; returns how many bytes were copied."""
        if not end:
            return 0
        for spec, buffer, head, position in self._each():
            width, row = end * position, head * spec.num_kv_heads
            first, second = buffer.pointer + one * row, buffer.pointer + other * row
            spare = self._spare(spec, end)
            self.memory.copy_2d(spare.pointer, width, first, head, width, spec.num_kv_heads)
            self.memory.copy_2d(first, head, second, head, width, spec.num_kv_heads)
            self.memory.copy_2d(second, head, spare.pointer, width, width, spec.num_kv_heads)
        return 3 * end * (self.nbytes // (self.slots * self.capacity))

    def shift(self, row: int, gone: int, kept: int) -> None:
        """Move the `kept` positions that lie behind the first `gone` of a row to its front."""
        for spec, buffer, head, position in self._each():
            width, first = kept * position, buffer.pointer + row * head * spec.num_kv_heads
            spare = self._spare(spec, kept)  # the two places may overlap
            self.memory.copy_2d(spare.pointer, width, first + gone * position, head, width, spec.num_kv_heads)
            self.memory.copy_2d(first, head, spare.pointer, width, width, spec.num_kv_heads)

    def widen(self, capacity: int) -> None:
        """Move all rows into buffers of `capacity` positions."""
        grown = self._allocate(capacity)
        for (spec, old, width, position), new in zip(self._each(), grown):
            pitch = capacity * position
            self.memory.copy_2d(new.pointer, pitch, old.pointer, width, width, self.slots * spec.num_kv_heads)
        self.buffers, self.capacity = grown, capacity

    def read(self, row: int, end: int) -> list[Bytes]:
        """The first `end` places of a row of every buffer, (num_kv_heads, bytes of them) each, on the host."""
        taken: list[Bytes] = []
        for spec, buffer, head, position in self._each():
            width = end * position
            taken.append(np.empty((spec.num_kv_heads, width), np.uint8))
            first = buffer.pointer + row * head * spec.num_kv_heads
            self.memory.copy_2d(taken[-1].ctypes.data, width, first, head, width, spec.num_kv_heads)
        return taken

    def write(self, row: int, taken: Sequence[Bytes]) -> None:
        """Let the first places of a row be what `read` gave."""
        for (spec, buffer, head, _), array in zip(self._each(), taken, strict=True):
            held: Any = np.ascontiguousarray(array)
            width = held.shape[1]
            assert width <= head, (width, head)
            first = buffer.pointer + row * head * spec.num_kv_heads
            self.memory.copy_2d(first, head, held.ctypes.data, width, width, spec.num_kv_heads)


def _part(spec: CacheSpec, slots: int, capacity: int) -> Part:
    return (slots, spec.num_kv_heads, capacity, spec.head_dim), spec.dtype
