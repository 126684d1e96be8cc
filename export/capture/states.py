"""Only the states that the logits depend on are kept: what stands before a sum may have asked for more of them."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from .emitter import Emitter
from .follow import Follower, StateEntry


def drop_unused(f: Follower, logits: ir.Value) -> None:
    """Forget every state that leads neither to the logits nor to a state that does, and count on without it."""
    emit = f.emit
    presents = {str(value.name): value for value in emit.outputs}
    kept: list[str] = []
    seen = _ancestors([logits])
    while (used := [e.past for e in f.states if emit.inputs[e.past] in seen]) != kept:
        kept = used
        seen = _ancestors([logits, *(presents[e.present] for e in f.states if e.past in kept)])
    if len(kept) == len(f.states):
        return
    entries: list[StateEntry] = []
    for entry in f.states:
        value = emit.inputs.pop(entry.past)
        if entry.past not in kept:
            emit.outputs.remove(presents[entry.present])
            continue
        number = len(entries)
        entries.append(replace(entry, past=f"past_states.{number}", present=f"present_states.{number}"))
        value.name, presents[entry.present].name = entries[-1].past, entries[-1].present
        emit.inputs[entries[-1].past] = value
    f.states[:] = entries
    _drop_dead_nodes(emit)


def _drop_dead_nodes(emit: Emitter) -> None:
    live = _ancestors(emit.outputs)
    for node in emit.nodes:
        if not any(output in live for output in node.outputs):
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)
    emit.nodes[:] = [node for node in emit.nodes if any(output in live for output in node.outputs)]


def _ancestors(values: list[ir.Value]) -> set[ir.Value]:
    """Everything that `values` are computed from, themselves too."""
    found: set[ir.Value] = set()
    todo = list(values)
    while todo:
        value = todo.pop()
        if value not in found:
            found.add(value)
            made = value.producer()
            todo += [i for i in made.inputs if i is not None] if made is not None else []
    return found
