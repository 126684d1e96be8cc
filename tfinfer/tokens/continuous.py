"""Prompts that come and go while others go on: one piece of a prompt that joins, then one token for everybody else.

So a prompt, however long, never holds the others up for longer than one piece takes. Knows ids only: no text, no graph,
no threads. (Iteration-level scheduling: Orca, Yu et al. 2022; prompts in pieces: Sarathi, Agrawal et al. 2023.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfinfer.errors import TfinferError
from tfinfer.tokens.generate import Limits, Token
from tfinfer.tokens.sampling import History, SamplingParams, choose, generators, top_logprobs

Seat = Callable[[Any, Sequence[int]], int]  # from a cache and a prompt to a slot that may hold some of its beginning


@dataclass(eq=False)
class Row:
    """A prompt that waits or is being continued.

    index: of its tokens. to: whatever the caller wants to find here. reused: how many of its ids the slot held before
    anything was run for it.
    """

    index: int
    prompt: Sequence[int]
    params: SamplingParams
    limits: Limits
    to: Any = None
    slot: int = -1
    reused: int = 0
    generated: int = 0
    next_id: int | None = None  # chosen, but not run yet


@dataclass
class _Drawing:
    """What the choice of a row's tokens remembers."""

    history: History
    draws: list[np.random.Generator]


Outcome = tuple[Row, Token | TfinferError]  # an error is the last of its row


@dataclass
class Continuous:
    """A loop over the slots of one cache. `add` a prompt at any time, and `advance` until `idle`.

    piece: how many ids of a prompt are run at once. seat: where a prompt begins.
    """

    decoder: Any
    cache: Any
    vocab_size: int
    piece: int
    seat: Seat
    waiting: deque[Row] = field(default_factory=deque)
    rows: dict[Row, _Drawing] = field(default_factory=dict)  # that have a slot, in the order in which they joined

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.rows and not self.waiting

    def add(self, row: Row) -> None:
        """Queue a prompt for the next slot that gets free."""
        self.waiting.append(row)

    def finish(self, row: Row) -> None:
        """End a prompt before its next token, wherever it is; one that ended already is no error."""
        if row in self.rows:
            self._leave(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def advance(self) -> Iterator[Outcome]:
        """One piece of the prompt that joined first of those not read yet, then a step of all that are.

        Runs as it is iterated over. What fails for one prompt is its outcome. Raises what a step raises: then all rows
        are lost, and the cache.
        """
        self._join()
        yield from self._read_a_piece()
        ready = sorted((row for row in self.rows if row.next_id is not None), key=lambda row: self.cache.row(row.slot))
        if ready:
            ids = np.array([row.next_id for row in ready], np.int64)
            yield from self._chosen(ready, self.decoder.step(self.cache, [row.slot for row in ready], ids))

    def _join(self) -> None:
        while self.waiting and len(self.rows) < self.cache.slots:
            row = self.waiting.popleft()
            row.slot = self.seat(self.cache, row.prompt)
            row.reused = self.cache.length(row.slot)
            history = History([row.prompt], self.vocab_size, row.params)
            self.rows[row] = _Drawing(history, generators(row.params, 1))

    def _read_a_piece(self) -> Iterator[Outcome]:
        """The first token of a prompt, once its last piece was read."""
        row = next((row for row in self.rows if row.next_id is None), None)
        if row is None:
            return
        at = self.cache.length(row.slot)
        try:
            piece, last = row.prompt[at : at + self.piece], at + self.piece >= len(row.prompt)
            logits = self.decoder.prefill(self.cache, row.slot, piece, keep=int(last))
        except TfinferError as error:
            self._leave(row)
            yield row, error
            return
        if self.cache.length(row.slot) == len(row.prompt):
            self.cache.keep(row.slot)  # another answer may go back to it
            yield from self._chosen([row], logits)

    def _chosen(self, rows: Sequence[Row], logits: Any) -> Iterator[Outcome]:
        """A token of each row by its logits (rows, vocab)."""
        groups: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):  # those that are chosen alike are chosen at once
            plain = row.params.temperature == 0 and not (row.params.logit_bias or row.params.needs_history)
            groups.setdefault("greedy" if plain else place, []).append(place)
        for places in groups.values():
            yield from self._of_group([rows[place] for place in places], logits[places])

    def _of_group(self, rows: Sequence[Row], logits: Any) -> Iterator[Outcome]:
        first = rows[0]
        try:
            ids = choose(logits, self.rows[first].history, first.params, self.rows[first].draws * len(rows)).tolist()
        except TfinferError as error:
            if len(rows) > 1:  # one of them is to blame, and only that one
                for place, row in enumerate(rows):
                    yield from self._of_group([row], logits[place : place + 1])
                return
            self._leave(first)
            yield first, error
            return
        for place, (row, token_id) in enumerate(zip(rows, ids)):
            yield row, self._taken(row, token_id, logits[place : place + 1])

    def _taken(self, row: Row, token_id: int, logits: Any) -> Token:
        """The token, after which its row goes on or leaves. logits: (1, vocab)"""
        limits, forced = row.limits, row.limits.forced(row.generated)
        token_id = token_id if forced is None else forced
        row.generated += 1
        reported = top_logprobs(logits, np.array([token_id]), limits.logprobs)[0] if limits.logprobs else None
        token = limits.token(row.index, token_id, row.generated, reported)
        if token.finish_reason is None:
            self.rows[row].history.add(np.array([token_id]))
            row.next_id = token_id
        else:
            self._leave(row)
        return token

    def _leave(self, row: Row) -> None:
        del self.rows[row]
        self.cache.release(row.slot)
