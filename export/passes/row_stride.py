"""Rows that lie a multiple of 4096 bytes apart evict each other from the first cache: widen them by one line.

A product reads 12 rows of its left operand side by side. Where their distance is a multiple of 4096 bytes all of them
fall into one set of 8 lines: 1024, 2048, 3072 and 4096 float32 columns run at 100 GFLOPS, with 16 more at 111, and 512,
1536 and 2560 do so as they are (one thread of an AMD EPYC 9004, 512 rows). So the inner width of a feed-forward block
gets 16 columns of zeros more, which the next weight's rows of zeros ignore: 47.9 to 44.3 ms for 3072 to 768 over 8 x
128 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .matching import SHARED

STRIDE, MORE = 1024, 16  # float32: a page of 4096 bytes, a cache line of 64
# Finite for zeros, and each column by itself.
ELEMENTWISE = {
    "Add", "Sub", "Mul", "Neg", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Relu", "Elu", "LeakyRelu", "Selu", "Celu",
    "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Swish", "Tanh", "Erf", "Softplus", "Softsign",
}  # fmt: skip


@dataclass
class Block:
    """What lies between the products that make a wide value and the one that reads it."""

    nodes: set[ir.Node] = field(default_factory=set)
    sources: list[ir.Node] = field(default_factory=list)  # MatMul(x, (k, width))
    vectors: list[tuple[ir.Node, int]] = field(default_factory=list)  # operands (width,)


def run(model: ir.Model) -> int:
    """Fires for each product whose left operand is made by products and elementwise operations and read by it alone."""
    return _Widening(model.graph).run()


class _Widening:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.wide: dict[tuple[ir.Value, int], ir.Value] = {}  # a weight that several products read is widened once

    def run(self) -> int:
        fired = 0
        for node in list(self.graph):
            width = _matrix(node, axis=0)
            if width is None or width % STRIDE or node.inputs[0] is None:
                continue
            block = Block()
            if _collect(node.inputs[0], width, block) and block.sources and _is_closed(block, node):
                self._widen(node, block)
                fired += 1
        return fired

    def _widen(self, node: ir.Node, block: Block) -> None:
        self._replace(node, 1, axis=0)
        for source in block.sources:
            self._replace(source, 1, axis=1)
        for reader, i in block.vectors:
            self._replace(reader, i, axis=0)
        for inner in block.nodes:
            for value in inner.outputs:
                value.shape = None

    def _replace(self, node: ir.Node, i: int, axis: int) -> None:
        value = node.inputs[i]
        assert value is not None
        if (value, axis) not in self.wide:
            self.wide[value, axis] = self._widened(value, axis)
        node.replace_input_with(i, self.wide[value, axis])

    def _widened(self, value: ir.Value, axis: int) -> ir.Value:
        """The initializer with zeros behind it, made when it is written."""
        tensor = value.const_value
        assert tensor is not None
        sizes = [int(n) for n in tensor.shape.numpy()]
        margins = [(0, MORE if i == axis else 0) for i in range(len(sizes))]
        shape = ir.Shape([n + after for n, (_, after) in zip(sizes, margins)])
        name = f"{value.name}.wide{axis}"
        made = ir.LazyTensor(lambda: ir.tensor(np.pad(tensor.numpy(), margins)), tensor.dtype, shape, name=name)
        new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=made)
        if SHARED in value.meta:  # widened in two graphs of a folder it is still one tensor
            new.meta[SHARED] = (value.meta[SHARED], "wide", axis)
        self.graph.initializers[name] = new
        return new


def _matrix(node: ir.Node, axis: int) -> int | None:
    """A size of the constant matrix that a product multiplies by."""
    value = node.inputs[1] if node.op_type == "MatMul" else None
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT or len(tensor.shape) != 2:
        return None
    return int(tensor.shape.numpy()[axis])


def _collect(value: ir.Value, width: int, block: Block) -> bool:
    """Walk back to the products; False where something else is met."""
    node = value.producer()
    if node is None or node in block.nodes:
        return node is not None
    block.nodes.add(node)
    if _matrix(node, axis=1) == width:
        block.sources.append(node)
        return True
    if node.op_type not in ELEMENTWISE:
        return False
    return all(_operand(node, i, width, block) for i, v in enumerate(node.inputs) if v is not None)


def _operand(node: ir.Node, i: int, width: int, block: Block) -> bool:
    """A number, a constant (width,), or another value of the block."""
    value = node.inputs[i]
    assert value is not None
    if (tensor := value.const_value) is None:
        return _collect(value, width, block)
    if tensor.size == 1:
        return len(tensor.shape) <= 1
    if list(tensor.shape.numpy()) == [width] and tensor.dtype is ir.DataType.FLOAT:
        block.vectors.append((node, i))
        return True
    return False


def _is_closed(block: Block, reader: ir.Node) -> bool:
    """Whether nobody else sees the width of what is inside."""
    values = [value for node in block.nodes for value in node.outputs]
    readers = {use.node for value in values for use in value.uses()}
    return readers <= {*block.nodes, reader} and not any(value.is_graph_output() for value in values)
