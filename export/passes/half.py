"""Weights, cache and most of the computation in float16 or bfloat16; norms and softmax stay in float32.

A sum of squares leaves float16's range at values of a few hundred, so what belongs to a norm (squares, means, roots and
the products with them) and every softmax is computed in float32, with a Cast on each way in. Logits stay float32. What
is known to make or read values that float16 does not hold stays float32 as well; bfloat16 holds what float32 does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

WIDE = {
    "ReduceMean",
    "ReduceSum",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "Sqrt",
    "Reciprocal",
    "Softmax",
    "LogSoftmax",
    "Exp",
    "Log",
    "Pow",
    "Scan",  # with its body as it is: a state adds up small numbers
    "LSTM",  # onnxruntime has these for float32 alone on a CPU
    "GRU",
    "RNN",
}
# What ONNX does not define for bfloat16 at opset 21.
NO_BFLOAT16 = {"Einsum", "Softplus", "Elu", "HardSwish", "Mish", "Round", "Sin", "Cos", "Selu", "HardSigmoid", "Atan"}
SCALING = {"Mul", "Div"}  # with a wide operand they stay wide: the norm's own product and its weight
SHIFTING = {"Add", "Sub", "Max", "Min", "Clip"}  # of wide operands and constants: an epsilon, a bias, a difference
TRUTHS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN"}
GIVES_TYPE = {"Where": 1, "GatherBlockQuantized": 2}  # which operand has the type of the result, where not the first
NUMPY: dict[ir.DataType, npt.DTypeLike] = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}


def run(model: ir.Model, dtype: ir.DataType, large: Collection[str] = ()) -> int:
    """Convert in place; returns how many initializers became `dtype`. large: names of values that stay float32."""
    return convert(model, dtype, large).narrow


@dataclass(frozen=True)
class Converted:
    """How many initializers became narrow, and how many operators stayed float32 for the size of their values alone."""

    narrow: int
    kept: int


def convert(model: ir.Model, dtype: ir.DataType, large: Collection[str] = ()) -> Converted:
    """As `run`, told in full."""
    conversion = _Conversion(model.graph, dtype, frozenset(large))
    return Converted(conversion.run(), conversion.kept)


def stays(node: ir.Node) -> bool:
    """Whether a node is converted whatever its values are: a cache has one width, and so has its attention."""
    cached = any(value.is_graph_output() and value.name != "logits" for value in node.outputs)
    return cached or node.op_type == "GroupQueryAttention"


def _touches(node: ir.Node, large: Collection[str]) -> bool:
    """Whether a node makes or reads one of the values `large`."""
    return any(value is not None and value.name in large for value in (*node.inputs, *node.outputs))


class _Conversion:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType, large: frozenset[str]) -> None:
        self.graph, self.dtype, self.large, self.kept = graph, dtype, large, 0
        self.types: dict[ir.Value, ir.DataType] = {}
        self.narrow: dict[ir.Value, ir.Value] = {}  # initializers in `dtype`
        self.casts: dict[tuple[ir.Value, ir.DataType, object], ir.Value] = {}  # by the graph that they stand in

    def run(self) -> int:
        outputs = list(self.graph.outputs)
        for value in (*self.graph.inputs, *self.graph.initializers.values()):
            self.types[value] = self._declared(value)
        for value in self.graph.inputs:
            if self._declared(value) is ir.DataType.FLOAT:
                value.dtype = self.types[value] = self.dtype
        for node in list(self.graph):
            self._convert(node)
        for value in outputs:
            if value.name == "logits":
                self._widen_output(value)
            else:
                value.dtype = self.types[value]
        for value in list(self.graph.initializers.values()):
            if value in self.narrow and not value.uses():
                del self.graph.initializers[str(value.name)]
        return len(self.narrow)

    @staticmethod
    def _declared(value: ir.Value) -> ir.DataType:
        assert value.dtype is not None, value
        return value.dtype

    def _convert(self, node: ir.Node) -> None:
        if node.op_type == "If":
            return self._convert_branches(node)
        floats = [v for v in node.inputs if v is not None and self.types[v] in (ir.DataType.FLOAT, self.dtype)]
        wide = bool(floats) and (self._is_wide(node) or self._is_kept(node))
        wanted = ir.DataType.FLOAT if wide else self.dtype
        if node.op_type != "Cast":
            for i, value in enumerate(node.inputs):
                if (value in floats and value is not None and self.types[value] is not wanted) or (
                    value in floats and value.const_value is not None
                ):
                    node.replace_input_with(i, self._as(value, wanted, node))  # type: ignore[arg-type]
        elif node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))
        for output in node.outputs:
            self.types[output] = self._type_of(node, wanted)
        return None

    def _convert_branches(self, node: ir.Node) -> None:
        """Convert what an `If` chooses from: both of its graphs end in values of the same types."""
        for attribute in node.attributes.values():
            branch = attribute.as_graph()
            for inner in list(branch):
                self._convert(inner)
            for outer, value in zip(node.outputs, branch.outputs):
                value.dtype = self.types[outer] = self.types[value]

    def _is_wide(self, node: ir.Node) -> bool:
        if node.op_type in NO_BFLOAT16 and self.dtype is ir.DataType.BFLOAT16:
            return True
        if node.op_type in WIDE or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1]):
            return True
        moving = [v for v in node.inputs if v is not None and v.const_value is None]
        wide = [v.producer() is not None and self.types[v] is ir.DataType.FLOAT for v in moving]
        return (node.op_type in SCALING and any(wide)) or (node.op_type in SHIFTING and all(wide))

    def _is_kept(self, node: ir.Node) -> bool:
        """Whether a node stays float32 for its values: of a large one, who makes it and who reads it."""
        kept = bool(self.large) and _touches(node, self.large) and not stays(node)
        self.kept += kept and node.op_type != "Cast"
        return kept

    def _type_of(self, node: ir.Node, wanted: ir.DataType) -> ir.DataType:
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type in TRUTHS:
            return ir.DataType.BOOL
        if node.op_type == "Shape":
            return ir.DataType.INT64
        source = node.inputs[GIVES_TYPE.get(node.op_type, 0)]
        assert source is not None
        return wanted if self.types[source] in (ir.DataType.FLOAT, self.dtype) else self.types[source]

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` in `dtype`: an initializer is converted, anything else is cast once."""
        if value.const_value is not None:
            return value if dtype is ir.DataType.FLOAT else self._narrowed(value)
        if self.types[value] is dtype:
            return value
        graph = before.graph
        assert graph is not None
        if (value, dtype, graph) not in self.casts:
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_as_{dtype.name.lower()}")
            graph.insert_before(before, node)
            self.casts[value, dtype, graph] = node.outputs[0]
            self.types[node.outputs[0]] = dtype
        return self.casts[value, dtype, graph]

    def _narrowed(self, value: ir.Value) -> ir.Value:
        if value not in self.narrow:
            tensor, shape = value.const_value, value.shape
            assert tensor is not None
            assert shape is not None
            name = f"{value.name}_{self.dtype.name.lower()}"
            made = ir.LazyTensor(narrowing(tensor, self.dtype), dtype=self.dtype, shape=shape, name=name)
            new = ir.Value(name=name, type=ir.TensorType(self.dtype), shape=shape, const_value=made)
            self.graph.initializers[name] = new
            self.narrow[value], self.types[new] = new, self.dtype
        return self.narrow[value]

    def _widen_output(self, value: ir.Value) -> None:
        node = value.producer()
        if self.types[value] is ir.DataType.FLOAT or node is None:
            return
        inner = ir.Value(name="logits_narrow", type=ir.TensorType(self.dtype))
        cast = ir.node("Cast", [inner], {"to": int(ir.DataType.FLOAT)}, name="logits_cast", outputs=[value_like(value)])
        at = list(self.graph.outputs).index(value)
        value.name = "logits_narrow"
        cast.replace_input_with(0, value)
        value.dtype = self.dtype
        self.graph.append(cast)
        self.graph.outputs[at] = cast.outputs[0]


def value_like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)


def narrowing(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Callable[[], ir.TensorProtocol]:
    """Make the narrow tensor when it is written; finite values stay finite."""

    def make() -> ir.TensorProtocol:
        array = tensor.numpy()
        if dtype is ir.DataType.FLOAT16:
            largest = np.finfo(np.float16).max
            array = np.where(np.isfinite(array), np.clip(array, -largest, largest), array)
        return ir.Tensor(array.astype(NUMPY[dtype]), dtype=dtype)

    return make
