"""Convolutions: along positions each output belongs to the last input that it reads, and none may come later."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..axes import Axes, Axis, Role, fixed
from ..follow import STRETCHABLE, Follower, followed, rule
from ..tensor import Tensor, laid_out
from ..trace import aten, refuse
from .shifts import AHEAD, is_sequence, settled, stretched

STRETCHABLE.update({aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding})


@rule(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
def convolution(
    f: Follower,
    node: fx.Node,
    x: Tensor,
    weight: fx.Node,
    bias: fx.Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """x: (n, channels, places...), of which one axis of places may hold the positions. Source: ONNX Conv."""
    if not f.is_constant(weight) or (bias is not None and not f.is_constant(bias)):
        raise refuse(node, "its weights are computed from the ids")
    shape = f.trace.shape(weight)  # (out, in / groups, kernel...)
    kernel = [int(n) for n in shape[2:]]
    if x.rank != len(kernel) + 2 or any(a.role for a in x.axes[1]):
        raise refuse(node, "its channels hold positions or rows", "expected (batch, channels, positions)")
    strides, dilations = _each(stride, kernel), _each(dilation, kernel)
    pads = _pads(padding, kernel, dilations)
    for i in range(len(kernel)):
        if any(a.role for a in x.axes[i + 2]):
            x, pads[i] = _causal(f, node, x, i + 2, strides[i], pads[i], (kernel[i] - 1) * dilations[i]), (0, 0)
    operands = [f.parameter(weight), *([] if bias is None else [f.parameter(bias)])]
    value = f.emit.op(
        "Conv", laid_out(f.emit, x), *operands, kernel_shape=kernel, strides=strides, dilations=dilations, group=groups,
        pads=[left for left, _ in pads] + [right for _, right in pads],
    )  # fmt: skip
    return _settled(f, node, x, value, fixed(int(shape[0])), [(k - 1) * d for k, d in zip(kernel, dilations)])


def _each(option: Any, kernel: list[int]) -> list[int]:
    values = list(option) if isinstance(option, (list, tuple)) else [option]
    return values * len(kernel) if len(values) < len(kernel) else values


def _pads(padding: Any, kernel: list[int], dilations: list[int]) -> list[tuple[int, int]]:
    """What is put on the left and on the right of every axis of places."""
    if isinstance(padding, str):
        sums = [(k - 1) * d if padding == "same" else 0 for k, d in zip(kernel, dilations)]
        return [(n // 2, n - n // 2) for n in sums]
    return [(p, p) for p in _each(padding, kernel)]


def _causal(f: Follower, node: fx.Node, x: Tensor, dim: int, stride: int, pads: tuple[int, int], reach: int) -> Tensor:
    """The positions with their padding; refused where an output would read later ones. reach: how far it reads."""
    if not reach and not any(pads) and stride == 1:
        return x
    if not is_sequence(f, x, dim):
        why = "reads neighbours along an axis that holds more than the positions of a decoder"
        raise refuse(node, why, "its padding would enter the rows of a batch")
    if stride != 1:
        raise refuse(node, f"a stride of {stride} along the positions: cuts the sequence in chunks of {stride}")
    before = pads[0] + x.axes[dim][0].before
    if before < reach:
        raise refuse(
            node,
            f"reads {reach - before} positions ahead: {AHEAD}",
            f"pad with {reach} zeros on the left alone, or cut the last {reach} of both-sided padding off",
        )
    return stretched(f, node, x, dim, *pads) if any(pads) else x


def _settled(f: Follower, node: fx.Node, x: Tensor, value: Any, out: Axis, reach: list[int]) -> Tensor:
    shape = f.trace.shape(node)
    places = [axis if any(a.role for a in axis) else fixed(int(n)) for axis, n in zip(x.axes[2:], shape[2:])]
    axes: Axes = followed((x.axes[0], out, *places))
    result = Tensor.of(value, axes, node.meta["val"].dtype)
    for i, axis in enumerate(axes[2:]):
        if axis and axis[0].role in (f.role, Role.STRETCH):
            result = settled(f, result, i + 2, axis[0].before - reach[i], axis[0].after)
    return result
