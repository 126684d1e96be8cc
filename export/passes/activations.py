"""Activations that are spelled out become the operator that computes them, a bias before a tanh GELU goes into it.

onnxruntime fuses some spellings while it loads and not others, and with them everything here costs one pass over the
values: 26.3 to 22.8 us for 16 times the bias and GELU of 1536 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import onnx_ir as ir

from .matching import CONTRIB, attribute, either_way, is_read_within, is_vector, made_by, number, only_reader, replace
from .shapes import infer

Polynomial = dict[int, float]  # the coefficient of each power
# What stands in 0.5 x (1 + f(...)).
INSIDE: dict[str, Polynomial] = {
    "Erf": {1: math.sqrt(0.5)},
    "Tanh": {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715},
}
Match = Callable[[ir.Node], tuple[ir.Node, list[ir.Node]] | None]  # the new node, and the old ones, the result's last
APPROXIMATE = {"Erf": "none", "Tanh": "tanh"}


def run(model: ir.Model) -> int:
    """Fires for each GELU, each product with the own sigmoid, each bias before a tanh GELU."""
    return run_standard(model) + _each(model, _sigmoid_product) + biased(model, "tanh", "FastGelu")


def run_standard(model: ir.Model) -> int:
    """What ONNX has operators for: GELU, from opset 20 on."""
    return _each(model, _spelled_gelu) if model.graph.opset_imports.get("", 0) >= 20 else 0


def biased(model: ir.Model, approximate: str, operator: str) -> int:
    """Put the bias (width,) that is added just before a Gelu of one kind into an operator that takes it."""
    fired, known = 0, infer(model.graph)
    for node in [n for n in model.graph if n.op_type == "Gelu" and not n.domain]:
        add = made_by(node.inputs[0], "Add")
        if attribute(node, "approximate", "none") != approximate or add is None:
            continue
        for x, bias in either_way(add) if only_reader(add.outputs[0]) is node else ():
            shape = known.get(x) if x is not None else None
            if shape is not None and len(shape) > 1 and is_vector(bias, shape[-1]):
                new = ir.node(operator, [x, bias], domain=CONTRIB, name=f"{node.name}.biased")
                replace([add, node], new, {node.outputs[0]: new.outputs[0]}, after=node)
                known[new.outputs[0]] = shape
                fired += 1
                break
    return fired


def _each(model: ir.Model, match: Match) -> int:
    fired = 0
    for node in list(model.graph):
        found = match(node) if node.graph is model.graph else None
        if found is not None:
            new, old = found
            replace(old, new, {old[-1].outputs[0]: new.outputs[0]}, after=old[-1])
            fired += 1
    return fired


# -- x * sigmoid(alpha * x) -----------------------------------------------------------------------------------------
def _sigmoid_product(node: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    if node.op_type != "Sigmoid" or (product := only_reader(node.outputs[0])) is None or product.op_type != "Mul":
        return None
    for x, gate in either_way(product):
        if gate is not node.outputs[0] or x is gate:
            continue
        inner = made_by(node.inputs[0], "Mul")
        for value, factor in either_way(inner) if inner is not None else ():
            alpha = number(factor)
            if value is x and alpha is not None and inner is not None and only_reader(inner.outputs[0]) is node:
                return _quick(x, alpha, product), [inner, node, product]
        if node.inputs[0] is x:
            return _quick(x, 1.0, product), [node, product]
    return None


def _quick(x: ir.Value | None, alpha: float, product: ir.Node) -> ir.Node:
    return ir.node("QuickGelu", [x], {"alpha": alpha}, domain=CONTRIB, name=f"{product.name}.silu")


# -- 0.5 x (1 + f(polynomial of x)) ---------------------------------------------------------------------------------
def _spelled_gelu(node: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """From the Erf or Tanh up to the last product; what is multiplied with there says what x is."""
    one_more = only_reader(node.outputs[0]) if node.op_type in INSIDE else None
    if one_more is None or one_more.op_type != "Add" or not any(number(value) == 1 for value in one_more.inputs):
        return None
    for last, chain in _products(one_more, []):
        for x, factors in _factors(last, chain, one_more):
            inner: list[ir.Node] = []
            if not _near(_polynomial(node.inputs[0], x, inner), INSIDE[node.op_type]):
                continue
            old = [*inner, node, one_more, *factors]
            if all(is_read_within(value, old) for n in old[:-1] for value in n.outputs):
                new = ir.node("Gelu", [x], {"approximate": APPROXIMATE[node.op_type]}, name=f"{last.name}.gelu")
                return new, old
    return None


def _products(node: ir.Node, chain: list[ir.Node]) -> Iterator[tuple[ir.Node, list[ir.Node]]]:
    """The one or two products above a node, each with those before it."""
    above = only_reader(node.outputs[0])
    if above is not None and above.op_type in ("Mul", "Div") and len(chain) < 2:
        yield above, [*chain, above]
        yield from _products(above, [*chain, above])


def _factors(last: ir.Node, chain: list[ir.Node], one_more: ir.Node) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
    """Every x of which a chain of products, `one_more` aside, is the half; with the nodes in between, `last` last."""
    operands: list[ir.Value] = []
    scale, below = 1.0, one_more
    for node in chain:
        i = 1 if node.inputs[0] is below.outputs[0] else 0
        other, below = node.inputs[i], node
        factor = number(other)
        if factor and (node.op_type == "Mul" or i == 1):
            scale *= factor if node.op_type == "Mul" else 1 / factor
        elif other is not None and node.op_type == "Mul":
            operands.append(other)
        else:
            return
    if len(operands) != 1:
        return
    if math.isclose(scale, 0.5):
        yield operands[0], chain
    half = made_by(operands[0], "Mul", "Div")
    for x, constant in either_way(half) if half is not None and scale == 1 else ():
        wanted = 0.5 if half is not None and half.op_type == "Mul" else 2
        if half is not None and x is not None and number(constant) == wanted and (wanted == 0.5 or x is half.inputs[0]):
            yield x, [half, *chain]


def _polynomial(value: ir.Value | None, x: ir.Value, inner: list[ir.Node]) -> Polynomial:
    """The polynomial of x that a value is, empty where it is none; `inner` gets the nodes that compute it."""
    if value is x:
        return {1: 1.0}
    if (constant := number(value)) is not None:
        return {0: constant}
    if (node := made_by(value, "Add", "Mul", "Div", "Pow")) is None:
        return {}
    left, right = (_polynomial(operand, x, inner) for operand in node.inputs)
    inner[:] = [*inner, *([] if node in inner else [node])]
    if not left or not right:
        return {}
    if node.op_type == "Add":
        return {power: left.get(power, 0) + right.get(power, 0) for power in {*left, *right}}
    if node.op_type == "Mul":
        return _times(left, right)
    if right.keys() != {0}:
        return {}
    if node.op_type == "Div":
        return {power: factor / right[0] for power, factor in left.items()}
    return _times(left, _times(left, left)) if right[0] == 3 else _times(left, left) if right[0] == 2 else {}


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for i, a in left.items():
        for j, b in right.items():
            product[i + j] = product.get(i + j, 0) + a * b
    return product


def _near(found: Polynomial, wanted: Polynomial) -> bool:
    """Whether two polynomials are one up to the digits that people write."""
    found = {power: factor for power, factor in found.items() if factor}
    return found.keys() == wanted.keys() and all(math.isclose(found[p], wanted[p], rel_tol=1e-5) for p in wanted)
