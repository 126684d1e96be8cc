"""A module as a functional program of its operators, and the check of what was answered in its stead on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from tfinfer.errors import CaptureError

from .choices import ASKED_OF_VALUES, AllExperts
from .writes import without_writes

aten = torch.ops.aten
INSTEAD = (
    "what runs, and how large it is, must not depend on the values of the ids: compute both ways and choose by "
    "torch.where, or pick tokens by torch.where(mask) and put them back by index_add"
)
DRAWS = 24

Draw = Callable[[int, int, torch.Generator], list[torch.Tensor]]


def functional(
    module: nn.Module, samples: tuple[torch.Tensor, ...], dynamic: Any, draw: Draw | None
) -> torch.export.ExportedProgram:
    """The exported program of `module(*samples)`, with no in-place operation in it.

    draw: tokens below a number, at least so many of them, as the module takes them, by which what is answered in its
    stead is checked.
    Raises CaptureError where control flow on data changes what the module computes, and what torch.export raises.
    """
    try:
        return without_writes(torch.export.export(module, samples, dynamic_shapes=dynamic))
    except ASKED_OF_VALUES:
        with AllExperts():
            program = torch.export.export(module, samples, dynamic_shapes=dynamic)
    program = without_writes(program)
    if draw is not None:
        _check_answers(module, without_assertions(program), partial(draw, _least_length(program)))
    return program


def _least_length(program: torch.export.ExportedProgram) -> int:
    """The fewest tokens that a program takes, at least 2."""
    sizes = [size for node in program.graph.nodes if node.op == "placeholder" for size in _sizes(node)]
    lowers = [program.range_constraints[s.node.expr].lower for s in sizes if s.node.expr in program.range_constraints]
    return max([2, *(int(lower) for lower in lowers)])


def _sizes(node: fx.Node) -> list[torch.SymInt]:
    value = node.meta.get("val")
    return [size for size in getattr(value, "shape", ()) if isinstance(size, torch.SymInt)]


def without_assertions(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph of a program; what was answered in its module's stead need not hold."""
    made = program.module(check_guards=False)
    for node in reversed(made.graph.nodes):
        if node.target is aten._assert_scalar.default:
            made.graph.erase_node(node)
    made.recompile()
    return made


def _check_answers(
    module: nn.Module, graph: fx.GraphModule, draw: Callable[[int, torch.Generator], list[torch.Tensor]]
) -> None:
    """Few tokens leave experts without any: there the graph must still compute what the module does."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        given = draw(smallest_vocabulary(graph), generator)
        for expected, found in zip(*(torch.utils._pytree.tree_leaves(m(*given)) for m in (module, graph))):
            if not (isinstance(expected, torch.Tensor) and expected.is_floating_point()):
                continue
            if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise CaptureError(f"control flow on data changes what the module computes; {INSTEAD}")


def smallest_vocabulary(graph: fx.GraphModule) -> int:
    """The least number of rows of any table: ids below it may be looked up in all."""
    tables = []
    for node in graph.graph.nodes:
        if node.target is aten.embedding.default:
            arguments: Any = node.args
            tables.append(arguments[0].meta["val"].shape[0])
    return int(min(tables, default=2))
