"""Products: with weights they are position-wise; of data with data one side is needed over all positions."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..axes import Atom, Axes, Role, fixed, has
from ..follow import Follower, followed, rule
from ..tensor import Tensor, laid_out
from ..trace import aten, refuse
from .elementwise import elementwise
from .padding import hide_padding


def times_weight(
    f: Follower, node: fx.Node, x: Tensor, weight: ir.Value, width: int, bias: ir.Value | None = None
) -> Tensor:
    """x (..., in) times weight (in, width), plus bias (width,)."""
    if any(a.role for a in x.axes[-1]):
        raise refuse(node, "sums over positions or rows with fixed weights")
    inner = x.axes[-1]
    lead = tuple(axis for axis in (tuple(a for a in axis if a not in inner) for axis in x.base) if axis)
    value = f.emit.op("MatMul", laid_out(f.emit, x, (*lead, inner)), weight)
    value = value if bias is None else f.emit.op("Add", value, bias)
    out = fixed(width)
    return Tensor(value, (*lead, out), (*x.axes[:-1], out), x.dtype)


@rule(aten.linear.default)
def linear(f: Follower, node: fx.Node, x: Tensor, weight: fx.Node, bias: fx.Node | None = None) -> Tensor:
    if isinstance(weight, Tensor) or isinstance(bias, Tensor):
        raise refuse(node, "its weights are computed from the ids")
    matrix = f.constant(weight)  # (out, in)
    return times_weight(
        f, node, x, f.parameter(weight, transposed=True), matrix.shape[0], None if bias is None else f.parameter(bias)
    )


@rule(aten.addmm.default)
def addmm(
    f: Follower, node: fx.Node, bias: fx.Node, x: Tensor, weight: fx.Node, *, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    if isinstance(bias, Tensor) or not f.is_constant(weight) or (beta, alpha) != (1, 1):
        raise refuse(node, "is followed as data times a weight plus a bias")
    return times_weight(f, node, x, f.parameter(weight), f.constant(weight).shape[1], f.parameter(bias))


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(f: Follower, node: fx.Node, a: Any, b: Any) -> Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return product(f, node, a, b)
    if isinstance(a, Tensor) and f.is_constant(b) and len(f.trace.shape(b)) == 2:
        return times_weight(f, node, a, f.parameter(b), f.constant(b).shape[1])
    if isinstance(b, Tensor) and f.is_constant(a) and len(f.trace.shape(a)) == 2 and b.rank > 1:  # (b^T a^T)^T
        turned = b.seen_as((*b.axes[:-2], b.axes[-1], b.axes[-2]))
        made = times_weight(f, node, turned, f.parameter(a, transposed=True), f.constant(a).shape[0])
        return made.seen_as((*made.axes[:-2], made.axes[-1], made.axes[-2]))
    raise refuse(node, "is followed for data times data, and for data times a matrix of weights")


@rule(aten.baddbmm.default)
def baddbmm(f: Follower, node: fx.Node, base: Any, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    scores = product(f, node, a, b)
    dtype = node.meta["val"].dtype

    def make(emit: Any, c: ir.Value, s: ir.Value) -> ir.Value:
        scale = [emit.constant(torch.tensor(n, dtype=dtype).numpy()) for n in (beta, alpha)]
        return emit.op("Add", emit.op("Mul", c, scale[0]), emit.op("Mul", s, scale[1]))

    return elementwise(f, node, [base, scores], make)


def product(f: Follower, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
    """(..., n, k) times (..., k, m) of data: the side that is summed up or listed over positions is a cache entry."""
    rows, columns, inner_a, inner_b = a.axes[-2], b.axes[-1], a.axes[-1], b.axes[-2]
    if has(inner_a, Role.QUERY) and has(inner_b, Role.QUERY):
        raise refuse(node, "sums over new positions: a running sum, whose state is not kept")
    if has(rows, Role.QUERY) and has(columns, Role.QUERY):  # q @ k^T
        b = f.whole(b, "key")
    elif has(inner_a, Role.KEY) and has(inner_b, Role.QUERY):  # weights @ v
        b = f.whole(b, "value")
    elif has(inner_b, Role.KEY) and has(inner_a, Role.QUERY):  # v^T @ weights^T
        a = f.whole(a, "value")
    values = [laid_out(f.emit, t) for t in (a, b)]
    values[0] = hide_padding(f, values[0], a.axes, a.rank - 1, 0.0)
    lead = _broadcast_lead(a.axes[:-2], b.axes[:-2])
    axes = followed((*lead, a.axes[-2], b.axes[-1]))
    return Tensor.of(f.emit.op("MatMul", *values), axes, node.meta["val"].dtype)


def _broadcast_lead(a: Axes, b: Axes) -> Axes:
    rank = max(len(a), len(b))
    a, b = (((),) * (rank - len(side)) + side for side in (a, b))
    return tuple(left or right for left, right in zip(a, b))


@rule(aten.einsum.default)
def einsum(f: Follower, node: fx.Node, equation: str, operands: list[Any]) -> Tensor:
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation or len(operands) != 2:
        raise refuse(node, "is followed for two operands with every axis named and an explicit result")
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    a, b = operands
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return _einsum_with_weight(f, node, (left, right, out), a, b)
    key = Atom(Role.KEY)
    axes_a, axes_b = dict(zip(left, a.axes)), dict(zip(right, b.axes))
    for letter, axis in axes_b.items():
        if not has(axis, Role.QUERY):
            continue
        other = axes_a.get(letter)
        if other is not None and has(other, Role.QUERY):
            if letter in out:
                continue
            raise refuse(node, "sums over new positions: a running sum, whose state is not kept")
        b = f.whole(b, "value" if other is not None else "key")
        axes_b = {**dict(zip(right, b.axes)), letter: (key,)}
        break
    value = f.emit.op("Einsum", laid_out(f.emit, a), laid_out(f.emit, b), equation=equation)
    merged = {**axes_b, **axes_a}
    axes = followed(tuple(axes_b[c] if c in axes_b and not axes_a.get(c) else merged[c] for c in out))
    return Tensor.of(value, axes, node.meta["val"].dtype)


def _einsum_with_weight(f: Follower, node: fx.Node, letters: tuple[str, str, str], a: Any, b: Any) -> Tensor:
    left, right, out = letters
    data, weight, of_data, of_weight = (a, b, left, right) if isinstance(a, Tensor) else (b, a, right, left)
    if not isinstance(data, Tensor) or not f.is_constant(weight):
        raise refuse(node, "is followed for data with data, and for data with constant weights")
    summed = {c: axis for c, axis in zip(of_data, data.axes) if c not in out}
    if any(atom.role for axis in summed.values() for atom in axis):
        raise refuse(node, "sums over positions or rows with fixed weights")
    values = {id(data): laid_out(f.emit, data), id(weight): f.parameter(weight)}
    value = f.emit.op("Einsum", values[id(a)], values[id(b)], equation=f"{left},{right}->{out}")
    known = {**{c: fixed(int(n)) for c, n in zip(of_weight, f.constant(weight).shape)}, **dict(zip(of_data, data.axes))}
    return Tensor.of(value, followed(tuple(known[c] for c in out)), node.meta["val"].dtype)
