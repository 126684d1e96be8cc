"""The keys and values of several sequences: slots of one buffer per layer and side, changed in place.

A slot keeps its number while its row in the buffers may move, so that live slots always stand in one block that a step
can bind. Knows nothing of graphs, tokens or text. Not for use by two threads at once; every call has its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfinfer.errors import ClosedError, InputError, LengthError
from tfinfer.manifest import CacheSpec
from tfinfer.session.memory import Buffer, CudaMemory, HostMemory

BLOCK = 64  # capacities are multiples of this, so that a cache that was released fits the next call


class Cache:
    """`slots` sequences of up to `capacity` positions.

    lengths: (slots,) int64, the positions that each *row* holds; use `length(slot)` for one slot.
    """

    def __init__(
        self, specs: Sequence[CacheSpec], memory: HostMemory | CudaMemory, slots: int, capacity: int, longest: int
    ) -> None:
        if slots < 1 or capacity < 1:
            raise InputError(f"expected at least one slot and one position, got {slots} and {capacity}")
        if capacity > longest:
            raise LengthError(f"a cache of {capacity} positions is longer than the model's longest length, {longest}")
        self.specs, self.memory, self.longest = specs, memory, longest
        self.slots, self.capacity = slots, min(-(-capacity // BLOCK) * BLOCK, longest)
        self.buffers = [self._allocate(spec, slots, self.capacity) for spec in specs]
        self.lengths = np.zeros(slots, np.int64)
        self._row: dict[int, int] = {}
        self._free = list(range(slots))
        self._next = 0
        self.generation = 0  # changes when pointers do
        self.bound: object = None  # what a decoder keeps bound to these buffers
        self.moved = 0  # bytes copied from row to row so far; growing is not counted

    def _allocate(self, spec: CacheSpec, slots: int, capacity: int) -> Buffer:
        return self.memory.allocate((slots, spec.num_kv_heads, capacity, spec.head_dim), spec.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def live(self) -> list[int]:
        """The slots in use, in the order of their rows."""
        return sorted(self._row, key=self._row.__getitem__)

    def length(self, slot: int) -> int:
        """How many positions a slot holds."""
        return int(self.lengths[self.row(slot)])

    def row(self, slot: int) -> int:
        if slot not in self._row:
            raise InputError(f"slot {slot} is not in use; live slots are {self.live}")
        return self._row[slot]

    # -- slots --------------------------------------------------------------------------------------------------
    def acquire(self) -> int:
        """An empty slot. Raises InputError when all are in use."""
        if not self._free:
            raise InputError(f"all {self.slots} slots are in use: release one, or open a cache with more")
        row = min(self._free)
        self._free.remove(row)
        slot, self._next = self._next, self._next + 1
        self._row[slot] = row
        self.lengths[row] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; its number is not used again."""
        row = self.row(slot)
        del self._row[slot]
        self._free.append(row)
        self.lengths[row] = 0

    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the first `length` positions of a slot."""
        row = self.row(slot)
        if not 0 <= length <= self.lengths[row]:
            raise InputError(f"slot {slot} holds {self.lengths[row]} positions: cannot rewind it to {length}")
        self.lengths[row] = length

    def fork(self, slot: int) -> int:
        """A new slot that holds what `slot` holds."""
        length = self.length(slot)
        target = self.acquire()
        self.copy_positions(slot, target, 0, length)
        return target

    def copy_positions(self, source_slot: int, target_slot: int, start: int, end: int) -> None:
        """Let `target_slot` hold what `source_slot` does up to `end`, where it does so up to `start` already.

        Raises InputError where the target holds fewer than `start` positions or the source fewer than `end`.
        """
        source, target = self.row(source_slot), self.row(target_slot)
        if not 0 <= start <= end <= self.lengths[source] or start > self.lengths[target]:
            raise InputError(
                f"cannot copy positions {start} to {end} of slot {source_slot}, which holds {self.lengths[source]}, to "
                f"slot {target_slot}, which holds {self.lengths[target]}: expected start <= end, no end past what the "
                "source holds and no start past what the target holds"
            )
        self._copy_row(source, target, start, end)
        self.lengths[target] = end

    def reserve(self, slot: int, positions: int) -> None:
        """Make room for `positions` more in a slot. Raises LengthError past the longest length."""
        needed = self.length(slot) + positions
        if needed > self.longest:
            raise LengthError(f"{needed} positions are more than the model's longest length, {self.longest}")
        if needed > self.capacity:
            self.grow(min(self.longest, max(needed, 2 * self.capacity)))

    def grow(self, capacity: int) -> None:
        """Move every slot into buffers of at least `capacity` positions."""
        if capacity > self.longest:
            raise LengthError(
                f"a cache of {capacity} positions is longer than the model's longest length, {self.longest}"
            )
        capacity = min(-(-capacity // BLOCK) * BLOCK, self.longest)
        if capacity <= self.capacity:
            return
        grown = []
        for spec, old in zip(self.specs, self.buffers):
            new = self._allocate(spec, self.slots, capacity)
            width = old.nbytes // (self.slots * spec.num_kv_heads)  # bytes of one head of one row
            pitch = new.nbytes // (self.slots * spec.num_kv_heads)
            self.memory.copy_2d(new.pointer, pitch, old.pointer, width, width, self.slots * spec.num_kv_heads)
            grown.append(new)
        self.buffers, self.capacity = grown, capacity
        self.generation += 1

    # -- rows ---------------------------------------------------------------------------------------------------
    def arrange(self, slots: Sequence[int]) -> int:
        """Bring `slots` into neighbouring rows in their order; returns the first row. Moves nothing where they are."""
        rows = [self.row(slot) for slot in slots]
        first = rows[0]
        if rows == list(range(first, first + len(rows))):
            return first
        for target, slot in enumerate(slots):
            self._move(slot, target)
        return 0

    def _move(self, slot: int, target: int) -> None:
        """Put a slot into row `target`; what lives there takes its place."""
        source = self._row[slot]
        if source == target:
            return
        other = next((s for s, row in self._row.items() if row == target), None)
        if other is None:
            self._copy_row(source, target, 0, int(self.lengths[source]))
            self._free.remove(target)
            self._free.append(source)
        else:
            self._swap_rows(source, target)
            self._row[other] = source
        self._row[slot] = target
        self.lengths[[source, target]] = self.lengths[[target, source]]

    def _copy_row(self, source: int, target: int, start: int, end: int) -> None:
        for spec, buffer in zip(self.specs, self.buffers):
            self.moved += self._copy_entry(spec, buffer, source, target, start, end)

    def _copy_entry(self, spec: CacheSpec, buffer: Buffer, source: int, target: int, start: int, end: int) -> int:
        """Copy what one entry holds of these positions to another row; returns how many bytes that was.

        The one place that knows where a position lies. An entry without positions, a state, belongs to all of them at
        once: it would be copied whole here, whatever `start` and `end` are.
        """
        head = buffer.nbytes // (self.slots * spec.num_kv_heads)  # bytes of one head of one row
        row, position = head * spec.num_kv_heads, head // self.capacity
        first, width = buffer.pointer + start * position, (end - start) * position
        self.memory.copy_2d(first + target * row, head, first + source * row, head, width, spec.num_kv_heads)
        return width * spec.num_kv_heads

    def _swap_rows(self, one: int, other: int) -> None:
        for spec, buffer in zip(self.specs, self.buffers):
            size = buffer.nbytes // self.slots
            spare = self._allocate(spec, 1, self.capacity)
            self.memory.copy(spare, 0, buffer, one * size, size)
            self.memory.copy(buffer, one * size, buffer, other * size, size)
            self.memory.copy(buffer, other * size, spare, 0, size)
            self.moved += 3 * size

    def pointers(self, row: int) -> list[int]:
        """The address of `row` in every buffer."""
        if not self.buffers:
            raise ClosedError("the cache was closed")
        return [buffer.pointer + row * (buffer.nbytes // self.slots) for buffer in self.buffers]

    def reset(self) -> None:
        """Give every slot back; the buffers stay."""
        for slot in list(self._row):
            self.release(slot)

    def close(self) -> None:
        """Let the memory go."""
        self.reset()
        self.buffers, self.bound = [], None
