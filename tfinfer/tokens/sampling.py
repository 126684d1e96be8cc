"""Turns logits into chosen ids: bias, penalties, temperature, top-k, top-p, min-p, one draw per row.

Pure functions of (logits, history, parameters, generators), vectorised over rows. Knows nothing of models, texts,
stop rules or how many rows are still running.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError, NonFiniteLogitsError

FloatArray = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]

# A bias of +inf forces a token. Added as it is, it would turn the softmax into NaN; this is as good as infinite.
_FORCED = 1e30


class Draws(Protocol):
    """Where random numbers come from, numpy's generator or another."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How ids are chosen; `temperature=0.0` is greedy and ignores top-k, top-p, min-p and the seed."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature = _finite("temperature", self.temperature)
        _require(temperature >= 0, "temperature", "a number >= 0; 0 is greedy", self.temperature)
        _require(_is_count(self.top_k), "top_k", "an integer >= 0; 0 keeps every token", self.top_k)
        _require(0 < _finite("top_p", self.top_p) <= 1, "top_p", "above 0 and at most 1; 1 is off", self.top_p)
        _require(0 <= _finite("min_p", self.min_p) < 1, "min_p", "at least 0 and below 1; 0 is off", self.min_p)
        repetition = _finite("repetition_penalty", self.repetition_penalty)
        _require(repetition > 0, "repetition_penalty", "above 0; 1 is off", self.repetition_penalty)
        _finite("presence_penalty", self.presence_penalty)
        _finite("frequency_penalty", self.frequency_penalty)
        _check_bias(self.logit_bias)
        _require(self.seed is None or _is_count(self.seed), "seed", "None or an integer >= 0", self.seed)

    @property
    def needs_history(self) -> bool:
        """Whether any penalty looks at the ids so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse a bias on ids that the model does not have."""
        beyond = sorted(token for token in self.logit_bias or () if token >= vocab_size)
        if beyond:
            raise InputError(f"logit_bias: expected ids below {vocab_size}, the vocabulary; got {beyond[:8]}")


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise InputError(f"{name}: expected {expected}; got {got!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _finite(name: str, value: object) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    _require(number and math.isfinite(value), name, "a finite number", value)  # type: ignore[arg-type]
    return float(value)  # type: ignore[arg-type]


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    _require(isinstance(bias, Mapping), "logit_bias", "a mapping of token id to number", bias)
    assert isinstance(bias, Mapping)
    for token, value in bias.items():
        _require(_is_count(token), "logit_bias", "token ids that are integers >= 0", token)
        number = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
        _require(number, f"logit_bias[{token}]", "a number that is not NaN; -inf forbids the token", value)


class History:
    """Which ids every row has seen, counted only as far as the penalties ask; greedy keeps nothing."""

    def __init__(self, prompts: Sequence[Iterable[int]], vocab_size: int, params: SamplingParams) -> None:
        self._prompt: npt.NDArray[np.int32] | None = None  # (rows, vocab) counts of prompt ids
        self._generated: npt.NDArray[np.int32] | None = None  # (rows, vocab) counts of generated ids
        if params.needs_history:
            self._generated = np.zeros((len(prompts), vocab_size), np.int32)
        if params.repetition_penalty != 1:
            counts = [np.bincount(np.fromiter(ids, np.int64), minlength=vocab_size) for ids in prompts]
            self._prompt = np.array(counts, np.int32).reshape(len(prompts), vocab_size)

    def add(self, ids: Ids) -> None:
        """Count one generated id per row; ids: (rows,)."""
        if self._generated is not None:
            self._generated[np.arange(len(ids)), ids] += 1

    def keep(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Keep these rows, in this order; a row may appear twice."""
        if self._prompt is not None:
            self._prompt = self._prompt[np.asarray(rows, np.int64)]
        if self._generated is not None:
            self._generated = self._generated[np.asarray(rows, np.int64)]

    def copy(self) -> Self:
        """One that may go on by itself."""
        twin = copy.copy(self)
        twin._generated = None if self._generated is None else self._generated.copy()
        return twin  # what the prompts hold is never changed in place

    def penalise(self, logits: FloatArray, params: SamplingParams) -> None:
        """Change logits (rows, vocab) in place by the repetition, presence and frequency penalties."""
        if self._generated is None:
            return
        if self._prompt is not None:  # over prompt and generated ids, as transformers does
            seen = (self._prompt > 0) | (self._generated > 0)
            penalty = params.repetition_penalty
            np.copyto(logits, np.where(logits > 0, logits / penalty, logits * penalty), where=seen)
        if params.presence_penalty or params.frequency_penalty:  # over generated ids only, as OpenAI does
            logits -= params.presence_penalty * (self._generated > 0) + params.frequency_penalty * self._generated


def generators(params: SamplingParams, rows: int) -> list[np.random.Generator]:
    """Make one generator per row, all from the same seed, so that a row draws the same alone or in a batch."""
    return [np.random.default_rng(params.seed) for _ in range(rows)]


def choose(
    logits: npt.NDArray[np.float32],
    history: History,
    params: SamplingParams,
    generators: Sequence[Draws],
) -> Ids:
    """Choose one id per row; logits: (rows, vocab), left as they are; returns (rows,)."""
    logits, best = _adjusted(logits, history, params)
    if params.temperature == 0:
        return best
    assert len(generators) == len(logits)
    uniform = np.array([generator.random() for generator in generators])  # (rows,)
    weights, ids = _weights(logits, best, params)
    picked = _invert(weights, uniform)
    return picked if ids is None else np.asarray(ids[np.arange(len(ids)), picked], np.int64)


def best_needed(params: SamplingParams, logprobs: int = 0) -> int:
    """How many of a row's largest logits are all that `choose` looks at; 0 where it looks at every one."""
    if params.logit_bias or params.needs_history or logprobs:
        return 0
    return 1 if params.temperature == 0 else int(params.top_k)


def choose_among(logits: npt.NDArray[np.float32], ids: Ids, params: SamplingParams, generators: Sequence[Draws]) -> Ids:
    """As `choose`, of the `best_needed` largest logits of each row, falling, the lowest id first among equals.

    logits, ids: (rows, k). The same draws give the same ids.
    """
    places = choose(logits, History((), 0, params), params, generators)
    return np.asarray(ids[np.arange(len(ids)), places], np.int64)


def distribution(logits: npt.NDArray[np.float32], history: History, params: SamplingParams) -> FloatArray:
    """The probabilities by which `choose` chooses, (rows, vocab); greedy, 1 for the one that it takes."""
    logits, best = _adjusted(logits, history, params)
    found = np.zeros(logits.shape, np.float64)
    if params.temperature == 0:
        found[np.arange(len(best)), best] = 1
        return found
    weights, ids = _weights(logits, best, params)
    weights = weights / weights.sum(axis=1, keepdims=True)
    if ids is None:
        return np.asarray(weights, np.float64)
    np.put_along_axis(found, ids, weights, axis=1)
    return found


def _best(logits: FloatArray) -> Ids:
    """Return the first largest id per row; argmax stops at a NaN, so one look at its value checks the whole row."""
    if len(logits) == 1:  # behind a step each operation of numpy comes from memory: as few as can be
        row = logits[0]
        best = row.argmax()
        if math.isfinite(row[best]):
            return np.array([best], np.int64)
    ids = logits.argmax(axis=1)
    finite = np.isfinite(logits[np.arange(len(logits)), ids])
    if not finite.all():
        row = int(np.argmin(finite))
        raise NonFiniteLogitsError(
            f"row {row}: expected finite logits to choose from; got NaN, +inf or no finite entry at all; "
            "look for overflow in the model (fp16 has the smallest range) or a logit_bias that forbids every token"
        )
    return np.asarray(ids, np.int64)


def _adjusted(logits: FloatArray, history: History, params: SamplingParams) -> tuple[FloatArray, Ids]:
    """Logits with bias and penalties, and the best id of each row."""
    best = _best(logits)
    if not (params.logit_bias or params.needs_history):
        return logits, best
    logits = logits.astype(np.float64)
    if params.logit_bias:
        tokens = np.fromiter(params.logit_bias.keys(), np.int64)
        bias = np.fromiter(params.logit_bias.values(), np.float64)
        logits[:, tokens] += np.minimum(bias, _FORCED)
    with np.errstate(over="ignore", invalid="ignore"):  # a penalty that overflows is found by the finite check
        history.penalise(logits, params)
    return logits, _best(logits)


def _weights(logits: FloatArray, best: Ids, params: SamplingParams) -> tuple[FloatArray, Ids | None]:
    """What the draw is by: (rows, vocab), or (rows, k) and the ids that these are, falling."""
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature makes the others -inf, which is meant
        scores = logits.astype(np.float64)
        scores -= np.take_along_axis(scores, best[:, None], axis=1)
        scores /= params.temperature  # (rows, vocab), the best is 0
        weights = np.exp(scores)  # (rows, vocab), the largest is 1
    ids = None
    if params.top_k or params.top_p < 1:
        total = weights.sum(axis=1, keepdims=True)
        ids = _largest(scores, _candidates(weights, total, params))
        weights = np.take_along_axis(weights, ids, axis=1)  # (rows, k), falling
        if params.top_k:
            total = weights.sum(axis=1, keepdims=True)
        reached = np.cumsum(weights, axis=1)[:, :-1] >= params.top_p * total
        if params.top_p < 1:
            weights[:, 1:][reached] = 0  # what comes before has reached top_p already
    if params.min_p:
        weights[weights < params.min_p] = 0
    return weights, ids


def _candidates(weights: FloatArray, total: FloatArray, params: SamplingParams) -> int:
    """Return how many of the largest have to be sorted.

    All tokens below (1 - top_p) / vocab together weigh less than 1 - top_p, so top-p never reaches them.
    """
    if params.top_k:
        return int(params.top_k)
    needed = weights >= (1 - params.top_p) / weights.shape[1] * total
    return int(np.count_nonzero(needed, axis=1).max())


def _largest(scores: FloatArray, k: int) -> Ids:
    """Return the ids of exactly the k largest per row, falling, the lowest id first among equals; (rows, k)."""
    rows, vocab = scores.shape
    if k >= vocab:
        return np.asarray(np.argsort(-scores, axis=1, kind="stable"), np.int64)
    bound = np.partition(scores, vocab - k, axis=1)[:, vocab - k, None]  # the k-th largest
    above, equal = scores > bound, scores == bound
    room = k - above.sum(axis=1, keepdims=True)
    kept = above | (equal & (np.cumsum(equal, axis=1) <= room))
    ids = np.nonzero(kept)[1].reshape(rows, k)
    order = np.argsort(-np.take_along_axis(scores, ids, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(ids, order, axis=1), np.int64)


def _invert(weights: FloatArray, uniform: FloatArray) -> Ids:
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    picked = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=1)
    # The product may round up to the whole sum; the last token with any weight is meant then.
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)
    return np.asarray(np.minimum(picked, last), np.int64)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a chosen token and of the most likely ones, falling, in the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def top_logprobs(logits: npt.NDArray[np.float32], ids: Ids, n: int) -> list[TokenLogprobs]:
    """Return, per row, the log-softmax of the logits as given at `ids` (rows,) and at the `n` most likely ids."""
    _require(_is_count(n), "logprobs", "an integer >= 0", n)
    best = _best(logits)
    scores = logits.astype(np.float64)
    scores -= np.take_along_axis(scores, best[:, None], axis=1)
    with np.errstate(under="ignore"):
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))  # (rows, vocab)
    likely = _largest(scores, n) if n else np.zeros((len(logits), 0), np.int64)
    return [
        TokenLogprobs(int(token), float(row[token]), tuple((int(i), float(row[i])) for i in top))
        for row, token, top in zip(scores, ids, likely)
    ]
