"""What only the wanted rows of the logits need is computed for those rows alone.

A caller asks for the last `logits_to_keep` rows, and capture cuts them out before the head. Everything between the last
attention and the head works row by row, so the cut moves up to it: a prompt's last feed-forward block, its norms and
the projection of its last attention see one row instead of all.
"""

from __future__ import annotations

import onnx_ir as ir

from .matching import attribute, integers, is_read_within, made_by, readers
from .shapes import BROADCAST, LIKE_FIRST, Known, infer

LAST_AXIS = {
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax", "LogSoftmax",
    "Split", "Concat", "CumSum",
}  # fmt: skip
NOT_BY_ROWS = {"RotaryEmbedding", "TensorScatter", "Trilu", "CumSum"}
MOST = 4  # cuts instead of the one: each costs about a microsecond where there is but one row


def run(model: ir.Model) -> int:
    """Fires for each cut that moves up."""
    return sum(_move(model.graph, node, infer(model.graph)) for node in list(model.graph) if _is_cut(node))


def _is_cut(node: ir.Node) -> bool:
    """Whether a node picks rows by a number that the caller gives, or always the same ones."""
    if node.op_type == "Gather":
        rows = integers(node.inputs[1])
        return rows is not None and len(node.inputs[1].shape or ()) == 1 and attribute(node, "axis", 0) > 0  # type: ignore[union-attr]
    start = made_by(node.inputs[1], "Neg") if node.op_type == "Slice" and len(node.inputs) == 4 else None
    return start is not None and start.inputs[0] is not None and start.inputs[0].name == "logits_to_keep"


def _move(graph: ir.Graph, cut: ir.Node, known: Known) -> bool:
    axes = [attribute(cut, "axis", 0)] if cut.op_type == "Gather" else integers(cut.inputs[3])
    (axis,) = axes or (0,)
    if axis <= 0:
        return False
    region = _region(graph, cut, axis, known)
    edges = dict.fromkeys(
        value for node in region for value in node.inputs
        if value is not None and value.producer() not in region and _has_rows(value, node, axis, known)
    )  # fmt: skip
    if not region or len(edges) > MOST:
        return False
    _compute_after(graph, cut, region, list(edges))
    return True


def _region(graph: ir.Graph, cut: ir.Node, axis: int, known: Known) -> list[ir.Node]:
    """The nodes that work row by row and whose results nobody sees but the cut, in the order of the graph."""
    region: dict[ir.Node, None] = {}
    for node in reversed(list(graph)):
        read = any(readers(value) for value in node.outputs)
        if not read or not all(is_read_within(value, [*region, cut]) for value in node.outputs):
            continue
        if node is not cut and _is_by_rows(node, axis, known):
            region[node] = None
    return list(reversed(region))


def _is_by_rows(node: ir.Node, axis: int, known: Known) -> bool:
    """Whether a row of every result depends on that row of the operands alone, and rows keep their axis."""
    shapes = [known.get(value) for value in (*node.inputs, *node.outputs) if value is not None]
    result = known.get(node.outputs[0])
    if result is None or None in shapes or len(result) < axis + 2 or node.op_type in NOT_BY_ROWS:
        return False
    if not any(_has_rows(value, node, axis, known) for value in node.inputs if value is not None):
        return False
    if node.op_type == "MatMul":
        right = node.inputs[1]
        return right is not None and right.const_value is not None and len(right.const_value.shape) == 2
    if node.op_type in LAST_AXIS:
        return attribute(node, "axis", -1) in (-1, len(result) - 1) and _constant_but_first(node)
    if node.op_type.startswith("Reduce"):
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes", None)
        return bool(attribute(node, "keepdims", 1)) and axes is not None and list(axes) in ([-1], [len(result) - 1])
    if node.op_type in BROADCAST:
        return all(_lines_up(value, node, axis, known) for value in node.inputs if value is not None)
    return node.op_type in LIKE_FIRST and _constant_but_first(node)


def _constant_but_first(node: ir.Node) -> bool:
    return all(value is None or value.const_value is not None for value in node.inputs[1:])


def _at(value: ir.Value, node: ir.Node, axis: int, known: Known) -> object:
    """The size that an operand has where the rows of the result are; 1 where it has no such axis."""
    shape, result = known[value], known[node.outputs[0]]
    at = axis - len(result) + len(shape) if node.op_type in BROADCAST else axis
    return shape[at] if 0 <= at < len(shape) else 1


def _has_rows(value: ir.Value, node: ir.Node, axis: int, known: Known) -> bool:
    return value.const_value is None and _at(value, node, axis, known) != 1


def _lines_up(value: ir.Value, node: ir.Node, axis: int, known: Known) -> bool:
    """Whether an operand is the same for all rows, or has as many as the result on the same axis."""
    size, result = _at(value, node, axis, known), known[node.outputs[0]]
    return size == 1 or (size == result[axis] and len(known[value]) == len(result) and value.const_value is None)


def _compute_after(graph: ir.Graph, cut: ir.Node, region: list[ir.Node], edges: list[ir.Value]) -> None:
    """Cut at the edges instead, and move the region behind those cuts; nobody before them reads it."""
    rows: dict[ir.Value | None, ir.Node] = {}
    for i, edge in enumerate(edges):
        inputs = [edge, *cut.inputs[1:]]
        rows[edge] = ir.node(cut.op_type, inputs, dict(cut.attributes), name=f"{cut.name}.{i}")
    graph.remove(region)
    graph.insert_before(cut, [*rows.values(), *region])
    for node in region:
        for i, value in enumerate(node.inputs):
            if value in rows:
                node.replace_input_with(i, rows[value].outputs[0])
        for result in node.outputs:
            result.shape = None
    for node in rows.values():
        node.outputs[0].name = node.name
    source, result = cut.inputs[0], cut.outputs[0]
    assert source is not None
    if result.is_graph_output():
        source.name, source.type, source.shape = result.name, result.type, result.shape
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(cut, safe=True)
