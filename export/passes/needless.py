"""What changes nothing goes: Casts to the same type, Reshapes of Reshapes, Transposes that cancel, times 1, Identity.

What a graph's caller sees keeps its name, so a node that makes an output stays.
"""

from __future__ import annotations

import onnx_ir as ir

from .matching import attribute, integers, made_by, number, only_reader
from .shapes import Known, infer

BOOLEANS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf"}
INTEGERS = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero"}
# Results of the type of the first operand.
KEEPING = {
    "Add", "Sub", "Mul", "Div", "Neg", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Gather", "Concat",
    "Expand", "MatMul", "Identity", "Softmax", "Split", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSum", "Tanh",
    "Sigmoid", "LayerNormalization", "Gelu", "Exp", "Log", "Pow",
}  # fmt: skip


def run(model: ir.Model) -> int:
    """Fires for each node that goes."""
    known, fired = infer(model.graph), 0
    for node in [n for n in model.graph if n.op_type in RULES and not n.domain and not n.outputs[0].is_graph_output()]:
        fired += _read_past(model.graph, node, known)
        before = node.inputs[0]
        if before is not None and RULES[node.op_type](node, before, known):
            node.outputs[0].replace_all_uses_with(before)
            model.graph.remove(node, safe=True)
            fired += 1
    return fired


# -- nodes that give what they get ----------------------------------------------------------------------------------
def _identity(node: ir.Node, before: ir.Value, known: Known) -> bool:
    return True


def _cast(node: ir.Node, before: ir.Value, known: Known) -> bool:
    return _type(before) == attribute(node, "to", None)


def _reshape(node: ir.Node, before: ir.Value, known: Known) -> bool:
    return before in known and known[before] == known.get(node.outputs[0])


def _transpose(node: ir.Node, before: ir.Value, known: Known) -> bool:
    order = attribute(node, "perm", None)
    return order is not None and list(order) == sorted(order)


def _one(node: ir.Node, before: ir.Value, known: Known) -> bool:
    return number(node.inputs[1]) == 1 and before in known and known[before] == known.get(node.outputs[0])


RULES = {"Mul": _one, "Div": _one, "Identity": _identity, "Cast": _cast, "Reshape": _reshape, "Transpose": _transpose}


def _type(value: ir.Value) -> ir.DataType | None:
    """The type of a value, where the graph says it or the nodes before do."""
    while value.dtype is None and (node := value.producer()) is not None:
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type in BOOLEANS or node.op_type in INTEGERS:
            return ir.DataType.BOOL if node.op_type in BOOLEANS else ir.DataType.INT64
        if node.op_type not in KEEPING or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return value.dtype


# -- two in a row ---------------------------------------------------------------------------------------------------
def _read_past(graph: ir.Graph, node: ir.Node, known: Known) -> bool:
    """Let a Reshape or Transpose do what the one just before it did as well; that one goes where nobody else reads."""
    inner = made_by(node.inputs[0], node.op_type) if node.op_type in ("Reshape", "Transpose") else None
    if (
        inner is None
        or inner.inputs[0] is None
        or only_reader(inner.outputs[0]) is not node
        or inner.graph is not graph
    ):
        return False
    if node.op_type == "Reshape":
        if not _reaches_past(node, inner, known):
            return False
    else:
        first, second = attribute(inner, "perm", None), attribute(node, "perm", None)
        if first is None or second is None:
            return False
        node.attributes["perm"] = ir.AttrInt64s("perm", [first[i] for i in second])
    node.replace_input_with(0, inner.inputs[0])
    graph.remove(inner, safe=True)
    return True


def _reaches_past(node: ir.Node, inner: ir.Node, known: Known) -> bool:
    """Whether the target of a Reshape means the same for what the one before it reads."""
    target = integers(node.inputs[1])
    shapes = [known.get(value) for value in (inner.inputs[0], inner.outputs[0]) if value is not None]
    if target is None or attribute(node, "allowzero", 0):
        return False
    copied = [i for i, size in enumerate(target) if size == 0]
    return all(
        all(shape is not None and i < len(shape) for shape in shapes) and shapes[0][i] == shapes[1][i]  # type: ignore[index]
        for i in copied
    )
