"""Rows of a decoder's batch have sources of different lengths: what lies behind a source is hidden from its row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from ..axes import Axes, Role, position
from ..follow import Follower, followed
from ..lower_full import LEAST
from ..tensor import Tensor, from_working, laid_out, refined, reshaped


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


def write_weights(f: Follower, scores: Tensor, key: int, sinks: Sequence[float]) -> Tensor:
    """A softmax over the axis `key` of scores, with a sink for each head where there are any.

    With m the largest of scores and sink: exp(score - m) / (sum of exp(score - m) + exp(sink - m)).
    """
    emit, parts = f.emit, refined(followed(scores.axes))
    axis = len(refined(scores.axes[:key]))
    value = hide_padding(f, laid_out(emit, scores, refined(scores.axes)), parts, axis)
    if not sinks:
        weights = emit.op("Softmax", value, axis=axis)
        return from_working(weights, parts, range(len(parts)), scores.dtype).seen_as(followed(scores.axes))
    shape = [1 if any(a.role for a in part) else math.prod(a.size for a in part) for part in parts]
    column = emit.constant(torch.tensor(sinks, dtype=scores.dtype).reshape(shape).numpy())
    largest = emit.op("Max", emit.op("ReduceMax", value, emit.constant([axis]), keepdims=1), column)
    exps = emit.op("Exp", emit.op("Sub", value, largest))
    total = emit.op("ReduceSum", exps, emit.constant([axis]), keepdims=1)
    total = emit.op("Add", total, emit.op("Exp", emit.op("Sub", column, largest)))
    weights = emit.op("Div", exps, total)
    return from_working(weights, parts, range(len(parts)), scores.dtype).seen_as(scores.axes)
