"""What a proof does with a decoder: cases of calls on a cache, and for each row of logits where it must come from.

A case is data: tokens that go into slots in pieces, steps of several slots together, rewinds. The same cases run
against the module's logits when a folder is made, and against its golden file wherever it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

GROWS_UP_TO = 1024  # positions


@dataclass(frozen=True)
class Call:
    """`prefill` one slot with ids, `step` every slot with one id each, `keep` one, or `rewind` one to a length."""

    op: str
    slot: int
    ids: tuple[int, ...] = ()
    length: int = 0


@dataclass(frozen=True)
class Row:
    """A row of logits that a call gives: that of the last position of `sequence`."""

    call: int
    row: int
    sequence: int
    position: int


@dataclass
class Case:
    """A named run of calls; `sequences` are the full token sequences that its rows are positions of.

    slot_of: the slot of each sequence. sources: of an encoder-decoder, the source of each slot.
    """

    name: str
    slots: int
    calls: list[Call] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    sequences: list[Ids] = field(default_factory=list)
    slot_of: list[int] = field(default_factory=list)
    sources: list[Ids] = field(default_factory=list)

    def source_of(self, sequence: int) -> Ids | None:
        """The source that a sequence is decoded from, of an encoder-decoder."""
        return self.sources[self.slot_of[sequence]] if self.sources else None


class _Writer:
    """Writes the calls of a case and keeps account of what every slot then holds."""

    def __init__(self, name: str, sequences: Sequence[Ids]) -> None:
        self.case = Case(name, len(sequences), sequences=list(sequences), slot_of=list(range(len(sequences))))
        self.current = list(range(len(sequences)))  # the sequence that each slot follows
        self.at = [0] * len(sequences)

    def prefill(self, slot: int, count: int) -> None:
        start, sequence = self.at[slot], self.current[slot]
        ids = self.case.sequences[sequence][start : start + count]
        self.case.calls.append(Call("prefill", slot, tuple(int(i) for i in ids)))
        rows = [Row(len(self.case.calls) - 1, r, sequence, start + r) for r in range(count)]
        self.case.rows += rows
        self.at[slot] += count

    def step(self) -> None:
        ids = tuple(int(self.case.sequences[s][at]) for s, at in zip(self.current, self.at))
        self.case.calls.append(Call("step", -1, ids))
        call = len(self.case.calls) - 1
        self.case.rows += [Row(call, r, s, at) for r, (s, at) in enumerate(zip(self.current, self.at))]
        self.at = [at + 1 for at in self.at]

    def keep(self, slot: int) -> None:
        self.case.calls.append(Call("keep", slot))

    def rewind(self, slot: int, length: int, onto: Ids) -> None:
        """Back to `length` positions, from which the slot goes on as `onto`."""
        self.case.calls.append(Call("rewind", slot, length=length))
        kept = self.case.sequences[self.current[slot]][:length]
        self.case.sequences.append(np.concatenate([kept, onto]))
        self.case.slot_of.append(slot)
        self.current[slot], self.at[slot] = len(self.case.sequences) - 1, length


@dataclass(frozen=True)
class Sources:
    """What the sources of an encoder-decoder's cases are made of."""

    vocab_size: int
    max_length: int


def grid(
    vocab_size: int, max_length: int, seed: int = 0, *, keeps: bool = False, sources: Sources | None = None
) -> list[Case]:
    """The cases of a proof, on sizes that were never traced: every one fits into `max_length` positions.

    keeps: whether the cache has states, which go back to where they were kept alone.
    """
    rng = np.random.default_rng(seed)

    def some(length: int) -> Ids:
        return rng.integers(0, vocab_size, min(length, max_length))

    cases = [_pieces("one token", some(1), [1]), _pieces("a prompt at once", some(29), [29])]
    cases.append(_pieces("uneven pieces", some(34), [6, 1, 1, 8, 3, 1, 14]))
    cases.append(_pieces("token by token", some(14), [1] * 14))
    cases.append(_ragged("two rows of different lengths", [some(17 + 8), some(2 + 8)], 8))
    cases.append(_ragged("three rows of different lengths", [some(9 + 12), some(1 + 12), some(30 + 12)], 12))
    cases.append(_ragged("rows that outgrow their cache", [some(62 + 8), some(20 + 8)], 8))
    cases.append(_rewound(some(23), some(9), keeps))
    if max_length > 43:
        cases.append(_longest(some(max_length)))
    if sources is not None:
        _add_sources(cases, sources, rng)
    return cases


