"""Products: with weights they are position-wise; of data with data one side is needed over all positions."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..axes import Atom, Axes, Role, distinct, fixed, has
from ..beside import beside
from ..follow import Follower, followed, rule
from ..tensor import Tensor, laid_out, refined, size_vector
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
    if not isinstance(x, Tensor) or not f.is_constant(weight):
        raise refuse(node, "is followed as data times a weight plus a bias")
    if isinstance(bias, Tensor) or (beta, alpha) != (1, 1):
        product = times_weight(f, node, x, f.parameter(weight), f.constant(weight).shape[1])
        return _weighed(f, node, bias, product, beta, alpha)
    return times_weight(f, node, x, f.parameter(weight), f.constant(weight).shape[1], f.parameter(bias))


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(f: Follower, node: fx.Node, a: Any, b: Any) -> Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return product(f, node, a, b)
    if isinstance(a, Tensor) and f.is_constant(b) and len(f.trace.shape(b)) == 2:
        return times_weight(f, node, a, f.parameter(b), f.constant(b).shape[1])
    if isinstance(a, Tensor) and f.is_constant(b) and len(f.trace.shape(b)) == 1:  # a number for each position
        column = f.parameter(f.derived(b, _as_column))
        result = times_weight(f, node, a, column, 1)
        return result.seen_as(result.axes[:-1])
    if isinstance(b, Tensor) and f.is_constant(a) and len(f.trace.shape(a)) == 2 and b.rank > 1:  # (b^T a^T)^T
        turned = b.seen_as((*b.axes[:-2], b.axes[-1], b.axes[-2]))
        made = times_weight(f, node, turned, f.parameter(a, transposed=True), f.constant(a).shape[0])
        return made.seen_as((*made.axes[:-2], made.axes[-1], made.axes[-2]))
    if f.is_constant(a) or f.is_constant(b):  # a matrix for each head or expert, or weights that stand first
        return product(f, node, *(t if isinstance(t, Tensor) else _as_tensor(f, t) for t in (a, b)))
    raise refuse(node, "is followed for data times data, and for data times constant weights")


def _as_tensor(f: Follower, weight: fx.Node) -> Tensor:
    value = f.constant(weight)
    return Tensor.of(f.parameter(weight), tuple(fixed(int(n)) for n in value.shape), value.dtype)


def _as_column(vector: torch.Tensor) -> torch.Tensor:
    return vector[:, None]


@rule(aten.baddbmm.default)
def baddbmm(f: Follower, node: fx.Node, base: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _weighed(f, node, base, matmul(f, node, a, b), beta, alpha)  # type: ignore[arg-type]


def _weighed(f: Follower, node: fx.Node, base: Any, result: Tensor, beta: Any, alpha: Any) -> Tensor:
    """beta * base + alpha * result; what is weighed by 0 is not read, whatever it holds."""
    dtype = node.meta["val"].dtype
    factor = [f.emit.constant(torch.tensor(n, dtype=dtype).numpy()) for n in (beta, alpha)]
    if beta == 0:
        return Tensor(f.emit.op("Mul", result.value, factor[1]), result.base, result.axes, result.dtype)

    def make(emit: Any, c: ir.Value, s: ir.Value) -> ir.Value:
        c, s = (v if n == 1 else emit.op("Mul", v, m) for v, n, m in zip((c, s), (beta, alpha), factor))
        return emit.op("Add", c, s)

    return elementwise(f, node, [base, result], make)


def product(f: Follower, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
    """(..., n, k) times (..., k, m) of data: the side that is summed up or listed over positions is a cache entry."""
    columns, inner_a, inner_b = b.axes[-1], a.axes[-1], b.axes[-2]
    if has(inner_a, Role.QUERY) and has(inner_b, Role.QUERY):
        raise refuse(node, "sums over new positions: a running sum, whose state is not kept")
    if has(columns, Role.QUERY) and any(has(axis, Role.QUERY) for axis in a.axes[:-1]):  # q @ k^T
        b = f.whole(b, "key")
    elif has(inner_a, Role.KEY) and has(inner_b, Role.QUERY):  # weights @ v
        b = f.whole(b, "value")
    elif has(inner_b, Role.KEY) and has(inner_a, Role.QUERY):  # v^T @ weights^T
        a = f.whole(a, "value")
    values = [laid_out(f.emit, t) for t in (a, b)]
    values[0] = hide_padding(f, values[0], a.axes, a.rank - 1, 0.0)
    lead = _broadcast_lead(a.axes[:-2], b.axes[:-2])
    axes = distinct(followed((*lead, a.axes[-2], b.axes[-1])))
    return Tensor.of(f.emit.op("MatMul", *values), axes, node.meta["val"].dtype)


def _broadcast_lead(a: Axes, b: Axes) -> Axes:
    rank = max(len(a), len(b))
    a, b = (((),) * (rank - len(side)) + side for side in (a, b))
    return tuple(left or right for left, right in zip(a, b))


@rule(aten.einsum.default)
def einsum(f: Follower, node: fx.Node, equation: str, operands: list[Any]) -> Tensor:
    """Two operands, queries or weights first, as `equations.py` leaves them; or one, whose axes are summed up."""
    letters = equation.replace(" ", "").replace("->", ",").split(",")
    if (
        "->" not in equation
        or "." in equation
        or len(letters) not in (2, 3)
        or any(len({*c}) < len(c) for c in letters)
    ):
        raise refuse(node, "takes a diagonal", "take it before with torch.diagonal")
    if len(letters) == 2:
        return _summed(f, node, operands[0], *letters)
    left, right, out = letters
    a, b = operands
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return _einsum_with_table(f, node, (left, right, out), a, b)
    a, b = _keys_whole(f, node, (left, right, out), a, b)
    value = f.emit.op("Einsum", laid_out(f.emit, a), laid_out(f.emit, b), equation=equation)
    known = {**dict(zip(left, a.axes)), **dict(zip(right, b.axes)), **{c: x for c, x in zip(left, a.axes) if x}}
    return Tensor.of(value, distinct(followed(tuple(known[c] for c in out))), node.meta["val"].dtype)


def _keys_whole(
    f: Follower, node: fx.Node, letters: tuple[str, str, str], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """The factors with that side over all positions which is listed or summed up over them."""
    left, right, out = letters
    rows = [c for c, axis in zip(left, a.axes) if has(axis, Role.QUERY)]
    for letter, axis in zip(right, b.axes):
        if not has(axis, Role.QUERY) or (letter in out and letter in rows):
            continue
        if letter in rows:
            raise refuse(node, "sums over new positions: a running sum, whose state is not kept")
        summed = letter in left and letter not in out
        if not (summed or rows):
            continue  # what has no positions beside those that have
        return a, _renamed(f, f.whole(b, "value" if summed else "key"))
    return a, b


def _renamed(f: Follower, whole: Tensor) -> Tensor:
    """Over all positions, an axis of which is its own from here on."""
    return Tensor.of(laid_out(f.emit, whole), followed(whole.axes), whole.dtype)


def _summed(f: Follower, node: fx.Node, x: Tensor, given: str, out: str) -> Tensor:
    """Axes in another order, some of them summed up."""
    for letter, axis in zip(given, x.axes):
        if letter not in out and any(atom.role for atom in axis):
            raise refuse(node, "sums over positions or rows")
    known = dict(zip(given, x.axes))
    if len(out) == len(given):
        return x.seen_as(tuple(known[c] for c in out))
    value = f.emit.op("Einsum", laid_out(f.emit, x), equation=f"{given}->{out}")
    return Tensor.of(value, followed(tuple(known[c] for c in out)), x.dtype)


def _einsum_with_table(f: Follower, node: fx.Node, letters: tuple[str, str, str], a: Any, b: Any) -> Tensor:
    """Data times weights, or times a table over positions."""
    left, right, out = letters
    swapped = not isinstance(a, Tensor)
    data, table, of_data, of_table = (b, a, right, left) if swapped else (a, b, left, right)
    if not isinstance(data, Tensor) or not isinstance(table, fx.Node):
        raise refuse(node, "is followed for data with data, and for data with constant weights")
    known = dict(zip(of_data, data.axes))
    if any(atom.role for c, axis in known.items() if c not in out for atom in axis):
        raise refuse(node, "sums over positions or rows with fixed weights")
    for letter, size in zip(of_table, f.trace.shape(table)):
        if not known.get(letter):  # a feature, or positions that the data does not have: those of the keys
            known[letter] = fixed(int(size)) if isinstance(size, int) else (Atom(f.role if f.is_whole else Role.KEY),)
    if f.is_constant(table):
        weight, names = f.parameter(table), of_table
    else:
        batch = next((c for c in of_data if c not in of_table and has(known[c], Role.BATCH)), "")
        names = batch + of_table
        axes = tuple(known[c] for c in names)
        weight = beside(f, table, axes, list(range(len(axes))), data.dtype, node)
        weight = f.emit.op("Expand", weight, size_vector(f.emit, refined(axes)))
    value = f.emit.op("Einsum", laid_out(f.emit, data), weight, equation=f"{of_data},{names}->{out}")
    return Tensor.of(value, followed(tuple(known[c] for c in out)), node.meta["val"].dtype)
