"""Drafts of a smaller model: it continues the text in a cache of its own, and goes back where its guess was wrong.

Knows ids only, and anything that decodes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tfinfer.tokens.generate import DecodesIds
from tfinfer.tokens.sampling import Draws, History, SamplingParams, choose, distribution
from tfinfer.tokens.speculate import Draft


class Places(Draws, Protocol):
    """Where a draft's random numbers come from."""

    def at(self, position: int) -> None: ...  # what comes next is the number of this generated token


class Own:
    """Numbers that nobody else draws: the loop takes or refuses what was drawn by its distribution."""

    def __init__(self, seed: int | None = None) -> None:
        self._generator = np.random.default_rng(seed)

    def at(self, position: int) -> None:
        """All places are alike."""

    def random(self) -> float:
        return self._generator.random()


class Shared:
    """The numbers that the loop will draw with this seed: what a like distribution gives for them is the guess.

    So a draft can do without a distribution, and with a seed the text does not depend on what was drafted.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator, self._drawn, self._next = np.random.default_rng(seed), list[float](), 0

    def at(self, position: int) -> None:
        self._next = position

    def random(self) -> float:
        while len(self._drawn) <= self._next:
            self._drawn.append(self._generator.random())
        self._next += 1
        return self._drawn[self._next - 1]


class ModelDraft:
    """Guesses of another model for one prompt.

    Args:
        decoder: of the model that drafts; the cache is opened with the first guess.
        params: as for what is generated, so that the guesses are of the same distribution.
        draws: `Own` where the loop asks for distributions, `Shared` where it chooses by itself.
        max_length: of the model that drafts; past it there are no guesses.
        has_states: the model has states, which go back to a snapshot alone.
    """

    free = False

    def __init__(
        self,
        decoder: DecodesIds,
        prompt: Sequence[int],
        params: SamplingParams,
        draws: Places,
        vocab_size: int,
        *,
        capacity: int,
        max_length: int,
        has_states: bool = False,
    ) -> None:
        self.decoder, self.params, self.draws, self.has_states = decoder, params, draws, has_states
        self.capacity, self.max_length = min(capacity, max_length), max_length
        self._ids, self._prompt = list(prompt), len(prompt)
        self._history = History([prompt], vocab_size, params)
        self._cache: Any = None
        self._slot = 0
        self._fed: list[int] = []  # what the slot holds
        self._known: tuple[int, Any] = (0, None)  # how much of it is known to be right, and the snapshot of that

    def add(self, token: int) -> None:
        """The text goes on with `token`."""
        self._ids.append(token)
        self._history.add(np.array([token]))

    def kind(self) -> int | None:
        """All guesses are of one kind; there are none where the text is too long for this model."""
        return 0 if len(self._ids) < self.max_length else None

    def guess(self) -> int:
        """As the first of a draft, at its cost."""
        return self.propose(1).ids[0]

    def propose(self, count: int) -> Draft:
        """At most `count` tokens, fewer where the model has no more room."""
        count = min(count, self.max_length - len(self._ids))
        logits = self._caught_up()
        self.draws.at(len(self._ids) - self._prompt)
        history = self._history.copy()
        ids: list[int] = []
        distributions = []
        while True:
            if not isinstance(self.draws, Shared):
                distributions.append(distribution(logits, history, self.params)[0])
            token = choose(logits, history, self.params, [self.draws])
            ids.append(int(token[0]))
            if len(ids) == count:
                return Draft(ids, distributions or None)
            history.add(token)
            logits = self.decoder.step(self._cache, [self._slot], token)
            self._fed.append(ids[-1])

    def _caught_up(self) -> Any:
        """Logits behind the text, (1, vocab), when the slot holds exactly that."""
        if self._cache is None:
            self._cache = self.decoder.open_cache(1, self.capacity)
            self._slot = self._cache.acquire()
        else:
            self._go_back()
        missing = self._ids[len(self._fed) :]
        if self._fed and len(missing) == 1:
            logits = self.decoder.step(self._cache, [self._slot], np.array(missing))
        else:
            logits = self.decoder.prefill(self._cache, self._slot, missing)
        self._fed += missing
        self._known = (len(self._fed), self._cache.snapshot(self._slot) if self.has_states else None)
        return logits

    def _go_back(self) -> None:
        """Forget what was guessed wrongly, and the last token, whose logits are needed again."""
        length, snapshot = self._known
        while length < min(len(self._fed), len(self._ids) - 1) and self._fed[length] == self._ids[length]:
            length += 1
        if length == len(self._fed):
            return
        if self.has_states:
            length = self._known[0]
            self._cache.restore(self._slot, snapshot)
        else:
            self._cache.rewind(self._slot, length)
        del self._fed[length:]

    def close(self) -> None:
        """Let the cache go."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None
