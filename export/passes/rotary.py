"""Rotary positions into GroupQueryAttention, which turns queries and keys while it moves the heads apart.

What stands between the products and the operator is read by its values (`rotation.py`). The operator knows where the
new positions of a row begin: behind what it holds already. A cache that may forget what lies behind a window holds less
than that, so an operator with a window is given the positions.

The operator takes heads of 16 n features of which the first 16 m turn, and one rotation for queries and keys. Any other
rotation becomes com.microsoft.RotaryEmbedding: one node in place of about ten.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .matching import CONTRIB, SHARED
from .rotation import LAYOUTS, Reader, Rotation
from .stretch import POSITIONS, Array, Stretch, Walk

QUERY, KEY, PAST_KEY, COS, SIN, POSITION = 0, 1, 3, 7, 8, 9  # inputs of com.microsoft.GroupQueryAttention
MULTIPLE = 16  # of features, in a head and among those that turn


@dataclass(frozen=True)
class Turned:
    """A query or key that is turned on its way, and the nearest value before that."""

    stretch: Stretch
    layout: str
    heads: int
    rotation: Rotation


def run(model: ir.Model) -> int:
    """Fires for each attention whose queries and keys are turned by their positions, both or one of them."""
    return _Rotary(model.graph).run()


class _Rotary:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.positions = next((value for value in graph.inputs if value.name == POSITIONS), None)
        self.walk = Walk(graph)
        self.read: dict[Any, Rotation | None] = {}  # by what a stretch does and how its source lies
        self.caches: dict[Any, ir.Value] = {}

    def run(self) -> int:
        if self.positions is None:
            return 0
        return sum(self._fold(node) for node in list(self.graph) if node.op_type == "GroupQueryAttention")

    def _fold(self, node: ir.Node) -> bool:
        turned = {i: found for i in (QUERY, KEY) if (found := self._turned(node, i)) is not None}
        if not turned:
            return False
        if self._takes(node, turned):
            self._into_operator(node, turned)
        else:
            for i, found in turned.items():
                self._before_operator(node, i, found)
        for found in turned.values():
            found.stretch.remove()
        return True

    def _turned(self, node: ir.Node, i: int) -> Turned | None:
        value, past = node.inputs[i], node.inputs[PAST_KEY]
        if value is None or past is None or len(value.uses()) > 1 or value.is_graph_output():
            return None
        heads = node.attributes["num_heads" if i == QUERY else "kv_num_heads"].as_int()
        size = _head_size(self.graph, past)
        if size is None or "do_rotary" in node.attributes:
            return None
        nearest = None
        for stretch in self.walk.back(value):
            if not stretch.tables:
                continue  # positions come in further back
            if nearest is not None and not _only_moves(nearest.stretch.source):
                break
            found = self._reading(stretch, heads, size)
            if nearest is not None and (found is None or not found.rotation.same(nearest.rotation)):
                break
            nearest = found
            if nearest is not None and nearest.layout == "rows":
                break
        return nearest

    def _reading(self, stretch: Stretch, heads: int, size: int) -> Turned | None:
        signature = stretch.signature()
        for layout in LAYOUTS:
            key = (signature, layout, heads, size)
            if key not in self.read:
                length = min(int(table.const_value.shape.numpy()[0]) for table in stretch.tables)  # type: ignore[union-attr]
                self.read[key] = Reader(stretch, layout, heads, size, length).read()
            if (rotation := self.read[key]) is not None:
                return Turned(stretch, layout, heads, rotation)
        return None

    # -- what it becomes ----------------------------------------------------------------------------------------
    def _takes(self, node: ir.Node, turned: dict[int, Turned]) -> bool:
        """Whether the operator itself can turn these."""
        past = node.inputs[PAST_KEY]
        if len(turned) < 2 or past is None or past.producer() is not None:  # it only reads what another wrote
            return False
        query, key = turned[QUERY].rotation, turned[KEY].rotation
        size = _head_size(self.graph, past)
        return query.same(key) and query.dims % MULTIPLE == 0 and size is not None and size % MULTIPLE == 0

    def _into_operator(self, node: ir.Node, turned: dict[int, Turned]) -> None:
        rotation = turned[QUERY].rotation
        for i, found in turned.items():
            node.replace_input_with(i, self._rows(found, node))
        windowed = "local_window_size" in node.attributes
        node.resize_inputs(max(len(node.inputs), POSITION + 1 if windowed else SIN + 1))
        node.replace_input_with(COS, self._cache(rotation.cos, "cos"))
        node.replace_input_with(SIN, self._cache(rotation.sin, "sin"))
        if windowed:
            node.replace_input_with(POSITION, self.positions)
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", int(rotation.interleaved))

    def _before_operator(self, node: ir.Node, i: int, found: Turned) -> None:
        """Source: com.microsoft.RotaryEmbedding, ContribOperators.md."""
        rotation, past = found.rotation, node.inputs[PAST_KEY]
        assert past is not None
        partial = rotation.dims != _head_size(self.graph, past)
        tables = self._cache(rotation.cos, "cos"), self._cache(rotation.sin, "sin")
        attributes = {
            "interleaved": int(rotation.interleaved),
            "num_heads": found.heads,
            "rotary_embedding_dim": rotation.dims if partial else 0,
        }
        turn = ir.node(
            "RotaryEmbedding", [self._rows(found, node), self.positions, *tables], attributes,
            domain=CONTRIB, name=f"{node.name}.{'query' if i == QUERY else 'key'}",
        )  # fmt: skip
        self._insert(turn, node)
        node.replace_input_with(i, turn.outputs[0])

    def _rows(self, found: Turned, before: ir.Node) -> ir.Value:
        """(batch, seq, heads * size)"""
        value = found.stretch.source
        if found.layout == "heads first":
            value = self._insert(
                ir.node("Transpose", [value], {"perm": [0, 2, 1, 3]}, name=f"{value.name}.moved"), before
            )
        if found.layout != "rows" or self.walk.ranks.get(value) != 3:
            shape = self._constant(np.array([0, 0, -1]), "rotary_rows")
            value = self._insert(ir.node("Reshape", [value, shape], name=f"{value.name}.rows"), before)
        return value

    def _insert(self, node: ir.Node, before: ir.Node) -> ir.Value:
        node.outputs[0].name = node.name
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _cache(self, table: Array, name: str) -> ir.Value:
        """A table as an initializer that all layers with the same rotation share."""
        return self._constant(table, f"rotary_{name}")

    def _constant(self, array: Array, stem: str) -> ir.Value:
        key = (stem, array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        if key not in self.caches:
            name = f"{stem}_{len(self.caches)}"
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
            value.meta[SHARED] = key
            self.graph.initializers[name] = self.caches[key] = value
        return self.caches[key]


def _head_size(graph: ir.Graph, past: ir.Value) -> int | None:
    """The last size of the cache that attention reads, its own or another's."""
    producer, seen = past.producer(), 0
    while producer is not None and seen < 4:
        found = next((v for v in producer.inputs if v is not None and v in graph.inputs), None)
        if found is None:
            return None
        past, producer, seen = found, found.producer(), seen + 1
    size = past.shape[-1] if past.shape is not None and len(past.shape) == 4 else None
    return size if isinstance(size, int) else None


def _only_moves(value: ir.Value) -> bool:
    """Whether a value is another one in another shape."""
    node = value.producer()
    return node is not None and node.op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")
