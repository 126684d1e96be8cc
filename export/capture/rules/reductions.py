"""Operations that sum up an axis: any but that of the new positions, which a cache does not hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..axes import Role, has, position
from ..follow import Follower, followed, rule
from ..tensor import Tensor, from_working, laid_out, working
from ..trace import aten, refuse
from .padding import hide_padding


def over(f: Follower, node: fx.Node, x: Tensor, dims: Any) -> list[int]:
    """The axes to sum up; refused where new positions or the batch lie along one."""
    asked = range(x.rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    found = [d % x.rank for d in asked]
    for dim in found:
        if has(x.axes[dim], Role.QUERY):
            raise refuse(
                node,
                "mixes positions: every token would see the ones behind it",
                "a causal mean is a masked matmul over the keys",
            )
        if has(x.axes[dim], Role.BATCH):
            raise refuse(node, "mixes the rows of a batch")
        if has(x.axes[dim], Role.PICKED):
            raise refuse(node, "mixes the tokens that were picked for an expert")
        if has(x.axes[dim], Role.SOURCE) and not f.is_whole and node.target not in HIDES_PADDING:
            raise refuse(node, "sums over the source in every step, where rows of a batch have sources of their own")
    return found


# Operations along a source that hide what lies behind each row's own.
HIDES_PADDING = {
    aten.sum.dim_IntList, aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten.logsumexp.default,
}  # fmt: skip
REDUCTIONS: dict[Any, str] = {
    aten.mean.dim: "ReduceMean",
    aten.sum.dim_IntList: "ReduceSum",
    aten.amax.default: "ReduceMax",
    aten.amin.default: "ReduceMin",
    aten.prod.dim_int: "ReduceProd",
}


@rule(*REDUCTIONS)
def reduce(f: Follower, node: fx.Node, x: Tensor, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return reduced(f, node, x, over(f, node, x, dims), keepdim, REDUCTIONS[node.target])


def reduced(
    f: Follower,
    node: fx.Node,
    x: Tensor,
    dims: list[int],
    keepdim: bool,
    op_type: str,
    dtype: torch.dtype | None = None,
    hidden: float = 0.0,
) -> Tensor:
    """dtype: what is computed in, where that is not the node's own. hidden: what behind a source changes nothing."""
    value, order = working(f.emit, x)
    own = node.meta["val"].dtype if isinstance(node.meta["val"], torch.Tensor) else x.dtype
    dtype = dtype or own
    value = value if dtype == x.dtype else f.emit.cast(value, dtype)
    for dim in dims:
        value = hide_padding(f, value, tuple(followed(x.axes)[i] for i in order), order.index(dim), hidden)
    value = f.emit.op(op_type, value, f.emit.constant([order.index(d) for d in dims]), keepdims=1)
    axes = tuple(() if i in dims else axis for i, axis in enumerate(followed(x.axes)))
    result = from_working(value, axes, order, dtype)
    return result if keepdim else result.seen_as(tuple(axis for i, axis in enumerate(axes) if i not in dims))


@rule(aten.linalg_vector_norm.default)
def vector_norm(
    f: Follower, node: fx.Node, x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any
) -> Tensor:
    if order not in (1, 2):
        return _norm_of_order(f, node, x, order, over(f, node, x, dims), keepdim)
    return reduced(f, node, x, over(f, node, x, dims), keepdim, f"ReduceL{order:.0f}")


def _norm_of_order(f: Follower, node: fx.Node, x: Tensor, order: float, dims: list[int], keepdim: bool) -> Tensor:
    """The largest or least size, how many are not 0, or a root of a sum of powers."""

    def number(n: float) -> ir.Value:
        return f.emit.constant(torch.tensor(n, dtype=x.dtype).numpy())

    size = f.emit.op("Abs", x.value)
    if math.isinf(order):
        return reduced(f, node, replace(x, value=size), dims, keepdim, "ReduceMax" if order > 0 else "ReduceMin")
    terms = f.emit.op("Sign", size) if order == 0 else f.emit.op("Pow", size, number(order))
    total = reduced(f, node, replace(x, value=terms), dims, keepdim, "ReduceSum")
    return total if order == 0 else replace(total, value=f.emit.op("Pow", total.value, number(1 / order)))


