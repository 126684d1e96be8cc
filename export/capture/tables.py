"""Recognise what a positional value is by its values: a row per position, a value per key, one per distance, a square.

Every reader compares several lengths. A value at (i, j) that changes with the length of the whole sequence would change
what was computed for earlier tokens, so no cache could continue it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# The bytes that a table of one value per pair of positions may take in the file.
SQUARE_BYTES = 256 * 2**20
SHORT = 48
# The lengths at which a value must be what it is at the longest: even and odd, long and short.
OTHERS = (SHORT, 37, 10, 5)

Rows = Callable[[torch.Tensor, int], torch.Tensor]  # (rows, length) -> (..., len(rows), length)


@dataclass(frozen=True)
class PerKey:
    """value[..., i, j] = table[..., j]; table: (..., length)."""

    table: torch.Tensor


@dataclass(frozen=True)
class ByDistance:
    """value[..., i, j] = table[..., i - j + length - 1]; table: (..., 2 * length - 1)."""

    table: torch.Tensor


@dataclass(frozen=True)
class Square:
    """value[..., i, j] = table[..., i, j]; table: (..., length, length)."""

    table: torch.Tensor


class NotStable(Exception):
    """The value at a position depends on the length of the whole sequence."""


class TooLarge(Exception):
    """A table of one value per pair of positions would not fit; holds its size in bytes."""


def sampled_rows(length: int) -> torch.Tensor:
    """All rows of a short sequence; of a long one its ends, powers of two and their neighbours, and some between."""
    if length <= 2 * SHORT:
        return torch.arange(length)
    powers = [p + d for e in range(length.bit_length()) for p in [1 << e] for d in (-1, 0, 1)]
    spread = torch.linspace(0, length - 1, 24).long().tolist()
    return torch.tensor(sorted({r for r in [0, length - 2, length - 1, *powers, *spread] if 0 <= r < length}))


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal, or equal up to the rounding of float32 where the values are floats; NaN stands for `any value`."""
    if not left.is_floating_point():
        return torch.equal(left, right)
    left, right = left.double(), right.double()
    counts = ~(left.isnan() | right.isnan()) & ~(left == right)
    if not counts.any():
        return True
    difference = (left - right).abs()[counts]
    finite = left[counts][left[counts].isfinite()]
    largest = max(1.0, float(finite.abs().max()) if len(finite) else 1.0)
    return bool((difference <= 1e-6 * largest).all())


def stable(rows: Rows, length: int) -> bool:
    """Whether values at the first positions are the same in a short and in the longest sequence."""

    def same(short: int) -> bool:
        first = torch.arange(short)
        return close(rows(first, short), rows(first, length)[..., :short])

    return all(same(short) for short in shorter(length))


def shorter(length: int) -> list[int]:
    """Some shorter lengths."""
    return sorted({min(short, length - 1) for short in OTHERS})


def read_square(rows: Rows, length: int) -> PerKey | ByDistance | Square:
    """Read a value over (query, key) positions. Raises NotStable or TooLarge."""
    return read_structure(rows, length) or whole_square(rows, length)


def read_structure(rows: Rows, length: int) -> PerKey | ByDistance | None:
    """The table of a value that depends on the key or on the distance alone. Raises NotStable."""
    if not stable(rows, length):
        raise NotStable
    sampled = sampled_rows(length)
    value = rows(sampled, length)
    last = value[..., -1, :]  # the last row of all: every key
    keys = _diagonal(rows, length) if last.is_floating_point() and last.isnan().any() else last
    if close(value, keys[..., None, :].expand_as(value)):
        return PerKey(keys)
    table = torch.cat([value[..., 0, 1:].flip(-1), last.flip(-1)], dim=-1)  # distances -(length-1) .. length-1
    distance = sampled[:, None] - torch.arange(length) + length - 1  # (rows, length)
    if close(value, table[..., distance]):
        return ByDistance(table)
    return None


def whole_square(rows: Rows, length: int) -> Square:
    """A value with one entry per pair of positions. Raises TooLarge."""
    one = rows(torch.zeros(1, dtype=torch.long), length)  # (..., 1, length)
    if (size := one.numel() * length * one.element_size()) > SQUARE_BYTES:
        raise TooLarge(size)
    return Square(rows(torch.arange(length), length))


def _diagonal(rows: Rows, length: int) -> torch.Tensor:
    """The value of each position at itself, where a window hides all but the last keys from the last row."""
    pieces = []
    for start in range(0, length, 256):
        some = torch.arange(start, min(start + 256, length))
        value = rows(some, length)
        pieces.append(value[..., torch.arange(len(some)), some])
    return torch.cat(pieces, dim=-1)


def read_rows(value: Callable[[int], torch.Tensor], axis: int, length: int) -> torch.Tensor:
    """Read a value with one sequence axis as a table over all positions. Raises NotStable."""
    table = value(length).clone()
    if not all(close(value(short), table.narrow(axis, 0, short)) for short in shorter(length)):
        raise NotStable
    return table
