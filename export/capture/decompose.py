"""Operations without a rule, said in terms of those that have one, as torch itself defines them.

Only what depends on the ids is asked: the rest is evaluated and needs no rule. Where torch's own words lead to another
operation without a rule the graph stays as it was, so that an error names what the module really calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._export.utils import _get_decomp_for_cia
from torch.export import ExportedProgram

from .allowed import COMPLEX_RULES, RULES

aten = torch.ops.aten
ROUNDS = 4  # how deep definitions may go
# Their definitions are loops over the sequence, unrolled to the traced length.
LOOPS = {
    aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input,
    aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data,
}  # fmt: skip
# Comparisons by their longer names. To trace a whole program again for one of them takes as long as to trace it.
SYNONYMS = {
    getattr(getattr(aten, name), kind): getattr(getattr(aten, short), kind)
    for name, short in (
        ("greater", "gt"), ("greater_equal", "ge"), ("less", "lt"), ("less_equal", "le"), ("not_equal", "ne"),
    )
    for kind in ("Tensor", "Scalar")
}  # fmt: skip

Reads = Callable[[fx.Node], Sequence[fx.Node]]


def decomposed(program: ExportedProgram, reads: Reads) -> ExportedProgram:
    """The program with every operation on data that has no rule replaced by such as have one, if that can be.

    reads: the inputs whose values matter to a node.
    """
    _shorten(program)
    found, core = program, core_aten_decompositions()
    for _ in range(ROUNDS):
        unknown = unknown_operations(found, reads)
        if not unknown:
            return found
        table = {target: meaning for target in unknown if (meaning := _definition(target, core)) is not None}
        if len(table) < len(unknown):
            return program
        try:
            found = found.run_decompositions(table)
        except Exception:
            return program  # a definition that asks for numbers where there are symbols
    return program


def _shorten(program: ExportedProgram) -> None:
    """Give every synonym the name that has a rule, in place: torch's own definition is no more than this."""
    for node in program.graph.nodes:
        node.target = SYNONYMS.get(node.target, node.target)


def unknown_operations(program: ExportedProgram, reads: Reads) -> set[Any]:
    """The operations on what depends on the inputs, that no rule is for."""
    inputs = set(program.graph_signature.user_inputs)
    data: set[fx.Node] = set()
    unknown: set[Any] = set()
    sizes = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            data.add(node)
        elif node.op != "call_function" or isinstance(node.meta.get("val"), sizes):
            continue
        elif any(operand in data for operand in reads(node)):
            data.add(node)
            if isinstance(node.target, torch._ops.OpOverload):
                unknown.add(node.target)
    return unknown - RULES.keys() - COMPLEX_RULES.keys()


def _definition(target: Any, core: Any) -> Any:
    """What torch says an operation is, in terms of others; None where it is one of the plainest itself."""
    if target in LOOPS:
        return None
    if target in core:
        return core[target]
    if torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), torch._C.DispatchKey.CompositeImplicitAutograd):
        return _get_decomp_for_cia(target)
    return decomposition_table.get(target)
