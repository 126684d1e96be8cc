"""What a beam search knows of one prompt: the beams that run, the hypotheses that ended, whether more could improve.

Pure numpy and plain records; nothing of models, caches or slots. The rules are those of `_beam_search` in transformers
5.23 (generation/utils.py), for one prompt at a time: there, too, a prompt of a batch that is done takes nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError, NonFiniteLogitsError
from tfinfer.tokens.generate import FinishReason, Limits

Scores = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_STEEPEST = 5.0  # of the length penalty: even a million tokens to this power are far inside float32
_BLOCK = 64  # scores that share one maximum in the search for the largest, or a few more
_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class BeamParams:
    """How wide to search and what to return; raises InputError for values that make no sense.

    num_beams: sequences continued together per prompt.
    length_penalty: a hypothesis of n tokens, the stop id among them, scores its log-probability / n ** length_penalty:
        above 0 favours long ones, below 0 short ones.
    early_stopping: True ends a prompt at its `num_beams`-th hypothesis, False where the best running beam, scored at
        its present length, is no better than the worst hypothesis, "never" where it cannot become better.
    num_return_sequences: hypotheses per prompt, best first.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        _require(_is_count(self.num_beams), "num_beams", "a whole number of at least 1", self.num_beams)
        penalty = self.length_penalty
        number = isinstance(penalty, int | float | np.floating) and not isinstance(penalty, bool)
        steepness = f"a number from {-_STEEPEST:g} to {_STEEPEST:g}"
        _require(number and abs(penalty) <= _STEEPEST, "length_penalty", steepness, penalty)  # NaN is not <= either
        known = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _require(known, "early_stopping", 'True, False or "never"', self.early_stopping)
        returned = self.num_return_sequences
        most = f"from 1 to num_beams={self.num_beams}: ask for fewer sequences or for more beams"
        _require(_is_count(returned) and returned <= self.num_beams, "num_return_sequences", most, returned)


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def _require(holds: object, name: str, expected: str, got: object) -> None:
    if not holds:
        raise InputError(f"{name}: expected {expected}; got {got!r}")


@dataclass(frozen=True)
class Hypothesis:
    """One continuation of a prompt; a stop id is counted by its score but is not part of `token_ids`."""

    token_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason


