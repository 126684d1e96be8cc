"""Operations on each element alone: nothing moves, so they run on the new positions in whatever order these lie.

Sources: the ATen signatures (torch/native_functions.yaml) and the ONNX operator specifications of opset 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..axes import Atom, Axes, Axis, Role, distinct
from ..beside import beside
from ..emitter import DTYPES, Emitter
from ..follow import Follower, followed, rule
from ..tensor import Tensor, from_working, refined, working
from ..trace import aten, refuse
from .meeting import alike, apart, met

Make = Callable[..., ir.Value]


def broadcast(f: Follower, node: fx.Node, operands: Sequence[Any], spread: Mapping[int, Axis] | None = None) -> Axes:
    """The axes of an element-wise result, as numpy and torch broadcast them; positions may only meet their like.

    spread: axes of positions that no data has, along which a table spreads.
    """
    shape = f.trace.shape(node)
    data = [o for o in operands if isinstance(o, Tensor)]
    result: list[Axis] = []
    for i in range(len(shape)):
        back = len(shape) - i
        found = [t.axes[t.rank - back] for t in data if t.rank >= back and t.axes[t.rank - back]]
        solid = [axis for axis in found if not any(a.repeat for a in axis)] or [
            a for axis in found[:1] for a in followed((axis,))
        ]
        roles = {tuple((a.role, a.before, a.after) for a in axis if a.role) for axis in found}
        if len(roles) > 1:
            shifted = any(role is Role.STRETCH for kinds in roles for role, *_ in kinds)
            other = "others that were cut off elsewhere" if shifted else "all positions"
            raise refuse(node, f"new positions meet {other} along axis {i}")
        if solid:
            result.append(solid[0])
        else:
            size = shape[i]
            spreads = (spread or {}).get(i)
            own = (Atom(size=size),) if isinstance(size, int) else None
            result.append(() if size == 1 else spreads or own or _of_table(f, node, i, data))
    if [atom.role for axis in result for atom in axis].count(Role.QUERY) > 1:
        raise refuse(node, "each new position meets each other one", "keep a running sum, or attend to the keys")
    return distinct(followed(tuple(result)))


def _of_table(f: Follower, node: fx.Node, axis: int, data: Sequence[Tensor]) -> Axis:
    """An axis of positions that a table alone brings along: of the keys beside queries, the other way round as well."""
    roles = {atom.role for tensor in data for own in tensor.axes for atom in own}
    if f.is_whole and f.role in roles and f.trace.shape(node)[axis] == f.symbols.size(Atom(f.role)):
        return (Atom(f.role),)
    if f.trace.shape(node)[axis] == f.trace.seq and not f.is_whole and len({Role.QUERY, Role.KEY} & roles) == 1:
        return (Atom(Role.QUERY if Role.KEY in roles else Role.KEY),)
    why = f"a table over positions spreads along axis {axis}, where the data has none"
    raise refuse(node, why, "a mask that is a function of the length alone would work")


def elementwise(
    f: Follower,
    node: fx.Node,
    operands: Sequence[Any],
    make: Make,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    keeps_bool: bool = False,
) -> Tensor:
    """Apply `make` to operands that are broadcast against each other and cast to `compute`.

    dtype: of the result, where it is not the node's own. keeps_bool: truth values are not cast: one is a condition.
    """
    dtype = dtype or node.meta["val"].dtype
    compute = compute or dtype
    lead = next(o for o in operands if isinstance(o, Tensor))
    alone = [o for o in operands if isinstance(o, (Tensor, fx.Node))] == [lead]
    if alone and node.meta["val"].dim() == lead.rank:  # scalars only: the layout does not matter
        values = [
            _cast(f.emit, lead.value, lead.dtype, compute, keeps_bool) if o is lead else _number(f.emit, o, compute)
            for o in operands
        ]
        return Tensor(make(f.emit, *values), lead.base, lead.axes, dtype)
    operands, spread = met(f, node, alike(f, operands))
    axes = broadcast(f, node, operands, spread)
    parts = refined(axes)
    operands = [apart(f, o, axes) for o in operands]
    order = _order(operands, parts)
    values = [_operand(f, node, o, parts, order, compute, keeps_bool) for o in operands]
    result = from_working(make(f.emit, *values), parts, order, dtype)
    return result.seen_as(axes)


def _order(operands: Sequence[Any], parts: Axes) -> list[int]:
    """The order of the first operand that does not lie in the module's order, so that no transpose is needed for it."""
    for operand in operands:
        if isinstance(operand, Tensor):
            order = operand.seen_as(refined(operand.axes)).order()
            missing = len(parts) - len(order)
            if order != list(range(len(order))) and missing >= 0:
                return [*range(missing), *(i + missing for i in order)]
    return list(range(len(parts)))


