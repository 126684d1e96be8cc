"""What a slot holds, apart from its cache: a moment to go back to, and a copy that another cache can take up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tfinfer.session.fixed import Bytes
from tfinfer.session.memory import Buffer


@dataclass(frozen=True)
class Snapshot:
    """What a slot held at a moment: how many positions, how many of them in the buffers, and a copy of its states."""

    length: int
    dropped: int
    states: tuple[Buffer, ...]


@dataclass(frozen=True)
class Contents:
    """All that a slot holds, on the host: what any cache of the same model can take up.

    ids: of its positions, of which the first `dropped` are no longer there. positions: for each cache entry those that
    are, (num_kv_heads, bytes of them). states: the bytes of each.
    """

    ids: tuple[int, ...]
    dropped: int
    positions: tuple[Bytes, ...]
    states: tuple[Bytes, ...]


class Kept:
    """Moments of slots with states, by slot and length: to these alone can a slot go back, each for a copy of them."""

    def __init__(self, most: int) -> None:
        """most: how many of a slot outlive its release."""
        self.most = most
        self._of: dict[int, dict[int, Snapshot]] = {}

    def lengths(self, slot: int) -> list[int]:
        return sorted(self._of.get(slot, ()))

    def at(self, slot: int, length: int) -> Snapshot:
        return self._of[slot][length]

    def add(self, slot: int, snapshot: Snapshot) -> None:
        self._of.setdefault(slot, {})[snapshot.length] = snapshot

    def only(self, slot: int, lengths: Iterable[int]) -> None:
        """Let go of all of a slot but these lengths."""
        wanted = set(lengths)
        self._of[slot] = {length: moment for length, moment in self._of.get(slot, {}).items() if length in wanted}
        if not self._of[slot]:
            del self._of[slot]

    def cut(self, slot: int, length: int) -> None:
        """Let go of all beyond `length` positions."""
        self.only(slot, (kept for kept in self.lengths(slot) if kept <= length))

    def released(self, slot: int) -> None:
        """Let go of all but the longest few."""
        self.only(slot, self.lengths(slot)[-self.most :])
