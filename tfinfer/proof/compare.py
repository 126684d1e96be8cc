"""How far computed logits may be from the expected ones, and how far they are. Knows no graph and no module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]

# float32 against PyTorch's float32: two orders of the same sums. Measured on tens of families: 1e-7 to 1e-5.
ABSOLUTE, RELATIVE = 1e-4, 1e-4
# float16 and bfloat16 against float32: the direction must stay, single logits may move. 1 - cosine.
# Weights and caches of a few bits do damage, which is measured; beyond these bounds something is broken.
COSINE = {"float16": 1e-3, "bfloat16": 1e-3, "int8 cache": 0.02, "int8": 0.02, "int4": 0.3}
ROUGH = ("int8 cache", "int8", "int4")
# A token that differs must be among the other side's best few (as vLLM's tests have it).
NEAR_TOP = 5


@dataclass
class Difference:
    """The worst row of a case so far. `excess` is 1 at the bound."""

    dtype: str
    name: str
    worst: float = 0.0
    excess: float = 0.0
    place: str = ""
    rows: int = 0
    agreeing: int = 0  # rows whose first choice is the same

    @property
    def measure(self) -> str:
        return "max |difference|" if self.dtype == "float32" else "1 - cosine"

    @property
    def passed(self) -> bool:
        return self.rows > 0 and self.excess <= 1.0

    @property
    def allowed(self) -> float:
        return ABSOLUTE if self.dtype == "float32" else COSINE[self.dtype]

    def add(self, expected: Vector, got: Vector, place: str) -> None:
        """Compare one row of logits."""
        worst, excess = _distance(expected, got, self.dtype)
        self.rows += 1
        self.agreeing += int(expected.argmax()) == int(got.argmax())
        if excess >= self.excess:
            self.worst, self.excess, self.place = worst, excess, place

    def refuse(self, why: str) -> None:
        """What came cannot be compared at all."""
        self.rows += 1
        self.worst = self.excess = float("inf")
        self.place = why

    def __str__(self) -> str:
        verdict = "ok" if self.passed else f"FAILED at {self.place}" if self.rows else "FAILED: nothing was compared"
        also = f" + {RELATIVE:g} relative" if self.dtype == "float32" else ""
        found = f"{self.measure} {self.worst:.1e} (allowed {self.allowed:g}{also})"
        agree = f", {self.agreeing / max(self.rows, 1):.0%} of first choices agree" if self.dtype in ROUGH else ""
        return f"{self.name}: {found}{agree}, {self.rows} rows: {verdict}"


def _distance(expected: Vector, got: Vector, dtype: str) -> tuple[float, float]:
    return _distance64(expected.astype(np.float64), got.astype(np.float64), dtype)


def _distance64(expected: Wide, got: Wide, dtype: str) -> tuple[float, float]:
    """The difference, and how often the allowed one it is."""
    if not (np.isfinite(got).all() and np.isfinite(expected).all()):
        return float("inf"), float("inf")
    if dtype == "float32":
        difference = np.abs(expected - got)
        bound = ABSOLUTE + RELATIVE * np.abs(expected)
        return float(difference.max()), float((difference / bound).max())
    lengths = float(np.linalg.norm(expected) * np.linalg.norm(got))
    away = 1 - float(expected @ got) / lengths if lengths else float(np.abs(expected - got).max())
    outside = dtype not in ROUGH and not _near_top(expected, got)
    return away, float("inf") if outside else away / COSINE[dtype]


def _near_top(expected: Wide, got: Wide) -> bool:
    """Whether each side's first choice is among the other's first few."""
    few = min(NEAR_TOP, len(expected))
    best = [set(np.argpartition(-side, few - 1)[:few].tolist()) for side in (expected, got)]
    return int(expected.argmax()) in best[1] and int(got.argmax()) in best[0]


def tie(logits: Vector, one: int, other: int) -> bool:
    """Whether two tokens are so close that the allowed difference may swap them."""
    bound = 2 * (ABSOLUTE + RELATIVE * max(abs(float(logits[one])), abs(float(logits[other]))))
    return abs(float(logits[one]) - float(logits[other])) <= bound


def failed(differences: Iterable[Difference]) -> list[Difference]:
    return [d for d in differences if not d.passed]
