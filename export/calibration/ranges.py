"""How large the features of a cache get on text: what an entry of few bits has to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.session.decoder import Decoder

from .samples import Ids

Range = npt.NDArray[np.float32]  # (num_kv_heads, head_dim)
Pairs = Sequence[tuple[int, int]]  # features that are turned together

AT_ONCE = 256  # positions that run together


def cache_ranges(decoder: Decoder, pieces: Sequence[Ids], wanted: Mapping[str, Pairs]) -> dict[str, Range]:
    """The largest magnitude of each feature of the cache's entries `wanted`, by the name of their past.

    pieces: (1, seq) each. Of features that turn together it is their length, which stays where a position turns them,
    also one that no piece has.
    """
    found: dict[str, Range] = {}
    for piece in pieces:
        cache = decoder.open_cache(1, piece.size)
        try:
            slot = cache.acquire()
            size = min(AT_ONCE, cache.most_at_once)  # a window forgets, so it is read again and again
            for at in range(0, piece.size, size):
                decoder.prefill(cache, slot, piece[0, at : at + size])
                held = cache.length(slot) - int(cache.dropped[cache.row(slot)])
                for spec, buffer in zip(cache.specs, cache.buffers):
                    if spec.past in wanted:
                        new = cache.memory.read(buffer)[0, :, max(0, held - size) : held]
                        largest = _largest(new, wanted[spec.past])
                        found[spec.past] = np.maximum(found.get(spec.past, largest), largest)
        finally:
            cache.close()
    return found


def _largest(array: npt.NDArray[Any], pairs: Pairs) -> Range:
    """array: (num_kv_heads, positions, head_dim)."""
    found: Range = np.abs(array).max(1)
    if pairs:
        one, other = np.array(pairs).T
        found[:, one] = found[:, other] = np.hypot(array[..., one], array[..., other]).max(1)
    return found
