"""The stages of capturing a decoder: trace, measure the longest length, follow every node, declare what goes out."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from tfinfer.errors import CaptureError

from . import rules  # noqa: F401  (registers the allow-list)
from .chunks import chunks_of_one
from .follow import AttentionReport, CacheEntry, Follower, StateEntry
from .outputs import declare_logits, find_logits, logits_node, vocabulary
from .positional import Positional, longest_length, read_by_data
from .states import drop_unused
from .trace import Trace
from .tracing import trace
from .walk import follow_all

# The longest length of a module that names none, or a very long one: the proof runs at it, so it is not free.
DEFAULT_MAX_LENGTH = 4096


@dataclass
class Captured:
    """A cached graph and what the manifest says of it."""

    model: ir.Model
    entries: list[CacheEntry]
    states: list[StateEntry]
    attention: list[AttentionReport]
    vocab_size: int  # of the ids that go in
    num_logits: int
    max_length: int
    module_length: int | None  # what the module itself says, where it does
    all_rows: bool  # whether every new position has logits, or the last alone
    keeps_window: int | None  # how many positions back the furthest key is, where all attention has such a bound


def capture(module: nn.Module, *, max_length: int | None = None, flavor: str = "ort") -> Captured:
    """Turn `module(input_ids) -> logits` into one graph for prefill and decode.

    input_ids: (batch, seq); logits: (batch, seq or 1, vocab), alone or first in a tuple, or as `logits` of a dict.
    Raises CaptureError with the module path, the source line and the operation where it cannot be followed.
    """
    return capture_decoder(trace_decoder(module), max_length=max_length, flavor=flavor)


def trace_decoder(module: nn.Module) -> Trace:
    """As `trace`, with its chunked scans in chunks of one token. Raises CaptureError."""
    with chunks_of_one(module):
        return trace(module)


def capture_decoder(
    captured: Trace, *, max_length: int | None = None, flavor: str = "ort", source: Follower | None = None
) -> Captured:
    """As `capture`, of a trace; `source` follows the encoder of an encoder-decoder."""
    positional = Positional(captured, captured.seq)
    length = longest_length(positional, read_by_data(captured, captured.seq), max_length, DEFAULT_MAX_LENGTH)
    follower = Follower(captured, positional, length, flavor, source=source)
    follow_all(follower, captured.target, logits_node(captured))
    logits = find_logits(captured, follower)
    emit = follower.emit
    emit.given("attention_mask")
    value, all_rows = declare_logits(follower, logits)
    if not follower.entries and not follower.states:
        raise CaptureError("the module has no attention over its sequence: there is nothing to cache, run it as it is")
    emit.outputs.insert(0, emit.outputs.pop(emit.outputs.index(value)))
    drop_unused(follower, value)
    model = emit.model("decoder", 24 if emit.needs_opset_24 else 21)
    num_logits = follower.size(logits.axes[-1])
    return Captured(
        model=model,
        entries=follower.entries,
        states=follower.states,
        attention=follower.attention,
        vocab_size=vocabulary(captured, captured.ids()) or num_logits,
        num_logits=num_logits,
        max_length=length,
        module_length=captured.limits.get(captured.seq),
        all_rows=all_rows,
        keeps_window=_keeps_window(follower),
    )


def _keeps_window(f: Follower) -> int | None:
    """The widest window, if every entry has one and nothing asks where in the cache a key stands."""
    windows = [entry.window for entry in f.entries]
    if f.by_key or not windows or None in windows:
        return None
    return max(window for window in windows if window is not None)