def _operand(
    f: Follower, node: fx.Node, operand: Any, parts: Axes, order: list[int], compute: torch.dtype, keeps_bool: bool
) -> ir.Value:
    if isinstance(operand, Tensor):
        tensor = operand.seen_as(refined(operand.axes))
        missing = len(parts) - tensor.rank
        own = [i - missing for i in order if i >= missing]
        value = working(f.emit, tensor, own)[0]
        gone = [at for at, i in enumerate(order) if i < missing]  # axes of the others alone: here of size 1
        if gone != list(range(missing)):
            value = f.emit.op("Unsqueeze", value, f.emit.constant(gone))
        return _cast(f.emit, value, operand.dtype, compute, keeps_bool)
    if isinstance(operand, fx.Node):
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            f.number(node, operand)
        kept = torch.bool if keeps_bool and operand.meta["val"].dtype == torch.bool else compute
        return beside(f, operand, parts, order, kept, node)
    return _number(f.emit, operand, compute)


def _cast(emit: Emitter, value: ir.Value, have: torch.dtype, want: torch.dtype, keeps_bool: bool) -> ir.Value:
    return value if have == want or (keeps_bool and have == torch.bool) else emit.cast(value, want)


def _number(emit: Emitter, number: Any, dtype: torch.dtype) -> ir.Value:
    return emit.constant(torch.tensor(number, dtype=dtype).numpy())


# -- one operand ------------------------------------------------------------------------------------------------
def _silu(emit: Emitter, x: ir.Value) -> ir.Value:
    return emit.op("Mul", x, emit.op("Sigmoid", x))


def _rsqrt(emit: Emitter, x: ir.Value) -> ir.Value:
    return emit.op("Reciprocal", emit.op("Sqrt", x))


def named(op_type: str, **attributes: Any) -> Make:
    return lambda emit, *values: emit.op(op_type, *values, **attributes)


def truncated(emit: Emitter, x: ir.Value) -> ir.Value:
    return emit.op("Mul", emit.op("Sign", x), emit.op("Floor", emit.op("Abs", x)))


