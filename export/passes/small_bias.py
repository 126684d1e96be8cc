"""The bias behind a product of few bits goes into it: the sixth input of MatMulNBits.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
onnxruntime does so itself for a plain Add, but not where `long_sum` joined a bias and a residual. On CUDA it takes one
since 1.28.
"""

from __future__ import annotations

import onnx_ir as ir

from .matching import CONTRIB, either_way, is_vector, only_reader, replace

BIAS = 5  # its place among the inputs: x, weights, scales, zeros, order, bias


def run(model: ir.Model) -> int:
    """Fires for each product of few bits that is read by one Add or Sum with a constant (columns,)."""
    return sum(_take(node) for node in list(model.graph) if node.op_type == "MatMulNBits" and node.domain == CONTRIB)


def _take(product: ir.Node) -> bool:
    reader = only_reader(product.outputs[0])
    if reader is None or reader.domain or len(product.inputs) > BIAS:
        return False
    if reader.op_type == "Add":
        return _take_add(product, reader)
    return reader.op_type == "Sum" and _take_sum(product, reader)


def _take_add(product: ir.Node, add: ir.Node) -> bool:
    bias = next((other for value, other in either_way(add) if value is product.outputs[0]), None)
    if not is_vector(bias, product.attributes["N"].as_int()):
        return False
    biased = _biased(product, bias)
    replace([product, add], biased, {add.outputs[0]: biased.outputs[0]}, after=add)
    return True


def _take_sum(product: ir.Node, added: ir.Node) -> bool:
    rest = list(added.inputs)
    at = next((i for i, value in enumerate(rest) if is_vector(value, product.attributes["N"].as_int())), None)
    if at is None or len(rest) < 3 or rest.count(product.outputs[0]) > 1:
        return False
    biased = _biased(product, rest.pop(at))
    rest = [biased.outputs[0] if value is product.outputs[0] else value for value in rest]
    summed = ir.node("Add" if len(rest) == 2 else "Sum", rest, name=added.name)
    replace([], summed, {added.outputs[0]: summed.outputs[0]}, after=added)
    replace([product, added], biased, {product.outputs[0]: biased.outputs[0]}, after=product)
    return True


def _biased(product: ir.Node, bias: ir.Value | None) -> ir.Node:
    inputs = [*product.inputs, *[None] * (BIAS - len(product.inputs)), bias]
    attributes = {name: attribute.value for name, attribute in product.attributes.items()}
    return ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB, name=product.name)
