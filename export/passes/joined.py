"""Weights side by side in one initializer, written as one and made only while it is written.

Another graph of the folder may hold the parts as they were: `take_parts` lets it take them out of the joined one, so
that the file has each number once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .matching import SHARED

PARTS = "parts"  # in an initializer's meta: the columns of others that it is made of


@dataclass(frozen=True)
class Columns:
    """Some columns of an initializer (..., width), in this order; zeros where there is none."""

    value: ir.Value | None
    which: tuple[int, ...]


def joined(graph: ir.Graph, name: str, parts: Sequence[Columns], made: dict[Any, ir.Value]) -> ir.Value:
    """The parts one behind the other along the last axis; `made` remembers what the same parts became before."""
    key = tuple(parts)
    if key in made:
        return made[key]
    first = next(part.value for part in parts if part.value is not None)
    assert first.const_value is not None
    sizes = [int(n) for n in first.const_value.shape.numpy()[:-1]]
    shape = ir.Shape([*sizes, sum(len(part.which) for part in parts)])
    tensor = ir.LazyTensor(_making(parts, sizes), first.const_value.dtype, shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    value.meta[PARTS] = key
    if all(part.value is None or SHARED in part.value.meta for part in parts):
        of = tuple((part.value.meta[SHARED] if part.value is not None else None, part.which) for part in parts)
        value.meta[SHARED] = ("joined", of)
    graph.initializers[name] = made[key] = value
    return value


def _making(parts: Sequence[Columns], sizes: list[int]) -> Callable[[], ir.TensorProtocol]:
    def make() -> ir.TensorProtocol:
        arrays = []
        for part in parts:
            held = part.value.const_value if part.value is not None else None
            empty = np.zeros((*sizes, len(part.which)), np.float32)
            arrays.append(empty if held is None else held.numpy()[..., list(part.which)])
        return ir.Tensor(np.ascontiguousarray(np.concatenate(arrays, axis=-1)))

    return make


def take_parts(model: ir.Model, others: Iterable[ir.Model]) -> int:
    """Replace the initializers of `model` that others have joined by what is taken out of these; returns how many."""
    graph, taken, made = model.graph, 0, dict[Any, ir.Value]()
    whole = {key: found for other in others for key, found in _wholes(other)}
    for name, value in list(graph.initializers.items()):
        found = whole.get(value.meta.get(SHARED))
        if found is None or value in graph.outputs:
            continue
        source, columns = found
        weight = _held(graph, source.meta[SHARED], str(source.name), source.const_value, made)
        indices = ir.Tensor(np.array(columns), name=f"{name}.columns")
        where = _held(graph, ("columns", columns), f"{name}.columns", indices, made)
        node = ir.node("Gather", [weight, where], {"axis": -1}, name=f"{name}.taken")
        node.outputs[0].name = node.name
        graph.insert_before(next(iter(graph)), node)
        value.replace_all_uses_with(node.outputs[0])
        del graph.initializers[name]
        taken += 1
    return taken


def _wholes(model: ir.Model) -> Iterator[tuple[Any, tuple[ir.Value, tuple[int, ...]]]]:
    """What tells a part from others, the joined one and which columns of it make the part."""
    for value in model.graph.initializers.values():
        places: dict[ir.Value, dict[int, int]] = {}
        at = 0
        for part in value.meta.get(PARTS, ()) if SHARED in value.meta else ():
            for column in part.which:
                if part.value is not None:
                    places.setdefault(part.value, {})[column] = at
                at += 1
        for part_value, columns in places.items():
            assert part_value.const_value is not None
            width = int(part_value.const_value.shape.numpy()[-1])
            if len(columns) == width:
                yield part_value.meta[SHARED], (value, tuple(columns[i] for i in range(width)))


def _held(
    graph: ir.Graph, key: Any, name: str, tensor: ir.TensorProtocol | None, made: dict[Any, ir.Value]
) -> ir.Value:
    """An initializer of this graph, one for one key."""
    if key not in made:
        assert tensor is not None
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        value.meta[SHARED] = key
        graph.initializers[name] = made[key] = value
    return made[key]
