"""`export_model`: the stages of an export in order, and nothing else."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from tfinfer.errors import IncompatibleModelError, InputError, ProofError, ProviderError
from tfinfer.integrity import sha256
from tfinfer.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    CacheSpec,
    DecoderRoles,
    FileSpec,
    GraphSpec,
    Manifest,
    ProofSpec,
    SourceSpec,
    TensorSpec,
    TextSpec,
    TokenIds,
)  # fmt: skip
from tfinfer.proof import golden
from tfinfer.proof.cases import grid
from tfinfer.proof.prove import GREEDY_TOKENS, Verdict, prove
from tfinfer.session.decoder import Decoder
from tfinfer.version import __version__

from .capture import DEFAULT_MAX_LENGTH, Captured, capture
from .folder import check_target, new_folder
from .passes import half, pipeline
from .report import ExportReport as ExportReport
from .report import summarise_attention
from .sources import Source
from .sources.source import from_module
from .verify import Reference

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FLAVORS = ("ort", "standard")
KINDS = ("auto", "decoder")
# The oldest onnxruntime that computes an operator right, by running folders on 1.20 to 1.31: before 1.28 a ragged step
# of Attention is wrong, before 1.25 TensorScatter has no kernel, before 1.24 GroupQueryAttention's window is one off.
LEAST_RUNTIME = {"Attention": "1.28", "TensorScatter": "1.25", "": "1.24"}
Progress = Callable[[str], None]


def export_model(
    module: nn.Module | Source,
    out: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    dtype: str = "fp32",
    flavor: str = "ort",
    kind: str = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage: None,
) -> ExportReport:
    """Export a causal decoder with a cache that it never mentions, and prove the result.

    Args:
        module: takes input_ids (batch, seq) int64 and returns logits (batch, seq, vocab); nothing else is asked of it.
        out: the folder to make; whole or not at all.
        max_length: the longest sequence; by default the module's own, at most 4096.
        dtype: "fp32", "fp16" or "bf16", of weights, cache and most activations.
        flavor: "ort" (GroupQueryAttention where it fits) or "standard" (ONNX operators only).
        tokenizer: a tokenizer.json to take along.

    Raises CaptureError where the module cannot be followed, ProofError where the graph computes something else,
    SourceError and TargetError for what cannot be read or written. Nothing is written unless all of it succeeds.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("flavor", flavor, FLAVORS), ("kind", kind, KINDS)):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
    check_max_length(max_length)
    target = Path(out)
    check_target(target, overwrite)
    source = module if isinstance(module, Source) else from_module(module, Path(tokenizer) if tokenizer else None)
    return _Export(source, target, dtype, flavor, max_length, progress).run(overwrite)


def _insist(verdict: Verdict) -> None:
    if not verdict.passed:
        told = "\n".join(verdict.lines())
        raise ProofError(f"the graph does not compute what the module computes; nothing was written\n{told}")


def check_max_length(max_length: int | None) -> None:
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2):
        raise InputError(f"expected max_length to be a whole number of at least 2, got {max_length!r}")


