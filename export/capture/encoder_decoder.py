"""Capture an encoder-decoder as two graphs: what depends on the source alone is made once, by the encoder's.

Among it are the keys and values of every cross-attention: they are found because nothing of the target leads to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from tfinfer.errors import CaptureError

from . import rules  # noqa: F401  (registers the allow-list)
from .capture import Captured, capture_decoder
from .encoder import follow_source
from .follow import AttentionReport
from .outputs import vocabulary
from .trace import Argument, Trace
from .tracing import trace
from .walk import follow_all


@dataclass
class CapturedPair:
    """The graphs of an encoder-decoder, and what the manifest says of them."""

    trace: Trace
    decoder: Captured
    encoder: ir.Model
    attention: list[AttentionReport]  # of the encoder
    cross: tuple[str, ...]  # the outputs of the one that are inputs of the other
    source_vocab_size: int
    max_source_length: int


def capture_encoder_decoder(
    module: nn.Module,
    arguments: list[Argument],
    *,
    max_length: int | None = None,
    max_source_length: int | None = None,
    flavor: str = "ort",
) -> CapturedPair:
    """Turn `module(source_ids, input_ids) -> logits` into an encoder's and a decoder's graph.

    source_ids: (batch, source); input_ids: (batch, seq); logits: (batch, seq, vocab). Raises CaptureError.
    """
    captured = trace(module, arguments)
    source = follow_source(captured, max_source_length, flavor)
    try:
        follow_all(source, captured.data - captured.target)
    except CaptureError:
        if not source.refusals:  # else they are told with those of the decoder
            raise
    decoder = capture_decoder(captured, max_length=max_length, flavor=flavor, source=source)
    emit = source.emit
    emit.given("input_ids")
    if not emit.outputs:
        raise CaptureError("no logits depend on the source: export the module as a decoder")
    return CapturedPair(
        trace=captured,
        decoder=decoder,
        encoder=emit.model("encoder", 24 if emit.needs_opset_24 else 21),
        attention=source.attention,
        cross=tuple(str(value.name) for value in emit.outputs),
        source_vocab_size=vocabulary(captured, captured.ids(source=True)) or decoder.vocab_size,
        max_source_length=source.max_length,
    )
