"""Recurrent layers over the positions: they go on from their hidden values, which a cache keeps as states."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.onnx.ops import _symbolic_impl

from ..axes import Role, fixed
from ..emitter import DTYPES
from ..follow import Follower, rule
from ..tensor import Tensor, laid_out
from ..trace import refuse
from .loops import loop
from .shifts import begun

MADE = torch.ops.onnx_symbolic._symbolic_multi_out.default  # what `capture/recurrent.py` leaves in a trace


@rule(MADE)
def recurrent(f: Follower, node: fx.Node, operands: list[Any], kind: str, *args: Any, **kwargs: Any) -> list[Tensor]:
    """x: (positions, batch, features). Source: ONNX LSTM, GRU and RNN.

    Returns all hidden values, (positions, 1, batch, hidden), and the last, (1, batch, hidden) each.
    """
    attributes = _attributes(kwargs)
    if kind == "Positions":
        return loop(f, node, operands, int(attributes["number"]))
    x, w, r, bias, _, *initial = operands
    if not isinstance(x, Tensor) or not all(f.is_constant(o) for o in (w, r, *([bias] if bias else []), *initial)):
        raise refuse(node, "its weights or first hidden values depend on the ids")
    roles = [[a.role for a in axis] for axis in x.axes]
    if roles[:2] != [[f.role], [Role.BATCH]] or f.role is Role.SOURCE:
        raise refuse(node, "is followed along the positions of a decoder, one sequence for each row of the batch")
    if attributes["direction"] != "forward":
        raise refuse(
            node, "reads the sequence from its end: a token would see the ones behind it", "one direction works"
        )
    hidden = fixed(int(attributes["hidden_size"]))
    firsts = [f.constant(state) for state in initial]  # (1, 1, hidden)
    pasts = [_first(f, state) if f.is_whole else None for state in firsts]
    entries = []
    for i, state in enumerate(firsts if not f.is_whole else []):
        past, entry = f.state(x.dtype, [f.size(hidden)])
        first = f.emit.shared(("initial", state.dtype, state.numpy().tobytes()), state.reshape(1, -1), "initial")
        # A copy, whatever the first value is: past and present are one memory, and the operator may write early.
        pasts[i] = f.emit.op("Unsqueeze", begun(f, past, first, 2), f.emit.constant([0]))
        entries.append(entry)
    weights = [f.parameter(o) for o in (w, r)] + [f.parameter(bias) if bias is not None else None, None]
    outputs = f.emit.multi(kind, laid_out(f.emit, x), *weights, *pasts, outputs=1 + len(firsts), **attributes)
    for entry, last in zip(entries, outputs[1:]):
        present = f.emit.op("Squeeze", last, f.emit.constant([0]))
        f.emit.output(present, entry.present, DTYPES[entry.dtype], ("batch", *entry.shape))
    axes = (x.axes[0], (), x.axes[1], hidden)
    return [
        Tensor.of(outputs[0], axes, x.dtype),
        *(Tensor.of(o, ((), x.axes[1], hidden), x.dtype) for o in outputs[1:]),
    ]


def _first(f: Follower, state: torch.Tensor) -> ir.Value:
    """(1, 1, hidden) for every row of the batch: (1, batch, hidden)."""
    value = f.emit.shared(("first", state.dtype, state.numpy().tobytes()), state, "initial")
    one = f.emit.constant([1])
    return f.emit.op("Expand", value, f.emit.op("Concat", one, f.emit.size(Role.BATCH), one, axis=0))


def _attributes(kwargs: dict[str, Any]) -> dict[str, Any]:
    encoded = ("attr_keys", "attr_types", "attr_pos", "attr_ints", "attr_floats", "attr_strs")
    return dict(_symbolic_impl.EncodedAttrs(*(kwargs[name] for name in encoded)).to_dict())
