"""Takes or refuses drafted tokens so that what is generated is distributed as if nothing had been drafted.

Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"; Chen et al. 2023, "Accelerating
large language model decoding with speculative sampling". Knows numbers only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tfinfer.tokens.sampling import Draws, FloatArray, History, Ids, SamplingParams, distribution


def choose_or_refuse(
    logits: npt.NDArray[np.float32],
    history: History,
    params: SamplingParams,
    draw: Draws,
    token: int,
    drawn_from: FloatArray,
) -> Ids:
    """The token that was drawn from q, `drawn_from` (vocab,), with probability min(1, p/q) of it; else one from p - q.

    p is the distribution of `logits` (1, vocab) with everything that `params` asks for, so that a token x comes with
    q(x) min(1, p(x)/q(x)) + P(refused) (p(x) - q(x))+ / sum (p - q)+ = p(x). Returns (1,).
    """
    p = distribution(logits, history, params)[0]
    if draw.random() * drawn_from[token] < p[token]:
        return np.array([token])
    rest = np.maximum(p - drawn_from, 0)
    rest = rest if rest.any() else p  # the two are one up to rounding
    cumulative = np.cumsum(rest)
    picked = int(np.searchsorted(cumulative, draw.random() * cumulative[-1], side="right"))
    return np.array([min(picked, int(np.flatnonzero(rest)[-1]))])
