"""Integer arithmetic, as with the numbers of experts and the indices of what was picked for them.

Sources: the ATen signatures (torch/native_functions.yaml) and the ONNX operator specifications of opset 21.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from ..axes import Axis
from ..emitter import Emitter
from ..follow import Follower, rule
from ..tensor import Tensor
from ..trace import aten
from .elementwise import divide, elementwise, named

BITWISE: dict[Any, str] = {
    aten.bitwise_and.Scalar: "And",
    aten.bitwise_and.Tensor: "And",
    aten.__and__.Tensor: "And",
    aten.__and__.Scalar: "And",
    aten.bitwise_or.Scalar: "Or",
    aten.bitwise_or.Tensor: "Or",
    aten.__or__.Tensor: "Or",
    aten.__or__.Scalar: "Or",
    aten.bitwise_xor.Scalar: "Xor",
    aten.bitwise_xor.Tensor: "Xor",
    aten.__xor__.Tensor: "Xor",
}


@rule(*BITWISE)
def bitwise(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    """Of truth values the logical operation, which is the same."""
    name = BITWISE[node.target]
    return elementwise(f, node, [x, y], named(name if node.meta["val"].dtype == torch.bool else f"Bitwise{name}"))


@rule(aten.bitwise_not.default)
def invert(f: Follower, node: fx.Node, x: Tensor) -> Tensor:
    return elementwise(f, node, [x], named("Not" if x.dtype == torch.bool else "BitwiseNot"))


@rule(
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.__lshift__.Scalar,
    aten.__rshift__.Scalar,
)
def shift(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    """ONNX shifts what has no sign; of int64 a product with, or a quotient by, a power of two is the same."""
    left = node.target in (
        aten.bitwise_left_shift.Tensor, aten.bitwise_left_shift.Tensor_Scalar, aten.__lshift__.Scalar,
    )  # fmt: skip
    dtype = node.meta["val"].dtype

    def make(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        power = emit.cast(emit.op("Pow", emit.constant(2.0, np.float64), emit.cast(b, torch.float64)), dtype)
        return emit.op("Mul", a, power) if left else floored(emit, a, power)

    return elementwise(f, node, [x, y], make)


def floored(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    """The quotient of integers, rounded down as Python does: ONNX rounds towards zero, Mod has the divisor's sign."""
    return emit.op("Div", emit.op("Sub", a, emit.op("Mod", a, b)), b)


def quotient_of(f: Follower, node: fx.Node, x: Any, y: Any, rounding: str) -> Tensor:
    """The quotient of integers; of indices along an axis by what its last part holds, those along the rest of it."""
    result = elementwise(f, node, [x, y], floored if rounding == "floor" else named("Div"))
    if isinstance(x, Tensor) and x.value in f.indexes and isinstance(y, int):
        split = f.symbols.regroup((f.indexes[x.value],), [f.symbols.product(f.indexes[x.value]) / y, y])
        if split is not None and not split[1]:
            f.indexes[result.value] = split[0][0]
    return result


@rule(aten.floor_divide.default, aten.floor_divide.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def rounded(f: Follower, node: fx.Node, x: Any, y: Any, *, rounding_mode: str | None = "floor") -> Any:
    if rounding_mode is None or node.meta["val"].is_floating_point():
        return divide(f, node, x, y, rounding_mode=rounding_mode)
    return quotient_of(f, node, x, y, rounding_mode)


@rule(aten.remainder.Scalar, aten.remainder.Tensor, aten.remainder.Scalar_Tensor, aten.fmod.Scalar, aten.fmod.Tensor)
def remainder(f: Follower, node: fx.Node, x: Any, y: Any) -> Tensor:
    """Source: ONNX Mod: of integers with the divisor's sign, with fmod=1 with the dividend's."""
    signed = node.target in (aten.fmod.Scalar, aten.fmod.Tensor)

    def of_floats(emit: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
        return emit.op("Sub", a, emit.op("Mul", b, emit.op("Floor", emit.op("Div", a, b))))

    if signed or not node.meta["val"].is_floating_point():
        result = elementwise(f, node, [x, y], named("Mod", fmod=int(signed)))
        _remember_rest(f, x, y, result)
        return result
    return elementwise(f, node, [x, y], of_floats)


def _remember_rest(f: Follower, x: Any, y: Any, result: Tensor) -> None:
    """What remains of indices along an axis indexes the last part of it."""
    if isinstance(x, Tensor) and x.value in f.indexes and isinstance(y, int):
        split = f.symbols.regroup((f.indexes[x.value],), [f.symbols.product(f.indexes[x.value]) / y, y])
        if split is not None and not split[1]:
            rest: Axis = split[0][1]
            f.indexes[result.value] = rest