class _Export:
    """One export: what it was asked for, and how long each stage took."""

    def __init__(
        self, source: Source, target: Path, dtype: str, flavor: str, max_length: int | None, progress: Progress
    ) -> None:
        self.source, self.target, self.dtype, self.flavor, self.max_length = source, target, dtype, flavor, max_length
        self._progress = progress
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", time.perf_counter()

    def stage(self, name: str) -> None:
        """A new stage begins."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = round(now - self._since, 3)
        self._stage, self._since = name, now
        if name:
            self._progress(name)

    def run(self, overwrite: bool) -> ExportReport:
        with new_folder(self.target, overwrite) as folder:
            self.stage("capture")
            captured = capture(self.source.module, max_length=self._longest(), flavor=self.flavor)
            self.stage("passes")
            pipeline.run(captured.model)
            self.stage("write")
            ir.save(captured.model, folder / "decoder.onnx", external_data="weights.bin")
            self._copy_text(folder)
            draft = self._manifest(captured, folder)
            self.stage("proof")
            verdicts, proof = self._prove(captured, draft, folder)
            self.stage("seal")
            manifest = self._manifest(captured, folder, proof)
            (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        self.stage("")
        lengths = [n for n in (self.source.max_length, captured.module_length) if n is not None]
        return ExportReport(self.target, manifest, verdicts, self.seconds, min(lengths, default=None))

    def _longest(self) -> int | None:
        """The length asked for, or the source's own where that is short enough to be proved without asking."""
        own = self.source.max_length
        if self.max_length is not None and own is not None and self.max_length > own:
            raise InputError(
                f"max_length {self.max_length} is longer than the model's own longest length, {own}: give {own} or less"
            )
        return own if self.max_length is None and own is not None and own <= DEFAULT_MAX_LENGTH else self.max_length

    # -- proof --------------------------------------------------------------------------------------------------
    def _prove(self, captured: Captured, draft: Manifest, folder: Path) -> tuple[tuple[Verdict, ...], ProofSpec]:
        """Prove the float32 graph strictly; then, for a half width, write it and measure what the width costs."""
        expectations = self._expectations(captured)
        golden.save(folder / golden.FILE_NAME, expectations)
        verdicts, not_run = [self._verdict(draft, folder, "float32", expectations)], ""
        _insist(verdicts[0])
        if self.dtype != "fp32":
            half.run(captured.model, DTYPES[self.dtype])
            (folder / "weights.bin").unlink()
            ir.save(captured.model, folder / "decoder.onnx", external_data="weights.bin")
            narrow, not_run = self._narrow_verdict(captured, folder, expectations)
            verdicts += narrow
        last = verdicts[-1]
        _insist(last)
        proof = ProofSpec(last.device, last.measured(), last.greedy.identical, golden.FILE_NAME, not_run)
        return tuple(verdicts), proof

    def _expectations(self, captured: Captured) -> golden.Golden:
        """What the module itself computes for every case."""
        reference = Reference(self.source.module, captured.all_rows)
        cases = grid(captured.vocab_size, captured.max_length)
        expected = []
        for case in cases:
            self._progress(f"proof: PyTorch, {case.name}")
            expected.append(reference.expected(case))
        count = min(12, max(1, captured.max_length // 4))
        prompt = np.random.default_rng(1).integers(0, captured.vocab_size, count)
        tokens = reference.greedy(prompt, min(GREEDY_TOKENS, captured.max_length - count))
        return golden.Golden(cases, expected, prompt, tokens)

    def _verdict(
        self, manifest: Manifest, folder: Path, dtype: str, expectations: golden.Golden, device: str = "cpu"
    ) -> Verdict:
        decoder = Decoder(manifest, folder, device=device)
        try:
            return prove(decoder, dtype, expectations, lambda case: self._progress(f"proof: {case}"))
        finally:
            decoder.close()

    def _narrow_verdict(
        self, captured: Captured, folder: Path, expectations: golden.Golden
    ) -> tuple[list[Verdict], str]:
        """The proof of a half-width graph on the first device that runs it; none does for bfloat16 without CUDA."""
        manifest, dtype = self._manifest(captured, folder), NAMES[self.dtype]
        reasons = []
        for device in ("cuda", "cpu"):
            try:
                return [self._verdict(manifest, folder, dtype, expectations, device)], ""
            except (ProviderError, IncompatibleModelError) as error:
                reasons.append(f"{device}: {str(error).splitlines()[0].replace(f'{folder}{os.sep}', '')}")
        return [], f"proved in float32; not run as {dtype}, because no device here runs it ({'; '.join(reasons)})"

    # -- the folder ---------------------------------------------------------------------------------------------
    def _copy_text(self, folder: Path) -> None:
        source = self.source
        if source.tokenizer is not None:
            (folder / "tokenizer.json").write_bytes(source.tokenizer)
        if source.chat_template is not None:
            (folder / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
        if source.generation_config is not None:
            (folder / "generation_config.json").write_text(
                json.dumps(source.generation_config, indent=1), encoding="utf-8"
            )

    def _manifest(self, captured: Captured, folder: Path, proof: ProofSpec | None = None) -> Manifest:
        """The manifest; without a proof it is a draft, for opening the graph before, and hashes nothing."""
        graph, source = captured.model.graph, self.source
        names = {value.name for value in graph.inputs}
        width = (
            "float32"
            if not any(v.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for v in graph.inputs)
            else NAMES[self.dtype]
        )
        opset, operators = dict(graph.opset_imports), {node.op_type for node in graph}
        return Manifest(
            format_version=FORMAT_VERSION,
            kind="decoder",
            graphs={
                "decoder": GraphSpec(
                    "decoder.onnx", opset, tuple(map(_spec, graph.inputs)), tuple(map(_spec, graph.outputs))
                )
            },
            roles=DecoderRoles(
                input_ids="input_ids",
                attention_mask="attention_mask",
                logits="logits",
                position_ids="position_ids" if "position_ids" in names else None,
                logits_to_keep="logits_to_keep" if "logits_to_keep" in names else None,
            ),
            cache=tuple(
                CacheSpec(e.past, e.present, e.num_kv_heads, e.head_dim, width, e.window) for e in captured.entries
            ),
            vocab_size=captured.vocab_size,
            num_logits=captured.num_logits,
            max_length=captured.max_length,
            all_rows=captured.all_rows,
            dtype=width,
            flavor=self.flavor,
            attention=summarise_attention(captured.attention),
            token_ids=TokenIds(source.bos_id, source.eos_ids, source.pad_id),
            text=self._text(),
            requires={"onnxruntime": next(v for op, v in LEAST_RUNTIME.items() if op in operators or not op)},
            source=SourceSpec(source.kind, source.reference, {"tfinfer": __version__, **source.versions}, _now()),
            files={p.name: FileSpec(sha256(p) if proof else "", p.stat().st_size) for p in sorted(folder.iterdir())},
            proof=proof or ProofSpec("cpu", (), 0),
        )

    def _text(self) -> TextSpec:
        source = self.source
        return TextSpec(
            "tokenizer.json" if source.tokenizer is not None else None,
            "chat_template.jinja" if source.chat_template is not None else None,
            "generation_config.json" if source.generation_config is not None else None,
            source.special_tokens,
        )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    dtype = "float32" if value.dtype is ir.DataType.FLOAT else value.dtype.name.lower()
    return TensorSpec(str(value.name), dtype, shape)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
