"""A norm that is spelled out in squares, means and roots becomes one node.

x / sqrt(mean(x^2) + epsilon) * weight was seven nodes: 2.7 to 0.75 us for 576 numbers, 41 to 17 us for 128 rows of them
(one thread). Of the difference to a mean it is a LayerNormalization. onnxruntime keeps SimplifiedLayerNormalization in
the domain of ONNX itself, where only it knows it; ONNX has RMSNormalization from opset 23 on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..capture.emitter import SHARED
from .matching import attribute, either_way, integers, is_read_within, is_vector, made_by, number, only_reader, replace
from .shapes import Known, infer


@dataclass(frozen=True)
class Found:
    """`last` divides x by the root of the mean of its squares, with nothing but `inner` in between."""

    x: ir.Value
    epsilon: float
    inner: list[ir.Node]
    last: ir.Node


def run(model: ir.Model) -> int:
    """Fires for each norm over the last axis with a constant epsilon; in every opset, for onnxruntime alone."""
    return _run(model, "SimplifiedLayerNormalization")


def run_standard(model: ir.Model) -> int:
    """The same with ONNX operators: RMSNormalization where the opset has it."""
    return _run(model, "RMSNormalization" if model.graph.opset_imports.get("", 0) >= 23 else None)


def _run(model: ir.Model, operator: str | None) -> int:
    known, fired = infer(model.graph), 0
    for node in list(model.graph):
        found = _match(node, known) if node.op_type in ("Mul", "Div") else None
        if found is not None:
            fired += _centred(model.graph, found, known) or (
                operator is not None and _fuse(model.graph, operator, found, known)
            )
    return fired


# -- what is looked for ---------------------------------------------------------------------------------------------
def _match(node: ir.Node, known: Known) -> Found | None:
    for x, root in either_way(node) if node.op_type == "Mul" else [(node.inputs[0], node.inputs[1])]:
        inner: list[ir.Node] = []
        under = _under_root(root, node.op_type == "Mul", inner)
        epsilon = _mean_square(under, x, known, inner) if under is not None and x is not None else None
        if epsilon is None or x is None:
            continue
        if all(is_read_within(value, [*inner, node]) for n in inner for value in n.outputs):
            return Found(x, epsilon, inner, node)
    return None


def _under_root(root: ir.Value | None, inverse: bool, inner: list[ir.Node]) -> ir.Value | None:
    """What a value is the root of, or the inverse root."""
    if (power := made_by(root, "Pow")) and number(power.inputs[1]) == (-0.5 if inverse else 0.5):
        inner.append(power)
        return power.inputs[0]
    if inverse:
        one_over = made_by(root, "Reciprocal", "Div")
        if one_over is None or (one_over.op_type == "Div" and number(one_over.inputs[0]) != 1):
            return None
        inner.append(one_over)
        root = one_over.inputs[-1]
    if (sqrt := made_by(root, "Sqrt")) is None:
        return None
    inner.append(sqrt)
    return sqrt.inputs[0]


def _mean_square(under: ir.Value, x: ir.Value, known: Known, inner: list[ir.Node]) -> float | None:
    """The epsilon, if `under` is the mean of the squares of x with a constant added."""
    if (total := made_by(under, "Add")) is None:
        return None
    for mean, constant in either_way(total):
        epsilon, reduce = number(constant), made_by(mean, "ReduceMean")
        squares = _squares(_averaged(mean, known), x)
        if epsilon is not None and reduce is not None and squares:
            inner += [total, reduce, *squares]
            return epsilon
    return None


def _squares(value: ir.Value | None, x: ir.Value | None) -> list[ir.Node]:
    """The nodes that make the squares of x, perhaps squared before x was parted into heads."""
    if (square := made_by(value, "Mul", "Pow")) is not None and x is not None:
        same = square.inputs[1] is x if square.op_type == "Mul" else number(square.inputs[1]) == 2
        return [square] if same and square.inputs[0] is x else []
    moved, own = made_by(value, "Reshape", "Transpose"), made_by(x, "Reshape", "Transpose")
    if moved is None or own is None or moved.op_type != own.op_type or moved.inputs[1:] != own.inputs[1:]:
        return []
    alike = moved.op_type == "Reshape" or attribute(moved, "perm", None) == attribute(own, "perm", None)
    squares = _squares(moved.inputs[0], own.inputs[0]) if alike else []
    return [*squares, moved] if squares else []


def _averaged(mean: ir.Value | None, known: Known) -> ir.Value | None:
    """What a value is the mean of over its last axis, which stays as a 1."""
    node = made_by(mean, "ReduceMean")
    shape = known.get(node.inputs[0]) if node is not None and node.inputs[0] is not None else None
    if node is None or shape is None or not attribute(node, "keepdims", 1):
        return None
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes", None)
    return node.inputs[0] if axes is not None and list(axes) in ([-1], [len(shape) - 1]) else None


# -- what is put in its place ---------------------------------------------------------------------------------------
def _centred(graph: ir.Graph, found: Found, known: Known) -> bool:
    """Where x is a difference to its own mean that nobody else reads: one LayerNormalization."""
    away = made_by(found.x, "Sub")
    if away is None or away.inputs[0] is None or not is_read_within(found.x, [*found.inner, found.last]):
        return False
    if _averaged(away.inputs[1], known) is not away.inputs[0]:
        return False
    mean = made_by(away.inputs[1], "ReduceMean")
    inner = [*found.inner, away, *([mean] if mean is not None else [])]
    return _fuse(graph, "LayerNormalization", Found(away.inputs[0], found.epsilon, inner, found.last), known)


def _fuse(graph: ir.Graph, operator: str, found: Found, known: Known) -> bool:
    shape = known.get(found.x)
    width = shape[-1] if shape else None
    if shape is None or not isinstance(width, int):
        return False
    old, weight = [*found.inner, found.last], None
    if (scaled := _with_vector("Mul", old[-1], width)) is not None:
        old.append(scaled[0])
        weight = scaled[1]
    inputs = [found.x, weight or _ones(graph, width)]
    if operator == "LayerNormalization" and (shifted := _with_vector("Add", old[-1], width)) is not None:
        old.append(shifted[0])
        inputs.append(shifted[1])
    new = ir.node(operator, inputs, {"axis": -1, "epsilon": found.epsilon}, name=f"{old[-1].name}.norm")
    replace(old, new, {old[-1].outputs[0]: new.outputs[0]}, after=old[-1])
    known[new.outputs[0]] = shape
    return True


def _with_vector(op_type: str, node: ir.Node, width: int) -> tuple[ir.Node, ir.Value] | None:
    """The only reader of a node, where it is of this type and its other operand is a constant (width,)."""
    reader = only_reader(node.outputs[0])
    if reader is None or reader.op_type != op_type or reader.graph is not node.graph:
        return None
    other = reader.inputs[1] if reader.inputs[0] is node.outputs[0] else reader.inputs[0]
    return (reader, other) if other is not None and is_vector(other, width) else None


def _ones(graph: ir.Graph, width: int) -> ir.Value:
    name = f"ones.{width}"
    if name not in graph.initializers:
        tensor = ir.Tensor(np.ones(width, np.float32), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([width]), const_value=tensor)
        value.meta[SHARED] = (name,)  # equal in every graph of a folder
        graph.initializers[name] = value
    return graph.initializers[name]