def _add_sources(cases: list[Case], sources: Sources, rng: np.random.Generator) -> None:
    """A source for each slot, of other lengths than those of its neighbours; once the longest of all."""
    lengths = (9, 1, 21, 14, 3)
    for number, case in enumerate(cases):
        last = number == len(cases) - 1
        sizes = [sources.max_length if last else lengths[(number + slot) % 5] for slot in range(case.slots)]
        case.sources = [rng.integers(0, sources.vocab_size, min(n, sources.max_length)) for n in sizes]


def _pieces(name: str, sequence: Ids, sizes: Sequence[int]) -> Case:
    writer = _Writer(name, [sequence])
    for size in sizes:
        if count := min(size, len(sequence) - writer.at[0]):
            writer.prefill(0, count)
    return writer.case


def _ragged(name: str, sequences: list[Ids], steps: int) -> Case:
    steps = min(steps, *(len(s) - 1 for s in sequences)) if min(map(len, sequences)) > 1 else 0
    writer = _Writer(name, sequences)
    for slot, sequence in enumerate(sequences):
        writer.prefill(slot, len(sequence) - steps)
    for _ in range(steps):
        writer.step()
    return writer.case


def _rewound(sequence: Ids, onto: Ids, keeps: bool) -> Case:
    writer = _Writer("rewound and refilled", [sequence])
    back = len(sequence) // 3
    if keeps and back:
        writer.prefill(0, back)
        writer.keep(0)
    writer.prefill(0, len(sequence) - writer.at[0])
    onto = onto[: len(sequence) - back]
    writer.rewind(0, back, onto)
    writer.prefill(0, max(1, len(onto) - 2))
    while writer.at[0] < back + len(onto):
        writer.step()
    return writer.case


def _longest(sequence: Ids) -> Case:
    """A long sequence in two pieces and some steps.

    All its rows would be large: the last one of each piece, and a few at the end, say as much.
    """
    writer = _Writer("the longest length", [sequence])
    half = len(sequence) // 2
    writer.prefill(0, half)
    writer.prefill(0, len(sequence) - half - 3)
    for _ in range(3):
        writer.step()
    writer.case.rows = [r for r in writer.case.rows if r.position >= len(sequence) - 12 or r.position == half - 1]
    return writer.case


def run(decoder: Any, case: Case, all_rows: bool) -> Iterator[tuple[Row, npt.NDArray[np.float32]]]:
    """Make the calls of a case; yields each expected row with the logits that came, (num_logits,)."""
    wanted: dict[int, list[Row]] = {}
    for row in case.rows:
        wanted.setdefault(row.call, []).append(row)
    cache = open_cache(decoder, case.slots, _first_capacity(case), case.sources)
    slots = [cache.acquire() for _ in range(case.slots)]
    try:
        for slot, source in zip(slots, case.sources):
            decoder.encode(cache, slot, source)
        for number, call in enumerate(case.calls):
            if call.op == "rewind":
                cache.rewind(slots[call.slot], call.length)
            elif call.op == "keep":
                cache.keep(slots[call.slot])
            elif call.op == "step":
                logits = decoder.step(cache, slots, np.array(call.ids))
                yield from ((row, logits[row.row]) for row in wanted.get(number, []))
            else:
                yield from _prefilled(decoder, cache, slots[call.slot], call, wanted.get(number, []), all_rows)
    finally:
        cache.close()


def _first_capacity(case: Case) -> int:
    """Too little, so that the cache has to grow; for a long sequence enough: growing holds it one and a half times."""
    longest = max(len(s) for s in case.sequences)
    return longest if longest > GROWS_UP_TO else max(1, longest // 2)


def open_cache(decoder: Any, slots: int, capacity: int, sources: Sequence[Ids]) -> Any:
    """A cache, with room for the longest of `sources` where there are any."""
    room = (max(map(len, sources)),) if sources else ()
    return decoder.open_cache(slots, capacity, *room)


def _prefilled(
    decoder: Any, cache: Any, slot: int, call: Call, rows: list[Row], all_rows: bool
) -> Iterator[tuple[Row, Any]]:
    count = len(call.ids)
    keep = count - min((r.row for r in rows), default=count - 1) if all_rows else 1
    logits = decoder.prefill(cache, slot, np.array(call.ids), keep=keep)  # (keep, num_logits)
    for row in rows:
        if row.row >= count - keep:
            yield row, logits[row.row - (count - keep)]
