"""An encoder-decoder: what depends on the source alone in one graph, the rest over a cache in another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from tfinfer.errors import InputError
from tfinfer.manifest import CrossSpec, EncoderRoles, Manifest
from tfinfer.proof import golden
from tfinfer.proof.cases import Sources
from tfinfer.proof.prove import Verdict

from ..capture import Observed, capture_encoder_decoder
from ..verify import Reference, observe
from .decoder import decoder_fields, expect, generating_verdict
from .job import Asked, Progress

if TYPE_CHECKING:
    from ..sources.forms import PairForm


class PairJob:
    """An export of `module(source_ids, input_ids) -> logits`."""

    def __init__(self, form: PairForm, asked: Asked) -> None:
        if not asked.start_ids:
            raise InputError(
                "an encoder-decoder needs the id that its target begins with, and neither the source nor a tokenizer's "
                "bos_token says one: give start_ids=[...] or --start-ids"
            )
        self.form, self.start = form, asked.start_ids
        self.pair = capture_encoder_decoder(
            form.module,
            list(form.arguments),
            max_length=asked.max_length,
            max_source_length=asked.max_source_length,
            flavor=asked.flavor,
        )
        self.graphs: Mapping[str, ir.Model] = {"encoder": self.pair.encoder, "decoder": self.pair.decoder.model}
        self.attention = [*self.pair.attention, *self.pair.decoder.attention]
        self.module_length = self.pair.decoder.module_length

    def fields(self, dtype: str) -> dict[str, Any]:
        outputs = {str(value.name): value for value in self.pair.encoder.graph.outputs}
        return {
            "kind": "encoder-decoder",
            **decoder_fields(self.pair.decoder, dtype),
            "encoder": EncoderRoles(input_ids="input_ids"),
            "cross": tuple(_cross(name, outputs[name], dtype) for name in self.pair.cross),
            "source_vocab_size": self.pair.source_vocab_size,
            "max_source_length": self.pair.max_source_length,
        }

    def expect(self, progress: Progress) -> golden.Golden:
        source_name, target_name = (argument.name for argument in self.form.arguments)
        reference = Reference(self.form.module, self.pair.decoder.all_rows, target_name, source_name)
        sources = Sources(self.pair.source_vocab_size, self.pair.max_source_length)
        return expect(reference, self.pair.decoder, progress, sources)

    def save(self, path: Path, expected: golden.Golden) -> None:
        golden.save(path, expected)

    def verdict(
        self, manifest: Manifest, folder: Path, expected: golden.Golden, device: str, progress: Progress
    ) -> Verdict:
        return generating_verdict(manifest, folder, expected, device, progress)

    def observe(self) -> Observed | None:
        return observe(self.pair.trace, self.pair.decoder.max_length, self.pair.max_source_length)


def _cross(name: str, value: ir.Value, dtype: str) -> CrossSpec:
    """An axis that the encoder's graph calls its sequence is the decoder's source."""
    assert value.shape is not None
    assert value.dtype is not None
    dims = (dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    shape = tuple("source" if dim == "seq" else dim for dim in dims)
    kind = dtype if value.dtype.is_floating_point() else value.dtype.name.lower()
    return CrossSpec(name, kind, shape)
