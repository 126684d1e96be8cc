"""Products of whole numbers: a scale for each channel of the weights, and one for each row that they multiply.

com.microsoft.MatMulIntegerToFloat multiplies bytes with signed bytes and sums up whole numbers over all of a row, where
MatMulNBits goes back to float32 at the end of each block. A row's scale comes from its own largest number alone, so
what is computed of it never depends on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .blocks import Blocks
from .matching import CONTRIB, replace

# Of a weight, stored in 8. Processors without VNNI add two products of bytes in 16 bits, which hold 2 x 255 x 64.
BITS = 7
MIDDLE = 1 << (BITS - 1)
LEVELS = 127  # of a row's numbers to each side of zero, which is byte 128


def operands(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """What the operator reads, of a matrix whose blocks are whole columns: int8 (k, n), float32 scales (n,)."""
    numbers = blocks.data.reshape(len(blocks.data), -1).astype(np.int16) - MIDDLE
    return np.ascontiguousarray(numbers.astype(np.int8).T), blocks.scales[:, 0]


def put(graph: ir.Graph, product: ir.Node, data: ir.Value, scales: ir.Value, constants: dict[str, ir.Value]) -> None:
    """Multiply by whole numbers in place of `product`.

    constants: `step` 1 / 127 and `middle` 128, with which rows are rounded, and `last`, the axis. Of a row of zeros the
    largest is 0, and 0 / 0 becomes some byte: its product is multiplied by 0 again.
    """
    x = product.inputs[0]
    assert x is not None
    sizes = ir.node("Abs", [x])
    most = ir.node("ReduceMax", [sizes.outputs[0], constants["last"]], {"keepdims": 1})  # (batch, seq, 1)
    shares = ir.node("Div", [x, most.outputs[0]])
    rounded = ir.node("QuantizeLinear", [shares.outputs[0], constants["step"], constants["middle"]])  # (batch, seq, k)
    given = [rounded.outputs[0], data, constants["step"], scales, constants["middle"]]
    summed = ir.node("MatMulIntegerToFloat", given, domain=CONTRIB)  # (batch, seq, n)
    for node in (sizes, most, shares, summed):
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    rounded.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    for node in (sizes, most, shares, rounded, summed):
        graph.insert_before(product, node)
    graph.opset_imports.setdefault(CONTRIB, 1)
    scaled = ir.node("Mul", [summed.outputs[0], most.outputs[0]], name=product.name)
    replace([product], scaled, {product.outputs[0]: scaled.outputs[0]}, product)
