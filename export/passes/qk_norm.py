"""Query, key and value by one product where queries and keys are normalised by head: one norm for both, then apart.

With the norm between, GroupQueryAttention cannot take the product as it is, as `packed_qkv` has it. The weight of the
norm is (num_heads + num_kv_heads, head_dim) then, a row for each head, which onnxruntime takes on a CPU. Of nine nodes
six remain: Qwen3's layer has 15 instead of 18.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .matching import attribute, integers, is_vector, made_by, only_reader
from .packed_qkv import PAST_KEY, Side, is_closed, joined_product, remove, side_of
from .stretch import Walk

NORM = "SimplifiedLayerNormalization"


@dataclass(frozen=True)
class Normed:
    """A side of attention, normalised by head: its nodes from the attention's input back, and what goes into them."""

    rows: ir.Node
    norm: ir.Node
    heads: ir.Node
    source: ir.Value  # (batch, seq, heads * head_dim)

    @property
    def settings(self) -> tuple[float, int]:
        """Equal for two norms that one node can do."""
        return attribute(self.norm, "epsilon", 1e-5), attribute(self.norm, "stash_type", 1)

    @property
    def weight(self) -> np.ndarray:
        """(head_dim,)"""
        assert self.norm.inputs[1] is not None
        assert self.norm.inputs[1].const_value is not None
        return self.norm.inputs[1].const_value.numpy()


def run(model: ir.Model) -> int:
    """Fires for each attention whose queries and keys are normalised and whose sides are products of one value."""
    graph, made, walk = model.graph, dict[Any, ir.Value](), Walk(model.graph)
    return sum(_pack(graph, walk, node, made) for node in list(graph) if node.op_type == "GroupQueryAttention")


def _pack(graph: ir.Graph, walk: Walk, node: ir.Node, made: dict[Any, ir.Value]) -> bool:
    value, past = node.inputs[2], node.inputs[PAST_KEY]
    if value is None or past is None or past.producer() is not None:
        return False
    normed = [_normed(node.inputs[i], node) for i in (0, 1)]
    q, k = normed
    if q is None or k is None or q.settings != k.settings or q.weight.shape != k.weight.shape:
        return False
    sides = [side_of(walk, source) for source in (q.source, k.source, value)]
    if not all(sides) or len({side.product.factor for side in sides if side}) > 1:
        return False
    known: list[Side] = [side for side in sides if side is not None]
    if not is_closed({node, q.heads, k.heads}, known):
        return False
    packed = joined_product(graph, node, known, made)
    for i, replacement in enumerate(_apart(graph, node, packed, q, k, [len(side.columns) for side in known])):
        node.replace_input_with(i, replacement)
    for old in (q.rows, k.rows, q.norm, k.norm, q.heads, k.heads):
        if not old.outputs[0].uses():
            graph.remove(old, safe=True)
    remove(graph, walk, known)
    return True


def _normed(rows_value: ir.Value | None, reader: ir.Node) -> Normed | None:
    """heads, norm, rows: (batch, seq, heads * head_dim) -> (batch, seq, heads, head_dim) -> itself -> and back."""
    rows = made_by(rows_value, "Reshape")
    norm = made_by(rows.inputs[0], NORM) if rows is not None else None
    heads = made_by(norm.inputs[0], "Reshape") if norm is not None else None
    if rows is None or norm is None or heads is None or heads.inputs[0] is None:
        return None
    split, flat = integers(heads.inputs[1]), integers(rows.inputs[1])
    if split is None or len(split) != 4 or flat is None or len(flat) != 3:
        return None
    plain = attribute(norm, "axis", -1) in (-1, 3) and is_vector(norm.inputs[1], split[-1]) and len(norm.outputs) == 1
    alone = [only_reader(n.outputs[0]) for n in (rows, norm, heads)] == [reader, rows, norm]
    return Normed(rows, norm, heads, heads.inputs[0]) if plain and alone else None


def _apart(
    graph: ir.Graph, node: ir.Node, packed: ir.Value, q: Normed, k: Normed, widths: list[int]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values (batch, seq, widths) of their product, the first two normalised together."""
    size, name = q.weight.shape[0], f"{node.name}.qk"
    by_head = [np.tile(side.weight, (width // size, 1)) for side, width in zip((q, k), widths)]
    weight = _constant(graph, f"{name}.weight", np.concatenate(by_head))  # (num_heads + num_kv_heads, head_dim)

    def op(op_type: str, value: ir.Value, operand: ir.Value, outputs: int = 1, **attributes: Any) -> ir.Node:
        made = ir.node(op_type, [value, operand], attributes, num_outputs=outputs, name=f"{name}.{op_type}")
        made.name = f"{made.name}.{len(nodes)}"
        nodes.append(made)
        for i, output in enumerate(made.outputs):
            output.name = f"{made.name}.{i}"
        return made

    nodes: list[ir.Node] = []
    qk_width = sum(widths[:2])
    both = op("Split", packed, _constant(graph, f"{name}.both", np.array([qk_width, widths[2]])), 2, axis=-1)
    heads = op("Reshape", both.outputs[0], _constant(graph, f"{name}.heads", np.array([0, 0, qk_width // size, size])))
    epsilon, stash = q.settings
    norm = op(NORM, heads.outputs[0], weight, axis=-1, epsilon=epsilon, stash_type=stash)
    rows = op("Reshape", norm.outputs[0], _constant(graph, f"{name}.rows", np.array([0, 0, qk_width])))
    each = op("Split", rows.outputs[0], _constant(graph, f"{name}.each", np.array(widths[:2])), 2, axis=-1)
    graph.insert_before(node, nodes)
    return each.outputs[0], each.outputs[1], both.outputs[1]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.initializers[name] = value
    return value
