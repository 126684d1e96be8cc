"""torch's own attention: causal over a cache, in both directions, or written out where its weights are wanted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from ..axes import Atom, Axes, Role, has, position
from ..beside import beside
from ..follow import Follower, followed, rule
from ..heads import full_sides, query_side, sides_of
from ..latent import attend_latent, find_latent
from ..lower import attend
from ..lower_full import LEAST, attend_fully
from ..scores import Chain, Scores
from ..tensor import Tensor, laid_out, refined
from ..trace import arguments, aten, refuse
from .attention import can_attend_fully, read, read_full
from .linear import product
from .padding import hide_padding

Three = tuple[Tensor, Tensor, Tensor]


@rule(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    f: Follower,
    node: fx.Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Source: torch.nn.functional.scaled_dot_product_attention."""
    if dropout:
        raise refuse(node, "drops at random in evaluation too", "pass dropout_p only in training")
    scale = options.get("scale")
    scale = float(f.symbols.product(q.axes[-1])) ** -0.5 if scale is None else float(scale)
    grouped = bool(options.get("enable_gqa"))
    if f.observed is not None:
        return written_out(f, node, (q, k, v), mask, causal, scale, grouped)
    if position(k.axes[-2]) is Role.SOURCE:
        return full_attention(f, node, (q, k, v), mask, causal, scale, grouped)
    return causal_attention(f, node, (q, k, v), mask, causal, scale, grouped)


def causal_attention(
    f: Follower, node: fx.Node, three: Three, mask: Any, causal: bool, scale: float, grouped: bool
) -> Tensor:
    """Attention of new positions to all up to them, over a cache."""
    q, k, v = three
    if not (has(q.axes[-2], Role.QUERY) and has(k.axes[-2], Role.QUERY)):
        raise refuse(node, "attends over something else than the sequence")
    if isinstance(mask, Tensor) and not causal and has(mask.axes[-1], Role.KEY):  # what it hides, only numbers tell
        return written_out(f, node, three, mask, causal, scale, grouped)
    if isinstance(mask, Tensor) or mask in f.trace.masks or (isinstance(mask, fx.Node) and mask in f.trace.data):
        raise refuse(node, "its mask is computed from the ids", "a mask that is a function of the length would work")
    if mask is None and not causal:
        raise refuse(
            node, "not causal: every token attends to the ones behind it", "pass is_causal=True or a causal attn_mask"
        )
    scores = sdpa_scores(f, node, q, mask, causal, scale)
    pattern = read(f, node, scores, ("sdpa", mask, causal, scale, str(q.axes[:-1])))
    if pattern is None:
        raise refuse(node, "its mask hides a position from itself", "let every token see at least itself")
    keys, values = arguments(node)[1:3]
    if latent := find_latent(f, (keys, (-2, -1)), (values, (-2, -1))):
        queries = query_side(f, (q, -2, -1))
        attended = attend_latent(f, queries, latent, pattern, (*queries.tensor.axes[:-1], v.axes[-1]))
        if attended is not None:
            return attended
    sides = sides_of(f, (q, -2, -1), (k, -2, -1), (v, -2, -1), grouped)
    return attend(f, *sides, pattern, (*sides[0].tensor.axes[:-1], sides[2].dim))


def full_attention(
    f: Follower, node: fx.Node, three: Three, mask: Any, causal: bool, scale: float, grouped: bool
) -> Tensor:
    """Attention to an encoder's positions, all of which are there; a mask may be data as well."""
    q, k, v = three
    data = mask if isinstance(mask, Tensor) else None
    positional = None if data is not None else mask
    key = ("sdpa", positional, causal, scale, str(q.axes[:-1]))
    pattern = read_full(f, node, sdpa_scores(f, node, q, positional, causal, scale), key)
    if pattern is None and mask in f.trace.masks:  # it does more than to hide keys
        value = f.value_of(mask)
        assert isinstance(value, Tensor)
        return full_attention(f, node, three, value, causal, scale, grouped)
    sides = full_sides(f, (q, -2, -1), (k, -2, -1), (v, -2, -1), grouped)
    crosses = position(q.axes[-2]) is Role.QUERY
    if pattern is None or sides is None or not can_attend_fully(f, pattern, sides[1].dim, sides[2].dim, crosses):
        return written_out(f, node, three, mask, causal, scale, grouped)
    return attend_fully(f, sides, pattern, data, (*q.axes[:-1], sides[2].dim))


