"""Operations that take, cut or join, along any axis; of positions only all or the last may be taken."""

from __future__ import annotations

import operator
import sys
from dataclasses import replace
from typing import Any

from torch import fx

from ..axes import Atom, Axes, Role, fixed, has
from ..filled import fill_value
from ..follow import Follower, followed, rule
from ..tensor import Tensor, from_working, working
from ..trace import arguments, aten, refuse
from .columns import cut_columns, is_keys, joined_to_keys
from .elementwise import broadcast, elementwise, named
from .picking import counts_all, gathered, picked_entries
from .shifts import cut, is_sequence, put_in_front


@rule(operator.getitem)
def getitem(f: Follower, node: fx.Node, parts: list[Tensor], index: int) -> Tensor:
    return parts[index]


@rule(aten.embedding.default)
def embedding(f: Follower, node: fx.Node, weight: fx.Node, ids: Any, *args: Any) -> Tensor:
    if not isinstance(ids, Tensor) or not f.is_constant(weight):
        raise refuse(node, "is followed for a fixed table looked up by data")
    table = f.constant(weight)  # (rows, width)
    value = f.emit.op("Gather", f.parameter(weight), ids.value, axis=0)
    out = fixed(table.shape[1])
    return Tensor(value, (*ids.base, out), (*ids.axes, out), table.dtype)


