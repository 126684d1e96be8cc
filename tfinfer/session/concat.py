"""A decoder whose graph concatenates: it takes a past of exactly the held length and gives a present that is longer.

Other exporters write such graphs. What a step gives is the past of the next, as it lies; nothing is ever changed in
place, so that forks share it. Rows of one length run together, those of another length in a pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfinfer.errors import ClosedError, InputError, LengthError
from tfinfer.manifest import CacheSpec
from tfinfer.session.contents import Contents
from tfinfer.session.decoder import Decoder, Ids, Logits
from tfinfer.session.ort import onnxruntime


@dataclass(frozen=True)
class Block:
    """What some rows hold, all of one length: for each cache entry an OrtValue (rows, heads, length, head_dim)."""

    values: tuple[Any, ...]
    rows: int
    length: int
    nbytes: int


@dataclass(frozen=True)
class Held:
    """What one slot holds: a row of a block."""

    block: Block
    row: int


class ConcatCache:
    """`slots` sequences, each of any length up to the longest. Has the methods of `Cache`; a slot's row is its number.

    Not for use by two threads at once; every call has its own.
    """

    def __init__(self, specs: Sequence[CacheSpec], device: str, slots: int, capacity: int, longest: int) -> None:
        if slots < 1 or capacity < 1:
            raise InputError(f"expected at least one slot and one position, got {slots} and {capacity}")
        if capacity > longest:
            raise LengthError(f"a cache of {capacity} positions is longer than the model's longest length, {longest}")
        self.specs, self.device, self.longest = specs, device, longest
        self.slots, self.capacity = slots, capacity
        empty = [np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), spec.dtype) for spec in specs]
        self._empty = Held(self._block(empty, 1, 0), 0)
        self.ids: dict[int, list[int]] = {}  # by slot, those of its positions
        self.leaves = True  # whether released slots can be revived
        self._held: dict[int, Held] = {}
        self._left: dict[int, Held] = {}
        self._next = self._most = 0
        self.moved = 0  # bytes copied to bring rows together or to cut them; what the graph copies is not counted
        self.closed = False

    def _block(self, arrays: Sequence[Any], rows: int, length: int) -> Block:
        make = onnxruntime().OrtValue.ortvalue_from_numpy
        values = tuple(make(np.ascontiguousarray(array), self.device, 0) for array in arrays)
        return Block(values, rows, length, sum(array.nbytes for array in arrays))

    # -- what there is ------------------------------------------------------------------------------------------
    @property
    def nbytes(self) -> int:
        """Bytes of all that was held at once at most; what slots share counts once."""
        return self._most

    @property
    def live(self) -> list[int]:
        """The slots in use."""
        return list(self._held)

    @property
    def left(self) -> list[int]:
        """The released slots that `revive` finds, in the order of their release."""
        return list(self._left)

    @property
    def most_at_once(self) -> int:
        """How many positions may be appended in one call."""
        return self.longest

    def row(self, slot: int) -> int:
        """The number by which slots are put in order."""
        self._of(slot)
        return slot

    def length(self, slot: int) -> int:
        """How many positions a slot holds."""
        return self._of(slot).block.length

    def has_room(self, capacity: int) -> bool:
        """Always: a slot takes as many positions as it holds."""
        return True

    def grow(self, capacity: int) -> None:
        """Nothing: there is room already."""

    def _of(self, slot: int) -> Held:
        if self.closed:
            raise ClosedError("the cache was closed: open another one")
        if slot not in self._held:
            raise InputError(f"slot {slot} is not in use; live slots are {self.live}")
        return self._held[slot]

    # -- slots --------------------------------------------------------------------------------------------------
    def acquire(self) -> int:
        """An empty slot. Raises InputError when all are in use."""
        if len(self._held) == self.slots:
            raise InputError(f"all {self.slots} slots are in use: release one, or open a cache with more")
        if len(self._held) + len(self._left) == self.slots:
            self._forget_left(next(iter(self._left)))
        slot, self._next = self._next, self._next + 1
        self._held[slot], self.ids[slot] = self._empty, []
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. What it held can be revived until its place is needed."""
        held = self._of(slot)
        del self._held[slot]
        if self.leaves and len(self.ids[slot]) == held.block.length > 0:
            self._left[slot] = held
        else:
            del self.ids[slot]

    def revive(self, slot: int, length: int) -> int:
        """Take up a released slot, one of `left`, with its first `length` positions."""
        if slot not in self._left or self.reachable(slot, length) != length:
            raise InputError(f"slot {slot} cannot be revived with {length} positions; released slots are {self.left}")
        self._held[slot] = self._left.pop(slot)
        self.rewind(slot, length)
        return slot

    def forget_left(self) -> None:
        """Leave nothing of released slots to be found."""
        for slot in self.left:
            self._forget_left(slot)

    def _forget_left(self, slot: int) -> None:
        del self._left[slot], self.ids[slot]

    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the first `length` positions of a slot."""
        held = self._of(slot)
        if not 0 <= length <= held.block.length:
            raise InputError(f"slot {slot} holds {held.block.length} positions: cannot rewind it to {length}")
        self._held[slot] = self._cut(held, length)
        del self.ids[slot][length:]

    def reachable(self, slot: int, length: int) -> int:
        """To how many positions, at most `length`, a slot that is live or left can be rewound."""
        held = self._held[slot] if slot in self._held else self._left[slot]
        return max(0, min(length, held.block.length))

    def can_copy(self, slot: int, end: int) -> bool:
        """Whether `copy_positions` gives an empty slot what this one holds up to `end`."""
        return end <= self.length(slot)

    def keep(self, slot: int) -> None:
        """Nothing: every position can be gone back to."""

    def _cut(self, held: Held, length: int) -> Held:
        if length == held.block.length:
            return held
        if length == 0:
            return self._empty
        block = self._block([array[:, :, :length] for array in self._arrays(held)], 1, length)
        self.moved += block.nbytes
        return Held(block, 0)

    def _arrays(self, held: Held) -> list[Any]:
        """What a slot holds of each entry, (1, heads, length, head_dim)."""
        return [value.numpy()[held.row : held.row + 1] for value in held.block.values]

    def snapshot(self, slot: int) -> Held:
        """What `restore` goes back to."""
        return self._of(slot)

    def restore(self, slot: int, snapshot: Held) -> None:
        """Let a slot hold what it did when `snapshot` was taken."""
        self._of(slot)
        self._held[slot] = snapshot
        del self.ids[slot][snapshot.block.length :]

    def fork(self, slot: int) -> int:
        """A new slot that holds what `slot` holds; nothing is copied."""
        held = self._of(slot)
        target = self.acquire()
        self._held[target], self.ids[target] = held, list(self.ids[slot])
        return target

    def copy_positions(self, source_slot: int, target_slot: int, start: int, end: int) -> None:
        """Let `target_slot` hold what `source_slot` does up to `end`; both hold the same up to `start`.

        Raises InputError where the target holds fewer than `start` positions or the source fewer than `end`.
        """
        source, target = self._of(source_slot), self._of(target_slot)
        if not 0 <= start <= end <= source.block.length or start > target.block.length:
            raise InputError(
                f"cannot copy positions {start} to {end} of slot {source_slot}, which holds {source.block.length}, to "
                f"slot {target_slot}, which holds {target.block.length}"
            )
        self._held[target_slot] = self._cut(source, end)
        self.ids[target_slot] = self.ids[source_slot][:end]

    def reserve(self, slot: int, positions: int) -> None:
        """Check that `positions` more fit into a slot. Raises LengthError past the longest length."""
        needed = self.length(slot) + positions
        if needed > self.longest:
            raise LengthError(f"{needed} positions are more than the model's longest length, {self.longest}")

    def lay_out_sources(self, capacity: int) -> None:
        """Raises InputError: these slots have no sources."""
        raise InputError("this cache has no sources: open it with the open_cache of an encoder-decoder")

    def contents(self, slot: int) -> Contents:
        """A copy of what a slot holds."""
        held = self._of(slot)
        rows = [np.ascontiguousarray(array[0]) for array in self._arrays(held)]
        return Contents(tuple(self.ids[slot]), 0, tuple(row.reshape(len(row), -1).view(np.uint8) for row in rows), ())

    def put(self, contents: Contents) -> int:
        """A new slot that holds `contents`, of a cache of the same model."""
        slot, length = self.acquire(), len(contents.ids)
        arrays = [
            np.ascontiguousarray(held).view(spec.dtype).reshape(1, spec.num_kv_heads, length, spec.head_dim)
            for spec, held in zip(self.specs, contents.positions, strict=True)
        ]
        self.hold([slot], self._block(arrays, 1, length))
        self.ids[slot] = list(contents.ids)
        return slot

    def arrange(self, slots: Sequence[int]) -> int:
        """Nothing: rows are brought together when they run."""
        return 0

    def reset(self) -> None:
        """Give every slot back."""
        for slot in self.live:
            self.release(slot)

    def close(self) -> None:
        """Let the memory go."""
        if not self.closed:
            self.reset()
            self.forget_left()
        self.closed = True

    # -- rows that run together ---------------------------------------------------------------------------------
    def together(self, slots: Sequence[int]) -> Block:
        """One block whose rows are those of `slots`, all of one length; what lies so already is not copied."""
        held = [self._of(slot) for slot in slots]
        block = held[0].block
        if block.rows == len(held) and all(h.block is block and h.row == row for row, h in enumerate(held)):
            return block
        arrays = [np.concatenate(rows) for rows in zip(*map(self._arrays, held))]
        made = self._block(arrays, len(held), block.length)
        self.moved += made.nbytes
        return made

    def hold(self, slots: Sequence[int], block: Block) -> None:
        """Let `slots` hold the rows of a block."""
        for row, slot in enumerate(slots):
            self._of(slot)
            self._held[slot] = Held(block, row)
        held = {id(held.block): held.block.nbytes for held in self._held.values()}
        self._most = max(self._most, sum(held.values()))


class ConcatDecoder(Decoder):
    """A decoder over concatenated caches. Several threads may use one at once, each with a cache of its own."""

    def open_cache(self, slots: int = 1, capacity: int = 256) -> ConcatCache:  # type: ignore[override]
        """An empty cache of `slots` sequences."""
        manifest, longest = self.manifest, self.manifest.max_length
        return ConcatCache(manifest.cache, self.device, slots, min(capacity, longest), longest)

    def _append(self, cache: Any, slot: int, ids: Ids, keep: int) -> Logits:
        logits, block = self._run_block(cache.together([slot]), ids[None], keep)
        cache.hold([slot], block)
        kept: Logits = logits[0]
        return kept

    def step(self, cache: Any, slots: Sequence[int], ids: Sequence[int] | Ids) -> Logits:
        """Append one id to each of `slots`; returns their logits, (slots, num_logits).

        ids: (slots,), taken as they are. A step that fails keeps what every slot holds.
        """
        given = np.asarray(ids, np.int64)
        groups: dict[int, list[int]] = {}  # places in `slots` by the length that they hold
        for place, slot in enumerate(slots):
            cache.reserve(slot, 1)
            groups.setdefault(cache.length(slot), []).append(place)
        logits: Logits = np.empty((len(slots), self.manifest.num_logits), np.float32)
        made = []
        for places in groups.values():
            members = [slots[place] for place in places]
            rows, block = self._run_block(cache.together(members), given[places][:, None], 1)
            logits[places] = rows[:, -1]
            made.append((members, block))
        for members, block in made:
            cache.hold(members, block)
        for slot, token in zip(slots, given.tolist()):
            cache.ids[slot].append(token)
        return logits

    def _run_block(self, past: Block, ids: Ids, keep: int) -> tuple[Logits, Block]:
        """Logits of the last `keep` of ids (rows, new), and what then is held."""
        roles, binding, (rows, new) = self.roles, self._binding(), ids.shape
        total = past.length + new
        ids, mask = np.ascontiguousarray(ids), np.ones((rows, total), np.int64)
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(past.length, total), (rows, new)))
        for name, array in zip((roles.input_ids, roles.attention_mask, roles.position_ids), (ids, mask, positions)):
            if name is not None:
                binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        if roles.use_cache_branch is not None:
            binding.bind_cpu_input(roles.use_cache_branch, np.array([past.length > 0]))
        self._bind_keep(binding, keep)
        kept, kind = new if self.all_logits else keep, self.logits_dtype
        logits = np.empty((rows, kept, self.manifest.num_logits), kind)
        binding.bind_output(roles.logits, "cpu", 0, kind, logits.shape, logits.ctypes.data)
        for entry, value in zip(self.manifest.cache, past.values):
            binding.bind_ortvalue_input(entry.past, value)
            binding.bind_output(entry.present, self.device, 0)
        self._run(binding)
        values = dict(zip([roles.logits, *(entry.present for entry in self.manifest.cache)], binding.get_outputs()))
        made = tuple(values[entry.present] for entry in self.manifest.cache)
        size = sum(
            int(np.prod(value.shape())) * np.dtype(e.dtype).itemsize for e, value in zip(self.manifest.cache, made)
        )
        return logits[:, -keep:].astype(np.float32, copy=False), Block(made, rows, total, size)