UNARY: dict[Any, Make] = {
    aten.neg.default: named("Neg"),
    aten.abs.default: named("Abs"),
    aten.exp.default: named("Exp"),
    aten.log.default: named("Log"),
    aten.sqrt.default: named("Sqrt"),
    aten.rsqrt.default: _rsqrt,
    aten.reciprocal.default: named("Reciprocal"),
    aten.tanh.default: named("Tanh"),
    aten.sigmoid.default: named("Sigmoid"),
    aten.relu.default: named("Relu"),
    aten.silu.default: _silu,
    aten.mish.default: named("Mish"),
    aten.hardswish.default: named("HardSwish"),
    aten.erf.default: named("Erf"),
    aten.sin.default: named("Sin"),
    aten.cos.default: named("Cos"),
    aten.floor.default: named("Floor"),
    aten.ceil.default: named("Ceil"),
    aten.round.default: named("Round"),
    aten.sign.default: named("Sign"),
    aten.logical_not.default: named("Not"),
    aten.isnan.default: named("IsNaN"),
    aten.isinf.default: named("IsInf"),
    aten.log1p.default: lambda emit, x: emit.op("Log", emit.op("Add", x, _number(emit, 1.0, torch.float32))),
    aten.softplus.default: named("Softplus"),
    aten.square.default: lambda emit, x: emit.op("Mul", x, x),
    aten.selu.default: named("Selu"),
    aten.hardsigmoid.default: named("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.log_sigmoid.default: lambda emit, x: emit.op("Neg", emit.op("Softplus", emit.op("Neg", x))),
    aten.atan.default: named("Atan"),
    aten.exp2.default: lambda emit, x: emit.op("Exp", emit.op("Mul", x, _number(emit, math.log(2), torch.float32))),
    aten.expm1.default: lambda emit, x: emit.op("Sub", emit.op("Exp", x), _number(emit, 1.0, torch.float32)),
}


@rule(*UNARY)
def unary(f: Follower, node: fx.Node, x: Tensor, *rest: Any) -> Tensor:
    if node.target is aten.softplus.default:
        return softplus(f, node, x, *rest)
    if node.target is aten.logical_not.default:
        x = Tensor(_cast(f.emit, x.value, x.dtype, torch.bool, False), x.base, x.axes, torch.bool)
    return elementwise(f, node, [x], UNARY[node.target], x.dtype)


def softplus(f: Follower, node: fx.Node, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """Source: torch's Softplus: x itself where beta x is above the threshold."""

    def make(emit: Emitter, v: ir.Value) -> ir.Value:
        slope = _number(emit, beta, x.dtype)
        steep = emit.op("Mul", v, slope)
        bent = emit.op("Div", emit.op("Softplus", steep), slope)
        return emit.op("Where", emit.op("Greater", steep, _number(emit, threshold, x.dtype)), v, bent)

    return elementwise(f, node, [x], named("Softplus") if (beta, threshold) == (1, 20) else make)


@rule(aten.gelu.default)
def gelu(f: Follower, node: fx.Node, x: Tensor, *, approximate: str = "none") -> Tensor:
    return elementwise(f, node, [x], named("Gelu", approximate=approximate))


@rule(aten.elu.default, aten.leaky_relu.default)
def with_slope(f: Follower, node: fx.Node, x: Tensor, slope: float | None = None) -> Tensor:
    name, default = ("Elu", 1.0) if node.target is aten.elu.default else ("LeakyRelu", 0.01)
    return elementwise(f, node, [x], named(name, alpha=float(default if slope is None else slope)))


@rule(aten.clamp.default)
def clamp(f: Follower, node: fx.Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return _clipped(f, node, x, low, high)


def _clipped(f: Follower, node: fx.Node, x: Tensor, low: Any, high: Any) -> Tensor:
    bounds = [None if b is None else _number(f.emit, f.number(node, b), x.dtype) for b in (low, high)]
    return elementwise(f, node, [x], lambda emit, v: emit.op("Clip", v, *bounds))


@rule(aten.relu6.default, aten.hardtanh.default)
def hardtanh(f: Follower, node: fx.Node, x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    low, high = (0.0, 6.0) if node.target is aten.relu6.default else (low, high)
    return _clipped(f, node, x, low, high)


@rule(aten.clamp_min.default, aten.clamp_max.default)
def clamp_one_side(f: Follower, node: fx.Node, x: Tensor, bound: Any) -> Tensor:
    name = "Max" if node.target is aten.clamp_min.default else "Min"
    return elementwise(f, node, [x, f.number(node, bound)], named(name))


@rule(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor)
def clamp_each(f: Follower, node: fx.Node, x: Any, low: Any = None, high: Any = None) -> Tensor:
    """Between bounds that are tensors themselves."""
    if node.target is aten.clamp_max.Tensor:
        low, high = None, low
    bounds = [(name, b) for name, b in (("Max", low), ("Min", high)) if b is not None]

    def make(emit: Emitter, value: ir.Value, *others: ir.Value) -> ir.Value:
        for (name, _), bound in zip(bounds, others):
            value = emit.op(name, value, bound)
        return value

    return elementwise(f, node, [x, *(b for _, b in bounds)], make)


@rule(aten.lerp.Tensor, aten.lerp.Scalar)
def lerp(f: Follower, node: fx.Node, x: Any, y: Any, weight: Any) -> Tensor:
    def make(emit: Emitter, a: ir.Value, b: ir.Value, w: ir.Value) -> ir.Value:
        return emit.op("Add", a, emit.op("Mul", w, emit.op("Sub", b, a)))

    return elementwise(f, node, [x, y, weight], make)


@rule(aten.dropout.default, aten.native_dropout.default)
def dropout(f: Follower, node: fx.Node, x: Tensor, p: float, train: bool | None) -> Tensor | list[Tensor]:
    if train and p:
        raise refuse(node, "drops at random in evaluation too", "pass training=self.training")
    return x if node.target is aten.dropout.default else [x]


@rule(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default)
def identity(f: Follower, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


@rule(aten._to_copy.default, aten.type_as.default, aten.to.dtype)
def to_copy(f: Follower, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = node.meta["val"].dtype
    if dtype not in DTYPES:
        raise refuse(node, f"values of {dtype} are not followed")
    if dtype == x.dtype:
        return x
    value = f.emit.cast(x.value, dtype)
    if x.value in f.indexes and not dtype.is_floating_point:  # numbers of another type index what they did
        f.indexes[value] = f.indexes[x.value]
    return Tensor(value, x.base, x.axes, dtype)


# -- two and more -----------------------------------------------------------------------------------------------
@rule(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def add(f: Follower, node: fx.Node, x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    name = "Add" if node.target in (aten.add.Tensor, aten.add.Scalar) else "Sub"

    def make(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        scaled = b if alpha == 1 else emit.op("Mul", b, _number(emit, alpha, node.meta["val"].dtype))
        return emit.op(name, a, scaled)

    return elementwise(f, node, [x, y], make)


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def reversed_sub(f: Follower, node: fx.Node, x: Any, y: Any, alpha: Any = 1) -> Tensor:
    def make(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        return emit.op("Sub", a, b if alpha == 1 else emit.op("Mul", b, _number(emit, alpha, node.meta["val"].dtype)))

    return elementwise(f, node, [y, x], make)


BINARY: dict[Any, str] = {
    aten.mul.Tensor: "Mul",
    aten.mul.Scalar: "Mul",
    aten.maximum.default: "Max",
    aten.max.other: "Max",
    aten.minimum.default: "Min",
    aten.min.other: "Min",
    aten.pow.Tensor_Tensor: "Pow",
    aten.pow.Tensor_Scalar: "Pow",
    aten.pow.Scalar: "Pow",
}
LOGICAL: dict[Any, str] = {
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
    aten.logical_xor.default: "Xor",
}
COMPARISONS: dict[Any, str] = {
    name: op_type
    for stem, op_type in (
        ("eq", "Equal"),
        ("lt", "Less"),
        ("le", "LessOrEqual"),
        ("gt", "Greater"),
        ("ge", "GreaterOrEqual"),
    )
    for name in (getattr(aten, stem).Tensor, getattr(aten, stem).Scalar)
}


@rule(*BINARY)
def binary(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    if node.target is aten.pow.Tensor_Scalar and y == 2:  # a product is exact and faster
        return elementwise(f, node, [x], lambda emit, v: emit.op("Mul", v, v))
    if node.target is aten.pow.Tensor_Scalar and y == 0.5:
        return elementwise(f, node, [x], named("Sqrt"))
    return elementwise(f, node, [x, y], named(BINARY[node.target]))


@rule(aten.div.Tensor, aten.div.Scalar)
def divide(f: Follower, node: fx.Node, x: Any, y: Any, *, rounding_mode: str | None = None) -> Tensor:
    def make(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        quotient = emit.op("Div", a, b)
        rounded = {"floor": named("Floor"), "trunc": truncated}
        return quotient if rounding_mode is None else rounded[rounding_mode](emit, quotient)

    if rounding_mode not in (None, "floor", "trunc"):
        raise refuse(node, "division is followed as it is, or rounded")
    if isinstance(y, (int, float)) and rounding_mode is None and y and math.log2(abs(y)).is_integer():
        return elementwise(f, node, [x, 1 / y], named("Mul"))  # exact for powers of two
    return elementwise(f, node, [x, y], make)


@rule(*LOGICAL)
def logical(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    if any(isinstance(o, Tensor) and o.dtype != torch.bool for o in (x, y)):
        raise refuse(node, "is followed on truth values only")
    return elementwise(f, node, [x, y], named(LOGICAL[node.target]))


@rule(*COMPARISONS, aten.ne.Tensor, aten.ne.Scalar)
def compare(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    compute = torch.result_type(*(_example(o) for o in (x, y)))
    if node.target in COMPARISONS:
        return elementwise(f, node, [x, y], named(COMPARISONS[node.target]), compute)
    return elementwise(f, node, [x, y], lambda emit, a, b: emit.op("Not", emit.op("Equal", a, b)), compute)


def _example(operand: Any) -> Any:
    """Something that takes part in type promotion as the operand does."""
    if isinstance(operand, Tensor):
        return torch.empty((1,) * operand.rank, dtype=operand.dtype)
    if isinstance(operand, fx.Node):
        value = operand.meta["val"]
        return torch.empty((1,) * value.dim(), dtype=value.dtype)
    return operand


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def choose(f: Follower, node: fx.Node, condition: Any, x: Any, y: Any) -> Tensor:
    return elementwise(f, node, [condition, x, y], named("Where"), keeps_bool=True)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(f: Follower, node: fx.Node, x: Any, mask: Any, value: Any) -> Tensor:
    return elementwise(f, node, [mask, value, x], named("Where"), keeps_bool=True)
