"""Recurrent layers while tracing: torch would unroll one, or make a loop of it; here each is one ONNX operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn, TypeAlias
from unittest import mock

import torch
import torch.nn.functional as F

from tfinfer.errors import CaptureError

# Where PyTorch's gates (LSTM: input, forget, cell, output; GRU: reset, update, new) stand in ONNX.
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
# What nn.LSTM, nn.GRU and nn.RNN call in torch._VF, its operator, and what is special about it.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", {"activations": "Tanh"}),
    "rnn_relu": ("RNN", {"activations": "Relu"}),
}


@contextmanager
def operators_for_recurrent_layers() -> Iterator[None]:
    """While tracing, recurrent layers call `_recurrent`, cells are what they are made of, and packing is refused."""
    with ExitStack() as stack:
        for function in LAYERS:
            stack.enter_context(mock.patch.object(torch._VF, function, partial(_recurrent, *LAYERS[function])))
        for cell in (gru_cell, lstm_cell, rnn_tanh_cell, rnn_relu_cell):
            stack.enter_context(mock.patch.object(torch._VF, cell.__name__, cell))
        stack.enter_context(mock.patch.object(torch._VF, "_pack_padded_sequence", _refuse_packed))
        yield


def _refuse_packed(*_: Any) -> NoReturn:
    raise CaptureError(
        "expected padded sequences, got a packed one: its length depends on the values of the lengths; "
        "give the recurrent layer the padded tensor, or run each length apart"
    )


def _recurrent(
    kind: str,
    special: dict[str, Any],
    x: torch.Tensor,
    state: Any,
    weights: Any,
    biased: Any,
    layers: int,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    """Write a recurrent layer as ONNX operators, one for each of its layers; https://onnx.ai/onnx/operators has them.

    `options` are dropout, whether to train, bidirectional and batch_first; x is (batch, length, features) with the
    last of them and (length, batch, features) without, and so is the first output; the others are the final states.
    """
    if not isinstance(biased, bool):  # the arguments of a packed sequence stand otherwise
        _refuse_packed()
    states, (_, _, both, batch_first) = state if kind == "LSTM" else (state,), options
    directions, hidden = 1 + both, states[0].shape[2]
    if states[-1].shape[2] != hidden:
        raise CaptureError("nn.LSTM with proj_size: the ONNX LSTM has no projection; project with nn.Linear instead")
    each = 2 + 2 * biased  # tensors for one layer and direction
    attributes = {"hidden_size": hidden, "direction": "bidirectional" if both else "forward", **special}
    if "activations" in special:
        attributes["activations"] = [special["activations"]] * directions
    x = x.transpose(0, 1) if batch_first else x
    length, batch, finals = x.shape[0], x.shape[1], []
    for at in range(0, layers * directions, directions):
        parts = (weights[each * d : each * (d + 1)] for d in range(at, at + directions))
        w, r, *biases = (torch.stack([_gates(kind, part) for part in same]) for same in zip(*parts))
        operands = (x, w, r, torch.cat(biases, 1) if biases else None, None, *(s[at : at + directions] for s in states))
        shapes = [(length, directions, batch, hidden), *[(directions, batch, hidden)] * len(states)]
        made = torch.onnx.ops.symbolic_multi_out(
            kind, operands, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
        )
        x = made[0].transpose(1, 2).flatten(2) if both else made[0].squeeze(1)
        finals.append(made[1:])
    last = [torch.cat(same) if layers > 1 else same[0] for same in zip(*finals)]
    return (x.transpose(0, 1) if batch_first else x, *last)


def _gates(kind: str, part: torch.Tensor) -> torch.Tensor:
    """A weight or bias (gates * hidden, ...) with its gates in ONNX's order."""
    size = part.shape[0] // len(GATES[kind])  # slices, because a constant Split is not folded
    return torch.cat([part[i * size : (i + 1) * size] for i in GATES[kind]])


# -- cells ----------------------------------------------------------------------------------------------------------
Weight: TypeAlias = torch.Tensor
Bias: TypeAlias = torch.Tensor | None


def gru_cell(
    x: torch.Tensor, h: torch.Tensor, w_x: Weight, w_h: Weight, b_x: Bias = None, b_h: Bias = None
) -> torch.Tensor:
    """One step of nn.GRUCell, as its page has it: reset, update and new gates."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = F.linear(x, w_x, b_x).chunk(3, -1), F.linear(h, w_h, b_h).chunk(3, -1)
    update = (z_x + z_h).sigmoid()
    new = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (1 - update) * new + update * h


def lstm_cell(
    x: torch.Tensor, state: Any, w_x: Weight, w_h: Weight, b_x: Bias = None, b_h: Bias = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of nn.LSTMCell, as its page has it: input, forget, cell and output gates."""
    h, c = state
    into, forget, new, out = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, -1)
    c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
    return out.sigmoid() * c.tanh(), c


def rnn_tanh_cell(
    x: torch.Tensor, h: torch.Tensor, w_x: Weight, w_h: Weight, b_x: Bias = None, b_h: Bias = None
) -> torch.Tensor:
    return (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).tanh()


def rnn_relu_cell(
    x: torch.Tensor, h: torch.Tensor, w_x: Weight, w_h: Weight, b_x: Bias = None, b_h: Bias = None
) -> torch.Tensor:
    return (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).relu()