@rule(aten.max.dim, aten.min.dim)
def extreme(f: Follower, node: fx.Node, x: Tensor, dim: int, keepdim: bool = False) -> list[Tensor]:
    dims = over(f, node, x, dim)
    name = "Max" if node.target is aten.max.dim else "Min"
    return [reduced(f, node, x, dims, keepdim, f"Reduce{name}"), position_of(f, x, dims[0], keepdim, f"Arg{name}")]


@rule(aten.argmax.default, aten.argmin.default)
def arg_extreme(f: Follower, node: fx.Node, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    if dim is None:
        raise refuse(node, "is followed along one axis")
    (axis,) = over(f, node, x, dim)
    return position_of(f, x, axis, keepdim, "ArgMax" if node.target is aten.argmax.default else "ArgMin")


def position_of(f: Follower, x: Tensor, dim: int, keepdim: bool, op_type: str) -> Tensor:
    """Where along a fixed axis the first largest or least value stands, int64."""
    value, order = working(f.emit, x)
    value = f.emit.op(op_type, value, axis=order.index(dim), keepdims=1)
    axes = tuple(() if i == dim else axis for i, axis in enumerate(followed(x.axes)))
    result = from_working(value, axes, order, torch.int64)
    return result if keepdim else result.seen_as((*axes[:dim], *axes[dim + 1 :]))


@rule(aten.any.dim, aten.any.dims, aten.any.default, aten.all.dim, aten.all.dims, aten.all.default)
def any_or_all(f: Follower, node: fx.Node, x: Tensor, dims: Any = None, keepdim: bool = False) -> Tensor:
    found = over(f, node, x, dims)
    name = "ReduceMax" if node.target in (aten.any.dim, aten.any.dims, aten.any.default) else "ReduceMin"
    truth = f.emit.cast(f.emit.cast(x.value, torch.bool), torch.int32)
    result = reduced(f, node, Tensor(truth, x.base, x.axes, torch.int32), found, keepdim, name, torch.int32)
    return Tensor(f.emit.cast(result.value, torch.bool), result.base, result.axes, torch.bool)


@rule(aten.var.dim, aten.std.dim)
def unbiased_variance(
    f: Follower, node: fx.Node, x: Tensor, dims: Any = None, unbiased: bool = True, keepdim: bool = False
) -> Tensor:
    return _variance(f, node, x, dims, int(unbiased), keepdim)


@rule(aten.var.correction, aten.std.correction)
def corrected_variance(
    f: Follower,
    node: fx.Node,
    x: Tensor,
    dims: Any = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    return _variance(f, node, x, dims, 1 if correction is None else correction, keepdim)


def _variance(f: Follower, node: fx.Node, x: Tensor, dims: Any, correction: float, keepdim: bool) -> Tensor:
    found = over(f, node, x, dims)
    count = 1
    for dim in found:
        size = f.symbols.product(x.axes[dim])
        if not isinstance(size, int):
            raise refuse(node, "the variance along an axis of positions is not followed")
        count *= size
    mean = reduced(f, node, x, found, True, "ReduceMean")
    value, order = working(f.emit, x)
    centred = f.emit.op("Sub", value, working(f.emit, mean, order)[0])
    square = from_working(f.emit.op("Mul", centred, centred), followed(x.axes), order, x.dtype)
    result = reduced(f, node, square, found, keepdim, "ReduceMean")
    scale = count / (count - correction)
    value = f.emit.op("Mul", result.value, f.emit.constant(torch.tensor(scale, dtype=x.dtype).numpy()))
    value = f.emit.op("Sqrt", value) if node.target in (aten.std.correction, aten.std.dim) else value
    return Tensor(value, result.base, result.axes, result.dtype)


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(f: Follower, node: fx.Node, x: Tensor, dim: int, *args: Any) -> Tensor:
    (axis,) = over(f, node, x, dim)
    value, order = working(f.emit, x)
    dtype = node.meta["val"].dtype
    value = value if dtype == x.dtype else f.emit.cast(value, dtype)
    lies = tuple(followed(x.axes)[i] for i in order)
    value = hide_padding(f, value, lies, order.index(axis))
    name = "Softmax" if node.target in (aten.softmax.int, aten._softmax.default) else "LogSoftmax"
    weights = from_working(f.emit.op(name, value, axis=order.index(axis)), followed(x.axes), order, dtype)
    queries = [i for i, own in enumerate(x.axes) if i != axis and position(own)]
    whole = sum(a.before + a.after for a in x.axes[axis]) == 0  # else the columns are cut off afterwards
    if f.observed is not None and name == "Softmax" and position(x.axes[axis]) and len(queries) == 1 and whole:
        f.observed.append((node, weights, queries[0], axis))
    return weights


def _features_last(f: Follower, node: fx.Node, x: Tensor, count: int) -> tuple[ir.Value, tuple[Any, ...]]:
    """The value with the last `count` axes behind everything else, which stays as it lies."""
    over(f, node, x, list(range(-count, 0)))
    own = [a for axis in x.axes[-count:] for a in axis]
    lead = tuple(axis for axis in (tuple(a for a in axis if a not in own) for axis in x.base) if axis)
    lies = (*lead, *x.axes[-count:])
    return laid_out(f.emit, x, lies), lies


@rule(aten.layer_norm.default)
def layer_norm(
    f: Follower,
    node: fx.Node,
    x: Tensor,
    shape: list[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor:
    value, lies = _features_last(f, node, x, len(shape))
    scale = (
        f.parameter(weight)
        if weight is not None
        else f.emit.shared(("ones", tuple(shape), x.dtype), torch.ones(shape, dtype=x.dtype), "ones")
    )
    shift = f.parameter(bias) if bias is not None else None
    value = f.emit.op("LayerNormalization", value, scale, shift, axis=-len(shape), epsilon=float(eps))
    return Tensor(value, lies, x.axes, x.dtype)


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm(
    f: Follower, node: fx.Node, x: Tensor, weight: Any, bias: Any, mean: fx.Node, var: fx.Node, *rest: float
) -> list[Tensor]:
    """A fixed scale and shift of each entry of axis 1, as its statistics do not change in evaluation."""
    if any(a.role for a in x.axes[1]):
        raise refuse(node, "normalises each position by statistics of its own")
    scale = (f.constant(var) + rest[-1]).rsqrt() * (1 if weight is None else f.constant(weight))
    shift = (0 if bias is None else f.constant(bias)) - f.constant(mean) * scale
    value, order = working(f.emit, x)
    shape = [1] * (x.rank - 1 - order.index(1))
    for op_type, name, table in (("Mul", "scale", scale), ("Add", "shift", shift)):
        parameter = f.emit.shared((name, node.name), table.reshape(-1, *shape).to(x.dtype), f"{node.name}.{name}")
        value = f.emit.op(op_type, value, parameter)
    return [from_working(value, followed(x.axes), order, x.dtype)]


@rule(aten.rms_norm.default)
def rms_norm(
    f: Follower, node: fx.Node, x: Tensor, shape: list[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    value, lies = _features_last(f, node, x, len(shape))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    mean = f.emit.op(
        "ReduceMean", f.emit.op("Mul", value, value), f.emit.constant(list(range(-len(shape), 0))), keepdims=1
    )
    root = f.emit.op("Sqrt", f.emit.op("Add", mean, f.emit.constant(torch.tensor(eps, dtype=x.dtype).numpy())))
    value = f.emit.op("Div", value, root)
    value = value if weight is None else f.emit.op("Mul", value, f.parameter(weight))
    return Tensor(value, lies, x.axes, x.dtype)
