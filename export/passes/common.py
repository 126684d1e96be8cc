"""Equal nodes with equal inputs become one, equal small constants too."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

SMALL = 64  # bytes: numbers, axes and sizes; a weight keeps its name
RANDOM = {"Bernoulli", "Dropout", "Multinomial"}


def run(model: ir.Model) -> int:
    """Fires for each node and each constant that goes."""
    return _constants(model.graph) + _nodes(model.graph)


def _constants(graph: ir.Graph) -> int:
    kept: dict[Any, ir.Value] = {}
    fired = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes > SMALL or value.is_graph_input() or value.is_graph_output():
            continue
        if tensor.dtype is ir.DataType.STRING:
            continue
        first = kept.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[name]
            fired += 1
    return fired


def _nodes(graph: ir.Graph) -> int:
    kept: dict[Any, ir.Node] = {}
    fired = 0
    for node in list(graph):
        first = kept.setdefault(key, node) if (key := _key(node)) is not None else node
        if first is not node and _take(node, first):
            graph.remove(node, safe=True)
            fired += 1
    return fired


def _key(node: ir.Node) -> Any:
    """Equal for nodes that compute the same; None for what is never the same as another."""
    kinds = {value.type for value in node.attributes.values()}
    if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR}:
        return None
    if node.op_type in RANDOM or node.op_type.startswith("Random") or not node.inputs:
        return None
    attributes = sorted((name, repr(value.value)) for name, value in node.attributes.items())
    written = tuple(value.name == "" for value in node.outputs)
    return node.op_identifier(), tuple(node.inputs), tuple(attributes), written


def _take(node: ir.Node, first: ir.Node) -> bool:
    """Let everybody read `first` instead; False where both are outputs of the graph, each under its own name."""
    pairs = list(zip(node.outputs, first.outputs))
    if any(value.is_graph_output() and other.is_graph_output() for value, other in pairs):
        return False
    for value, other in pairs:
        if value.is_graph_output():
            name, value.name = value.name, None
            other.name, other.type, other.shape = name, value.type, value.shape
        value.replace_all_uses_with(other, replace_graph_outputs=True)
    return True
