"""Speculative decoding: a decoder whose steps are made several at a time, from guesses that one pass checks.

The loop does not know. It asks for a step after the token that it chose; a pass over that token and the drafted ones
gives the logits of them all, and the steps after it are answered from these for as long as the loop chooses what was
drafted. Where it chooses something else, the cache forgets what was drafted. So every token is chosen by the loop from
the model's own logits, whatever was guessed, and stop ids, penalties, forced ids and logprobs are the loop's as ever.

The logits of a pass of several tokens differ from those of a step by rounding alone: only where two tokens are equally
good up to that may the chosen one be another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tfinfer.tokens.accept import choose_or_refuse
from tfinfer.tokens.pace import Pace
from tfinfer.tokens.sampling import Draws, FloatArray, History, Ids, SamplingParams, choose

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Draft:
    """Guessed tokens, and the distributions (vocab,) that they were drawn from where the loop has to know these."""

    ids: list[int]
    distributions: list[FloatArray] | None = None


class Drafter(Protocol):
    """What guesses for one prompt."""

    free: bool  # whether a guess costs next to nothing

    def add(self, token: int) -> None: ...
    def kind(self) -> int | None: ...  # how good a guess of now is, judged with its like; None: there is none
    def guess(self) -> int: ...  # the first token of what `propose` would give, of one that is free
    def propose(self, count: int) -> Draft: ...  # `count` tokens at most
    def close(self) -> None: ...


class VerifiesIds(Protocol):
    """What is needed of a decoder: prefill that gives several rows of logits."""

    def open_cache(self, slots: int, capacity: int) -> Any: ...
    def prefill(self, cache: Any, slot: int, ids: Sequence[int], *, keep: int = 1) -> Logits: ...
    def step(self, cache: Any, slots: Sequence[int], ids: Ids) -> Logits: ...


@dataclass(frozen=True)
class Checked:
    """A drafted token that is in the cache already, and the logits behind it."""

    token: int
    logits: Logits  # (vocab,)
    distribution: FloatArray | None


@dataclass
class Row:
    """One prompt: what is known ahead of it, and what became of its drafts.

    snapshot, since: what a model with states goes back to, and the right tokens fed since then. again: those that it
    has to be fed once more after it went back.
    """

    drafter: Drafter
    pace: Pace
    generated: int = 0
    proposed: int = 0
    accepted: int = 0
    kind: int | None = None  # of the last guess
    guess: int | None = None  # a token that was guessed but not fed
    drafts_on: bool = False  # whether there was a draft before, so that the next has no long text to catch up with
    ahead: deque[Checked] = field(default_factory=deque)
    snapshot: Any = None
    since: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)


class Speculating:
    """A decoder for the loop of `Batch`, over another one. Prompts must be prefilled in the order of `drafters`.

    Several rows go together as ever; drafts are made when one is left, for then a pass has room for them.

    Args:
        max_tokens: nothing is drafted past these.
        has_states: the model has states, which go back to a snapshot alone.
        clock: gives seconds.
    """

    def __init__(
        self,
        decoder: VerifiesIds,
        drafters: Iterable[Drafter],
        max_tokens: int,
        *,
        has_states: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.decoder, self.max_tokens, self.has_states, self._clock = decoder, max_tokens, has_states, clock
        self.rows = [Row(drafter, Pace(free=drafter.free, redo=has_states)) for drafter in drafters]
        self._of: dict[int, Row] = {}
        self._last: Row | None = None  # the one that is left

    def close(self) -> None:
        """Let the drafters go."""
        for row in self.rows:
            row.drafter.close()

    def counts(self, index: int) -> tuple[int, int]:
        """How many tokens were drafted for a prompt and checked, and how many of them were right."""
        return self.rows[index].proposed, self.rows[index].accepted

    def open_cache(self, slots: int, capacity: int) -> Any:
        """A cache of the decoder."""
        return self.decoder.open_cache(slots, capacity)

    def prefill(self, cache: Any, slot: int, ids: Sequence[int]) -> Logits:
        """As the decoder's."""
        self._of[slot] = self.rows[len(self._of)]
        return self.decoder.prefill(cache, slot, ids)

    def choose(self, logits: Logits, history: History, params: SamplingParams, draws: Sequence[Draws]) -> Ids:
        """As `sampling.choose`, and in the same distribution; a token drawn from a known one is taken or refused."""
        if self._last is not None and self._last.ahead:
            drafted = self._last.ahead[0]
            if drafted.distribution is not None:
                return choose_or_refuse(logits, history, params, draws[0], drafted.token, drafted.distribution)
        return choose(logits, history, params, draws)

    def step(self, cache: Any, slots: Sequence[int], ids: Ids) -> Logits:
        """As the decoder's, of ids that were chosen from the logits before."""
        for slot, token in zip(slots, ids.tolist()):
            row = self._of[slot]
            row.drafter.add(token)
            row.generated += 1
        if len(slots) > 1:
            return self.decoder.step(cache, slots, ids)
        self._last = row
        return self._step(cache, slots, row, ids, token)

    def _step(self, cache: Any, slots: Sequence[int], row: Row, ids: Ids, token: int) -> Logits:
        if row.ahead:
            checked = row.ahead.popleft()
            self._judge(row, checked.token == token)
            if checked.token == token:
                row.accepted += 1
                row.since.append(token)
                return checked.logits[None]
            self._forget(cache, slots[0], row)
        elif row.guess is not None:
            self._judge(row, row.guess == token, made=False)
        row.kind, row.guess = row.drafter.kind(), None
        if row.again:
            return self._repair(cache, slots[0], row, token)
        draft = self._draft(row)
        if draft is not None:
            return self._verify(cache, slots[0], row, token, draft)
        started = self._clock()
        logits = self.decoder.step(cache, slots, ids)
        row.pace.passed(1, self._clock() - started)
        return logits

    def _judge(self, row: Row, right: bool, *, made: bool = True) -> None:
        assert row.kind is not None
        row.pace.judged(row.kind, right, made=made)

    def _draft(self, row: Row) -> Draft | None:
        """What is worth a pass of several tokens; None where nothing is."""
        if row.kind is None:
            return None
        # A pass gives logits for one token more than it takes drafted ones.
        length = row.pace.length(row.kind, self.max_tokens - row.generated - 1)
        if length:
            started = self._clock()
            draft = row.drafter.propose(length)
            if row.drafts_on:
                row.pace.drafted(len(draft.ids), self._clock() - started)
            row.drafts_on = True
            return draft if draft.ids else None
        row.drafts_on = False
        if row.drafter.free:
            row.guess = row.drafter.guess()
        return None

    def _verify(self, cache: Any, slot: int, row: Row, token: int, draft: Draft) -> Logits:
        """One pass over the token and what was drafted behind it; returns the logits behind the token."""
        row.snapshot = cache.snapshot(slot) if self.has_states else None
        row.since = [token]
        started = self._clock()
        logits = self.decoder.prefill(cache, slot, [token, *draft.ids], keep=1 + len(draft.ids))
        row.pace.passed(1 + len(draft.ids), self._clock() - started)
        row.proposed += len(draft.ids)
        for place, token in enumerate(draft.ids):
            drawn_from = draft.distributions[place] if draft.distributions else None
            row.ahead.append(Checked(token, logits[place + 1], drawn_from))
        return logits[:1]

    def _repair(self, cache: Any, slot: int, row: Row, token: int) -> Logits:
        """Feed the right tokens once more, and the new one with them."""
        right, row.again = [*row.again, token], []
        started = self._clock()
        logits = self.decoder.prefill(cache, slot, right)
        row.pace.repaired(self._clock() - started)
        return logits

    def _forget(self, cache: Any, slot: int, row: Row) -> None:
        """Take back what was drafted and not chosen: the one just refused and all ahead of it."""
        if self.has_states:
            cache.restore(slot, row.snapshot)
            row.again = row.since
        else:
            cache.rewind(slot, cache.length(slot) - 1 - len(row.ahead))
        row.ahead.clear()
