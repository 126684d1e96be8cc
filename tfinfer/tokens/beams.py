"""Beam search: several continuations of every prompt kept together, the most likely ones returned.

The same tokens as transformers' `generate(num_beams=...)`. All beams of all prompts go through one decoder step, each
row at its own length. Reordering renames slots and copies next to nothing: see `BeamSlots`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError
from tfinfer.tokens.generate import DecodesIds, Limits
from tfinfer.tokens.hypotheses import BeamParams, Hypotheses, Hypothesis, Ids, Scores, log_softmax
from tfinfer.tokens.sampling import History, SamplingParams

_LARGE = 1e30  # the most that a bias adds, so that no sum of them passes float32


@dataclass(frozen=True)
class Beam:
    """One row of scores: which prompt, what it has generated so far, and which row of the last call it continues.

    At first there is one row per prompt, without tokens, and `parent` is the row itself.
    """

    prompt: int
    token_ids: tuple[int, ...]
    parent: int


# From log-probabilities (rows, vocab), float32, which it may change, and the beam of every row, to (rows, vocab).
# -inf forbids a token. What comes back is added up as it is, without making it a distribution again, as transformers
# does with what its logits processors return.
Adjust = Callable[[Scores, Sequence[Beam]], Scores]


def beam_search(
    decoder: DecodesIds,
    cache: Any,
    prompts: Sequence[Sequence[int]],
    params: BeamParams,
    limits: Limits,
    vocab_size: int,
    *,
    slots: Sequence[int] | None = None,
    adjust: Adjust | None = None,
    cancel: threading.Event | None = None,
    counted_before: int = 0,
) -> list[list[Hypothesis]]:
    """Continue every prompt by beam search, as transformers 5.23 does each alone (`_beam_search`).

    Args:
        cache: has room for `num_beams` slots per prompt; all that are used are given back, `slots` among them.
        prompts: ids, of any lengths.
        slots: one per prompt, acquired already; the prompt is appended to what it holds (a prefix, a source).
        adjust: changes the log-probabilities before they are added up; see `Adjust` and `Penalties`.
        cancel: where it is set before a step, what there is comes back, unfinished beams as "cancelled".
        counted_before: ids at the end of every prompt that `length_penalty` counts as generated; see `Hypotheses`.

    Returns at most `num_return_sequences` hypotheses per prompt, best first. Raises InputError for arguments that do
    not fit together and NonFiniteLogitsError where nothing can be chosen.
    """
    _check(prompts, limits, vocab_size, slots)
    search = _Search(decoder, cache, adjust, cancel)
    found = [Hypotheses(params, limits, counted_before) for _ in prompts]
    try:
        return search.run(prompts, slots, found)
    finally:
        search.release()


def _check(prompts: Sequence[Sequence[int]], limits: Limits, vocab_size: int, slots: Sequence[int] | None) -> None:
    if limits.logprobs:
        raise InputError(f"a beam search reports no logprobs: expected logprobs=0, got {limits.logprobs}; see `score`")
    if slots is not None and len(set(slots)) != len(prompts):
        raise InputError(f"expected one slot for each of {len(prompts)} prompts, got {list(slots)}")
    if sum(0 <= token < vocab_size for token in limits.stop_ids) == vocab_size:
        raise InputError(f"all {vocab_size} ids are stop ids: expected one at least that a beam may go on with")


class BeamSlots:
    """The slots of one prompt's beams. After a choice, every new beam is given one that holds what its parent held.

    The first child of a parent takes over its slot, and nothing moves. Only further children need a copy, made into
    the slot of a beam that died; and since two beams of one prompt are the same up to where they parted, bit by bit,
    only the positions after that are copied.
    """

    def __init__(self, cache: Any, slot: int) -> None:
        self.cache, self.slots = cache, [slot]
        self._places = [0]  # of the running beams in `slots`, best first
        self._shared = np.zeros((1, 1), np.int64)

    def fork(self, beams: int) -> None:
        """Have `beams` slots that hold what the first one does."""
        for _ in range(beams - len(self.slots)):
            self.slots.append(self.cache.fork(self.slots[0]))
        # (beams, beams): how many of their first positions two slots have in common
        self._shared = np.full((beams, beams), self.cache.length(self.slots[0]))

    def release(self) -> None:
        """Give all of them back."""
        while self.slots:
            self.cache.release(self.slots.pop())

    def follow(self, parents: Ids) -> list[int]:
        """The slots of the new beams; parents: (new beams,), which beam each continues."""
        sources = [self._places[parent] for parent in parents.tolist()]
        length = self.cache.length(self.slots[sources[0]])
        free = [place for place in range(len(self.slots)) if place not in sources]
        origins = np.arange(len(self.slots))  # from which place each slot has what it holds now
        self._places = []
        for source in sources:
            place = source
            if source in self._places:
                place = max(free, key=lambda other: int(self._shared[source, other]))
                free.remove(place)
                start = int(self._shared[source, place])
                self.cache.copy_positions(self.slots[source], self.slots[place], start, length)
                origins[place] = source
            self._places.append(place)
        self._shared = self._shared[np.ix_(origins, origins)]
        self._shared[origins[:, None] == origins] = length  # children of one parent part here
        return [self.slots[place] for place in self._places]


class Penalties:
    """The bias and penalties of `SamplingParams` as an `Adjust` of one search, in the order of `sampling.choose`.

    They act on log-probabilities, as in transformers. A bias of +inf leaves the tokens that have it as likely as they
    are and forbids all others: added up, it would drown what tells beams apart.
    """

    def __init__(self, params: SamplingParams, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        params.check_vocab(vocab_size)
        self.params, self._history = params, History(prompts, vocab_size, params)
        bias = params.logit_bias or {}
        self._tokens = np.array(list(bias), np.int64)
        values = np.array([0 if value == math.inf else value for value in bias.values()], np.float64)
        self._bias = np.where(values < -_LARGE, -math.inf, np.minimum(values, _LARGE)).astype(np.float32)
        forced = [token for token, value in bias.items() if value == math.inf]
        self._others = np.delete(np.arange(vocab_size), forced) if forced else np.zeros(0, np.int64)

    def __call__(self, scores: Scores, beams: Sequence[Beam]) -> Scores:
        if beams[0].token_ids:  # all beams are equally long; at first they are the prompts themselves
            self._history.keep([beam.parent for beam in beams])
            self._history.add(np.array([beam.token_ids[-1] for beam in beams], np.int64))
        scores[:, self._tokens] += self._bias
        scores[:, self._others] = -math.inf
        self._history.penalise(scores, self.params)
        return scores


@dataclass
class _Prompt:
    """One prompt in search of its continuations; `first` is its first row among the scores of the last step."""

    index: int
    hypotheses: Hypotheses
    slots: BeamSlots
    first: int

    def beams(self) -> list[Beam]:
        parents = (self.first + self.hypotheses.parents).tolist()
        return [Beam(self.index, tokens, parent) for tokens, parent in zip(self.hypotheses.tokens, parents)]


class _Search:
    """All prompts of one call. Whoever runs it calls `release` in the end, however it ends."""

    def __init__(self, decoder: DecodesIds, cache: Any, adjust: Adjust | None, cancel: threading.Event | None) -> None:
        self.decoder, self.cache, self.adjust, self.cancel = decoder, cache, adjust, cancel
        self._held: list[BeamSlots] = []

    def release(self) -> None:
        for slots in self._held:
            slots.release()

    def run(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int] | None, found: Sequence[Hypotheses]
    ) -> list[list[Hypothesis]]:
        """found: what is known of each prompt, nothing at first."""
        self._held = [BeamSlots(self.cache, slot) for slot in slots or ()]
        searched = []
        logits = []
        for index, ids in enumerate(prompts):
            if slots is None:
                self._held.append(BeamSlots(self.cache, self.cache.acquire()))
            held = self._held[index]
            logits.append(self.decoder.prefill(self.cache, held.slots[0], ids)[-1])
            held.fork(found[index].params.num_beams)
            searched.append(_Prompt(index, found[index], held, index))
        self._continue(list(searched), np.stack(logits))
        return [prompt.hypotheses.best() for prompt in searched]

    def _continue(self, running: list[_Prompt], logits: npt.NDArray[np.float32]) -> None:
        """logits: (rows, vocab), of all beams of one prompt after the other."""
        while not (self.cancel is not None and self.cancel.is_set()):
            scores = log_softmax(logits)
            if self.adjust is not None:
                scores = self.adjust(scores, [beam for prompt in running for beam in prompt.beams()])
            first = 0
            for prompt in running:
                rows = len(prompt.hypotheses.tokens)
                prompt.hypotheses.advance(scores[first : first + rows])
                prompt.first, first = first, first + rows
                if prompt.hypotheses.done:
                    prompt.slots.release()
            running = [prompt for prompt in running if not prompt.hypotheses.done]
            if not running:
                return
            logits = self._step(running)

    def _step(self, running: Sequence[_Prompt]) -> npt.NDArray[np.float32]:
        """Logits after every running beam; (beams, vocab), prompt by prompt, best beam first."""
        slots = [slot for prompt in running for slot in prompt.slots.follow(prompt.hypotheses.parents)]
        ids = np.concatenate([prompt.hypotheses.ids for prompt in running])
        # Slots are given in the order of their rows, so that the cache has none to exchange.
        order = np.argsort([self.cache.row(slot) for slot in slots])
        logits = self.decoder.step(self.cache, [slots[place] for place in order], ids[order])
        return logits[np.argsort(order)]
