"""What lies between one value of a graph and another, run by itself on made-up inputs: it is read by what it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

Array = npt.NDArray[Any]
POSITIONS, IDS = "position_ids", "input_ids"  # inputs of a graph: of the latter only the sizes may matter
MOST_NODES, MOST_BYTES = 64, 1 << 20  # of a stretch, of one constant matrix in it that is multiplied by
# Their result has as many axes as the operand that has most of them.
KEEP_RANK = {
    "MatMul", "FusedMatMul", "Add", "Sub", "Mul", "Div", "Neg", "Cast", "Identity", "Sigmoid", "Tanh", "Gelu", "Relu",
    "Sqrt", "Reciprocal", "Pow", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "FastGelu", "BiasGelu", "QuickGelu",
}  # fmt: skip
# As many as the first operand.
KEEP_FIRST = {"GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding", "Slice", "Split", "Concat"}
QUIET = 4  # onnxruntime's log level: what cannot be run is no error here


@dataclass(frozen=True)
class Stretch:
    """The nodes that make `result` of `source`, positions and constants, in order."""

    graph: ir.Graph
    source: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]  # that read the source, directly or not
    fixed: tuple[ir.Node, ...]  # that give them tables and sizes
    _sessions: list[ort.InferenceSession | None] = field(default_factory=list)

    @property
    def tables(self) -> list[ir.Value]:
        """The constants of which rows are picked by position."""
        picks = [n for n in self.fixed if n.op_type == "Gather" and n.inputs[1] is not None]
        tables = [n.inputs[0] for n in picks if n.inputs[1].name == POSITIONS and _axis(n) == 0]  # type: ignore[union-attr]
        return [table for table in tables if table is not None and table.const_value is not None]

    @property
    def is_positional(self) -> bool:
        """Whether positions or sizes have a say in it."""
        return bool(self.fixed) or any(v is not None and v.name == POSITIONS for n in self.nodes for v in n.inputs)

    def run(self, source: Array, positions: Array) -> Array | None:
        """`result` for a source and its positions (batch, seq); None where the source cannot have this shape."""
        if not self._sessions:
            self._sessions.append(self._open())
        (session,) = self._sessions
        if session is None:
            return None
        feeds = {"source": source, POSITIONS: positions, IDS: np.zeros_like(positions)}
        wanted = {given.name for given in session.get_inputs()}
        options = ort.RunOptions()
        options.log_severity_level = QUIET
        try:
            (found,) = session.run(None, {name: feeds[name] for name in wanted}, options)
        except Exception:  # onnxruntime's own classes have no base but this one
            return None
        return np.asarray(found)

    def signature(self) -> Any:
        """Equal for two stretches of one graph that do the same with the same constants."""
        names: dict[ir.Value | None, object] = {None: None, self.source: "source"}
        rows: list[Any] = []
        for node in (*self.fixed, *self.nodes):
            names |= {value: (len(rows), i) for i, value in enumerate(node.outputs)}
            attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
            inputs = tuple(names.get(value, id(value)) for value in node.inputs)
            rows.append((node.domain, node.op_type, tuple(attributes), inputs))
        return tuple(rows), names[self.result]

    def remove(self) -> None:
        """Remove the nodes whose results nobody reads any more."""
        for node in reversed(self.nodes):
            if node.graph is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
                self.graph.remove(node, safe=True)

    def _open(self) -> ort.InferenceSession | None:
        made = {self.source: ir.Value(name="source", type=ir.TensorType(ir.DataType.FLOAT))}
        nodes, constants = [], {}
        for node in (*self.fixed, *self.nodes):
            for value in node.inputs:
                if value is not None and value not in made:
                    made[value] = ir.Value(name=value.name, type=value.type, const_value=value.const_value)
                    if value.const_value is not None:
                        constants[str(value.name)] = made[value]
            inputs = [None if value is None else made[value] for value in node.inputs]
            copy = ir.node(
                node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs)
            )
            for old, new in zip(node.outputs, copy.outputs):
                made[old], new.name = new, old.name
            nodes.append(copy)
        result = made[self.result]
        result.type = ir.TensorType(ir.DataType.FLOAT)
        given = [v for v in made.values() if v.producer() is None and v.const_value is None]
        graph = ir.Graph(
            given, [result], nodes=nodes, initializers=list(constants.values()), opset_imports=self.graph.opset_imports
        )
        options = ort.SessionOptions()
        options.log_severity_level = QUIET
        options.intra_op_num_threads = 1
        try:
            data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
            return ort.InferenceSession(data, options, ["CPUExecutionProvider"])
        except Exception:  # as above
            return None


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


class Walk:
    """Walks back through a graph as it is now."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.at = {node: i for i, node in enumerate(graph)}
        self._fixed = {value for value in graph.inputs if value.name == POSITIONS}
        self.ranks: dict[ir.Value, int] = {}
        for node in graph:
            if (found := _rank(node, self.ranks)) is not None:
                self.ranks.update(dict.fromkeys(node.outputs, found))
            sizes = node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].name == IDS
            if sizes or (node.inputs and all(map(self.is_fixed, node.inputs)) and not _has_graphs(node)):
                self._fixed.update(node.outputs)

    def is_fixed(self, value: ir.Value | None) -> bool:
        """Whether a value is a function of positions, sizes and constants alone."""
        return value is None or value.const_value is not None or value in self._fixed

    def back(self, result: ir.Value) -> Iterator[Stretch]:
        """From every value that all of `result` comes through, the nearest first."""
        front, nodes = {result}, list[ir.Node]()
        while front and len(nodes) < MOST_NODES:
            node = max((v.producer() for v in front), key=lambda n: -1 if n is None else self.at.get(n, -1))
            if node is None or node not in self.at or _has_graphs(node) or _is_large(node):
                return
            nodes.append(node)
            front -= set(node.outputs)
            front |= {v for v in node.inputs if v is not None and not self.is_fixed(v)}
            if len(front) == 1:
                inner = tuple(sorted(nodes, key=self.at.__getitem__))
                yield Stretch(self.graph, next(iter(front)), result, inner, self._behind(inner))

    def _behind(self, nodes: tuple[ir.Node, ...]) -> tuple[ir.Node, ...]:
        """The nodes that make the fixed operands of others."""
        found, left = set[ir.Node](), list(nodes)
        while left:
            for value in left.pop().inputs:
                node = value.producer() if value is not None and value in self._fixed else None
                if node is not None and node not in found:
                    found.add(node)
                    if node.op_type != "Shape":
                        left.append(node)
        return tuple(sorted(found, key=self.at.__getitem__))


