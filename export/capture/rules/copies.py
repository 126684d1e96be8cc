"""Tensors that are filled piece by piece, as `y[..., :n] = x` becomes without in-place operations."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..axes import fixed
from ..follow import Follower, followed, rule
from ..tensor import Tensor, from_working, working
from ..trace import EMPTY, aten, refuse
from .shifts import written_into
from .views import expand


@rule(aten.copy.default)
def copy(f: Follower, node: fx.Node, _: Any, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The source in the shape and type of what it is written into, whose values vanish."""
    spread = expand(f, node, source)
    assert isinstance(spread, Tensor)
    dtype = node.meta["val"].dtype
    if dtype == source.dtype:
        return spread
    return Tensor(f.emit.cast(spread.value, dtype), spread.base, spread.axes, dtype)


@rule(aten.slice_scatter.default)
def slice_scatter(
    f: Follower, node: fx.Node, base: Any, piece: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    """`base` with `piece` from `start` to `end` of one axis; of an empty base the rest is zeros."""
    shape = f.trace.shape(node)
    dim %= len(shape)
    whole = shape[dim]
    if isinstance(piece, Tensor) and any(atom.role for atom in piece.axes[dim]):
        return written_into(f, node, base, piece, dim, start, step)
    if not isinstance(piece, Tensor) or not isinstance(whole, int):
        raise refuse(node, "writes into a part of the positions or rows")
    first, width = int(f.number(node, start) or 0) % (whole + 1), f.size(piece.axes[dim])
    if width == whole:
        return piece
    place_of = {first + i * step: i for i in range(width)}
    if isinstance(base, fx.Node) and base.target in EMPTY:  # zeros, of which one behind the piece is enough
        axes = followed(piece.axes)
        value, order = working(f.emit, piece)
        pads = [0] * 2 * len(shape)
        pads[order.index(dim) + len(shape)] = 1
        value = f.emit.op("Pad", value, f.emit.constant(pads))
        places = [place_of.get(i, width) for i in range(whole)]
    elif isinstance(base, Tensor):
        axes = followed(base.axes)
        value, order = working(f.emit, base)
        value = f.emit.op("Concat", value, working(f.emit, piece, order)[0], axis=order.index(dim))
        places = [whole + place_of[i] if i in place_of else i for i in range(whole)]
    else:
        raise refuse(node, "writes data into a table", "write into a tensor of zeros")
    value = f.emit.op("Gather", value, f.emit.constant(places), axis=order.index(dim))
    return from_working(value, (*axes[:dim], fixed(whole), *axes[dim + 1 :]), order, node.meta["val"].dtype)
