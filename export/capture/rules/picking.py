"""Entries that data picks: the tokens of an expert, the weights of a token's experts; and what is put back where.

Which tokens an expert gets depends on the ids, so their number does too: an axis of picked entries is as long as it
turns out to be. Nothing may be summed up along it, so each token is still treated alone. An index may only pick among
positions where it is known to have come from them; along fixed axes any index may.

Sources: ONNX NonZero, Gather, GatherND, GatherElements, ScatterND and ScatterElements of opset 18.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..axes import Atom, Axes, Axis, Role, fixed, flat, has, renewed, same
from ..beside import beside
from ..filled import fill_value, filled, spread
from ..follow import Follower, followed, rule
from ..tensor import Tensor, laid_out, size_of_axis, size_vector, working
from ..trace import arguments, aten, is_computed, refuse

ONE_BY_ONE = "look up positions by indices that torch.where or nonzero gave of a mask over the same positions"
UNCHANGED = (aten.unsqueeze.default, aten.view.default, aten.slice.Tensor, aten.alias.default)  # where shapes agree


@dataclass(frozen=True)
class Pick:
    """The axes that are indexed, their indices, and the axes that these have together."""

    dims: list[int]
    indices: list[Tensor]
    axes: Axes

    def rest(self, rank: int) -> list[int]:
        return [i for i in range(rank) if i not in self.dims]

    @property
    def at(self) -> int:
        """Where the indices' own axes stand in the result: where the indexed ones did if those were in a row."""
        adjacent = self.dims == list(range(self.dims[0], self.dims[0] + len(self.dims)))
        return self.dims[0] if adjacent else 0

    def placed(self, rest: Sequence[Axis]) -> Axes:
        """The axes of the result, `rest` of them not indexed."""
        return (*rest[: self.at], *self.axes, *rest[self.at :])


# -- which entries ------------------------------------------------------------------------------------------------
@rule(aten.nonzero.default, aten.nonzero_numpy.default, aten.where.default, aten.argwhere.default)
def nonzero(f: Follower, node: fx.Node, x: Tensor) -> Tensor | list[Tensor]:
    value = node.meta["val"]
    first = value[0] if isinstance(value, (list, tuple)) else value
    found = _true_entries(f, node, x, first.shape[0])
    return _columns(f, found) if isinstance(value, (list, tuple)) else found


def _true_entries(f: Follower, node: fx.Node, x: Tensor, count: Any) -> Tensor:
    """(picked, rank) int64: the indices of what is not zero, in the order of the module's own axes."""
    size = count.node.expr if isinstance(count, torch.SymInt) else count
    if not any(a.role for a in flat(x.axes)):
        raise refuse(node, "picks entries by data that belongs to no token")
    value = f.emit.op("Transpose", f.emit.op("NonZero", laid_out(f.emit, x)), perm=[1, 0])
    f.columns[value] = x.axes
    if x.rank == 1:
        f.indexes[value] = x.axes[0]
    f.emit.count_picked(size, value)
    return Tensor.of(value, ((Atom(Role.PICKED, size),), fixed(x.rank)), torch.int64)


def _columns(f: Follower, found: Tensor) -> list[Tensor]:
    axes, columns = found.axes[:1], []
    for i, axis in enumerate(f.columns[found.value]):
        value = f.emit.op("Gather", found.value, f.emit.constant(i), axis=1)
        f.indexes[value] = axis
        columns.append(Tensor.of(value, axes, torch.int64))
    return columns


def read_indices(
    f: Follower, node: fx.Node, sizes: Sequence[Any], roles: Sequence[Axis | None], indices: list[Any]
) -> Pick:
    """The indices of an indexing; a mask stands for those of its true entries, along as many axes as it has.

    roles: the axes that are indexed, where they are known.
    """
    dims, tensors, dim = [], [], 0
    for index in indices:
        if index is None:
            dim += 1
            continue
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            found = _columns(f, _true_entries(f, node, index, _count(node)))
        else:
            found = [_as_data(f, node, index, sizes[dim], roles[dim])]
        for tensor in found:
            dims.append(dim)
            tensors.append(tensor)
            dim += 1
    return Pick(dims, tensors, _together(node, tensors))


def _count(node: fx.Node) -> Any:
    """The number of entries that a mask picks: the one size that nobody knows before."""
    result = arguments(node)[2] if node.target is aten.index_put.default else node
    value = result.meta["val"] if isinstance(result, fx.Node) else None
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return next((size for size in sizes if isinstance(size, torch.SymInt) and _is_counted(size)), None)


