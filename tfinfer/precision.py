"""What is known of a half-width graph's numbers; part of the manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RangeSpec:
    """How large values became while the float32 graph ran on `tokens` of text, and what stayed float32 for it.

    largest: the largest magnitude of all values that became half width or would have. limit: above which a value stays
    float32: what float16 holds, with a margin. kept: how many operators do so that would be half width otherwise.
    """

    largest: float
    limit: float
    kept: int
    tokens: int
    origin: str  # of the text
