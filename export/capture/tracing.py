"""A module into one functional graph of its operators, by torch.export. Knows no architecture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from tfinfer.errors import CaptureError

from .choices import ASKED_OF_VALUES
from .decompose import decomposed
from .equations import normalise_einsums
from .modes import inference_mode_of, quiet
from .program import INSTEAD, Draw, functional, without_assertions
from .recurrent import operators_for_recurrent_layers
from .trace import TORCH, Argument, Kind, Trace, read_for_values

# Sizes above 1 and different from each other: torch.export pins sizes 0 and 1, and equal sizes look related.
TRACED_BATCH, TRACED_SEQ, TRACED_SOURCE = 2, 11, 13
PINNED = "specialized it to be a constant"  # in what torch.export says of an axis that a module needs as a number


def trace(module: nn.Module, arguments: Sequence[Argument] = (Argument("input_ids"),)) -> Trace:
    """Capture `module(*arguments)` with symbolic batch and sequence axes.

    Raises CaptureError where torch.export meets control flow on data, an axis that is pinned to the traced size, or
    a module that does not take these arguments.
    """
    lengths = {False: TRACED_SEQ, True: TRACED_SOURCE}
    samples = tuple(argument.sample(TRACED_BATCH, lengths[argument.source]) for argument in arguments)
    dynamic: Any = tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for _ in arguments)
    called = module
    if len(arguments) > 1:
        called, dynamic = _Together(module, arguments), (dynamic,)
    loops: list[Any] = []
    try:
        with inference_mode_of(module):
            program = _exported(called, samples, dynamic, partial(_few_tokens, arguments))
    except CaptureError:
        raise
    except Exception as error:
        if len(arguments) > 1 or arguments[0].source or PINNED not in str(error):
            raise CaptureError(f"torch.export cannot capture the module: {explain(error)}") from error
        program, loops = _rerolled(module, arguments[0], error)
    graph_module = without_assertions(program)
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    inputs = dict(zip(placeholders, arguments))
    batch, sizes = _symbols(inputs)
    normalise_einsums(graph_module.graph, list(sizes.values()))
    nodes = list(graph_module.graph.nodes)
    limits = {}
    for symbol in sizes.values():
        upper = program.range_constraints[symbol].upper
        if upper.is_Integer:
            limits[symbol] = int(upper)
    return Trace(graph_module, nodes, inputs, nodes[-1], batch, sizes.get(False), sizes.get(True), limits, loops=loops)


def _exported(
    module: nn.Module, samples: tuple[torch.Tensor, ...], dynamic: Any, draw: Draw | None = None
) -> torch.export.ExportedProgram:
    with operators_for_recurrent_layers(), quiet():
        return decomposed(functional(module, samples, dynamic, draw), read_for_values)


def _few_tokens(
    arguments: Sequence[Argument], count: int, below: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """One row of `count` tokens for each argument."""
    given = [argument.sample(1, count) for argument in arguments]
    for argument, tensor in zip(arguments, given):
        if argument.kind is Kind.IDS:
            tensor.random_(0, below, generator=generator)
    return given


def _one_token(length: int, count: int, below: int, generator: torch.Generator) -> list[torch.Tensor]:
    """One row of as many tokens as a trace of fixed length has, all of them the same."""
    return [torch.randint(0, below, (1, 1), generator=generator).expand(1, length)]


def _rerolled(module: nn.Module, ids: Argument, error: Exception) -> tuple[torch.export.ExportedProgram, list[Any]]:
    """Another try for a module that needs the number of positions as a number: it may loop over them."""
    from .reroll import reroll  # it is made of traces itself
    from .unrolled import NotALoop

    def export(length: int) -> torch.export.ExportedProgram:
        with operators_for_recurrent_layers(), quiet():  # what iterations write is looked for as it is written
            sample = (ids.sample(TRACED_BATCH, length),)
            return functional(module, sample, ({0: Dim.DYNAMIC},), partial(_one_token, length))

    try:
        with inference_mode_of(module):
            rolled, loops = reroll(export)
            sample = (ids.sample(TRACED_BATCH, TRACED_SEQ),)
            return _exported(rolled, sample, ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)), loops
    except NotALoop as why:
        raise CaptureError(
            f"the module needs the number of positions as a number, and {why}: a loop over positions, each step of "
            f"which does the same with its own position and what the step before left, would work; {explain(error)}"
        ) from error
    except CaptureError:
        raise
    except Exception as other:
        raise CaptureError(f"torch.export cannot capture the module: {explain(error)}") from other


class _Together(nn.Module):
    """Calls a module with several arguments by name, whose batches, and lengths on each side, are the same."""

    def __init__(self, module: nn.Module, arguments: Sequence[Argument]) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, *inputs: torch.Tensor) -> Any:
        firsts: dict[bool, torch.Tensor] = {}
        for argument, tensor in zip(self.arguments, inputs):
            torch._check(tensor.shape[0] == inputs[0].shape[0])
            torch._check(tensor.shape[1] == firsts.setdefault(argument.source, tensor).shape[1])
        return self.module(**dict(zip((a.name for a in self.arguments), inputs)))


def _symbols(inputs: dict[fx.Node, Argument]) -> tuple[Any, dict[bool, Any]]:
    """The symbols of the batch, and of the target's (False) and the source's (True) length."""
    batch, sizes = None, {}
    both = len({argument.source for argument in inputs.values()}) > 1
    for node, argument in inputs.items():
        found = node.meta["val"].shape
        side = "" if not both else "source's " if argument.source else "target's "
        for size, name in zip(found, ("batch", f"{side}sequence")):
            if not isinstance(size, torch.SymInt):
                raise CaptureError(f"the {name} axis is pinned to {size}: the module computes with it as a number")
        batch = found[0].node.expr
        sizes[argument.source] = found[1].node.expr
    if both and sizes[True] == sizes[False]:
        raise CaptureError("the module takes source and target of one length only: their axes must be free")
    return batch, sizes


def explain(error: Exception) -> str:
    """The lines of a torch.export error that help its reader, in one line."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    source = [line for line in lines if line.startswith("File ") and TORCH not in line]
    kept = [*lines[:2], *source[-1:]]
    advice = f"; {INSTEAD}" if isinstance(error, ASKED_OF_VALUES) else ""
    return f"{type(error).__name__}: {' '.join(kept)}"[:600] + advice
