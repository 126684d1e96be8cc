"""Attention as one operator over a cache, once it is known what its heads, mask and bias are.

`ort`: com.microsoft.GroupQueryAttention, past and present bound to one buffer. `standard`: TensorScatter and Attention
of opset 24 over the same buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from .axes import Axes, Axis, Role, flat
from .beside import place_square
from .emitter import CONTRIB
from .follow import Follower, scatter
from .scores import Pattern
from .tables import ByDistance, PerKey, Square
from .tensor import Tensor, laid_out

HIDDEN_SCORE = -1e9  # finite: an operator that works in blocks makes NaN of a block of -inf


@dataclass(frozen=True)
class Side:
    """Queries, keys or values: which atoms are heads (none of them a repeat) and which are features."""

    tensor: Tensor
    heads: Axis
    dim: Axis


def operator_of(f: Follower, q: Side, v: Side) -> tuple[str, str]:
    """The operator for sides of these sizes in the flavor asked for, and why it is not the flavor's own."""
    dim, v_dim = f.size(q.dim), f.size(v.dim)
    if f.flavor == "standard":
        return "Attention", ""
    if dim % 8:
        return "Attention", f"head size {dim} is not a multiple of 8"
    if dim != v_dim:
        return "Attention", f"keys of size {dim}, values of size {v_dim}"
    return "GroupQueryAttention", ""


def can_attend(f: Follower, q: Side, k: Side, v: Side, pattern: Pattern) -> bool:
    """Whether an operator computes it: that of the standard has no sinks."""
    return not pattern.sinks or operator_of(f, q, v)[0] == "GroupQueryAttention"


def attend(f: Follower, q: Side, k: Side, v: Side, pattern: Pattern, result: Axes, of: str = "") -> Tensor:
    """Write attention in the flavor asked for, or in the next that can express it, and report which.

    result: the axes of the module's own result, made of the atoms of the queries' heads and the values' features.
    of: what keys and values are, in words, where they are no usual ones.
    """
    name, why = operator_of(f, q, v)
    f.report_attention(name, f"{pattern}{of}", why)
    q = _with_head_scales(f, q, pattern)
    write = _group_query if name == "GroupQueryAttention" else _standard
    value = write(f, q, k, v, pattern)  # (batch, seq, heads * v_dim)
    atoms = flat(result)
    batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
    base: Axes = ((batch,), (query,), tuple(a for a in atoms if a.role is None))
    return Tensor(value, base, result, q.tensor.dtype)


def _with_head_scales(f: Follower, q: Side, pattern: Pattern) -> Side:
    """The queries times the scale of their head, where heads differ in it."""
    if not pattern.head_scales:
        return q
    atoms = flat(q.tensor.axes)
    batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
    axes: Axes = ((batch,), (query,), q.heads, q.dim)
    scales = torch.tensor(pattern.head_scales, dtype=q.tensor.dtype)[:, None]
    value = f.emit.op("Mul", laid_out(f.emit, q.tensor, axes), f.emit.constant(scales.numpy()))
    return Side(Tensor.of(value, axes, q.tensor.dtype), q.heads, q.dim)


def _rows_of(f: Follower, side: Side, four: bool) -> ir.Value:
    """A side of attention as (batch, seq, heads * dim), or as (batch, heads, seq, dim)."""
    atoms = flat(side.tensor.axes)
    batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
    axes: Axes = ((batch,), side.heads, (query,), side.dim) if four else ((batch,), (query,), (*side.heads, *side.dim))
    return laid_out(f.emit, side.tensor, axes)


def _bias(f: Follower, pattern: Pattern, window_too: bool) -> ir.Value | None:
    """(batch or 1, heads or 1, seq, total): what is added to the scores."""
    read = pattern.bias
    if window_too and pattern.window is not None:
        read = _with_window(pattern, pattern.window, f.max_length)
    if read is None:
        return None
    return placed_bias(f, read, Role.QUERY, Role.KEY)


def placed_bias(f: Follower, read: PerKey | ByDistance | Square, query: Role, key: Role) -> ir.Value:
    """(batch or 1, heads or 1, query, key): a table over pairs of positions; what it hides is low, but finite."""
    table = read.table.clamp(min=HIDDEN_SCORE)
    placed = place_square(f, type(read)(table), [1], 2, 3, torch.float32)
    value = placed.arranged(f.emit, range(4), 0)
    if 0 not in (0 if d == -1 else d for d in placed.dims):  # arranged() leaves leading axes of size 1 out
        first = min(placed.dims)
        value = f.emit.op("Unsqueeze", value, f.emit.constant(list(range(first))))
    if isinstance(read, PerKey):  # the operators want every query row
        parts = [f.emit.constant([1, table.shape[0]]), f.emit.size(query), f.emit.size(key)]
        value = f.emit.op("Expand", value, f.emit.op("Concat", *parts, axis=0))
    return value


