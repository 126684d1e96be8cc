"""Rows of a decoder's batch have sources of different lengths: what lies behind a source is hidden from its row."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from ..axes import Axes, Role, position
from ..follow import Follower
from ..lower_full import LEAST
from ..tensor import refined, reshaped


def hide_padding(f: Follower, scores: ir.Value, axes: Axes, axis: int, hidden: float = LEAST) -> ir.Value:
    """Values of a decoder's rows over their sources, along `axis`, with `hidden` behind these.

    Those of an encoder stay as they are. hidden: what changes nothing afterwards: the least score before a softmax, 0
    before a sum.
    """
    if f.is_whole or position(axes[axis]) is not Role.SOURCE:
        return scores
    parts = refined(axes)  # a batch may be folded with heads
    atoms = [part[0] if part else None for part in parts]
    batch, along = (next(i for i, a in enumerate(atoms) if a and a.role is role) for role in (Role.BATCH, Role.SOURCE))
    there = f.emit.cast(f.emit.given("source_mask"), torch.bool)  # (batch, source)
    there = there if batch < along else f.emit.op("Transpose", there, perm=[1, 0])
    first = min(batch, along)
    missing = [i - first for i in range(first, len(parts)) if i not in (batch, along)]
    there = f.emit.op("Unsqueeze", there, f.emit.constant(missing)) if missing else there
    shown = reshaped(f.emit, scores, axes, parts)
    shown = f.emit.op("Where", there, shown, f.emit.constant(hidden, np.float32))
    return reshaped(f.emit, shown, parts, axes)
