"""The keys and values of several sequences: slots of one buffer per layer and side, changed in place.

A slot keeps its number while its row in the buffers may move, so that live slots always stand in one block that a step
can bind. States, which belong to all positions of a slot at once, and its source go wherever it goes. What a released
slot held stays until its row is needed. Knows nothing of graphs and text. Not for use by two threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfinfer.errors import ClosedError, InputError, LengthError
from tfinfer.manifest import CacheSpec, StateSpec
from tfinfer.session.contents import Contents, Kept, Snapshot
from tfinfer.session.cross import Sources
from tfinfer.session.fixed import FixedRows
from tfinfer.session.memory import Buffer, CudaMemory, HostMemory
from tfinfer.session.positions import PositionRows

BLOCK = 64  # capacities are multiples of this, so that a cache that was released fits the next call
MOST_KEPT = 4  # of what `keep` was told of a slot, how much outlives its release: each is a copy of all states


def slack(window: int) -> int:
    """How many positions beyond its window a cache has room for, so that what is behind it is seldom moved out."""
    return max(BLOCK, min(512, window // 2))


class Cache:
    """`slots` sequences of up to `capacity` positions.

    lengths: (slots,) int64, the positions that each *row* holds; use `length(slot)` for one slot. dropped: (slots,)
    int64, how many of them, the first, are no longer in the buffers: with a `window`, beyond which nothing looks back,
    these hold it and some more, and never grow further.
    states: one buffer of (slots, *shape) per state. sources: what the slots are decoded from, of an encoder-decoder.
    ids: by slot, those of its positions, as whoever runs the graph says. leaves: whether released slots can be revived.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        memory: HostMemory | CudaMemory,
        slots: int,
        capacity: int,
        longest: int,
        states: Sequence[StateSpec] = (),
        sources: Sources | None = None,
        window: int | None = None,
    ) -> None:
        if slots < 1 or capacity < 1:
            raise InputError(f"expected at least one slot and one position, got {slots} and {capacity}")
        if capacity > longest:
            raise LengthError(f"a cache of {capacity} positions is longer than the model's longest length, {longest}")
        self.specs, self.memory, self.longest, self.window = specs, memory, longest, window
        self.most = longest if window is None else min(longest, _rounded(window + slack(window)))  # the widest buffers
        self.slots = slots
        self.positions = PositionRows(specs, memory, slots, min(_rounded(capacity), self.most))
        self.states = FixedRows(memory, slots, [state.shape for state in states], [state.dtype for state in states])
        self.sources = sources
        self.lengths, self.dropped = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.held, self.gone = self.lengths.data, self.dropped.data  # the same numbers, sooner read
        self.ids: dict[int, list[int]] = {}
        self.leaves = True
        self._row: dict[int, int] = {}
        self._left: dict[int, int] = {}  # the rows of released slots whose content nobody has needed the place of
        self._kept = Kept(MOST_KEPT)
        self._free = list(range(slots))
        self._next = 0
        self.generation = 0  # changes when pointers do
        self.bound: object = None  # what a decoder keeps bound to these buffers
        self.moved = 0  # bytes copied from row to row so far; growing is not counted
        self.closed = False

    @property
    def buffers(self) -> list[Buffer]:
        """(slots, num_kv_heads, capacity, head_dim) each."""
        return self.positions.buffers

    @property
    def capacity(self) -> int:
        """How many positions of a slot the buffers have room for."""
        return self.positions.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.positions.nbytes + self.states.nbytes + (self.sources.nbytes if self.sources else 0)

    @property
    def live(self) -> list[int]:
        """The slots in use, in the order of their rows."""
        return sorted(self._row, key=self._row.__getitem__)

    def length(self, slot: int) -> int:
        """How many positions a slot holds."""
        return self.held[self.row(slot)]

    def has_room(self, capacity: int) -> bool:
        """Whether a cache of this capacity would be no wider than this one."""
        return self.capacity >= min(capacity, self.most)

    @property
    def most_at_once(self) -> int:
        """How many positions may be appended in one call."""
        return self.longest if self.window is None else max(1, self.most - self.window)

    @property
    def left(self) -> list[int]:
        """The released slots that `revive` finds, in the order of their release."""
        return list(self._left)

    def row(self, slot: int) -> int:
        if slot not in self._row:
            raise InputError(f"slot {slot} is not in use; live slots are {self.live}")
        return self._row[slot]

    # -- slots --------------------------------------------------------------------------------------------------
    def acquire(self) -> int:
        """An empty slot. Raises InputError when all are in use."""
        rows = [*self._free, *self._left.values()]
        if not rows:
            raise InputError(f"all {self.slots} slots are in use: release one, or open a cache with more")
        row = min(rows)
        self._vacate(row)
        slot, self._next = self._next, self._next + 1
        self._row[slot], self.ids[slot] = row, []
        self.lengths[row] = self.dropped[row] = 0
        self.states.zero(row)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. What it held, except from a source, can be revived until its row is needed."""
        row = self.row(slot)
        del self._row[slot]
        if self.leaves and self.sources is None and len(self.ids[slot]) == self.lengths[row] > 0:
            self._left[slot] = row
            self._kept.released(slot)
            return
        self._free.append(row)
        self.lengths[row] = 0
        self._forget(slot)
        if self.sources is not None:
            self.sources.forget(row)

    def revive(self, slot: int, length: int) -> int:
        """Take up a released slot, one of `left`, with its first `length` positions; see `reachable`."""
        if slot not in self._left or self.reachable(slot, length) != length:
            raise InputError(f"slot {slot} cannot be revived with {length} positions; released slots are {self.left}")
        self._row[slot] = self._left.pop(slot)
        self.rewind(slot, length)
        return slot

    def forget_left(self) -> None:
        """Leave nothing of released slots to be found."""
        for row in list(self._left.values()):
            self._vacate(row)
            self._free.append(row)

    def _vacate(self, row: int) -> None:
        """Take a row that no live slot has, whatever was left in it."""
        if row in self._free:
            self._free.remove(row)
            return
        slot = next(slot for slot, place in self._left.items() if place == row)
        del self._left[slot]
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        del self.ids[slot]
        self._kept.only(slot, ())

    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the first `length` positions of a slot; its source stays.

        A state is of all positions at once: a slot with states goes back to none of them, or to a length at which
        `keep` was called. Raises InputError for any other, and where a position is gone that would be looked at.
        """
        row = self.row(slot)
        held = int(self.lengths[row])
        if not 0 <= length <= held:
            raise InputError(f"slot {slot} holds {held} positions: cannot rewind it to {length}")
        if length and self._sees_dropped(row, length):
            raise InputError(
                f"slot {slot} holds {held} positions, of which the first {self.dropped[row]} lie behind its window and "
                f"are gone: cannot rewind it to {length}; rewind it to 0 and prefill again"
            )
        if self.states.buffers and length < held:
            self._rewind_states(slot, length)
        self.lengths[row] = length
        self.dropped[row] = 0 if length == 0 else self.dropped[row]
        del self.ids[slot][length:]

    def reachable(self, slot: int, length: int) -> int:
        """To how many positions, at most `length`, a slot that is live or left can be rewound."""
        row = self._row[slot] if slot in self._row else self._left[slot]
        held = int(self.lengths[row])
        length = max(0, min(length, held))
        if self.states.buffers and length < held:
            length = max((kept for kept in self._kept.lengths(slot) if kept <= length), default=0)
        return 0 if self._sees_dropped(row, length) else length

    def can_copy(self, slot: int, end: int) -> bool:
        """Whether `copy_positions` gives an empty slot what this one holds up to `end`."""
        return end == self.length(slot) or (not self.states.buffers and self.reachable(slot, end) == end)

    def keep(self, slot: int) -> None:
        """Let `rewind` find the way back to what a slot holds now, for as long as no rewind goes back further.

        Without states every position can be gone back to; with some, each length that is kept costs a copy of them.
        """
        if self.states.buffers:
            self._kept.add(slot, self.snapshot(slot))

    def _rewind_states(self, slot: int, length: int) -> None:
        kept = self._kept.lengths(slot)
        if length and length not in kept:
            raise InputError(
                f"slot {slot} holds {self.length(slot)} positions and states of all of them, which cannot go back to "
                f"{length}; it can to {', '.join(map(str, [0, *kept]))}: call keep(slot) where you may want to "
                "return to, or rewind it to 0 and prefill again"
            )
        if length:
            self.states.put(self.row(slot), self._kept.at(slot, length).states)
        else:
            self.states.zero(self.row(slot))
        self._kept.cut(slot, length)

    def _sees_dropped(self, row: int, length: int) -> bool:
        """Whether the position that follows `length` others would look at one that is gone."""
        return self.window is not None and bool(self.dropped[row] > max(0, length - self.window + 1))

    def snapshot(self, slot: int) -> Snapshot:
        """What `restore` goes back to; for as long as the slot's positions are only added to."""
        row = self.row(slot)
        return Snapshot(self.length(slot), int(self.dropped[row]), tuple(self.states.taken(row)))

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Let a slot hold what it did when `snapshot` was taken, states too; nothing where that is gone meanwhile."""
        row = self.row(slot)
        gone = self._sees_dropped(row, snapshot.length)
        self.lengths[row] = 0 if gone else snapshot.length
        self.dropped[row] = 0 if gone else self.dropped[row]
        self.states.put(row, snapshot.states)
        del self.ids[slot][self.lengths[row] :]
        self._kept.cut(slot, int(self.lengths[row]))

    def lay_out_sources(self, capacity: int) -> None:
        """Have room for exactly `capacity` positions of every source. Raises InputError where one in use is longer."""
        if self.sources is None:
            raise InputError("this cache has no sources: open it with the open_cache of an encoder-decoder")
        self.generation += self.sources.lay_out(capacity)

    def fork(self, slot: int) -> int:
        """A new slot that holds what `slot` holds."""
        length = self.length(slot)
        target = self.acquire()
        self.copy_positions(slot, target, 0, length)
        return target

    def copy_positions(self, source_slot: int, target_slot: int, start: int, end: int) -> None:
        """Let `target_slot` hold what `source_slot` does up to `end`, where it does so up to `start` already.

        States are copied whole, and the source where the target has another one. Raises InputError where the target
        holds fewer than `start` positions or the source fewer than `end`, or with states not exactly so many.
        """
        source, target = self.row(source_slot), self.row(target_slot)
        if not 0 <= start <= end <= self.lengths[source] or start > self.lengths[target]:
            raise InputError(
                f"cannot copy positions {start} to {end} of slot {source_slot}, which holds {self.lengths[source]}, to "
                f"slot {target_slot}, which holds {self.lengths[target]}: expected start <= end, no end past what the "
                "source holds and no start past what the target holds"
            )
        if self.states.buffers and end != self.lengths[source]:
            raise InputError(
                f"cannot copy {end} of the {self.lengths[source]} positions of slot {source_slot}: its states are of "
                "all of them: copy all, or prefill again"
            )
        gone = int(self.dropped[source])
        start = start if gone == 0 and self.dropped[target] == 0 else gone  # positions lie elsewhere: copy all
        self._copy_row(source, target, start - gone, end - gone)
        self.lengths[target], self.dropped[target] = end, gone
        self.ids[target_slot] = self.ids[source_slot][:end]
        self._kept.cut(target_slot, start)

    def reserve(self, slot: int, positions: int) -> None:
        """Make room for `positions` more in a slot. Raises LengthError past the longest length."""
        row = self.row(slot)
        needed = self.held[row] + positions
        if needed > self.longest:
            raise LengthError(f"{needed} positions are more than the model's longest length, {self.longest}")
        needed -= self.gone[row]
        if needed > self.capacity and self.capacity < self.most:
            self.grow(min(self.most, max(needed, 2 * self.capacity)))
        if needed > self.capacity and self.window is not None:
            self._drop(row, self.window)

    def _drop(self, row: int, kept: int) -> None:
        """Move the last `kept` positions of a row to its front, over what lies behind the window."""
        gone = int(self.lengths[row] - self.dropped[row]) - kept
        self.positions.shift(row, gone, kept)
        self.dropped[row] += gone

    def grow(self, capacity: int) -> None:
        """Move every slot into buffers of at least `capacity` positions."""
        if capacity > self.longest:
            raise LengthError(
                f"a cache of {capacity} positions is longer than the model's longest length, {self.longest}"
            )
        capacity = min(_rounded(capacity), self.most)
        if capacity <= self.capacity:
            return
        self.positions.widen(capacity)
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
            self._vacate(target)  # what was left there gives way: to exchange it would be three copies
            self._copy_row(source, target, 0, int(self.lengths[source] - self.dropped[source]))
            self._free.append(source)
            if self.sources is not None:
                self.sources.forget(source)
        else:
            self._swap_rows(source, target)
            self._row[other] = source
        self._row[slot] = target
        for counts in (self.lengths, self.dropped):
            counts[[source, target]] = counts[[target, source]]

    def _copy_row(self, source: int, target: int, start: int, end: int) -> None:
        self.moved += self.positions.copy(source, target, start, end)
        self.moved += self.states.copy(source, target)
        if self.sources is not None:
            self.moved += self.sources.copy(source, target)

    def _swap_rows(self, one: int, other: int) -> None:
        held = int((self.lengths - self.dropped)[[one, other]].max())
        self.moved += self.positions.swap(one, other, held) + self.states.swap(one, other)
        if self.sources is not None:
            self.moved += self.sources.swap(one, other)

    def pointers(self, row: int) -> list[int]:
        """The address of `row` in every buffer."""
        if self.closed:
            raise ClosedError("the cache was closed: open another one")
        return self.positions.pointers(row)

    # -- between caches -----------------------------------------------------------------------------------------
    def contents(self, slot: int) -> Contents:
        """A copy of what a slot holds. Its source is not part of it."""
        row, ids = self.row(slot), self.ids[slot]
        dropped = int(self.dropped[row])
        positions = self.positions.read(row, len(ids) - dropped)
        return Contents(tuple(ids), dropped, tuple(positions), tuple(self.states.read(row)))

    def put(self, contents: Contents) -> int:
        """A new slot that holds `contents`, of a cache of the same model."""
        length = len(contents.ids)
        slot = self.acquire()
        row = self.row(slot)
        self.reserve(slot, length - contents.dropped)
        self.positions.write(row, contents.positions)
        self.states.write(row, contents.states)
        self.lengths[row], self.dropped[row] = length, contents.dropped
        self.ids[slot] = list(contents.ids)
        return slot

    def reset(self) -> None:
        """Give every slot back; the buffers stay."""
        for slot in self.live:
            self.release(slot)

    def close(self) -> None:
        """Let the memory go."""
        self.reset()
        self.forget_left()
        self.closed, self.bound, self.sources = True, None, None
        self.positions.buffers.clear()
        self.states.buffers.clear()


def _rounded(capacity: int) -> int:
    return -(-capacity // BLOCK) * BLOCK
