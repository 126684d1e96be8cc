"""Attention in both directions as one operator: of an encoder to itself, of a decoder to what its encoder made.

A decoder's keys and values of the source are laid out in the encoder's graph, (batch, heads, source, head_dim), made
once for a source: a step takes them as they lie.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch

from .axes import Atom, Axes, Role, flat, position
from .emitter import CONTRIB
from .follow import Follower
from .lower import HIDDEN_SCORE, Side, placed_bias
from .scores import OpenPattern
from .tensor import Tensor, laid_out

LEAST = float(torch.finfo(torch.float32).min)  # finite: with -inf a row of hidden keys would be NaN


def attend_fully(
    f: Follower, sides: tuple[Side, Side, Side], pattern: OpenPattern, mask: Tensor | None, result: Axes
) -> Tensor:
    """Write attention as MultiHeadAttention. Source: com.microsoft.MultiHeadAttention, ContribOperators.md.

    mask: data, true or 0 where a query may attend, over axes of (batch, heads, query, key). result: the axes of the
    module's own result.
    """
    q, k, v = sides
    crosses = position(q.tensor.axes[_query_axis(q)]) is Role.QUERY
    f.report_attention("MultiHeadAttention", f"{pattern} to the source" if crosses else str(pattern))
    rows = [_rows(f, q), *((_heads_first if crosses else _rows)(f, side) for side in (k, v))]
    keys, bias, shown = _masks(f, pattern, mask, sides, crosses)
    hidden = LEAST if pattern.hidden in (None, -math.inf) else pattern.hidden
    value = f.emit.op(
        "MultiHeadAttention", *rows, None, keys, bias,
        domain=CONTRIB, num_heads=f.size(q.heads), scale=pattern.scale, mask_filter_value=hidden,
    )  # fmt: skip
    if shown is not None:
        value = f.emit.op("Where", shown, value, f.emit.constant(0.0, np.float32))
    atoms = flat(result)
    batch = next(a for a in atoms if a.role is Role.BATCH)
    query = next(a for a in atoms if a.role not in (None, Role.BATCH))
    base: Axes = ((batch,), (query,), tuple(a for a in atoms if a.role is None))
    return Tensor(value, base, result, q.tensor.dtype)


def _query_axis(side: Side) -> int:
    return next(i for i, axis in enumerate(side.tensor.axes) if position(axis))


def _batch_and_positions(side: Side) -> tuple[Atom, Atom]:
    atoms = flat(side.tensor.axes)
    batch = next(a for a in atoms if a.role is Role.BATCH)
    return batch, next(a for a in atoms if a.role not in (None, Role.BATCH))


def _rows(f: Follower, side: Side) -> ir.Value:
    """(batch, positions, heads * dim)"""
    batch, query = _batch_and_positions(side)
    return laid_out(f.emit, side.tensor, ((batch,), (query,), (*side.heads, *side.dim)))


def _heads_first(f: Follower, side: Side) -> ir.Value:
    """(batch, heads, positions, dim)"""
    batch, query = _batch_and_positions(side)
    return laid_out(f.emit, side.tensor, ((batch,), side.heads, (query,), side.dim))


def _masks(
    f: Follower, pattern: OpenPattern, mask: Tensor | None, sides: tuple[Side, Side, Side], crosses: bool
) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """Which keys are there, (batch, keys) int32; what is added to the scores; which queries see any key at all."""
    emit, bias, shown = f.emit, None, None
    keys = emit.cast(emit.given("source_mask"), torch.int32) if crosses else None
    if pattern.hidden is not None and not crosses:
        keys = emit.cast(emit.given("attention_mask"), torch.int32)
        shown = _any_key(f, keys) if pattern.hidden == -math.inf else None
    if pattern.bias is not None:
        bias = placed_bias(f, pattern.bias, f.role, f.role)
    if mask is not None and mask.dtype is torch.bool and _is_over_keys(mask):
        own = emit.cast(laid_out(emit, mask, _keys_alone(mask)), torch.int32)
        shown = _any_key(f, own)
        keys = own if keys is None else emit.op("Mul", keys, own)
    elif mask is not None:
        given = _as_bias(f, mask, sides[0])
        shown = _any_score(f, mask, given)
        bias = given if bias is None else emit.op("Add", bias, given)
    return keys, bias, shown


def _any_key(f: Follower, keys: ir.Value) -> ir.Value:
    """(batch, 1, 1) bool"""
    most = f.emit.op("ReduceMax", keys, f.emit.constant([1]), keepdims=1)
    return f.emit.cast(f.emit.op("Unsqueeze", most, f.emit.constant([2])), torch.bool)


def _any_score(f: Follower, mask: Tensor, bias: ir.Value) -> ir.Value | None:
    """(batch or 1, query, 1) bool; None where the heads differ."""
    if mask.rank == 4 and mask.axes[1] and not all(a.repeat for a in mask.axes[1]):
        return None
    most = f.emit.op("ReduceMax", bias, f.emit.constant([3]), keepdims=1)  # (batch, 1 or heads, query, 1)
    first = f.emit.op("Gather", most, f.emit.constant(0), axis=1)
    return f.emit.op("Greater", first, f.emit.constant(HIDDEN_SCORE / 2, np.float32))


def _is_over_keys(mask: Tensor) -> bool:
    """Whether a mask is one truth value for each key of a row."""
    between = [a for axis in mask.axes[1:-1] for a in axis if not a.repeat]
    return not between and mask.rank > 1 and all(a and not a[0].repeat for a in (mask.axes[0], mask.axes[-1]))


def _keys_alone(mask: Tensor) -> Axes:
    return (mask.axes[0], mask.axes[-1])


def _as_bias(f: Follower, mask: Tensor, q: Side) -> ir.Value:
    """(batch or 1, heads or 1, query, key) float32: what a mask of data adds to the scores."""
    axes = ((),) * (4 - mask.rank) + mask.axes
    query = axes[2] or (Atom(_batch_and_positions(q)[1].role, repeat=True),)
    heads = () if all(a.repeat for a in axes[1]) else axes[1]
    value = laid_out(f.emit, mask, (axes[0], heads, query, axes[3]))
    least = f.emit.constant(HIDDEN_SCORE, np.float32)
    if mask.dtype is torch.bool:
        return f.emit.op("Where", value, f.emit.constant(0.0, np.float32), least)
    return f.emit.op("Max", value, least)