def _is_counted(size: torch.SymInt) -> bool:
    return str(size.node.expr).startswith("u")


def _as_data(f: Follower, node: fx.Node, index: Any, size: Any, axis: Axis | None) -> Tensor:
    """Indices as a tensor: data, fixed numbers, or each position itself, as `arange` over all of them is."""
    if isinstance(index, Tensor):
        return index
    if f.is_constant(index):
        picked = f.constant(index)
        picked = picked.nonzero().squeeze(-1) if picked.dtype == torch.bool and picked.dim() == 1 else picked
        axes = tuple(fixed(int(n)) for n in picked.shape)
        return Tensor.of(f.emit.constant(picked.numpy()), axes, torch.int64)
    if axis is None or not counts_all(f, index, size):
        raise refuse(node, "picks positions by a table", ONE_BY_ONE)
    length = f.emit.op("Squeeze", size_of_axis(f.emit, axis))
    value = f.emit.op("Range", f.emit.constant(0), length, f.emit.constant(1))
    f.indexes[value] = axis
    (own,) = renewed((axis,))
    return Tensor(value, (own,), tuple(() if n == 1 else own for n in f.trace.shape(index)), torch.int64)


def counts_all(f: Follower, node: fx.Node, size: Any) -> bool:
    """Whether a positional node is arange(size), whatever axes of size 1 stand around it."""
    if [n for n in f.trace.shape(node) if n != 1] != [size]:
        return False
    while node.target in UNCHANGED or (node.target is aten.add.Tensor and arguments(node)[1:] == (0,)):
        node = arguments(node)[0]
    starts = {aten.arange.default: (), aten.arange.start: (0,), aten.arange.start_step: (0,)}
    if not is_computed(node) or node.target not in starts or f.trace.shape(node) != [size]:
        return False
    args = arguments(node)
    step = args[2] if len(args) > 2 and node.target is aten.arange.start_step else 1
    return (node.target is aten.arange.default or args[0] == 0) and step == 1


def _together(node: fx.Node, tensors: Sequence[Tensor]) -> Axes:
    """The axes of indices that are broadcast against each other."""
    rank = max(t.rank for t in tensors)
    result: list[Axis] = []
    for back in range(rank, 0, -1):
        found = [t.axes[t.rank - back] for t in tensors if t.rank >= back and t.axes[t.rank - back]]
        axis = found[0] if found else ()
        if any(tuple(a.role for a in other) != tuple(a.role for a in axis) for other in found):
            raise refuse(node, "its indices belong to different positions")
        result.append(axis)
    return renewed(followed(tuple(result)))


def _check_indices(f: Follower, node: fx.Node, axes: Axes, pick: Pick) -> None:
    """Positions may only be picked by indices of theirs, and no token may pick in the rows of another."""
    for dim, index in zip(pick.dims, pick.indices):
        known = f.indexes.get(index.value)
        if any(a.role for a in axes[dim]) and not (known is not None and same(known, axes[dim])):
            raise refuse(node, "looks up positions or rows by data", ONE_BY_ONE)
    own = [a.role for i in pick.rest(len(axes)) for a in axes[i] if a.role]
    if own and any(a.role for a in flat(pick.axes)):
        raise refuse(node, "each position looks up something in all positions", "gather along a fixed axis would work")


def _coordinates(f: Follower, pick: Pick) -> ir.Value:
    """(*indices' axes, number of indexed axes) int64, as GatherND and ScatterND want them."""
    last = f.emit.constant([-1])
    parts = []
    for index in pick.indices:
        missing = len(pick.axes) - index.rank
        value = laid_out(f.emit, index.seen_as(((),) * missing + index.axes))
        value = value if index.dtype == torch.int64 else f.emit.cast(value, torch.int64)
        if any(bool(axis) != bool(own) for axis, own in zip(pick.axes, ((),) * missing + index.axes)):
            value = f.emit.op("Expand", value, size_vector(f.emit, pick.axes))
        parts.append(f.emit.op("Unsqueeze", value, last))
    return parts[0] if len(parts) == 1 else f.emit.op("Concat", *parts, axis=-1)


