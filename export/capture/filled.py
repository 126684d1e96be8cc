"""Tensors of one number, as the zeros that something is added into: of what size they are does not matter."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .axes import Axes
from .emitter import Emitter
from .tensor import Tensor, size_vector
from .trace import Trace, arguments, aten

ZEROS = {
    aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
}  # fmt: skip
ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
FULL = {aten.full.default, aten.full_like.default}
MOVES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.clone.default, aten.alias.default,
    aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten._to_copy.default, aten.lift_fresh_copy.default,
}  # fmt: skip


def fill_value(trace: Trace, node: Any) -> Any:
    """The number that every entry of a positional node is, if it is made so; what is empty holds zeros."""
    while isinstance(node, fx.Node) and node not in trace.data and node.target in MOVES:
        node = arguments(node)[0]
    if not isinstance(node, fx.Node):
        return None
    if node.target in ZEROS:
        return 0
    if node.target in ONES:
        return 1
    number = None
    if node.target in FULL:
        number = arguments(node)[1]
    elif node.target is aten.new_full.default:
        number = arguments(node)[2]
    return number if isinstance(number, (bool, int, float)) else None


def filled(emit: Emitter, number: Any, axes: Axes, dtype: torch.dtype) -> Tensor:
    """A tensor of one number."""
    return Tensor.of(spread(emit, number, axes, dtype), axes, dtype)


def spread(emit: Emitter, number: Any, axes: Axes, dtype: torch.dtype) -> ir.Value:
    one = emit.constant(torch.tensor(number, dtype=dtype).numpy())
    return emit.op("Expand", one, size_vector(emit, axes))