def _with_window(pattern: Pattern, window: int, length: int) -> ByDistance | Square:
    """The bias with what lies behind the window hidden in it, for an operator that has no window of its own."""
    distance = torch.arange(-(length - 1), length)
    hidden = torch.where(distance < window, 0.0, -torch.inf)
    if pattern.bias is None:
        return ByDistance(hidden[None])
    if isinstance(pattern.bias, ByDistance):
        return ByDistance(pattern.bias.table + hidden)
    table = pattern.bias.table[..., None, :] if isinstance(pattern.bias, PerKey) else pattern.bias.table
    behind = torch.arange(length)[:, None] - torch.arange(length) >= window
    return Square(table.masked_fill(behind, -torch.inf))


def _group_query(f: Follower, q: Side, k: Side, v: Side, pattern: Pattern) -> ir.Value:
    """Source: com.microsoft.GroupQueryAttention, ContribOperators.md.

    It writes new keys and values itself. Of those that another attention holds as well, or that are both, it is given
    none, and what the cache holds of them already.
    """
    queries, keys, values = (_rows_of(f, side, four=False) for side in (q, k, v))
    heads, window = f.size(k.heads), pattern.window
    writes = keys is not values and f.held(keys, heads, window) is None and f.held(values, heads, window) is None
    if writes:
        (past_key, key), (past_value, value) = (
            f.entry(name, heads, f.size(side.dim), side.tensor.dtype, window)
            for name, side in (("key", k), ("value", v))
        )
        given = (queries, keys, values, past_key, past_value)
    else:
        held = _written(f, "key", k, window), _written(f, "value", v, window)
        none = f.emit.op("Slice", keys, f.emit.constant([0]), f.emit.constant([0]), f.emit.constant([1]))
        given = (queries, none, none, *held)
    bias = _bias(f, pattern, window_too=False)
    sinks = f.emit.constant(torch.tensor(pattern.sinks, dtype=q.tensor.dtype).numpy()) if pattern.sinks else None
    optional = (None, None, None, bias, sinks)  # cos_cache, sin_cache, position_ids
    inputs = (*given, f.emit.seqlens_k(), f.emit.total_length(), *optional)
    sizes: dict[str, Any] = {"num_heads": f.size(q.heads), "kv_num_heads": f.size(k.heads), "scale": pattern.scale}
    if pattern.window is not None:
        sizes["local_window_size"] = pattern.window
    if pattern.softcap is not None:
        sizes["softcap"] = pattern.softcap
    made = f.emit.multi("GroupQueryAttention", *inputs, outputs=3 if writes else 1, domain=CONTRIB, **sizes)
    if writes:
        f.hold(keys, heads, key, made[1])
        f.hold(values, heads, value, made[2])
    return made[0]


def _written(f: Follower, name: str, side: Side, window: int | None) -> ir.Value:
    """(batch, heads, capacity, dim): what the cache holds of keys or values, the new ones among them."""
    rows, heads = _rows_of(f, side, four=False), f.size(side.heads)
    present = f.held(rows, heads, window)
    if present is None:
        past, entry = f.entry(name, heads, f.size(side.dim), side.tensor.dtype, window)
        present = scatter(f.emit, past, _rows_of(f, side, four=True))
        f.hold(rows, heads, entry, present)
    return present


def _standard(f: Follower, q: Side, k: Side, v: Side, pattern: Pattern) -> ir.Value:
    """Source: ai.onnx Attention-24 and TensorScatter-24; nonpad_kv_seqlen makes is_causal right for each row."""
    valid = [f.valid(_written(f, name, side, pattern.window)) for name, side in (("key", k), ("value", v))]
    lengths = f.emit.op("ReduceSum", f.emit.given("attention_mask"), f.emit.constant([1]), keepdims=0)
    inputs = (_rows_of(f, q, four=True), *valid, _bias(f, pattern, window_too=True), None, None, lengths)
    options: dict[str, Any] = {"scale": pattern.scale, "is_causal": 1}
    if pattern.softcap is not None:  # before what is added, as in GroupQueryAttention
        options["softcap"] = pattern.softcap
    (out,) = f.emit.multi("Attention", *inputs, outputs=1, version=24, **options)  # (batch, heads, seq, v_dim)
    moved = f.emit.op("Transpose", out, perm=[0, 2, 1, 3])
    return f.emit.op("Reshape", moved, f.emit.constant([0, 0, -1]))
