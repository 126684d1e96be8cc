"""The graph of attention's weights, compared with the same weights in the module's own trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from tfinfer.errors import CaptureError, ProofError
from tfinfer.session.ort import onnxruntime

from ..capture import Observed, Trace, capture_attention
from ..capture.program import smallest_vocabulary
from ..capture.trace import Kind, aten

LENGTH, SOURCE_LENGTH = 9, 7
INSTEAD = "export with --no-attention (attention=False) to leave them out"
CLOSE = 1e-4  # as the proof of logits in float32: large scores are rounded before the softmax


def observe(captured: Trace, max_length: int, max_source_length: int | None = None) -> Observed | None:
    """The graph, or None where there is no softmax over positions to show, or a loop over them, which no trace runs."""
    if captured.loops:
        return None
    try:
        return capture_attention(captured, max_length, max_source_length)
    except CaptureError:
        return None


def check_observed(observed: Observed, file: Path) -> None:
    """Run the graph as it was written to `file`. Raises ProofError where its weights are not the module's."""
    captured = observed.trace
    feeds = _feeds(captured)
    with torch.no_grad():
        watched = _Watched(captured, [node for node, _ in observed.nodes])
        watched.run(*(torch.from_numpy(feeds[node]) for node in captured.inputs))
    names = [name for outputs in observed.maps.values() for name in outputs]
    got = _run(file, captured, feeds)
    weights = [_keys_last(watched.weights[node], key) for node, key in observed.nodes]
    expected = dict(zip(sorted(names, key=_order(observed)), weights))
    for name in names:
        one, other = expected[name], got[name]
        if one.size != other.size or not np.allclose(one.reshape(other.shape), other, atol=CLOSE, rtol=0):
            raise ProofError(f"the weights {name} are not those of the module, {INSTEAD}")
        if (other.sum(-1) - 1).max() > CLOSE:
            raise ProofError(f"the rows of the weights {name} sum to more than 1, {INSTEAD}")


def _keys_last(weights: torch.Tensor, key: int) -> Any:
    return (weights if key >= weights.dim() else weights.movedim(key, -1)).numpy()


def _order(observed: Observed) -> Callable[[str], int]:
    """The order in which the graph declares its outputs, which is that of the trace."""
    places = {str(value.name): i for i, value in enumerate(observed.model.graph.outputs)}
    return lambda name: places[name]


def _feeds(captured: Trace) -> dict[fx.Node, Any]:
    rng, feeds = np.random.default_rng(0), {}
    vocabulary = smallest_vocabulary(cast(fx.GraphModule, captured.module))
    for node, argument in captured.inputs.items():
        both = captured.seq is not None and captured.source is not None
        length = min(SOURCE_LENGTH if argument.source and both else LENGTH, captured.limits.get(captured.seq, LENGTH))
        if argument.kind is Kind.IDS:
            feeds[node] = rng.integers(0, vocabulary, (1, length))
        elif argument.kind is Kind.PADDING:
            feeds[node] = np.zeros((1, length), bool)
        else:
            feeds[node] = np.full((1, length), int(argument.kind is Kind.MASK), np.int64)
    return feeds


def _run(file: Path, captured: Trace, feeds: dict[fx.Node, Any]) -> dict[str, Any]:
    both = captured.seq is not None and captured.source is not None
    named = {}
    for node, argument in captured.inputs.items():
        name = {Kind.IDS: "source_ids" if both and argument.source else "input_ids", Kind.TYPES: "token_type_ids"}
        if argument.kind in name:
            named[name[argument.kind]] = feeds[node]
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime().InferenceSession(str(file), options)
    outputs = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    try:
        return dict(zip(outputs, session.run(outputs, {n: v for n, v in named.items() if n in wanted})))
    except Exception as error:  # onnxruntime's own classes
        raise ProofError(f"the graph of attention's weights does not run, {INSTEAD}: {error}") from error


class _Watched(fx.Interpreter):
    """Runs a trace and keeps the weights of every attention, (1, heads, query, key)."""

    def __init__(self, captured: Trace, nodes: Sequence[fx.Node]) -> None:
        super().__init__(cast(fx.GraphModule, captured.module))
        self.nodes = set(nodes)
        self.weights: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:
            self.weights[n] = result
            if n.target is aten.scaled_dot_product_attention.default:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                self.weights[n] = _weights(*args, **kwargs)
        return result


def _weights(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, dropout: float = 0.0, causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """softmax(q k^T scale + mask), as torch.nn.functional.scaled_dot_product_attention defines it."""
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)