class Hypotheses:
    """The beams and hypotheses of one prompt. At first there is one beam without tokens.

    counted_before: ids at the end of the prompt that lengths count as if they had been generated, as transformers does
        with the first ids that it forces on a target.
    tokens: per running beam, best first, its generated ids.
    parents: (beams,) the beam of the step before that each continues; ids: (beams,) by which id.
    done: whether nothing that is returned can change any more.
    """

    def __init__(self, params: BeamParams, limits: Limits, counted_before: int = 0) -> None:
        self.params, self.limits, self.counted_before = params, limits, counted_before
        # Of so many candidates at least `num_beams` go on, even if all the others are stop ids.
        self._candidates = max(2, 1 + len(limits.stop_ids)) * params.num_beams
        self._stop_ids = np.array(sorted(limits.stop_ids), np.int64)
        self._scores = np.zeros(1, np.float32)
        self._ended: list[Hypothesis] = []
        self._length = 0
        self.tokens: list[tuple[int, ...]] = [()]
        self.parents: Ids = np.zeros(1, np.int64)
        self.ids: Ids = np.zeros(0, np.int64)
        self.done = False

    def advance(self, log_probs: Scores) -> None:
        """Continue every beam by one id; log_probs: (beams, vocab), of ids after each beam; -inf forbids one.

        Raises NonFiniteLogitsError for NaN, +inf, or where nothing may follow and nothing has ended.
        """
        forced = self.limits.forced(self._length)
        if forced is not None:
            log_probs = np.full_like(log_probs, -math.inf)
            log_probs[:, forced] = 0
        totals = (self._scores[:, None] + log_probs).ravel()
        places = largest(totals, self._candidates)
        if not places.size and not self._ended:
            raise NonFiniteLogitsError(
                "expected a token that may follow one of the beams; got scores of -inf alone: look for a bias or a "
                "constraint that forbids every token"
            )
        parents, ids = np.divmod(places, log_probs.shape[1])
        self._length += 1
        at_limit = self._length >= self.limits.max_tokens
        ends = np.isin(ids, self._stop_ids) | at_limit
        width = self.params.num_beams
        # What ends counts among the best `num_beams` only; the rest are there to go on where these end.
        ending, going = np.flatnonzero(ends[:width]), np.flatnonzero(~ends)[:width]
        self._end(parents[ending], ids[ending], totals[places[ending]])
        self.parents, self.ids, self._scores = parents[going], ids[going], totals[places[going]]
        chosen = zip(self.parents.tolist(), self.ids.tolist())
        self.tokens = [self.tokens[parent] + (token,) for parent, token in chosen]
        self.done = not self.tokens or self._cannot_improve()

    def _end(self, parents: Ids, ids: Ids, totals: Scores) -> None:
        for parent, token_id, score in zip(parents.tolist(), ids.tolist(), self._per_length(totals, self._length)):
            token = self.limits.token(parent, token_id, self._length)
            assert token.finish_reason is not None, "it neither stops nor is the last"
            tokens = self.tokens[parent] if token.token_id is None else self.tokens[parent] + (token_id,)
            self._ended.append(Hypothesis(tokens, score, token.finish_reason))
        self._ended = _best(self._ended, self.params.num_beams)

    def _cannot_improve(self) -> bool:
        """Whether the search ends here: `_check_early_stop_heuristic` and `_beam_search_has_unfinished_sequences`."""
        if len(self._ended) < self.params.num_beams:
            return False
        if self.params.early_stopping is True:
            return True
        far = self.params.early_stopping == "never" and self.params.length_penalty > 0
        hoped = self._per_length(self._scores[:1], self.limits.max_tokens if far else self._length)
        return hoped[0] <= self._ended[-1].score

    def _per_length(self, totals: Scores, length: int) -> list[float]:
        """In float32, as torch divides, so that what is equal there is equal here."""
        counted = length + self.counted_before
        scores: list[float] = (totals / np.float32(counted**self.params.length_penalty)).tolist()
        return scores

    def best(self) -> list[Hypothesis]:
        """The hypotheses to return, best first; before the search is done the running beams are among them, cancelled.

        Fewer than asked for where there are no more: a tiny vocabulary, a constraint, a search cancelled early.
        """
        found = self._ended
        if not self.done:
            running = self._per_length(self._scores, max(1, self._length))
            found = found + [Hypothesis(tokens, score, "cancelled") for tokens, score in zip(self.tokens, running)]
        return _best(found, self.params.num_return_sequences)


def _best(hypotheses: Sequence[Hypothesis], most: int) -> list[Hypothesis]:
    """The best, falling, the earlier one first among equals."""
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:most]


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> Scores:
    """Log-probabilities (rows, vocab) of logits (rows, vocab), in float32.

    Raises NonFiniteLogitsError where a row has NaN, +inf or nothing finite.
    """
    top = logits.max(axis=1, keepdims=True)  # a NaN is passed on
    if not np.isfinite(top).all():
        raise NonFiniteLogitsError(
            f"row {int(np.argmin(np.isfinite(top)))}: expected finite logits to choose from; got NaN, +inf or "
            "no finite entry at all: look for overflow in the model (fp16 has the smallest range)"
        )
    scores: Scores = (logits - top).astype(np.float32, copy=False)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores


def largest(scores: Scores, most: int) -> Ids:
    """Where the `most` largest of (n,) stand, falling, the first among equals first; -inf is never among them.

    As torch.topk, which leaves the order of equals open. Raises NonFiniteLogitsError for NaN and +inf.
    """
    # Every `width`-th score is of one block. The maximum of each, taken of whole rows at once, is read first; a block
    # whose maximum is below the `most`-th of them is not looked at again, and no equal is lost at the edge.
    width = max(1, len(scores) // _BLOCK)
    whole = len(scores) // width * width
    tops = scores[:whole].reshape(-1, width).max(axis=0)  # (width,)
    if whole < len(scores):
        rest = scores[whole:]
        np.maximum(tops[: len(rest)], rest, out=tops[: len(rest)])
    if not tops.max() < math.inf:
        raise NonFiniteLogitsError(
            "expected scores that are numbers or -inf; got NaN or +inf: look at what adjusts the scores"
        )
    bound = np.partition(tops, width - most)[width - most] if width > most else _LOWEST
    blocks = np.flatnonzero(tops >= max(bound, _LOWEST))
    places: Ids = (blocks + np.arange(0, len(scores), width)[:, None]).ravel()  # rising
    places = places[places < len(scores)]
    found: Ids = places[scores[places] >= max(bound, _LOWEST)]
    return found[np.argsort(-scores[found], kind="stable")[:most]]
