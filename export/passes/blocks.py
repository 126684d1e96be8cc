"""Matrices in 8, 7 or 4 bits by blocks: each block of a column has a scale, and a zero point where it is not symmetric.

The layout is that of com.microsoft.MatMulNBits: (columns, blocks, bytes), two 4-bit numbers in a byte, low half first;
scales (columns, blocks); zero points (columns, bytes), packed the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# What a block's range is multiplied by, to find the least squared error: outliers are cut where that helps the rest.
SHRINK = tuple(float(f) for f in np.linspace(1.0, 0.7, 7))
ROWS_AT_ONCE = 4096  # columns of a matrix that are worked on together, which bounds the memory


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix of (k, n): packed numbers, scales, and zero points or None where they are the middle."""

    bits: int
    block_size: int
    k: int
    data: Bytes  # (n, ceil(k / block_size), bytes of block_size numbers)
    scales: Floats  # (n, blocks)
    zeros: Bytes | None  # (n, ceil(blocks * bits / 8))

    def dense(self) -> Floats:
        """(k, n) float32: what the numbers stand for."""
        numbers = _unpacked(self.data, self.bits).reshape(*self.scales.shape, self.block_size).astype(np.float32)
        rows = (numbers - self.middles()[..., None]) * self.scales[..., None]
        return np.ascontiguousarray(rows.reshape(len(rows), -1)[:, : self.k].T)

    def middles(self) -> Floats:
        """(n, blocks): the number that stands for zero."""
        if self.zeros is None:
            return np.full(self.scales.shape, 1 << (self.bits - 1), np.float32)
        return _unpacked(self.zeros, self.bits)[:, : self.scales.shape[1]].astype(np.float32)

    def with_numbers(self, numbers: Bytes) -> Blocks:
        """Other numbers, (k, n), by the same scales and zero points."""
        n, count = self.scales.shape
        rows = np.pad(numbers.T, ((0, 0), (0, count * self.block_size - self.k)))
        return replace(self, data=_packed(rows.reshape(n * count, -1), self.bits).reshape(n, count, -1))


def quantised(
    matrix: Floats, bits: int, block_size: int, *, symmetric: bool = True, search: bool = True,
    importance: Floats | None = None,
) -> Blocks:  # fmt: skip
    """The matrix (k, n) in `bits` by blocks of `block_size` along k.

    search: choose each block's range by the least squared error, instead of its largest number. importance: (k,), what
    an error counts in each row of the matrix.
    """
    k, n = matrix.shape
    count = -(-k // block_size)
    weights = np.ones(k, np.float32) if importance is None else importance.astype(np.float32)
    weights = np.pad(weights, (0, count * block_size - k)).reshape(count, block_size)
    parts = []
    for first in range(0, n, ROWS_AT_ONCE):
        rows = np.ascontiguousarray(matrix[:, first : first + ROWS_AT_ONCE].T)
        rows = np.pad(rows, ((0, 0), (0, count * block_size - k))).reshape(len(rows), count, block_size)
        parts.append(_rows(rows, bits, symmetric, SHRINK if search else SHRINK[:1], weights))
    numbers, scales, zeros = (np.concatenate(side) for side in zip(*parts))
    packed = _packed(numbers.reshape(n * count, block_size), bits).reshape(n, count, -1)
    return Blocks(bits, block_size, k, packed, scales, None if symmetric else _packed(zeros, bits))


def _rows(
    rows: Floats, bits: int, symmetric: bool, factors: tuple[float, ...], weights: Floats
) -> tuple[Bytes, Floats, Bytes]:
    """(n, blocks, size) as numbers of the same shape, scales and zero points (n, blocks); weights: (blocks, size)."""
    best = _in_range(rows, bits, symmetric, factors[0])
    error = _error(rows, weights, *best)
    for factor in factors[1:]:
        tried = _in_range(rows, bits, symmetric, factor)
        found = _error(rows, weights, *tried)
        better = found < error
        error = np.where(better, found, error)
        best = (
            np.where(better[..., None], tried[0], best[0]),
            np.where(better, tried[1], best[1]),
            np.where(better, tried[2], best[2]),
        )
    return best


def _in_range(rows: Floats, bits: int, symmetric: bool, factor: float) -> tuple[Bytes, Floats, Bytes]:
    levels, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:  # the end of the range with one number more goes to the side of the largest one
        at = np.abs(rows).argmax(-1)[..., None]
        largest = np.take_along_axis(rows, at, -1)[..., 0] * np.float32(factor)
        scales = largest / np.float32(-middle)
        zeros = np.full(scales.shape, middle, np.uint8)
    else:
        low, high = np.minimum(rows.min(-1), 0) * np.float32(factor), np.maximum(rows.max(-1), 0) * np.float32(factor)
        scales = (high - low) / np.float32(levels)
        zeros = np.clip(np.rint(-low / _nonzero(scales)), 0, levels).astype(np.uint8)
    numbers = np.rint(rows / _nonzero(scales)[..., None]) + zeros[..., None]
    return np.clip(numbers, 0, levels).astype(np.uint8), scales.astype(np.float32), zeros


def _nonzero(scales: Floats) -> Floats:
    return np.where(scales == 0, np.float32(1), scales)


def _error(rows: Floats, weights: Floats, numbers: Bytes, scales: Floats, zeros: Bytes) -> Floats:
    away = (numbers.astype(np.float32) - zeros[..., None]) * scales[..., None] - rows
    found: Floats = np.einsum("nbs,nbs,bs->nb", away, away, weights)
    return found


def _packed(numbers: Bytes, bits: int) -> Bytes:
    """(rows, ceil(count * bits / 8)) bytes of (rows, count) numbers."""
    if bits > 4:
        return numbers
    even = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
    return even[:, ::2] | (even[:, 1::2] << np.uint8(4))


def _unpacked(packed: Bytes, bits: int) -> Bytes:
    """The numbers again, along the last axis; of an odd count one too many."""
    if bits > 4:
        return packed
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)
