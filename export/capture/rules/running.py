"""Running sums: along new positions they go on from a state, which is all that a cache has to keep of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..axes import Axes, Role, has, position
from ..emitter import DTYPES
from ..follow import Follower, followed, rule
from ..tensor import Tensor, laid_out, working
from ..trace import aten, refuse


@rule(aten.cumsum.default)
def cumsum(f: Follower, node: fx.Node, x: Tensor, dim: int, **kwargs: Any) -> Tensor:
    """Source: ONNX CumSum. The state is the sum up to the last position, (batch, ...) without the axis of positions."""
    dim %= x.rank
    dtype: torch.dtype = node.meta["val"].dtype
    if has(x.axes[dim], Role.BATCH):
        raise refuse(node, "mixes the rows of a batch")
    if has(x.axes[dim], Role.QUERY):
        return _continued(f, node, x, dim, dtype)
    if position(x.axes[dim]) is Role.SOURCE and not f.is_whole:
        raise refuse(node, "sums over the source in every step, where rows of a batch have sources of their own")
    value, order = working(f.emit, x)
    value = value if dtype == x.dtype else f.emit.cast(value, dtype)
    summed = f.emit.op("CumSum", value, f.emit.constant(order.index(dim)))
    axes = followed(x.axes)
    return Tensor(summed, tuple(axes[i] for i in order), axes, dtype)


def _continued(f: Follower, node: fx.Node, x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    axes = followed(x.axes)
    batch = next(i for i, axis in enumerate(axes) if has(axis, Role.BATCH))
    if len(axes[batch]) > 1 or len(axes[dim]) > 1:
        raise refuse(node, "sums along an axis that holds more than positions, or rows that are folded with heads")
    order = [batch, *(i for i in range(x.rank) if i not in (batch, dim)), dim]
    lies: Axes = tuple(axes[i] for i in order)  # (batch, ..., seq)
    value = laid_out(f.emit, Tensor(x.value, x.base, x.axes, x.dtype), tuple(x.axes[i] for i in order))
    value = value if dtype == x.dtype else f.emit.cast(value, dtype)
    past, entry = f.state(dtype, [f.size(axis) for axis in lies[1:-1]])
    new = f.emit.op("CumSum", value, f.emit.constant(x.rank - 1))
    total = f.emit.op("Add", new, f.emit.op("Unsqueeze", past, f.emit.constant([-1])))
    last = f.emit.op("Gather", total, f.emit.constant(-1), axis=-1)
    f.emit.output(last, entry.present, DTYPES[dtype], ("batch", *entry.shape))
    return Tensor(total, lies, axes, dtype)