def _rank(node: ir.Node, ranks: dict[ir.Value, int]) -> int | None:
    """How many axes a node's first result has, where that is easily known."""
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return len(node.attributes["perm"].as_ints())
    if node.op_type == "Reshape":
        shape = node.inputs[1].const_value if node.inputs[1] is not None else None
        return None if shape is None else int(shape.size)
    known = [_known(v, ranks) for v in node.inputs if v is not None]
    if node.op_type in KEEP_FIRST:
        return known[0]
    if None in known:
        return None
    if node.op_type == "Gather":
        return sum(n for n in known if n is not None) - 1
    reduces = node.op_type.startswith("Reduce") and "keepdims" in node.attributes
    if reduces and node.attributes["keepdims"].as_int() == 1:
        return known[0]
    return max((n for n in known if n is not None), default=None) if node.op_type in KEEP_RANK else None


def _known(value: ir.Value, ranks: dict[ir.Value, int]) -> int | None:
    return ranks.get(value) if value.shape is None else len(value.shape)


def _has_graphs(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _is_large(node: ir.Node) -> bool:
    """Whether a node is a product with a weight that nobody would read anything through."""
    tensors = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    return node.op_type in ("MatMul", "Gemm") and any(tensor.nbytes > MOST_BYTES for tensor in tensors)