def sdpa_scores(f: Follower, node: fx.Node, q: Tensor, mask: Any, causal: bool, scale: float) -> Scores:
    """What torch's attention makes of a score; the queries of an encoder are rows here like those of a decoder."""
    query, key = (Atom(Role.QUERY),), (Atom(Role.KEY),)
    axes: Axes = (*(query if position(axis) else axis for axis in followed(q.axes[:-1])), key)
    size = arguments(node)[1].meta["val"].shape[-2]
    symbols = replace(f.symbols, seq=f.positional.symbol, key=size.node.expr)
    chain = Chain([], node, axes, f.positional, symbols)

    def scores(score: float, rows: torch.Tensor, length: int) -> torch.Tensor:
        value = torch.full(chain.sizes(axes, len(rows), length), score * scale, dtype=torch.float64)
        if causal:
            value = value.masked_fill(torch.arange(value.shape[-1]) > rows[:, None], -torch.inf)
        if mask is not None:
            given = chain.aligned(mask, axes, rows, length)
            value = value.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else value + given
        return chain.canonical(value, axes, len(rows), length)

    return scores


def written_out(
    f: Follower, node: fx.Node, three: Three, mask: Any, causal: bool, scale: float, grouped: bool
) -> Tensor:
    """softmax(scale q k^T + mask) v, operator by operator, over positions that are all there."""
    q, k, v = three
    sides = full_sides(f, (q, -2, -1), (k, -2, -1), (v, -2, -1), grouped)
    if sides is None:
        raise refuse(node, "its queries, keys and values have different numbers of heads")
    if f.observed is None:
        why = "its mask is data" if isinstance(mask, Tensor) else "keys and values of different sizes, or a table"
        f.report_attention("the module's own operators", "as written", why)
    k, v = sides[1].tensor, sides[2].tensor
    turned = k.seen_as((*k.axes[:-2], k.axes[-1], k.axes[-2]))
    scores = product(f, node, q, turned)
    axes = refined(scores.axes)
    factor = f.emit.constant(torch.tensor(scale, dtype=scores.dtype).numpy())
    value = f.emit.op("Mul", laid_out(f.emit, scores, axes), factor)
    if causal:
        value = _masked(f, value, _is_before(f, axes))
    if isinstance(mask, Tensor):
        own = ((),) * (scores.rank - mask.rank) + mask.axes
        value = _with_mask(f, value, laid_out(f.emit, mask.seen_as(own), refined(own)), mask.dtype)
    elif mask is not None:
        dtype = mask.meta["val"].dtype
        value = _with_mask(f, value, beside(f, mask, axes, list(range(len(axes))), dtype, node), dtype)
    value = hide_padding(f, value, axes, len(axes) - 1)
    weights = Tensor.of(f.emit.op("Softmax", value, axis=-1), axes, scores.dtype)
    if f.observed is not None:
        f.observed.append((node, weights, len(axes) - 2, len(axes) - 1))
    return product(f, node, weights.seen_as(scores.axes), v)


def _is_before(f: Follower, axes: Axes) -> ir.Value:
    """(query, key) bool: whether a key is no later than a query."""

    def positions(axis: int) -> ir.Value:
        end = f.emit.op("Squeeze", f.emit.size(position(axes[axis]) or f.role))
        return f.emit.op("Range", f.emit.constant(0), end, f.emit.constant(1))

    rows = f.emit.op("Unsqueeze", positions(-2), f.emit.constant([1]))
    return f.emit.op("GreaterOrEqual", rows, positions(-1))


def _masked(f: Follower, scores: ir.Value, visible: ir.Value) -> ir.Value:
    return f.emit.op("Where", visible, scores, f.emit.constant(LEAST, np.float32))


def _with_mask(f: Follower, scores: ir.Value, mask: ir.Value, dtype: torch.dtype) -> ir.Value:
    if dtype is torch.bool:
        return _masked(f, scores, mask)
    return f.emit.op("Add", scores, f.emit.op("Max", mask, f.emit.constant(LEAST, np.float32)))
