"""A batch without padding runs without its mask: onnxruntime's fast attention on the CPU takes none.

One condition for the graph and an `If` around each attention: 7.7 to 6.4 ms for that of one BERT-base layer over
8 x 128 tokens on one thread, 26.7 to 21.1 over 8 x 256; it costs nothing at 1 x 16 (54 to 48 us).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

KEYS, BIAS = 4, 5  # inputs of com.microsoft.MultiHeadAttention: which keys are there, what is added to the scores
TRUTH_OF_ROWS = {"Cast", "ReduceMax", "Unsqueeze"}  # how a graph asks whether a row has any key


def run(model: ir.Model) -> int:
    """Fires for each attention whose keys are hidden by the graph's own attention_mask and by nothing else."""
    graph = model.graph
    mask = next((value for value in graph.inputs if value.name == "attention_mask"), None)
    nodes = [node for node in graph if mask is not None and _is_masked_by(node, mask)]
    if not nodes or mask is None:
        return 0
    padded = _any_padding(graph, mask)
    for node in nodes:
        _branch(graph, node, mask, padded)
    return len(nodes)


def _is_masked_by(node: ir.Node, mask: ir.Value) -> bool:
    if node.op_type != "MultiHeadAttention" or len(node.inputs) <= KEYS or len(node.outputs) > 1:
        return False
    keys = node.inputs[KEYS]
    cast = keys.producer() if keys is not None else None
    biased = any(value is not None for value in node.inputs[BIAS:])  # then the mask is not all that costs
    return cast is not None and cast.op_type == "Cast" and cast.inputs[0] is mask and not biased


def _any_padding(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """() bool: whether the mask hides anything."""
    one = ir.Tensor(np.array(1, np.int64), name="one_key")
    constant = ir.Value(name="one_key", type=ir.TensorType(one.dtype), shape=ir.Shape([]), const_value=one)
    graph.initializers["one_key"] = constant
    least = ir.node("ReduceMin", [mask], {"keepdims": 0}, name="least_key")
    padded = ir.node("Less", [least.outputs[0], constant], name="any_padding")
    for node in (least, padded):
        node.outputs[0].name = node.name
    graph.insert_before(next(iter(graph)), [least, padded])
    return padded.outputs[0]


def _branch(graph: ir.Graph, node: ir.Node, mask: ir.Value, padded: ir.Value) -> None:
    """Replace an attention, and what clears the rows that see no key at all, by an `If` of it with and without mask."""
    last = _clearing(node, mask) or node
    result, inner = last.outputs[0], list(dict.fromkeys((node, last)))
    bodies = {"then_branch": _copies(inner, result), "else_branch": [_unmasked(node)]}
    branches = [ir.AttrGraph(name, _body(graph, f"{node.name}.{name}", nodes)) for name, nodes in bodies.items()]
    choice = ir.node("If", [padded], {branch.name: branch for branch in branches}, name=f"{node.name}.by_padding")
    chosen = choice.outputs[0]
    chosen.name, chosen.type, chosen.shape = result.name, result.type, result.shape
    graph.insert_after(last, choice)
    result.replace_all_uses_with(chosen, replace_graph_outputs=True)
    for old in reversed(inner):
        graph.remove(old, safe=True)


def _clearing(node: ir.Node, mask: ir.Value) -> ir.Node | None:
    """The only reader of an attention, where it puts zeros in rows of which the mask hides every key."""
    uses = list(node.outputs[0].uses())
    reader = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    if reader is None or reader.op_type != "Where" or reader.inputs[1] is not node.outputs[0]:
        return None
    return reader if set(_sources(reader.inputs[0])) == {mask} else None


def _sources(value: ir.Value | None) -> Iterator[ir.Value | None]:
    """What a truth about rows is made from, constants aside."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in TRUTH_OF_ROWS:
        yield value
    else:
        yield from _sources(node.inputs[0])


def _copies(nodes: list[ir.Node], result: ir.Value) -> list[ir.Node]:
    """The nodes once more, the second reading the first one's copy."""
    made: dict[ir.Value | None, ir.Value] = {}
    copies = []
    for node in nodes:
        inputs = [made.get(value, value) if value is not None else None for value in node.inputs]
        copy = ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain, name=f"{node.name}.masked")
        made[node.outputs[0]] = copy.outputs[0]
        copies.append(copy)
    return copies


def _unmasked(node: ir.Node) -> ir.Node:
    inputs = list(node.inputs[:KEYS])
    while inputs[-1] is None:  # a trailing empty input crashes onnxruntime
        inputs.pop()
    return ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain, name=f"{node.name}.unmasked")


def _body(graph: ir.Graph, name: str, nodes: list[ir.Node]) -> ir.Graph:
    for node in nodes:
        node.outputs[0].name = node.name
    result = nodes[-1].outputs[0]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [result], nodes=nodes, opset_imports=graph.opset_imports, name=name)
