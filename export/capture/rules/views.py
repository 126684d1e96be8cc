"""Operations that only arrange: they regroup atoms and write nothing into the graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..axes import Atom, Role, fixed, has, position
from ..follow import Follower, rule
from ..tensor import Tensor
from ..trace import aten, refuse


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
def view(f: Follower, node: fx.Node, x: Tensor, *args: Any) -> Tensor:
    grouped = f.symbols.regroup(x.axes, f.trace.shape(node))
    if grouped is None:
        raise refuse(node, f"cuts the sequence or batch axis: {list(x.axes)} into {f.trace.shape(node)}")
    return x.seen_as(*grouped)


@rule(aten.unsqueeze.default)
def unsqueeze(f: Follower, node: fx.Node, x: Tensor, dim: int) -> Tensor:
    dim %= x.rank + 1
    return x.seen_as((*x.axes[:dim], (), *x.axes[dim:]))


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(f: Follower, node: fx.Node, x: Tensor, dims: int | list[int] | None = None) -> Tensor:
    asked = range(x.rank) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % x.rank for d in asked if not x.axes[d % x.rank]}
    return x.seen_as(tuple(axis for i, axis in enumerate(x.axes) if i not in gone))


@rule(aten.transpose.int)
def transpose(f: Follower, node: fx.Node, x: Tensor, i: int, j: int) -> Tensor:
    order = list(range(x.rank))
    order[i], order[j] = order[j], order[i]
    return x.seen_as(tuple(x.axes[k] for k in order))


@rule(aten.t.default, aten.numpy_T.default)
def reverse(f: Follower, node: fx.Node, x: Tensor) -> Tensor:
    return x.seen_as(x.axes[::-1])


@rule(aten.permute.default)
def permute(f: Follower, node: fx.Node, x: Tensor, order: list[int]) -> Tensor:
    return x.seen_as(tuple(x.axes[i] for i in order))


@rule(aten.expand.default)
def expand(f: Follower, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    shape = f.trace.shape(node)
    x = x.seen_as(((),) * (len(shape) - x.rank) + x.axes)
    places = [i for i, size in enumerate(shape) if size == f.symbols.seq]
    if len(places) == 2 and not f.is_whole and has(x.axes[places[1]], Role.QUERY):  # one value for each key
        x = f.whole(x, "data")
    spread = []
    for i, (size, axis) in enumerate(zip(shape, x.axes)):
        if axis or size == 1:
            spread.append(axis)
        elif isinstance(size, int):
            spread.append((Atom(size=size, repeat=True),))
        elif f.is_whole and size in (f.symbols.size(Atom(f.role)), f.symbols.batch):
            role = Role.BATCH if size == f.symbols.batch else f.role
            spread.append((Atom(role, repeat=True),))
        elif len(places) == 2 and i in places and position(x.axes[sum(places) - i]):
            spread.append((Atom(Role.KEY if i == places[1] else Role.QUERY, repeat=True),))
        else:
            raise refuse(node, f"spreads one value along an axis of {size} positions or rows")
    return x.seen_as(tuple(spread))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(
    f: Follower, node: fx.Node, x: Tensor, repeats: int, dim: int | None = None, **kwargs: Any
) -> Tensor:
    if dim is None or not isinstance(repeats, int):
        raise refuse(node, "is followed for a number of repeats along one axis")
    return _repeated(x, dim % x.rank, repeats, inside=True)


@rule(aten.repeat.default)
def repeat(f: Follower, node: fx.Node, x: Tensor, repeats: list[int]) -> Tensor:
    if not all(isinstance(r, int) for r in repeats):
        raise refuse(node, "repeats along an axis of positions or rows")
    x = x.seen_as(((),) * (len(repeats) - x.rank) + x.axes)
    for i, count in enumerate(repeats):
        x = _repeated(x, i, count, inside=False)
    return x


def _repeated(x: Tensor, dim: int, count: int, inside: bool) -> Tensor:
    """Each value `count` times in a row (inside), or the whole axis `count` times."""
    if count == 1:
        return x
    copies = tuple(Atom(size=a.size, repeat=True) for a in fixed(count))
    axis = (*x.axes[dim], *copies) if inside else (*copies, *x.axes[dim])
    return x.seen_as((*x.axes[:dim], axis, *x.axes[dim + 1 :]))
