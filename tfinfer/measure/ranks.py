"""Whether one side of a measurement is really slower: small tests on ranks and signs, of numpy alone.

Times are skewed and have outliers, so nothing here takes them for normal. Knows nothing of what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EXACT_UP_TO = 400  # of the product of both sizes; beyond it the normal approximation is as good


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(U of `second`, two-sided p) of the hypothesis that neither side tends to be larger.

    U counts the pairs in which `second` is larger, a tie for half of one. p is exact for few samples without ties,
    else by the normal approximation, corrected for ties and for continuity.
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    n, m = len(x), len(y)
    pooled = np.concatenate([x, y])
    _, inverse, counts = np.unique(pooled, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    u = float(ranks[n:].sum() - m * (m + 1) / 2)
    if len(counts) == n + m and n * m <= EXACT_UP_TO:
        return u, _exact(u, n, m)
    return u, _normal(u, n, m, counts)


def _exact(u: float, n: int, m: int) -> float:
    """From the number of orders that give each U: the coefficients of the Gaussian binomial of n + m over m."""
    ways = np.zeros(n * m + 1)
    ways[0] = 1
    for i in range(1, m + 1):
        for at in range(n * m, n + i - 1, -1):  # times 1 - q^(n + i)
            ways[at] -= ways[at - n - i]
        for at in range(i, n * m + 1):  # over 1 - q^i
            ways[at] += ways[at - i]
    extreme = max(u, n * m - u)
    return min(1.0, 2 * float(ways[math.ceil(extreme) :].sum()) / math.comb(n + m, m))


def _normal(u: float, n: int, m: int, counts: npt.NDArray[np.int64]) -> float:
    total = n + m
    ties = float((counts.astype(np.float64) ** 3 - counts).sum()) / (total * (total - 1)) if total > 1 else 0.0
    spread: float = math.sqrt(n * m / 12 * (total + 1 - ties))
    if spread == 0:
        return 1.0
    away: float = max(0.0, abs(u - n * m / 2) - 0.5) / spread
    return math.erfc(away / math.sqrt(2))


def sign_test(wins: int, rounds: int) -> float:
    """One-sided p of at least so many wins where a win and a loss are equally likely."""
    ways = sum(math.comb(rounds, k) for k in range(wins, rounds + 1))
    return float(ways / 2**rounds)


def ratio_of_medians(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Median of `second` over that of `first`, and both ends of its bootstrap interval; the same in every call."""
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    rng = np.random.default_rng(0)
    tops, bottoms = (np.median(side[rng.integers(0, len(side), (resamples, len(side)))], axis=1) for side in (y, x))
    low, high = np.quantile(tops / bottoms, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(y) / np.median(x)), float(low), float(high)
