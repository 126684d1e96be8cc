"""A causal decoder: one graph for prefill and decode over a cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from tfinfer.errors import CaptureError
from tfinfer.manifest import CacheSpec, DecoderRoles, Manifest, StateSpec
from tfinfer.proof import golden
from tfinfer.proof.cases import Sources, grid
from tfinfer.proof.prove import GREEDY_TOKENS, Verdict, compared_as, open_session, prove

from ..capture import Captured, Observed, Trace, capture_decoder
from ..capture.modes import inference_mode_of
from ..capture.outputs import logits_node, vocabulary
from ..verify import Leak, Reference, find_leak, observe
from ..verify.reference import logits_of
from .job import Asked, Progress


class DecoderJob:
    """An export of `module(input_ids) -> logits`."""

    def __init__(self, module: nn.Module, captured: Trace, asked: Asked) -> None:
        self.module = module
        self.trace: Trace | None = captured
        leak = _find_leak(module, captured)
        try:
            self.captured = capture_decoder(captured, max_length=asked.max_length, flavor=asked.flavor)
        except CaptureError as refusal:  # it names the place, which the numbers cannot
            if leak is None or "\n" in str(refusal):
                raise
            raise CaptureError(f"{refusal}; {leak}") from refusal
        if leak is not None:
            raise CaptureError(str(leak))
        self.graphs: Mapping[str, ir.Model] = {"decoder": self.captured.model}
        self.attention, self.module_length = self.captured.attention, self.captured.module_length

    def fields(self, dtype: str) -> dict[str, Any]:
        return {"kind": "decoder", **decoder_fields(self.captured, dtype)}

    def expect(self, progress: Progress) -> golden.Golden:
        reference = Reference(self.module, self.captured.all_rows, num_logits=self.captured.num_logits)
        return expect(reference, self.captured, progress)

    def save(self, path: Path, expected: golden.Golden) -> None:
        golden.save(path, expected)

    def verdict(
        self, manifest: Manifest, folder: Path, expected: golden.Golden, device: str, progress: Progress
    ) -> Verdict:
        return generating_verdict(manifest, folder, expected, device, progress)

    def observe(self) -> Observed | None:
        """Once: the trace, hundreds of megabytes of it, is let go before the proof."""
        traced, self.trace = self.trace, None
        return None if traced is None else observe(traced, self.captured.max_length)


def expect(
    reference: Reference, captured: Captured, progress: Progress, sources: Sources | None = None
) -> golden.Golden:
    """What a module that generates computes for the cases of its proof; `sources`: those of an encoder-decoder."""
    cases = grid(captured.vocab_size, captured.max_length, keeps=bool(captured.states), sources=sources)
    expected = []
    for case in cases:
        progress(f"proof: PyTorch, {case.name}")
        try:
            expected.append(reference.expected(case))
        except (IndexError, RuntimeError):
            reference.check_takes(captured.max_length, None if sources is None else sources.max_length)
            raise
    count = min(12, max(1, captured.max_length // 4))
    prompt, source = np.random.default_rng(1).integers(0, captured.vocab_size, count), None
    if sources is not None:
        source = np.random.default_rng(2).integers(0, sources.vocab_size, min(11, sources.max_length))
    tokens = reference.greedy(prompt, min(GREEDY_TOKENS, captured.max_length - count), source)
    return golden.Golden(cases, expected, prompt, tokens, source)


def _find_leak(module: nn.Module, captured: Trace) -> Leak | None:
    """What moves that must not when a token changes; None where the module cannot be run so, which others say."""
    node = logits_node(captured)
    ids, width = vocabulary(captured, captured.ids()), captured.shape(node)[-1]

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with inference_mode_of(module):
            return logits_of(module(batch), width)

    try:
        return find_leak(forward, ids or width, captured.limits.get(captured.seq))
    except (IndexError, RuntimeError):
        return None


def decoder_fields(captured: Captured, dtype: str) -> dict[str, Any]:
    """What the manifest says of a decoder's graph."""
    names = {value.name for value in captured.model.graph.inputs}

    def given(name: str) -> str | None:
        return name if name in names else None

    kinds = {state.past: str(state.dtype).removeprefix("torch.") for state in captured.states}
    return {
        "roles": DecoderRoles(
            input_ids="input_ids",
            attention_mask="attention_mask",
            logits="logits",
            position_ids=given("position_ids"),
            logits_to_keep=given("logits_to_keep"),
            source_mask=given("source_mask"),
        ),
        "cache": tuple(
            CacheSpec(e.past, e.present, e.num_kv_heads, e.head_dim, dtype, e.window) for e in captured.entries
        ),
        "states": tuple(
            StateSpec(s.past, s.present, s.shape, dtype if kinds[s.past] == "float32" else kinds[s.past])
            for s in captured.states
        ),
        "vocab_size": captured.vocab_size,
        "num_logits": captured.num_logits,
        "max_length": captured.max_length,
        "all_rows": captured.all_rows,
        "keeps_window": captured.keeps_window,
    }


def generating_verdict(
    manifest: Manifest, folder: Path, expected: golden.Golden, device: str, progress: Progress
) -> Verdict:
    """Prove the graphs of a folder that generates."""
    session = open_session(manifest, folder, device=device)
    try:
        return prove(session, compared_as(manifest), expected, lambda case: progress(f"proof: {case}"))
    finally:
        session.close()
