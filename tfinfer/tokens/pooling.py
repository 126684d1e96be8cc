"""One vector of a text from the vectors of its tokens. Works on arrays; knows neither graphs nor text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError
from tfinfer.manifest import POOLINGS, EncoderRoles, PoolingSpec

Vectors = npt.NDArray[np.float32]
POOLED = "pooled"  # what the module itself makes of a text
MODES = (*POOLINGS, POOLED)


def choose(
    asked: str | None, normalize: bool | None, own: PoolingSpec | None, roles: EncoderRoles, outputs: Sequence[str]
) -> PoolingSpec:
    """What to do for a call; None is the folder's own way, or else the mean, not normalised.

    The folder's own normalising is of vectors of texts: with "none", tokens are normalised only where that was asked.

    Args:
        own: what the folder's manifest says.
        outputs: names of the graph's outputs, for the message.

    Raises:
        InputError: no such pooling, or one that these outputs do not allow.
    """
    if asked is not None and asked not in MODES:
        raise InputError(f"pooling: expected one of {', '.join(MODES)} or None, got {asked!r}")
    if normalize is not None and not isinstance(normalize, bool):
        raise InputError(f"normalize: expected True, False or None, got {normalize!r}")
    if roles.hidden_states is None and roles.pooled is None:
        raise InputError(
            f"this encoder gives {', '.join(outputs)}: neither hidden states to pool nor a pooled vector; use run"
        )
    if roles.hidden_states is None and asked not in (None, POOLED):
        raise InputError(f"pooling: this encoder pools by itself, so expected {POOLED!r} or None, got {asked!r}")
    if roles.pooled is None and asked == POOLED:
        raise InputError(f"pooling: this encoder does not pool by itself: expected one of {', '.join(POOLINGS)}")
    mode = asked or (own.mode if own else "mean")
    if roles.hidden_states is None:
        mode = POOLED
    if normalize is None:
        normalize = own is not None and own.normalize and mode != "none"
    return PoolingSpec(mode, normalize)


def pool(hidden: npt.NDArray[Any], lengths: Sequence[int], mode: str) -> Vectors:
    """(batch, hidden) of hidden states (batch, seq, hidden) of which each row's first `lengths` are of tokens.

    mode: "mean", "cls" (the first token) or "last".
    """
    if mode == "cls":
        chosen = [row[0] for row in hidden]
    elif mode == "last":
        chosen = [row[length - 1] for row, length in zip(hidden, lengths)]
    elif mode == "mean":
        # Row by row: a product with the mask would let what padding computed, if it is not finite, into the sum.
        chosen = [row[:length].mean(axis=0, dtype=np.float32) for row, length in zip(hidden, lengths)]
    else:
        raise InputError(f"pooling: expected mean, cls or last, got {mode!r}")
    return np.stack(chosen).astype(np.float32)


def normalized(vectors: npt.NDArray[Any]) -> Vectors:
    """Vectors (..., hidden) of length 1 in their directions; zeros stay zeros."""
    wide = vectors.astype(np.float64)  # the squares of float32 may be too large for it, or too small
    norms = np.sqrt(np.square(wide).sum(axis=-1, keepdims=True))
    wide /= np.where(norms > 0, norms, 1.0)
    return wide.astype(np.float32)