@rule(aten.slice.Tensor)
def slice_(
    f: Follower, node: fx.Node, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    dim %= x.rank
    before, after = f.trace.shape(arguments(node)[0])[dim], f.trace.shape(node)[dim]
    if before == after:
        return x
    if any(a.role for a in x.axes[dim]):
        if start == -1 and has(x.axes[dim], Role.QUERY):
            return _last(f, node, x, dim, keep=True)
        if f.is_whole and after == 1 and isinstance(start, int):
            one = taken(f, x, dim, start)
            return one.seen_as((*one.axes[:dim], (), *one.axes[dim:]))
        if is_keys(x, dim) and step == 1:
            return cut_columns(f, node, x, dim, start or 0, before, after)
        if is_sequence(f, x, dim):
            return cut(f, node, x, dim, start or 0, before, after, step)
        raise refuse(node, "takes a part of the positions or rows", "only all or the last position can be taken")
    start, end = (f.number(node, b) for b in (start, end))
    bounds = [f.emit.constant([b]) for b in (start or 0, sys.maxsize if end is None else end)]
    value, order = working(f.emit, x)
    value = f.emit.op("Slice", value, *bounds, f.emit.constant([order.index(dim)]), f.emit.constant([step]))
    axes = followed(x.axes)
    return from_working(value, (*axes[:dim], fixed(int(after)), *axes[dim + 1 :]), order, x.dtype)


def _last(f: Follower, node: fx.Node, x: Tensor, dim: int, keep: bool) -> Tensor:
    """The last position, where the module computes logits for it alone."""
    if x.axes[dim] != tuple(a for a in x.axes[dim] if a.role is Role.QUERY):
        raise refuse(node, "takes the last of an axis that holds more than positions")
    value, order = working(f.emit, x)
    value = f.emit.op("Gather", value, f.emit.constant([-1]), axis=order.index(dim))
    axes = followed(x.axes)
    result = from_working(value, (*axes[:dim], (), *axes[dim + 1 :]), order, x.dtype)
    return result if keep else result.seen_as((*axes[:dim], *axes[dim + 1 :]))


@rule(aten.select.int)
def select(f: Follower, node: fx.Node, x: Tensor, dim: int, index: Any) -> Tensor:
    dim %= x.rank
    if has(x.axes[dim], Role.QUERY) and index == -1:
        return _last(f, node, x, dim, keep=False)
    if f.is_whole and isinstance(index, int) and [a.role for a in x.axes[dim]] == [f.role]:
        return taken(f, x, dim, index)
    if any(a.role for a in x.axes[dim]):
        raise refuse(node, "takes one position or row", "only the last position can be taken")
    return taken(f, x, dim, f.number(node, index))


def taken(f: Follower, x: Tensor, dim: int, index: int) -> Tensor:
    """One entry of an axis, which vanishes; of the indices of picked entries those along one axis."""
    value, order = working(f.emit, x)
    value = f.emit.op("Gather", value, f.emit.constant([index]), axis=order.index(dim))
    axes = followed(x.axes)
    if x.value in f.columns and x.axes[dim] == x.base[-1]:
        f.indexes[value] = f.columns[x.value][index]
    result = from_working(value, (*axes[:dim], (), *axes[dim + 1 :]), order, x.dtype)
    return result.seen_as((*axes[:dim], *axes[dim + 1 :]))


@rule(aten.index.Tensor, aten.index_select.default)
def index(f: Follower, node: fx.Node, x: Any, *where: Any) -> Tensor:
    indices = where[0]
    if node.target is aten.index_select.default and isinstance(x, fx.Node):
        indices = [None] * where[0] + [where[1]]
    elif node.target is aten.index_select.default:
        indices = [None] * (where[0] % x.rank) + [where[1]]
    named = [i for i, index in enumerate(indices) if index is not None]
    if isinstance(x, fx.Node) and fill_value(f.trace, x) is None:
        return _look_up(f, node, x, indices)
    if isinstance(x, Tensor) and (every := _every_entry(f, x, indices)) is not None:
        return every
    if len(named) != 1 or not f.is_constant(indices[named[0]]) or isinstance(x, fx.Node):
        return picked_entries(f, node, x, indices)
    (dim,), picked = named, f.constant(indices[named[0]])
    if picked.dim() != 1:
        raise refuse(node, "is followed for one axis and a row of fixed indices")
    if any(a.role for a in x.axes[dim]):
        if has(x.axes[dim], Role.QUERY) and picked.tolist() == [-1]:
            return _last(f, node, x, dim, keep=True)
        raise refuse(node, "takes some of the positions or rows", "only the last position can be taken")
    value, order = working(f.emit, x)
    value = f.emit.op("Gather", value, f.emit.constant(picked.numpy()), axis=order.index(dim))
    axes = followed(x.axes)
    return from_working(value, (*axes[:dim], fixed(len(picked)), *axes[dim + 1 :]), order, x.dtype)


def _every_entry(f: Follower, x: Tensor, indices: list[Any]) -> Tensor | None:
    """x[arange(rows)[:, None], arange(positions)]: all of x in other axes, as masks by index look it up; or None."""
    if not all(isinstance(i, fx.Node) and counts_all(f, i, f.symbols.product(a)) for i, a in zip(indices, x.axes)):
        return None
    shapes = [f.trace.shape(index) for index in indices]
    places = [next((len(shape) - i for i, n in enumerate(shape) if n != 1), 0) for shape in shapes]  # from behind
    if 0 in places or len(set(places)) < len(places):
        return None
    rank = max(map(len, shapes))
    seen = dict(zip(places, x.axes))
    return x.seen_as((*(seen.get(rank - i, ()) for i in range(rank)), *x.axes[len(indices) :]))


@rule(aten.gather.default)
def gather(f: Follower, node: fx.Node, x: Any, dim: int, ids: Any, **kwargs: Any) -> Tensor:
    """A fixed row of values, the same for all rows of the batch, looked up by data; or data by data."""
    if isinstance(x, Tensor):
        return gathered(f, node, x, dim, ids)
    if not isinstance(x, fx.Node) or x in f.trace.masks or not isinstance(ids, Tensor):
        raise refuse(node, "is followed for a fixed table looked up by data")
    table = f.constant(x)
    if dim % table.dim() != table.dim() - 1 or table.numel() != table.shape[-1]:
        raise refuse(node, "is followed for a table that is one row, the same for the whole batch")
    rows = f.emit.shared(("row", x.name), table.reshape(-1), "table")
    return Tensor(f.emit.op("Gather", rows, ids.value, axis=0), ids.base, ids.axes, table.dtype)


def _look_up(f: Follower, node: fx.Node, table: fx.Node, indices: list[Any]) -> Tensor:
    """table[ids]: an embedding by another name."""
    if not f.is_constant(table) or len(indices) != 1 or not isinstance(indices[0], Tensor):
        raise refuse(node, "is followed for a fixed table looked up by data")
    ids, shape = indices[0], f.constant(table).shape
    value = f.emit.op("Gather", f.parameter(table), ids.value, axis=0)
    out = tuple(fixed(int(n)) for n in shape[1:])
    return Tensor(value, (*ids.base, *out), (*ids.axes, *out), f.constant(table).dtype)


def _pieces(f: Follower, node: fx.Node, x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
    dim %= x.rank
    if any(a.role for a in x.axes[dim]):
        raise refuse(node, "cuts the positions or rows into pieces")
    value, order = working(f.emit, x)
    splits = f.emit.constant(sizes)
    parts = f.emit.multi("Split", value, splits, outputs=len(sizes), axis=order.index(dim))
    axes = followed(x.axes)
    if x.value in f.columns and x.axes[dim] == x.base[-1] and set(sizes) == {1}:
        f.indexes.update(zip(parts, f.columns[x.value]))
    return [from_working(p, (*axes[:dim], fixed(n), *axes[dim + 1 :]), order, x.dtype) for p, n in zip(parts, sizes)]


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_chunk.default, aten.unbind.int)
def split(f: Follower, node: fx.Node, x: Tensor, *args: Any) -> list[Tensor]:
    dim = args[-1] if len(args) == (1 if node.target is aten.unbind.int else 2) else 0
    parts = node.meta["val"]
    if node.target is aten.unbind.int:
        pieces = _pieces(f, node, x, [1] * len(parts), dim)
        gone = dim % x.rank
        return [p.seen_as((*p.axes[:gone], *p.axes[gone + 1 :])) for p in pieces]
    sizes = [f.trace.sizes(p)[dim] for p in parts]
    if not all(isinstance(size, int) for size in sizes):
        raise refuse(node, "cuts into pieces whose sizes data counted", "take each expert's tokens by torch.where")
    return _pieces(f, node, x, sizes, dim)


@rule(aten.glu.default)
def glu(f: Follower, node: fx.Node, x: Tensor, dim: int = -1) -> Tensor:
    width = int(f.trace.shape(node)[dim])
    value, gate = _pieces(f, node, x, [width, width], dim)
    open_gate = replace(gate, value=f.emit.op("Sigmoid", gate.value))
    return elementwise(f, node, [value, open_gate], named("Mul"))


@rule(aten.cat.default, aten.concat.default, aten.stack.default)
def cat(f: Follower, node: fx.Node, tensors: list[Any], dim: int = 0) -> Tensor:
    shape = f.trace.shape(node)
    dim %= len(shape)
    stacked = node.target is aten.stack.default
    given = [t for t in tensors if isinstance(t, Tensor)]
    keys = None if stacked else joined_to_keys(f, node, tensors, dim)
    lead = next((t for t in given if keys and is_keys(t, dim)), given[0])
    if not stacked and not keys and len(given) == 1 and is_sequence(f, lead, dim):
        return put_in_front(f, node, tensors, lead, dim)
    if not stacked and not keys and any(a.role for a in lead.axes[dim]):
        raise refuse(node, "joins along the positions or rows", "nothing may stand before the first token")
    data = [t if isinstance(t, Tensor) else _spread(f, t, lead, None if stacked else dim) for t in tensors]
    if stacked:
        data = [t.seen_as((*t.axes[:dim], (), *t.axes[dim:])) for t in data]
    if not keys and any(a.role for t in data for a in t.axes[dim]):
        raise refuse(node, "joins along the positions or rows", "nothing may stand before the first token")
    rest = [t.seen_as((*t.axes[:dim], (), *t.axes[dim + 1 :])) for t in data]
    axes = broadcast_of(f, node, rest, dim)
    _, order = working(f.emit, next((t for t in data if t.order() != list(range(t.rank))), data[0]))
    dtype = node.meta["val"].dtype
    values = [working(f.emit, t, order)[0] for t in data]
    values = [v if t.dtype == dtype else f.emit.cast(v, dtype) for v, t in zip(values, data)]
    value = f.emit.op("Concat", *values, axis=order.index(dim))
    joined = keys or (Atom(size=int(shape[dim])),)
    return from_working(value, (*axes[:dim], joined, *axes[dim + 1 :]), order, dtype)


def _spread(f: Follower, table: fx.Node, lead: Tensor, dim: int | None) -> Tensor:
    """A table over the rows and positions of data that it is joined with, along `dim`, where their sizes may differ."""
    if dim is not None:
        one = taken(f, lead, dim, 0)
        lead = one.seen_as((*one.axes[:dim], (), *one.axes[dim:]))
    return elementwise(f, table, [lead, table], lambda emit, like, x: emit.op("Expand", x, emit.op("Shape", like)))


def broadcast_of(f: Follower, node: fx.Node, tensors: list[Tensor], dim: int) -> Axes:
    """The axes of joined tensors beside the one they are joined along."""
    axes = broadcast(f, node, tensors, {dim: (Atom(size=1),)})
    return followed((*axes[:dim], (), *axes[dim + 1 :]))
