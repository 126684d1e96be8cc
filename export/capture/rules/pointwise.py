"""Element-wise functions that are rare in transformers, as ONNX has them or as identities say.

Sources: the ATen signatures (torch/native_functions.yaml) and the ONNX operator specifications of opset 21. What torch
itself defines in terms of others (celu, logit, nan_to_num, addcmul ...) needs no rule: see `decompose.py`.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..emitter import Emitter
from ..follow import Follower, rule
from ..tensor import Tensor
from ..trace import aten, refuse
from .elementwise import Make, elementwise, named, truncated


def _like(emit: Emitter, number: float, x: ir.Value) -> ir.Value:
    """A number of the type that `x` has."""
    return emit.op("CastLike", emit.constant(torch.tensor(number).numpy()), x)


def _divided_log(base: float) -> Make:
    return lambda emit, x: emit.op("Div", emit.op("Log", x), _like(emit, math.log(base), x))


FUNCTIONS: dict[Any, Make] = {
    aten.tan.default: named("Tan"),
    aten.asin.default: named("Asin"),
    aten.acos.default: named("Acos"),
    aten.sinh.default: named("Sinh"),
    aten.cosh.default: named("Cosh"),
    aten.asinh.default: named("Asinh"),
    aten.acosh.default: named("Acosh"),
    aten.atanh.default: named("Atanh"),
    aten.erfc.default: lambda emit, x: emit.op("Sub", _like(emit, 1.0, x), emit.op("Erf", x)),
    aten.log2.default: _divided_log(2),
    aten.log10.default: _divided_log(10),
    aten.trunc.default: truncated,
    aten.frac.default: lambda emit, x: emit.op("Sub", x, truncated(emit, x)),
    aten.sgn.default: named("Sign"),
    aten.positive.default: named("Identity"),
}


@rule(*FUNCTIONS)
def function(f: Follower, node: fx.Node, x: Tensor) -> Tensor:
    return elementwise(f, node, [x], FUNCTIONS[node.target])


@rule(aten.isfinite.default)
def isfinite(f: Follower, node: fx.Node, x: Tensor) -> Tensor:
    def make(emit: Emitter, v: ir.Value) -> ir.Value:
        return emit.op("Not", emit.op("Or", emit.op("IsNaN", v), emit.op("IsInf", v)))

    return elementwise(f, node, [x], make, x.dtype)


@rule(aten.isposinf.default, aten.isneginf.default)
def infinite(f: Follower, node: fx.Node, x: Tensor) -> Tensor:
    positive = int(node.target is aten.isposinf.default)
    return elementwise(f, node, [x], named("IsInf", detect_positive=positive, detect_negative=1 - positive), x.dtype)


@rule(aten.signbit.default)
def signbit(f: Follower, node: fx.Node, x: Tensor) -> Tensor:
    """Whether 1/x is below nothing, which tells the two zeros apart."""
    return elementwise(f, node, [x], _is_negative, x.dtype)


def _is_negative(emit: Emitter, x: ir.Value) -> ir.Value:
    zero = _like(emit, 0.0, x)
    below_zero = emit.op("Less", emit.op("Div", _like(emit, 1.0, x), x), zero)
    return emit.op("Or", emit.op("Less", x, zero), emit.op("And", emit.op("Equal", x, zero), below_zero))


@rule(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(f: Follower, node: fx.Node, x: Any, sign: Any) -> Tensor:
    def make(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        size = emit.op("Abs", a)
        return emit.op("Where", _is_negative(emit, b), emit.op("Neg", size), size)

    return elementwise(f, node, [x, sign], make)


@rule(aten.hypot.default)
def hypot(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    def make(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        return emit.op("Sqrt", emit.op("Add", emit.op("Mul", a, a), emit.op("Mul", b, b)))

    return elementwise(f, node, [x, y], make)


@rule(aten.fmax.default, aten.fmin.default)
def without_nan(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    """The larger or smaller of two of which one may be no number."""
    op_type = "Max" if node.target is aten.fmax.default else "Min"

    def make(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        picked = emit.op("Where", emit.op("IsNaN", b), a, emit.op(op_type, a, b))
        return emit.op("Where", emit.op("IsNaN", a), b, picked)

    return elementwise(f, node, [x, y], make)


@rule(aten.atan2.default)
def atan2(f: Follower, node: fx.Node, y: Any, x: Any) -> Tensor:
    """The angle by the half, 2 atan((r - x) / y), which knows the quadrant; on the axis itself 0 or pi, as signed."""

    def make(emit: Emitter, b: ir.Value, a: ir.Value) -> ir.Value:
        radius = emit.op("Sqrt", emit.op("Add", emit.op("Mul", a, a), emit.op("Mul", b, b)))
        zero = _like(emit, 0.0, a)
        behind = emit.op("Less", a, zero)
        # of two equal fractions, the one whose difference does not cancel
        near = emit.op("Div", b, emit.op("Add", radius, a))
        far = emit.op("Div", emit.op("Sub", radius, a), b)
        half = emit.op("Where", behind, far, near)
        angle = emit.op("Mul", emit.op("Atan", half), _like(emit, 2.0, a))
        flat = emit.op("Where", _is_negative(emit, a), _like(emit, math.pi, a), zero)
        signed = emit.op("Where", _is_negative(emit, b), emit.op("Neg", flat), flat)
        return emit.op("Where", emit.op("Equal", b, zero), signed, angle)

    return elementwise(f, node, [y, x], make)


@rule(aten.round.decimals)
def round_decimals(f: Follower, node: fx.Node, x: Tensor, *, decimals: int) -> Tensor:
    def make(emit: Emitter, v: ir.Value) -> ir.Value:
        tens = _like(emit, 10.0 ** abs(decimals), v)
        there, back = ("Mul", "Div") if decimals >= 0 else ("Div", "Mul")
        return emit.op(back, emit.op("Round", emit.op(there, v, tens)), tens)

    return elementwise(f, node, [x], make)


@rule(aten._prelu_kernel.default)
def prelu(f: Follower, node: fx.Node, x: Tensor, weight: fx.Node) -> Tensor:
    def make(emit: Emitter, v: ir.Value, slope: ir.Value) -> ir.Value:
        return emit.op("Where", emit.op("Less", v, _like(emit, 0.0, v)), emit.op("Mul", v, slope), v)

    return elementwise(f, node, [x, weight], make)


@rule(aten.rrelu.default)
def rrelu(
    f: Follower,
    node: fx.Node,
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    *rest: Any,
) -> Tensor:
    """In evaluation a leaky ReLU of the mean slope."""
    if training:
        raise refuse(node, "draws its slopes at random", "pass training=self.training")
    return elementwise(f, node, [x], named("LeakyRelu", alpha=float(lower + upper) / 2))
