"""Whether a stretch of a graph turns each head by its position, read by its values: how it is written does not matter.

In each head the first `dims` features turn by pairs, and what is behind them passes through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .stretch import Array, Stretch

CLOSE = 1e-5
AT_ONCE = 512  # positions
# How a source may lie: (batch, seq, heads * size), (batch, seq, heads, size), (batch, heads, seq, size).
LAYOUTS = ("rows", "heads", "heads first")


@dataclass(frozen=True)
class Rotation:
    """cos, sin: (positions, dims / 2), any scale among them; a pair is (2i, 2i + 1), or (i, i + dims / 2)."""

    cos: Array
    sin: Array
    interleaved: bool

    @property
    def dims(self) -> int:
        return 2 * int(self.cos.shape[1])

    def same(self, other: Rotation) -> bool:
        alike = self.interleaved == other.interleaved and self.cos.shape == other.cos.shape
        return alike and np.array_equal(self.cos, other.cos) and np.array_equal(self.sin, other.sin)


@dataclass(frozen=True)
class Reader:
    """Runs a stretch whose result is (batch, seq, heads * size) on sources that lie in one way."""

    stretch: Stretch
    layout: str
    heads: int
    size: int
    length: int

    def read(self) -> Rotation | None:
        """The rotation, if it is one at every position."""
        found = self._pairs()
        if found is None:
            return None
        first, second, interleaved = found
        probe = np.zeros((1, self.length, self.heads, self.size), np.float32)
        probe[..., first] = 1
        turned = self._run(probe, np.arange(self.length)[None])
        if turned is None:
            return None
        rotation = Rotation(
            np.ascontiguousarray(turned[0, :, 0, first].T), np.ascontiguousarray(turned[0, :, 0, second].T), interleaved
        )
        return rotation if self._holds(rotation, first, second) else None

    def _pairs(self) -> tuple[Array, Array, bool] | None:
        """Which features turn together, by what becomes of each alone at a few positions."""
        at = np.unique([min(n, self.length - 1) for n in (0, 1, 2, 3, self.length // 2, self.length)])
        units = np.eye(self.size, dtype=np.float32)
        source = np.repeat(np.tile(units, (len(at), 1))[None, :, None], self.heads, axis=2)
        turned = self._run(source, np.repeat(at, self.size)[None])
        if turned is None:
            return None
        of_unit = turned[0, :, 0].reshape(len(at), self.size, self.size)  # [position, from feature, to feature]
        if (of_unit == units).all():
            return None  # nothing turns
        fitting = [pairs for pairs in self._possible() if _fits(of_unit, pairs[0], pairs[1])]
        return min(fitting, key=lambda pairs: (len(pairs[0]) % 8 > 0, len(pairs[0])), default=None)  # what fits best

    def _possible(self) -> Iterator[tuple[Array, Array, bool]]:
        for dims in range(2, self.size + 1, 2):
            yield np.arange(dims // 2), np.arange(dims // 2, dims), False
            yield np.arange(0, dims, 2), np.arange(1, dims, 2), True

    def _holds(self, rotation: Rotation, first: Array, second: Array) -> bool:
        """Whether anything at all at any position becomes what the tables say, in every head and row."""
        rng = np.random.default_rng(0)
        at = np.stack([np.arange(self.length), rng.permutation(self.length)])
        source = rng.normal(size=(2, self.length, self.heads, self.size)).astype(np.float32)
        cos, sin = rotation.cos[at][:, :, None], rotation.sin[at][:, :, None]
        expected = source.copy()
        expected[..., first] = source[..., first] * cos - source[..., second] * sin
        expected[..., second] = source[..., second] * cos + source[..., first] * sin
        found = self._run(source, at)
        scale = max(1.0, float(np.abs(rotation.cos).max()))
        return found is not None and np.allclose(found, expected, rtol=CLOSE, atol=CLOSE * scale)

    def _run(self, source: Array, positions: Array) -> Array | None:
        """(batch, seq, heads, size) to the same, some positions at a time."""
        parts = []
        for start in range(0, source.shape[1], AT_ONCE):
            part, at = source[:, start : start + AT_ONCE], positions[:, start : start + AT_ONCE]
            found = self.stretch.run(self._laid(part), np.ascontiguousarray(at, np.int64))
            if found is None or found.dtype != np.float32 or found.shape != (*at.shape, self.heads * self.size):
                return None
            parts.append(found.reshape(part.shape))
        return np.concatenate(parts, axis=1)

    def _laid(self, source: Array) -> Array:
        if self.layout == "rows":
            return source.reshape(*source.shape[:2], -1)
        return np.ascontiguousarray(source.swapaxes(1, 2) if self.layout == "heads first" else source)


def _fits(of_unit: Array, first: Array, second: Array) -> bool:
    """Whether features turn in these pairs, and no others touch each other."""
    rest = of_unit.copy()
    cos, sin = rest[:, first, first], rest[:, first, second]
    alike = np.allclose(cos, rest[:, second, second], atol=CLOSE) and np.allclose(
        sin, -rest[:, second, first], atol=CLOSE
    )
    every = np.arange(rest.shape[1])
    passes = every[2 * len(first) :]
    if not alike or not (rest[:, passes, passes] == 1).all():
        return False
    rest[:, every, every] = rest[:, first, second] = rest[:, second, first] = 0
    return not rest.any()
