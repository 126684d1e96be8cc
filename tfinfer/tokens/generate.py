"""The loop from logits to tokens, for one prompt or many of different lengths. Knows ids only: no text, no graph.

Anything with `open_cache`, `prefill` and `step` will do as a decoder, so that the loop is tested without a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError, LengthError
from tfinfer.tokens.sampling import (
    History,
    Ids,
    SamplingParams,
    TokenLogprobs,
    best_needed,
    choose,
    choose_among,
    generators,
    top_logprobs,
)

# From logits (rows, vocab), and a generator for each row, to one id for each row.
Choose = Callable[[npt.NDArray[np.float32], History, SamplingParams, Sequence[np.random.Generator]], Ids]
FinishReason = Literal["stop", "length", "cancelled"]


class DecodesIds(Protocol):
    """What the loop needs of a decoder.

    One that `selects` has `step_best` too, which gives the largest logits of each row and their ids.
    """

    def open_cache(self, slots: int, capacity: int) -> Any: ...
    def prefill(self, cache: Any, slot: int, ids: Sequence[int]) -> npt.NDArray[np.float32]: ...
    def step(self, cache: Any, slots: Sequence[int], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Limits:
    """When generation ends, and what is reported of each token.

    forced_last: the id that is the last of `max_tokens`, whatever the model says; None leaves it the choice.
    """

    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    logprobs: int = 0
    forced_last: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("max_tokens", self.max_tokens, 1), ("logprobs", self.logprobs, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"expected {name} to be a whole number of at least {least}, got {value!r}")

    def forced(self, generated: int) -> int | None:
        """The id that must follow so many generated ones; None where the model has the choice."""
        return self.forced_last if generated == self.max_tokens - 1 else None

    def token(self, index: int, token_id: int, generated: int, logprobs: TokenLogprobs | None = None) -> Token:
        """What an id is to prompt `index`, of which it is the `generated`-th: the last one, or not."""
        last = generated >= self.max_tokens
        if token_id in self.stop_ids:
            # A stop id that was forced is no sign that the model was done.
            return Token(index, None, "length" if last and self.forced_last is not None else "stop")
        return Token(index, token_id, "length" if last else None, logprobs)


@dataclass(slots=True)  # not frozen: one is made at every step, and that takes twice as long
class Token:
    """One token of one prompt; with `finish_reason` it is the last, and `token_id` is None if it ends without one."""

    index: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


@dataclass
class _Row:
    """A prompt that is still being continued."""

    index: int
    slot: int
    generated: int = 0


@dataclass
class Batch:
    """Several prompts continued together in one cache; a prompt that ends leaves, the others go on.

    Iterate over `tokens()`; `finish(index)` ends a prompt from outside (a stop string), `cancel` ends them all.

    slots: one per prompt, acquired already; the prompt is appended to what it holds (a source). They are given back.
    held: how many of the first ids of each prompt its slot holds; the rest is prefilled.
    """

    decoder: DecodesIds
    cache: Any
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    limits: Limits
    vocab_size: int
    cancel: threading.Event | None = None
    slots: Sequence[int] | None = None
    held: Sequence[int] = ()
    choose: Choose = choose
    _ended: set[int] = field(default_factory=set)

    def finish(self, index: int) -> None:
        """End a prompt before its next token."""
        self._ended.add(index)

    def tokens(self) -> Generator[Token]:
        """The tokens of all prompts in the order in which they are made."""
        rows = [_Row(index, slot) for index, slot in enumerate(self.slots or ())]
        try:
            history = History(self.prompts, self.vocab_size, self.params)
            draws = generators(self.params, len(self.prompts))
            logits = []
            for index, prompt in enumerate(self.prompts):
                if self.slots is None:
                    rows.append(_Row(index, self.cache.acquire()))
                rest = prompt[self.held[index] :] if self.held else prompt
                logits.append(self.decoder.prefill(self.cache, rows[index].slot, rest)[-1])
            yield from self._continue(rows, np.stack(logits), history, draws)
        finally:
            for row in rows:
                self.cache.release(row.slot)

    def _continue(
        self, rows: list[_Row], logits: Any, history: History, draws: list[np.random.Generator]
    ) -> Iterator[Token]:
        best = best_needed(self.params, self.limits.logprobs) if getattr(self.decoder, "selects", False) else 0
        among: Ids | None = None  # the ids of the logits, where they are not all
        while rows:
            if self.cancel is not None and self.cancel.is_set():
                yield from (Token(row.index, None, "cancelled") for row in rows)
                return
            ids = self._choose(rows, logits, among, history, draws)
            reported = top_logprobs(logits, ids, self.limits.logprobs) if self.limits.logprobs else None
            history.add(ids)
            kept = []
            for place, (row, token_id) in enumerate(zip(list(rows), ids.tolist())):
                row.generated += 1
                token = self.limits.token(row.index, token_id, row.generated, reported[place] if reported else None)
                yield token
                if token.finish_reason is None and row.index not in self._ended:
                    kept.append(place)
            ids, draws = self._keep(rows, kept, ids, history, draws)
            if rows:
                logits, among = self._step([row.slot for row in rows], ids, best)

    def _step(self, slots: list[int], ids: Any, best: int) -> tuple[Any, Ids | None]:
        """The logits behind one id more in each slot; where `best` are enough, these alone and their ids."""
        if not best:
            return self.decoder.step(self.cache, slots, ids), None
        decoder: Any = self.decoder
        logits, among = decoder.step_best(self.cache, slots, ids, best)
        return logits, among

    def _choose(
        self, rows: list[_Row], logits: Any, among: Ids | None, history: History, draws: list[np.random.Generator]
    ) -> Any:
        """One id for each row, (rows,)."""
        forced = self.limits.forced(rows[0].generated)  # all rows have as many
        if forced is not None:
            return np.full(len(rows), forced, np.int64)
        if among is not None:
            return choose_among(logits, among, self.params, draws)
        return self.choose(logits, history, self.params, draws)

    def _keep(self, rows: list[_Row], kept: list[int], ids: Any, history: History, draws: Any) -> Any:
        """Let the rows that ended go."""
        if len(kept) == len(rows):
            return ids, draws
        for place in range(len(rows) - 1, -1, -1):
            if place not in kept:
                self.cache.release(rows.pop(place).slot)
        history.keep(kept)
        return ids[kept], [draws[place] for place in kept]


def check_lengths(prompts: Sequence[Sequence[int]], max_tokens: int, max_length: int, what: str = "a prompt") -> int:
    """The longest sequence of a request. Raises LengthError where it passes `max_length`; `what` is `prompts`' name."""
    longest = max(len(prompt) for prompt in prompts)
    if longest > max_length:
        raise LengthError(
            f"{what} of {longest} tokens is longer than the model's longest length, {max_length}: shorten it"
        )
    if longest + max_tokens > max_length:
        raise LengthError(
            f"{what} of {longest} tokens and max_tokens={max_tokens} would pass the model's longest length, "
            f"{max_length}: max_tokens may be at most {max_length - longest}"
        )
    return longest + max_tokens
