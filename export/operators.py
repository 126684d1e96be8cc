"""Which operators a graph is made of, from one attention to the next."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import onnx_ir as ir

from tfinfer.manifest import LayerSpec

ATTENTION = {"GroupQueryAttention", "MultiHeadAttention", "Attention"}


def layers_of(graph: ir.Graph) -> tuple[LayerSpec, ...]:
    """The operators up to each attention, it among them, and those behind the last; equal ones in a row told once.

    Attention that is left as a module wrote it ends with its softmax.
    """
    operators = ATTENTION if any(_attends(node, ATTENTION) for node in graph) else {"Softmax"}
    layers: list[Counter[str]] = [Counter()]
    for node in graph:
        layers[-1][node.op_type] += 1
        if _attends(node, operators):
            layers.append(Counter())
    return tuple(LayerSpec(len(list(alike)), dict(sorted(first.items()))) for first, alike in groupby(layers) if first)


def _attends(node: ir.Node, operators: set[str]) -> bool:
    """Whether a node is attention, or chooses between two ways of it."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]
    return node.op_type in operators or any(_attends(inner, operators) for graph in graphs for inner in graph)