# -- taken out ----------------------------------------------------------------------------------------------------
def picked_entries(f: Follower, node: fx.Node, x: Any, indices: list[Any]) -> Tensor:
    """x[i, :, j], with any of the indices data."""
    if not isinstance(x, Tensor):
        return _of_one_number(f, node, x, indices)
    sizes = [f.symbols.product(axis) for axis in x.axes]
    pick = read_indices(f, node, sizes, x.axes, indices)
    _check_indices(f, node, x.axes, pick)
    rest = [renewed(followed((x.axes[i],)))[0] for i in pick.rest(x.rank)]
    if len(pick.dims) == 1:
        value, order = working(f.emit, x)
        at = order.index(pick.dims[0])
        value = f.emit.op("Gather", value, laid_out(f.emit, pick.indices[0]), axis=at)
        kept = dict(zip(pick.rest(x.rank), rest))
        base: Axes = tuple(a for i in order for a in (pick.axes if i == pick.dims[0] else (kept[i],)))
        if x.value in f.indexes:  # indices among those that are picked still index what they did
            f.indexes[value] = f.indexes[x.value]
    else:
        lies = tuple(x.axes[i] for i in (*pick.dims, *pick.rest(x.rank)))
        value = f.emit.op("GatherND", laid_out(f.emit, x, lies), _coordinates(f, pick))
        base = (*pick.axes, *rest)
    return Tensor(value, base, pick.placed(rest), x.dtype)


def _of_one_number(f: Follower, node: fx.Node, x: fx.Node, indices: list[Any]) -> Tensor:
    """Entries of zeros are zeros."""
    number, shape = fill_value(f.trace, x), f.trace.shape(x)
    if number is None:
        raise refuse(node, "data looks up entries of a table over positions")
    pick = read_indices(f, node, shape, [None] * len(shape), indices)
    rest = [shape[i] for i in pick.rest(len(shape))]
    if not all(isinstance(size, int) for size in rest):
        raise refuse(node, "each position looks up something in all positions")
    axes = pick.placed([fixed(size) for size in rest])
    return filled(f.emit, number, axes, x.meta["val"].dtype)


def gathered(f: Follower, node: fx.Node, x: Tensor, dim: int, index: Any) -> Tensor:
    """x.gather(dim, index) of data: along a fixed axis by any index, of the positions themselves by rows."""
    dim %= x.rank
    if not isinstance(index, Tensor):
        return _by_table(f, node, x, dim, index)
    if any(a.role for a in x.axes[dim]):
        rows = as_rows(f, node, index, dim)
        return picked_entries(f, node, x, [None] * dim + [rows])
    check_beside(node, x.axes, index.axes, dim)
    value, order = working(f.emit, x)
    value = f.emit.op(
        "GatherElements", value, laid_out(f.emit, index, in_order(order, index.axes)), axis=order.index(dim)
    )
    axes = renewed(followed(index.axes))
    return Tensor(value, in_order(order, axes), axes, x.dtype)


def _by_table(f: Follower, node: fx.Node, x: Tensor, dim: int, index: fx.Node) -> Tensor:
    """What positions look up among their own fixed entries, as a bias for each distance to a key."""
    if any(a.role for a in x.axes[dim]):
        raise refuse(node, "picks positions by a table", ONE_BY_ONE)
    shape = f.trace.shape(index)
    listed = fixed(shape[dim]) if isinstance(shape[dim], int) else (Atom(f.role if f.is_whole else Role.KEY),)
    axes = followed(tuple(listed if i == dim else axis for i, axis in enumerate(x.axes)))
    if [f.symbols.product(axis) for axis in axes] != shape or any(len(axis) > 1 for axis in axes):
        raise refuse(node, "a table looks up entries for some of the positions")
    places = beside(f, index, axes, list(range(x.rank)), torch.int64, node)
    places = f.emit.op("Expand", places, size_vector(f.emit, axes))
    return Tensor.of(f.emit.op("GatherElements", laid_out(f.emit, x), places, axis=dim), axes, x.dtype)


def in_order(order: Sequence[int], axes: Axes) -> Axes:
    return tuple(axes[i] for i in order)


def as_rows(f: Follower, node: fx.Node, index: Tensor, dim: int) -> Tensor:
    """Of an index that says the same for all features of a row, what it says for the row."""
    rest = [axis for i, axis in enumerate(index.axes) if i != dim]
    if any(not a.repeat for a in flat(tuple(rest))):
        raise refuse(node, "looks up positions or rows by data", ONE_BY_ONE)
    return index.seen_as((index.axes[dim],))


def check_beside(node: fx.Node, axes: Axes, of_index: Axes, dim: int) -> None:
    """Every other axis of the index must be that of the data: the same tokens."""
    for i, (own, other) in enumerate(zip(axes, of_index)):
        if i != dim and [a.role for a in own if a.role] != [a.role for a in other if a.role]:
            raise refuse(node, f"the index and what it looks up differ along axis {i}")
    if any(a.role for a in of_index[dim]) and not has(axes[dim], Role.KEY):
        raise refuse(node, "each position looks up something for all positions")


