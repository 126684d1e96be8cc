"""What passes ask of a graph: who reads a value, which constant it is, and one set of nodes in place of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx_ir as ir

CONTRIB = "com.microsoft"
SHARED = "shared"  # in an initializer's meta: what equal ones of two graphs have in common; see capture/emitter.py


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def integers(value: ir.Value | None) -> list[int] | None:
    """The entries of a constant, as sizes and axes are given."""
    tensor = value.const_value if value is not None and not value.is_graph_input() else None
    if tensor is None or tensor.dtype is not ir.DataType.INT64 or len(tensor.shape) > 1:
        return None
    return [int(entry) for entry in tensor.numpy().reshape(-1)]


def number(value: ir.Value | None) -> float | None:
    """A constant that is one float32."""
    tensor = value.const_value if value is not None and not value.is_graph_input() else None
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(-1)[0])


def is_vector(value: ir.Value | None, width: object) -> bool:
    """Whether a value is a constant (width,) of float32: the weight or the bias of vectors."""
    tensor = value.const_value if value is not None and not value.is_graph_input() else None
    return tensor is not None and tensor.dtype is ir.DataType.FLOAT and list(tensor.shape) == [width]


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, where it is one of those of ONNX itself."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types and not node.domain else None


def either_way(node: ir.Node) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    """The two operands of a node in both orders."""
    yield node.inputs[0], node.inputs[1]
    yield node.inputs[1], node.inputs[0]


def readers(value: ir.Value) -> set[ir.Node]:
    return {use.node for use in value.uses()}


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, if nothing else does, not even the graph's caller."""
    found = readers(value)
    return found.pop() if len(found) == 1 and not value.is_graph_output() else None


def is_read_within(value: ir.Value, nodes: Iterable[ir.Node]) -> bool:
    """Whether nobody but these nodes sees a value."""
    return not value.is_graph_output() and readers(value) <= set(nodes)


def replace(old: Sequence[ir.Node], new: ir.Node, results: dict[ir.Value, ir.Value], after: ir.Node) -> None:
    """Put one node in the place of others: `results` says which of its outputs stands for which of theirs.

    Names stay with the results, so that the graph's outputs keep theirs. Nodes that still have readers stay.
    """
    graph = after.graph
    assert graph is not None
    for before, value in results.items():
        value.name, value.type, value.shape = before.name, before.type, before.shape
        before.replace_all_uses_with(value, replace_graph_outputs=True)
        before.name = None
    graph.insert_after(after, new)
    if new.domain:
        graph.opset_imports.setdefault(new.domain, 1)
    for node in sorted(old, key=list(graph).index, reverse=True):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
