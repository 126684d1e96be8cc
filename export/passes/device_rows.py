"""Which rows of the logits are wanted is reckoned on the host where a graph runs on a device.

onnxruntime puts what depends on an input of the graph alone on the device, and copies it back for a Slice, which wants
its numbers on the host: a stop in the middle of every run, and one such copy forbids CUDA graphs. What begins with the
size of a value stays on the host (`fallback_cpu_capability.cc`), so the first wanted row is counted from the front.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def run(model: ir.Model) -> int:
    """Fires once for a graph whose caller says how many rows it wants."""
    graph = model.graph
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    found = [node for node in graph if ids is not None and _is_negative(node)]
    if not found or ids is None:
        return 0
    first = _first_row(graph, ids, found[0])
    for node in found:
        node.outputs[0].replace_all_uses_with(first)
        graph.remove(node, safe=True)
    return 1


def _is_negative(node: ir.Node) -> bool:
    return node.op_type == "Neg" and node.inputs[0] is not None and node.inputs[0].name == "logits_to_keep"


def _first_row(graph: ir.Graph, ids: ir.Value, before: ir.Node) -> ir.Value:
    """(1,) int64: the number of new positions without the wanted ones, at least 0: by default all are wanted."""
    zero = ir.Tensor(np.array([0], np.int64), name="first_row")
    constant = ir.Value(name=zero.name, type=ir.TensorType(zero.dtype), shape=ir.Shape([1]), const_value=zero)
    graph.initializers["first_row"] = constant
    positions = ir.node("Shape", [ids], {"start": 1, "end": 2}, name="new_positions")
    unwanted = ir.node("Sub", [positions.outputs[0], before.inputs[0]], name="unwanted_rows")
    start = ir.node("Max", [unwanted.outputs[0], constant], name="first_wanted_row")
    for node in (positions, unwanted, start):
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([1])
    graph.insert_before(before, [positions, unwanted, start])
    return start.outputs[0]
