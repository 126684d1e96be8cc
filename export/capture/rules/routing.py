"""Which experts a token goes to: the largest of its scores, in order, as numbers or as a row of zeros and ones.

All of it is along a fixed axis, so each token decides alone. Sorting tokens by their experts is the exception: it only
moves them, and what is moved back is as it was.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Min

from ..axes import Atom, Axes, Role, fixed, has, renewed
from ..follow import Follower, followed, rule
from ..tensor import Tensor, from_working, laid_out, size_of_axis, working
from ..trace import aten, refuse
from .reductions import over

SORTED = (torch.float32, torch.float64, torch.int64, torch.int32)  # what TopK has kernels for


@rule(aten.topk.default)
def topk(
    f: Follower, node: fx.Node, x: Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True
) -> list[Tensor]:
    """Source: ONNX TopK: of equal entries that with the lower index comes first."""
    if has(x.axes[dim], Role.KEY) and len(x.axes[dim]) == 1:
        return _best_keys(f, node, x, dim % x.rank, largest)
    (axis,) = over(f, node, x, dim)
    return _largest(f, x, int(f.number(node, k)), axis, largest)


def _largest(f: Follower, x: Tensor, count: int, dim: int, largest: bool) -> list[Tensor]:
    value, order = working(f.emit, x)
    compute = x.dtype if x.dtype in SORTED else torch.float32 if x.dtype.is_floating_point else torch.int64
    value = value if compute == x.dtype else f.emit.cast(value, compute)
    values, indices = f.emit.multi(
        "TopK", value, f.emit.constant([count]), outputs=2, axis=order.index(dim), largest=int(largest), sorted=1
    )
    values = values if compute == x.dtype else f.emit.cast(values, x.dtype)
    axes = tuple(fixed(count) if i == dim else axis for i, axis in enumerate(followed(x.axes)))
    return [from_working(values, axes, order, x.dtype), from_working(indices, axes, order, torch.int64)]


def _best_keys(f: Follower, node: fx.Node, x: Tensor, dim: int, largest: bool) -> list[Tensor]:
    """Those of all positions, for each new one; in a short sequence there are fewer than the module asks for."""
    size, own = f.trace.sizes(node.meta["val"][1])[dim], f.symbols.product(x.axes[dim])
    limits = size.args if isinstance(size, (sympy.Min, Min)) else (size,)
    numbers = [limit for limit in limits if limit != own]
    if any(sympy.sympify(limit).free_symbols for limit in numbers):
        raise refuse(node, "picks a number of keys that changes with the length of the whole sequence", "give a number")
    count = size_of_axis(f.emit, x.axes[dim])
    for limit in numbers:
        count = f.emit.op("Min", count, f.emit.constant([int(limit)]))
    value, order = working(f.emit, x)
    values, indices = f.emit.multi(
        "TopK", value, count, outputs=2, axis=order.index(dim), largest=int(largest), sorted=1
    )
    f.indexes[indices] = x.axes[dim]
    f.emit.count_picked(size, indices, order.index(dim))
    axes = tuple((Atom(Role.PICKED, size),) if i == dim else axis for i, axis in enumerate(followed(x.axes)))
    return [from_working(values, axes, order, x.dtype), from_working(indices, axes, order, torch.int64)]


@rule(aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
def sort(f: Follower, node: fx.Node, x: Tensor, dim: int = -1, descending: bool = False, **kwargs: Any) -> Any:
    descending = kwargs.get("descending", descending)
    dim = kwargs.get("dim", dim) % x.rank
    indices_only = node.target in (aten.argsort.default, aten.argsort.stable)
    if x.rank == 1 and any(a.role for a in x.axes[dim]):
        found = _moved(f, node, x, descending, indices_only)
    else:
        (dim,) = over(f, node, x, dim)
        found = _largest(f, x, f.size(x.axes[dim]), dim, descending)
    return found[1] if indices_only else found


def _moved(f: Follower, node: fx.Node, x: Tensor, descending: bool, indices_only: bool) -> list[Tensor]:
    """Tokens in the order of their experts: no token sees another, as long as nothing is summed up along the order."""
    source = x.axes[0]
    count, value = size_of_axis(f.emit, source), laid_out(f.emit, x)
    values, indices = f.emit.multi("TopK", value, count, outputs=2, axis=0, largest=int(descending), sorted=1)
    back = f.indexes.get(x.value)
    if back is not None and indices_only and len(source) == 1 and source[0].role is Role.PICKED:
        axis = renewed((back,))[0]  # the order of an order: where each token has gone
    else:
        size = f.symbols.product(source)
        axis = (Atom(Role.PICKED, size),)
        f.emit.count_picked(size, indices)
    f.indexes[indices] = source
    return [Tensor.of(values, (axis,), x.dtype), Tensor.of(indices, (axis,), torch.int64)]


@rule(aten.one_hot.default)
def one_hot(f: Follower, node: fx.Node, x: Tensor, classes: int = -1) -> Tensor:
    if not isinstance(classes, int) or classes < 1:
        raise refuse(node, "its number of classes depends on the values", "give num_classes")
    zero_one = f.emit.constant([0, 1])
    value = f.emit.op("OneHot", x.value, f.emit.constant(classes), zero_one, axis=-1)
    out: Axes = (fixed(classes),)
    return Tensor(value, (*x.base, *out), (*x.axes, *out), torch.int64)