# -- put back -----------------------------------------------------------------------------------------------------
@rule(aten.index_put.default)
def index_put(f: Follower, node: fx.Node, x: Any, indices: list[Any], values: Any, accumulate: bool = False) -> Tensor:
    shape = f.trace.shape(node)
    roles = x.axes if isinstance(x, Tensor) else [None] * len(shape)
    pick = read_indices(f, node, shape, roles, indices)
    if isinstance(values, fx.Node) and len(pick.indices) == 1:  # inverse[order] = arange(n)
        axis = pick.indices[0].axes[0]
        if counts_all(f, values, f.symbols.product(axis)):
            values = _as_data(f, node, values, f.symbols.product(axis), axis)
    result = put(f, node, x, pick, values, "add" if accumulate else "none")
    written = f.symbols.product(pick.indices[0].axes[0]) if len(pick.indices) == 1 else None
    if isinstance(values, Tensor) and values.value in f.indexes and shape == [written]:  # every entry is written once
        f.indexes[result.value] = f.indexes[values.value]
    return result


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(f: Follower, node: fx.Node, x: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Tensor:
    shape = f.trace.shape(node)
    roles = x.axes if isinstance(x, Tensor) else [None] * len(shape)
    dim %= len(shape)
    pick = read_indices(f, node, shape, roles, [None] * dim + [index])
    if isinstance(source, Tensor) and alpha != 1:
        scale = f.emit.constant(torch.tensor(alpha, dtype=source.dtype).numpy())
        source = Tensor(f.emit.op("Mul", source.value, scale), source.base, source.axes, source.dtype)
    return put(f, node, x, pick, source, "add" if node.target is aten.index_add.default else "none")


def put(f: Follower, node: fx.Node, x: Any, pick: Pick, values: Any, how: str) -> Tensor:
    """x with values written, or added, at the picked entries."""
    x = _base(f, node, x, pick)
    _check_indices(f, node, x.axes, pick)
    first = (*pick.dims, *pick.rest(x.rank))
    rest = [x.axes[i] for i in pick.rest(x.rank)]
    value = laid_out(f.emit, x, tuple(x.axes[i] for i in first))
    updates = _updates(f, node, pick, rest, values, x.dtype)
    value = f.emit.op("ScatterND", value, _coordinates(f, pick), updates, reduction=how)
    axes = renewed(followed(x.axes))
    return Tensor(value, tuple(axes[i] for i in first), axes, x.dtype)


def _base(f: Follower, node: fx.Node, x: Any, pick: Pick) -> Tensor:
    """What is written into, as data: zeros have the axes that the indices were picked from."""
    if isinstance(x, Tensor):
        return x
    number, shape = fill_value(f.trace, x), f.trace.shape(x)
    axes: list[Axis | None] = [fixed(size) if isinstance(size, int) else None for size in shape]
    for dim, index in zip(pick.dims, pick.indices):
        if axes[dim] is None:
            axes[dim] = f.indexes.get(index.value)
    if number is None or any(axis is None for axis in axes):
        raise refuse(node, "data is put into a table over positions", "zeros, or data, may be written into")
    known = renewed(tuple(axis for axis in axes if axis is not None))
    return filled(f.emit, number, known, x.meta["val"].dtype)


def _updates(f: Follower, node: fx.Node, pick: Pick, rest: list[Axis], values: Any, dtype: torch.dtype) -> ir.Value:
    """The values as ScatterND wants them: the indices' axes first, each entry of its own."""
    wanted: Axes = (*pick.axes, *rest)
    if not isinstance(values, Tensor):
        number = fill_value(f.trace, values) if isinstance(values, fx.Node) else values
        if number is None and f.is_constant(values) and values.meta["val"].numel() == 1:
            number = f.constant(values).item()
        if number is None:
            raise refuse(node, "a table is written where data says")
        return spread(f.emit, number, wanted, dtype)
    full = values.seen_as(((),) * (len(wanted) - values.rank) + values.axes)
    own = range(pick.at, pick.at + len(pick.axes))
    lies = tuple(full.axes[i] for i in (*own, *(i for i in range(len(wanted)) if i not in own)))
    value = laid_out(f.emit, full, lies)
    if any(bool(have) != bool(want) for have, want in zip(lies, wanted)):
        value = f.emit.op("Expand", value, size_vector(f.emit, wanted))
    return value if values.dtype == dtype else f.emit.cast(value, dtype)
