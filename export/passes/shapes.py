"""The shapes inside a graph, as far as a pass needs them: how many axes, which sizes are equal, which are numbers.

A size is a number, the name of a graph input's axis, or an object that equals itself alone. ONNX's own inference stops
at the first operator of com.microsoft, which in a decoder is the first attention.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import onnx_ir as ir

from .matching import attribute, integers, made_by

Shape = tuple[Hashable, ...]
Known = dict[ir.Value, Shape]

LIKE_FIRST = {
    "Abs", "BiasGelu", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "CumSum", "Elu", "Erf", "Exp", "FastGelu",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Log",
    "LogSoftmax", "Mish", "Neg", "Not", "QuickGelu", "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding",
    "Round", "Selu", "Sigmoid", "Sign", "SimplifiedLayerNormalization", "Sin", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "TensorScatter",
    "Trilu",
}  # fmt: skip
BROADCAST = {
    "Add", "Sum", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "Where", "And", "Or", "Xor", "Equal", "Less",
    "LessOrEqual", "Greater", "GreaterOrEqual",
}  # fmt: skip


def infer(graph: ir.Graph) -> Known:
    """The shape of every value whose shape can be told, by the rules below or else as the graph declares it."""
    known: Known = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        _declare(value, known)
    for node in graph:
        for value, shape in zip(node.outputs, _shapes(node, known)):
            known[value] = shape
        for value in node.outputs:
            if value not in known:
                _declare(value, known)
    return known


def _declare(value: ir.Value, known: Known) -> None:
    if value.shape is not None:
        sizes = (size if isinstance(size, int) else size.value for size in value.shape)
        known[value] = tuple(object() if size is None else size for size in sizes)


def _shapes(node: ir.Node, known: Known) -> list[Shape]:
    """The shapes of all outputs, or none of them."""
    shapes = [known.get(value) if value is not None else None for value in node.inputs]
    if not shapes or shapes[0] is None:
        return []
    if node.op_type in LIKE_FIRST:
        return [shapes[0]] * len(node.outputs)
    if node.op_type in BROADCAST:
        told = [shape for shape in shapes if shape is not None]
        return [broadcast(*told)] if len(told) == len(shapes) else []
    rule = RULES.get("Reduce" if node.op_type.startswith("Reduce") else node.op_type)
    return rule(node, shapes[0], shapes, known) if rule is not None else []


def broadcast(*shapes: Shape) -> Shape:
    """The common shape; where it cannot be told which of two sizes is the 1, a size that equals nothing."""
    found: list[Hashable] = []
    for axis in range(-max(map(len, shapes)), 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        numbers = [size for size in sizes if isinstance(size, int)]
        found.append(numbers[0] if numbers else sizes.pop() if len(sizes) == 1 else object() if sizes else 1)
    return tuple(found)


Shapes = list[Shape | None]  # of all inputs
Rule = Callable[[ir.Node, Shape, Shapes, Known], list[Shape]]


def _matmul(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    second = shapes[1]
    if second is None or len(first) < 2 or len(second) < 2:
        return []
    return [(*broadcast(first[:-2], second[:-2]), first[-2], second[-1])]


def _gather(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    axis, at = attribute(node, "axis", 0) % len(first), shapes[1]
    return [] if at is None else [(*first[:axis], *at, *first[axis + 1 :])]


def _reshape(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    target = _contents(node.inputs[1], known)
    if target is None:
        rank = shapes[1][0] if shapes[1] is not None else None
        return [tuple(object() for _ in range(rank))] if isinstance(rank, int) else []
    if (attribute(node, "allowzero", 0) and 0 in target) or 0 in target[len(first) :]:
        return []
    found = [first[i] if size == 0 else size for i, size in enumerate(target)]
    if -1 in target:
        found[target.index(-1)] = _rest(first, [size for size in found if size != -1])
    return [tuple(found)]


def _expand(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    target = _contents(node.inputs[1], known)
    return [] if target is None else [broadcast(first, target)]


def _contents(value: ir.Value | None, known: Known) -> Shape | None:
    """The entries of a vector of sizes: constants, shapes, and several of them one after another."""
    if (entries := integers(value)) is not None:
        return tuple(entries)
    if (node := made_by(value, "Shape", "Concat")) is None:
        return None
    if node.op_type == "Shape":
        shape = known.get(node.inputs[0]) if node.inputs[0] is not None else None
        return None if shape is None else shape[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
    parts = [_contents(part, known) for part in node.inputs]
    return None if None in parts else tuple(size for part in parts if part is not None for size in part)


def _rest(sizes: Shape, others: list[Hashable]) -> Hashable:
    """The one size that makes the product of `others` that of `sizes`."""
    left = list(sizes)
    for size in [size for size in others if not isinstance(size, int)]:
        if size not in left:
            return object()
        left.remove(size)
    names = [size for size in left if not isinstance(size, int)]
    total, taken = _product(left), _product(others)
    if len(names) > 1 or (names and total != taken) or not taken or total % taken:
        return object()
    return names[0] if names else total // taken


def _product(sizes: list[Hashable]) -> int:
    product = 1
    for size in sizes:
        product *= size if isinstance(size, int) else 1
    return product


def _transpose(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    return [tuple(first[i] for i in attribute(node, "perm", range(len(first))[::-1]))]


def _unsqueeze(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        return []
    rank = len(first) + len(axes)
    new, sizes = {axis % rank for axis in axes}, iter(first)
    return [tuple(1 if i in new else next(sizes) for i in range(rank))]


def _squeeze(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        return []
    return [tuple(size for i, size in enumerate(first) if i not in {axis % len(first) for axis in axes})]


def _split(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    axis, parts = attribute(node, "axis", 0) % len(first), len(node.outputs)
    sizes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is None or len(sizes) != parts:
        whole = first[axis]
        even = isinstance(whole, int) and whole % parts == 0 and len(node.inputs) == 1
        sizes = [whole // parts] * parts if even and isinstance(whole, int) else None
    return [(*first[:axis], object() if sizes is None else sizes[i], *first[axis + 1 :]) for i in range(parts)]


def _slice(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    starts, ends, axes, steps = ([*map(integers, node.inputs[1:]), None, None])[:4]
    axes = axes if len(node.inputs) > 3 else list(range(len(first)))
    if axes is None:
        return [tuple(object() for _ in first)]
    found = list(first)
    for i, axis in enumerate(axes):
        size = first[axis]
        found[axis] = ("slice", size, i, *node.inputs[1:])  # equal where another is cut alike
        if isinstance(size, int) and starts is not None and ends is not None and (steps or len(node.inputs) < 5):
            found[axis] = len(range(size)[starts[i] : ends[i] : steps[i] if steps else 1])
    return [tuple(found)]


def _concat(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    axis = attribute(node, "axis", 0) % len(first)
    sizes = [shape[axis] if shape is not None else None for shape in shapes]
    numbers = [size for size in sizes if isinstance(size, int)]
    return [(*first[:axis], sum(numbers) if len(numbers) == len(sizes) else object(), *first[axis + 1 :])]


def _reduce(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes", None)
    if axes is None:
        return []
    gone = {axis % len(first) for axis in axes}
    if attribute(node, "keepdims", 1):
        return [tuple(1 if i in gone else size for i, size in enumerate(first))]
    return [tuple(size for i, size in enumerate(first) if i not in gone)]


def _shape(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    ends = attribute(node, "start", 0), attribute(node, "end", len(first))
    return [(len(first[slice(*ends)]),)]


def _attention(node: ir.Node, first: Shape, shapes: Shapes, known: Known) -> list[Shape]:
    """What queries (batch, seq, width) get: as wide as themselves, or as all heads of values of another width."""
    if node.op_type == "GroupQueryAttention" and node.inputs[2] is None:
        return [_queries_of_all(node, first)]
    value = shapes[2] if len(shapes) > 2 else None
    if value is not None and len(first) == len(value) == 4 and node.op_type == "Attention":
        return [(*first[:3], value[3])]
    if len(first) != 3 or value is None or len(value) != 3:
        return []
    queries, keys = attribute(node, "num_heads", None), attribute(node, "kv_num_heads", None)
    if node.op_type == "Attention":
        queries, keys = attribute(node, "q_num_heads", None), attribute(node, "kv_num_heads", None)
    wide = value[2]
    if keys and isinstance(wide, int):
        wide = wide // keys * queries
    return [(*first[:2], wide)]


def _queries_of_all(node: ir.Node, first: Shape) -> Shape:
    """The shape of the queries where query, key and value lie side by side in one value."""
    queries, keys, wide = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0), first[-1]
    return (*first[:-1], wide // (queries + 2 * keys) * queries if isinstance(wide, int) else object())


RULES: dict[str, Rule] = {
    "MatMul": _matmul, "Gather": _gather, "Reshape": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze, "Split": _split, "Slice": _slice, "Concat": _concat, "Expand": _expand, "Reduce": _reduce,
    "Shape": _shape, "GroupQueryAttention": _attention, "MultiHeadAttention": _attention, "Attention": _attention,
}  # fmt: skip
