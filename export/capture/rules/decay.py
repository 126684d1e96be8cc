"""A sum over the past whose weights decay, as a state that a scan over the new positions carries on."""

from __future__ import annotations

import onnx_ir as ir
import torch

from ..axes import Atom, Axes, Role
from ..decays import Decay
from ..emitter import DTYPES, Emitter
from ..follow import Follower, followed
from ..tensor import Tensor, laid_out, size_vector
from .shifts import is_sequence, newest


def lower_decay(f: Follower, decay: Decay) -> Tensor | None:
    """h_i = g_i h_i-1 + s_i; None where the axes are not those of a decoder's own positions."""
    gates, values = f.value_of(decay.source), f.value_of(decay.values)
    if not (isinstance(gates, Tensor) and isinstance(values, Tensor)):
        return None
    of_values, out = decay.equation.partition(",")[2].split("->")
    at, along = of_values.index(decay.summed), decay.sources.index(decay.summed)
    if not (is_sequence(f, values, at) and is_sequence(f, gates, along)):
        return None
    before = {values.axes[at][0].before, gates.axes[along][0].before}
    if len(before) > 1 or not before <= {0, 1} or values.axes[at][0].after or gates.axes[along][0].after:
        return None
    new_gates, new_values = newest(f, gates, along), newest(f, values, at)
    named = dict(zip(of_values, new_values.axes))
    order = [decay.summed, *(c for c in of_values if c != decay.summed)]
    position, *rest = (followed((named[c],))[0] for c in order)  # (positions, batch, ...)
    if not rest or [a.role for a in rest[0]] != [Role.BATCH]:
        return None
    own = {c: axis for c, axis in zip(decay.sources, new_gates.axes) if c != " "}
    gate = laid_out(f.emit, new_gates, tuple(own.get(c, ()) for c in order))
    gate = f.emit.op("Exp", gate) if decay.gate == "exp" else gate
    summand = laid_out(f.emit, new_values, tuple(named[c] for c in order))
    if f.is_whole:
        zero = f.emit.constant(torch.zeros((), dtype=values.dtype).numpy())
        past = f.emit.op("Expand", zero, size_vector(f.emit, rest))
    else:
        past, entry = f.state(values.dtype, [f.size(axis) for axis in rest[1:]])
    states = _scan(f.emit, past, gate, summand, DTYPES[values.dtype])
    if before == {1}:  # each position takes the state before it
        states = f.emit.op("Concat", f.emit.op("Unsqueeze", past, f.emit.constant([0])), states, axis=0)
        position = (Atom(Role.STRETCH, before=1),)
    if not f.is_whole:
        # Past and present are one buffer: the last state is written when nobody reads the past any more.
        last = f.emit.op("Gather", states, f.emit.constant(-1), axis=0)
        f.emit.output(last, entry.present, DTYPES[values.dtype], ("batch", *entry.shape))
    lies: Axes = (position, *rest)
    letters = dict(zip([decay.row, *order[1:]], lies))
    return Tensor(states, lies, tuple(letters[c] for c in out), values.dtype)


def _scan(emit: Emitter, past: ir.Value, gate: ir.Value, summand: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The state at each position, which come first. Source: ONNX Scan."""
    state, g, s = (ir.Value(name=name, type=ir.TensorType(dtype)) for name in ("state", "gate", "summand"))
    kept = ir.node("Mul", [state, g])
    new = ir.node("Add", [kept.outputs[0], s])
    seen = ir.node("Identity", [new.outputs[0]])
    outputs = [new.outputs[0], seen.outputs[0]]
    for name, value in zip(("kept", "next_state", "seen"), (kept.outputs[0], *outputs)):
        value.name, value.type = name, ir.TensorType(dtype)
    body = ir.Graph([state, g, s], outputs, nodes=[kept, new, seen], name="decay")
    return emit.multi("Scan", past, gate, summand, outputs=2, body=body, num_scan_inputs=2)[1]
