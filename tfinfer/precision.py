"""How a graph's numbers were made narrow, and what is known of them; part of the manifest."""

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


@dataclass(frozen=True)
class WeightsSpec:
    """How the weights were made small, and what that costs.

    block_size: numbers that share a scale; per_channel: in products of 8 bits whole columns do. agreement: share of the
    proof's rows whose first choice is still PyTorch's. wider, kept: how many of the matrices have 8 bits by
    blocks in place of what the rest have, and how many are as wide as they were. quantiser: "rtn", each number to its
    nearest, or "gptq", for the inputs that the matrices get on a text: calibration says which, of so many tokens.
    """

    bits: int
    head_bits: int
    block_size: int
    symmetric: bool
    matrices: int
    agreement: float = 0.0
    wider: int = 0
    kept: int = 0
    quantiser: str = "rtn"
    calibration: str | None = None
    calibration_tokens: int = 0
    per_channel: bool = False


@dataclass(frozen=True)
class SmallCacheSpec:
    """How entries of the cache were made small, and what that costs.

    entries: how many have `bits`; kept: how many are as wide as they were. calibration: the text that their ranges are
    from, for people. agreement: share of the proof's rows whose first choice is still PyTorch's, by the cache alone.
    """

    bits: int
    entries: int
    calibration: str
    kept: int = 0
    agreement: float = 0.0
