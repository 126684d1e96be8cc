"""Operations along features, position by position: what turns, takes a diagonal, and sums up otherwise than by sum."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..axes import Axis, fixed
from ..follow import Follower, followed, rule
from ..lower_full import LEAST
from ..tensor import Tensor, from_working, working
from ..trace import aten, refuse
from .reductions import corrected_variance, over, reduce, reduced


def _features(node: fx.Node, x: Tensor, dim: int) -> Axis:
    if any(a.role for a in x.axes[dim]):
        raise refuse(node, "moves positions or rows", "only features can be moved")
    return x.axes[dim]


def _picked(f: Follower, x: Tensor, dim: int, places: list[int]) -> Tensor:
    """Entries of an axis of features in another order."""
    value, order = working(f.emit, x)
    value = f.emit.op("Gather", value, f.emit.constant(places), axis=order.index(dim))
    axes = followed(x.axes)
    return from_working(value, (*axes[:dim], fixed(len(places)), *axes[dim + 1 :]), order, x.dtype)


@rule(aten.flip.default)
def flip(f: Follower, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    for dim in (d % x.rank for d in dims):
        x = _picked(f, x, dim, list(range(f.size(_features(node, x, dim))))[::-1])
    return x


@rule(aten.roll.default)
def roll(f: Follower, node: fx.Node, x: Tensor, shifts: list[int], dims: list[int] | None = None) -> Tensor:
    if not dims or len(dims) != len(shifts):
        raise refuse(node, "rolls positions and rows laid end to end", "give the axis of the features")
    for shift, dim in zip(shifts, (d % x.rank for d in dims)):
        count = f.size(_features(node, x, dim))
        x = _picked(f, x, dim, [(i - f.number(node, shift)) % count for i in range(count)])
    return x


@rule(aten.diagonal.default)
def diagonal(f: Follower, node: fx.Node, x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    first, second = dim1 % x.rank, dim2 % x.rank
    columns = f.size(_features(node, x, second))
    _features(node, x, first)
    rest = tuple(x.axes[i] for i in range(x.rank) if i not in (first, second))
    merged = x.seen_as((*rest, (*x.axes[first], *x.axes[second])))  # (..., rows * columns)
    start = max(-offset, 0) * columns + max(offset, 0)
    count = int(f.trace.shape(node)[-1])
    return _picked(f, merged, merged.rank - 1, [start + i * (columns + 1) for i in range(count)])


@rule(aten.logsumexp.default)
def logsumexp(f: Follower, node: fx.Node, x: Tensor, dims: Any, keepdim: bool = False) -> Tensor:
    """Source: ONNX ReduceLogSumExp, which onnxruntime computes from the largest value on."""
    return reduced(f, node, x, over(f, node, x, dims), keepdim, "ReduceLogSumExp", hidden=LEAST)


@rule(aten.var_mean.correction, aten.var_mean.dim)
def variance_and_mean(
    f: Follower,
    node: fx.Node,
    x: Tensor,
    dims: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> list[Any]:
    spread = correction if correction is not None else int(unbiased)
    alone = _first_of(node)
    return [
        corrected_variance(f, alone, x, dims, correction=spread, keepdim=keepdim),
        reduce(f, _as_mean(alone), x, dims, keepdim),
    ]


def _first_of(node: fx.Node) -> fx.Node:
    """A node of the same place whose value is the first of several."""
    return _stand_in(node, aten.var.correction, node.meta["val"][0])


def _as_mean(node: fx.Node) -> fx.Node:
    return _stand_in(node, aten.mean.dim, node.meta["val"])


def _stand_in(node: fx.Node, target: Any, value: Any) -> fx.Node:
    made = fx.Graph().call_function(target)
    made.meta = {**node.meta, "val": value}
    return made
