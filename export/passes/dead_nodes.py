"""Remove nodes whose results nobody reads, and the initializers that only they read."""

from __future__ import annotations

import onnx_ir as ir


def run(model: ir.Model) -> int:
    graph, removed = model.graph, 0
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value in outputs or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.inputs:
            del graph.initializers[name]
            removed += 1
    return removed
