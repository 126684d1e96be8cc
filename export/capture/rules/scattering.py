"""Values put, or added, where an index of as many axes says: along a fixed axis, among keys, or row by row of tokens.

Sources: torch's scatter, scatter_add and scatter_reduce; ONNX ScatterElements of opset 18.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..axes import Role, fixed, has, renewed
from ..filled import fill_value, filled, spread
from ..follow import Follower, followed, rule
from ..tensor import Tensor, laid_out, working
from ..trace import aten, refuse
from .picking import as_rows, check_beside, in_order, put, read_indices

REDUCTIONS = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "max", "amin": "min"}


@rule(
    aten.scatter.src, aten.scatter.value, aten.scatter_add.default,
    aten.scatter.reduce, aten.scatter.value_reduce, aten.scatter_reduce.two,
)  # fmt: skip
def scatter(
    f: Follower, node: fx.Node, x: Any, dim: int, index: Any, source: Any, how: str = "", **kwargs: Any
) -> Tensor:
    how = REDUCTIONS.get(kwargs.get("reduce", how), "add" if node.target is aten.scatter_add.default else "none")
    shape = f.trace.shape(node)
    dim %= len(shape)
    if not isinstance(index, Tensor) or not kwargs.get("include_self", True):
        raise refuse(node, "is followed for data put where data says, beside what was there")
    to_keys = has(f.indexes.get(index.value, ()), Role.KEY)
    if not isinstance(shape[dim], int) and not to_keys:
        rows = as_rows(f, node, index, dim)
        pick = read_indices(
            f, node, shape, x.axes if isinstance(x, Tensor) else [None] * len(shape), [None] * dim + [rows]
        )
        return put(f, node, x, pick, source, how)
    base = _beside_index(f, node, x, dim, index)
    if to_keys and not has(base.axes[dim], Role.KEY):
        raise refuse(node, "the index picks among all positions, and what it is put into has none there")
    check_beside(node, base.axes, index.axes, dim)
    value, order = working(f.emit, base)
    places = laid_out(f.emit, index, in_order(order, index.axes))
    updates = _beside_places(f, node, source, index, order, base.dtype)
    value = f.emit.op("ScatterElements", value, places, updates, axis=order.index(dim), reduction=how)
    axes = followed(base.axes)
    return Tensor(value, in_order(order, axes), axes, base.dtype)


def _beside_index(f: Follower, node: fx.Node, x: Any, dim: int, index: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x
    number = fill_value(f.trace, x)
    if number is None:
        raise refuse(node, "data is put into a table", "zeros, or data, may be written into")
    shape, along = f.trace.shape(x), f.indexes.get(index.value, ())
    own = [along if i == dim and along else axis for i, axis in enumerate(index.axes)]
    axes = tuple(fixed(n) if isinstance(n, int) else own[i] for i, n in enumerate(shape))
    return filled(f.emit, number, renewed(followed(axes)), x.meta["val"].dtype)


def _beside_places(
    f: Follower, node: fx.Node, source: Any, index: Tensor, order: list[int], dtype: torch.dtype
) -> ir.Value:
    """The values to put, as many as there are places."""
    if isinstance(source, Tensor):
        if math.prod(map(f.symbols.product, source.axes)) != math.prod(map(f.symbols.product, index.axes)):
            raise refuse(node, "puts some of its values", "give as many indices as values")
        value = laid_out(f.emit, source, in_order(order, source.axes))
        return value if source.dtype == dtype else f.emit.cast(value, dtype)
    number = fill_value(f.trace, source) if isinstance(source, fx.Node) else source
    if number is None:
        raise refuse(node, "puts entries of a table where data says")
    return spread(f.emit, number, in_order(order, followed(index.axes)), dtype)
