"""`export_model`: the stages of an export in order, and nothing else."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from tfinfer.errors import IncompatibleModelError, InputError, ProofError, ProviderError
from tfinfer.integrity import sha256
from tfinfer.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    FileSpec,
    GraphSpec,
    Manifest,
    MapSpec,
    ProofSpec,
    SourceSpec,
    TensorSpec,
    TextSpec,
    TokenIds,
)  # fmt: skip
from tfinfer.precision import RangeSpec, SmallCacheSpec, WeightsSpec
from tfinfer.proof import golden
from tfinfer.proof.prove import Verdict
from tfinfer.version import __version__

from . import graph_files, neighbours, small_cache
from .calibration import Calibration, read_text
from .capture import DEFAULT_MAX_LENGTH, Observed
from .capture.plain import InputSpec, parse_input
from .choices import Chosen, choose
from .folder import check_target, new_folder
from .kinds import Asked, Job, open_job
from .kinds.job import Progress
from .memory import give_back
from .narrow import half_width
from .operators import layers_of
from .passes import joined, pipeline
from .report import ExportReport as ExportReport
from .report import summarise_attention
from .runtimes import least_runtime
from .small import RECIPES, Shrinking, Small
from .small_cache import Rounding
from .sources import Source
from .sources.source import from_module
from .verify import check_observed

NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_model(
    module: nn.Module | Source,
    out: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    max_source_length: int | None = None,
    dtype: str = "fp32",
    flavor: str = "ort",
    kind: str = "auto",
    inputs: Sequence[InputSpec | str] = (),
    start_ids: Sequence[int] | None = None,
    attention: bool = True,
    also: Sequence[str] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    block_size: int | None = None,
    per_channel: bool = False,
    head_bits: int | None = None,
    symmetric: bool = True,
    keep: Sequence[str] = (),
    keep_agreement: float | None = None,
    activations: str = "fp32",
    quantiser: str | None = None,
    cache: str = "float32",
    calibration: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage: None,
) -> ExportReport:
    """Export a module, a decoder's or encoder-decoder's with a cache that it never mentions, and prove the result.

    Args:
        module: input_ids (batch, seq) int64 to logits (batch, seq, vocab), or to hidden states (batch, seq, hidden) or
            anything else, which makes it an encoder; source and target ids to logits: an encoder-decoder.
        out: the folder to make; whole or not at all.
        max_length, max_source_length: the longest sequence; by default the module's own, at most 4096.
        dtype: "fp32", "fp16" or "bf16", of weights, cache and most activations; "int8" or "int4": weights by blocks of
            128, activations stay float32. All but fp32 for decoders only.
        flavor: "ort" (GroupQueryAttention where it fits) or "standard" (ONNX operators only, for decoders).
        kind: "decoder", "encoder", "encoder-decoder", or "auto": what the source says, or else its trace shows.
        inputs: of a module that takes something else than ids, as "pixels:float32[batch,3,height,width]".
        start_ids: what the target of an encoder-decoder begins with; by default what the source or its tokenizer says.
        attention: whether to add the small graph that `tfinfer attention` asks.
        also: "genai" and "optimum": write what onnxruntime-genai and optimum need to run the folder as well.
        tokenizer: a tokenizer.json to take along.
        adapters: folders of PEFT adapters (LoRA) to merge into a live module's weights; the module keeps its own.
        head_bits: of the last product and of the embedding: 8, the default of int8 and int4, or with int4 also 4.
        block_size, symmetric, keep, keep_agreement: of int8 and int4: numbers that share a scale (32, 64 or 128),
            whether to do without zero points, patterns of names of weights that stay float32, and the least share of
            the proof's first choices that must be the module's, for which weights are widened where that helps most.
        per_channel: of int8, and of int4's head: a scale for each channel in place of blocks, to be fast on a CPU.
        activations: of int8 and int4: "fp32", or for CUDA "fp16" or "bf16", of cache and scales too.
        quantiser: "rtn" rounds each weight to the nearest number, "gptq", the default of int4, for its inputs on text.
        cache: "float32" or "int8": keys and values of a decoder rounded to 8 bits, with a scale for each feature.
        calibration: a file with that text, also for an int8 cache; needs a tokenizer. The model writes its own if None.

    Raises CaptureError where the module cannot be followed, ProofError where the graph computes something else,
    SourceError and TargetError for what cannot be read or written. Nothing is written unless all of it succeeds.
    """
    small = Small(block_size, symmetric, tuple(keep), keep_agreement, quantiser, head_bits, per_channel)
    chosen = choose(dtype, flavor, kind, activations, small, cache, calibration, also)
    check_length("max_length", max_length)
    check_length("max_source_length", max_source_length)
    target = Path(out)
    check_target(target, overwrite)
    if isinstance(module, Source):
        source = module
    else:
        source = from_module(module, Path(tokenizer) if tokenizer else None, [Path(folder) for folder in adapters])
    starts = tuple(source.decoder_start if start_ids is None else start_ids) or _bos(source)
    specs = tuple(parse_input(given) if isinstance(given, str) else given for given in inputs)
    asked = Asked(flavor, _longest(source, max_length), max_source_length or source.max_source_length, specs, starts)
    extra = neighbours.check_names(also)
    with torch.autocast("cpu", enabled=False):  # the user's own, around the call
        return _Export(source, target, chosen, kind, asked, attention, extra, progress).run(overwrite)


def _bos(source: Source) -> tuple[int, ...]:
    return () if source.bos_id is None else (source.bos_id,)


def _longest(source: Source, asked: int | None) -> int | None:
    """The length asked for, or the source's own where that is short enough to be proved without asking."""
    own = source.max_length
    if asked is not None and own is not None and asked > own:
        raise InputError(f"max_length {asked} is longer than the model's own longest length, {own}: give {own} or less")
    return own if asked is None and own is not None and own <= DEFAULT_MAX_LENGTH else asked


def _insist(verdict: Verdict) -> None:
    if not verdict.passed:
        told = "\n".join(verdict.lines())
        raise ProofError(f"the graph does not compute what the module computes; nothing was written\n{told}")


def check_length(name: str, value: int | None) -> None:
    """Raises InputError unless a length is None or a whole number of at least 2."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
        raise InputError(f"expected {name} to be a whole number of at least 2, got {value!r}")


class _Export:
    """One export: what it was asked for, and how long each stage took."""

    def __init__(
        self, source: Source, target: Path, chosen: Chosen, kind: str, asked: Asked, attention: bool,
        also: Sequence[str], progress: Progress,
    ) -> None:  # fmt: skip
        self.source, self.target, self.kind, self.asked = source, target, kind, asked
        self.chosen, self.dtype, self.width = chosen, chosen.dtype, chosen.width
        self.small_cache: SmallCacheSpec | None = None  # how it was made small
        self.weights: WeightsSpec | None = None  # how they were made small
        self.range: RangeSpec | None = None  # how large the values of an fp16 graph became in float32
        self.attention, self.also = attention, also
        self._progress = progress
        self.calibration = Calibration(None)
        self.maps: tuple[MapSpec, ...] = ()
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
            job = open_job(self.source, self.kind, self.asked)
            if self.dtype != "fp32" and "encoder" in job.graphs:
                raise InputError(f"{self.dtype} is for decoders: export this module in fp32")
            graphs = dict(job.graphs)
            self.stage("passes")
            for model in graphs.values():
                pipeline.run(model, self.asked.flavor, narrow=self.width != "fp32")
            rounding = Rounding(job) if self.chosen.cache == "int8" else None
            shrinking = self._shrinking(graphs, folder)
            self.calibration = self._calibration(job)
            self.stage("write")
            give_back(self.source.module)  # what capturing took
            observed = job.observe() if self.attention and self.dtype == "fp32" else None
            graphs |= self._observed(observed, graphs)
            graph_files.save(graphs, folder)
            if observed is not None:
                check_observed(observed, folder / "attention.onnx")
                observed = None
            self._copy_text(folder)
            draft = self._manifest(job, graphs, folder)
            neighbours.write(self.also, draft, folder)
            self.stage("proof")
            verdicts, proof = self._prove(job, graphs, draft, folder, rounding, shrinking)
            self.stage("seal")
            manifest = self._manifest(job, graphs, folder, proof)
            (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        self.stage("")
        lengths = [n for n in (self.source.max_length, job.module_length) if n is not None]
        return ExportReport(self.target, manifest, verdicts, self.seconds, min(lengths, default=None))

    def _observed(self, observed: Observed | None, others: dict[str, ir.Model]) -> dict[str, ir.Model]:
        """The graph of attention's weights; narrow weights are not shared with it, so it is left out there."""
        if observed is None:
            return {}
        self.maps = tuple(MapSpec(name, tuple(outputs)) for name, outputs in observed.maps.items())
        pipeline.run(observed.model, self.asked.flavor)
        joined.take_parts(observed.model, others.values())
        return {"attention": observed.model}

    def _shrinking(self, graphs: dict[str, ir.Model], folder: Path) -> Shrinking | None:
        if self.dtype not in RECIPES:
            return None
        return Shrinking(graphs, folder, self.chosen.small, self.dtype, reads_prompts=self.width == "fp32")

    # -- proof --------------------------------------------------------------------------------------------------
    def _prove(
        self,
        job: Job,
        graphs: dict[str, ir.Model],
        draft: Manifest,
        folder: Path,
        rounding: Rounding | None,
        shrinking: Shrinking | None,
    ) -> tuple[tuple[Verdict, ...], ProofSpec]:
        """Prove the float32 graphs strictly; then, for a half width, write them and measure what the width costs."""
        expected = job.expect(self._progress)
        job.save(folder / golden.FILE_NAME, expected)
        give_back(self.source.module)  # what PyTorch's passes took, before onnxruntime takes its own
        try:
            verdicts, not_run = [job.verdict(draft, folder, expected, "cpu", self._progress)], ""
        except InputError as error:
            raise ProofError(f"the exported graph does not run; nothing was written: {error}") from error
        _insist(verdicts[0])
        if rounding is not None:
            verdicts.append(self._round_cache(rounding, job, graphs, draft, folder, expected))
        if shrinking is not None:
            verdicts.append(self._make_small(shrinking, job, graphs, expected))
        if self.width != "fp32":
            self.range = half_width(graphs, self.width, draft, folder)
            (folder / graph_files.WEIGHTS).unlink()
            graph_files.save(graphs, folder)
            narrow, not_run = self._narrow_verdict(job, graphs, folder, expected)
            verdicts += narrow
            if self.weights is not None and narrow:
                self.weights = replace(self.weights, agreement=round(narrow[0].agreement, 4))
        last = verdicts[-1]
        _insist(last)
        greedy = last.greedy.identical if last.greedy else 0
        return tuple(verdicts), ProofSpec(last.device, last.measured(), greedy, golden.FILE_NAME, not_run)

    def _round_cache(
        self, rounding: Rounding, job: Job, graphs: dict[str, ir.Model], draft: Manifest, folder: Path,
        expected: golden.Golden,
    ) -> Verdict:  # fmt: skip
        """A cache of 8 bits, in the folder and in `graphs`; what they compute, before weights are made small."""
        self._progress("proof: the ranges of the cache")
        told = self.small_cache = rounding.run(graphs, draft, folder, self.calibration)
        verdict = job.verdict(self._manifest(job, graphs, folder), folder, expected, "cpu", self._progress)
        _insist(verdict)
        small_cache.check_agreement(verdict.agreement, self.chosen.small.agreement)
        self.small_cache = replace(told, agreement=round(verdict.agreement, 4))
        return verdict

    def _calibration(self, job: Job) -> Calibration:
        """The text for weights and cache. Raises InputError for a file that cannot be used."""
        file, fields = self.chosen.calibration, job.fields("float32")
        if file is None:
            return Calibration(None)
        return Calibration(read_text(file, self.source.tokenizer, fields["max_length"], fields["vocab_size"]))

    def _make_small(
        self, shrinking: Shrinking, job: Job, graphs: dict[str, ir.Model], expected: golden.Golden
    ) -> Verdict:
        """Weights of a few bits, in the folder and in `graphs`; what they compute."""

        def prove(tried: dict[str, ir.Model], spec: WeightsSpec, brief: bool) -> Verdict:
            self.weights = spec
            wanted = expected.brief() if brief else expected
            manifest = self._manifest(job, tried, shrinking.folder)
            return job.verdict(manifest, shrinking.folder, wanted, "cpu", self._progress)

        if shrinking.quantiser == "gptq":
            self._progress("proof: calibrating")
            shrinking.calibrate(self._manifest(job, graphs, shrinking.folder), self.calibration)
        verdict = shrinking.run(prove)
        self.weights = shrinking.spec
        graphs.update(shrinking.graphs)
        return verdict

    def _narrow_verdict(
        self, job: Job, graphs: dict[str, ir.Model], folder: Path, expected: Any
    ) -> tuple[list[Verdict], str]:
        """The proof of a half-width graph on the first device that runs it; none does for bfloat16 without CUDA."""
        manifest, dtype = self._manifest(job, graphs, folder), NAMES[self.width]
        reasons = []
        for device in ("cuda", "cpu"):
            try:
                return [job.verdict(manifest, folder, expected, device, self._progress)], ""
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

    def _manifest(
        self, job: Job, graphs: dict[str, ir.Model], folder: Path, proof: ProofSpec | None = None
    ) -> Manifest:
        """The manifest; without a proof it is a draft, for opening the graphs before, and hashes nothing."""
        source = self.source
        floats = {value.dtype for model in graphs.values() for value in model.graph.inputs}
        width = NAMES[self.width] if floats & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} else "float32"
        fields = job.fields(width)
        if self.small_cache is not None:
            fields["cache"] = small_cache.as_in_graph(fields["cache"], graphs["decoder"])
        return Manifest(
            format_version=FORMAT_VERSION,
            graphs={name: _graph(name, model) for name, model in graphs.items()},
            dtype=width,
            weights=self.weights,
            range=self.range,
            small_cache=self.small_cache,
            flavor=self.asked.flavor,
            attention=summarise_attention(job.attention),
            token_ids=TokenIds(
                source.bos_id,
                source.eos_ids,
                source.pad_id,
                self.asked.start_ids if fields["kind"] == "encoder-decoder" else (),
                source.forced_eos,
                source.suppressed,
            ),
            text=self._text(),
            requires={"onnxruntime": least_runtime(graphs.values())},
            source=SourceSpec(source.kind, source.reference, {"tfinfer": __version__, **source.versions}, _now()),
            files={p.name: FileSpec(sha256(p) if proof else "", p.stat().st_size) for p in sorted(folder.iterdir())},
            proof=proof or ProofSpec("cpu", (), 0),
            pooling=source.pooling if fields["kind"] == "encoder" else None,
            maps=self.maps,
            **fields,
        )

    def _text(self) -> TextSpec:
        source = self.source
        return TextSpec(
            "tokenizer.json" if source.tokenizer is not None else None,
            "chat_template.jinja" if source.chat_template is not None else None,
            "generation_config.json" if source.generation_config is not None else None,
            source.special_tokens,
        )


def _graph(name: str, model: ir.Model) -> GraphSpec:
    graph = model.graph
    opset = dict(graph.opset_imports)
    inputs, outputs = tuple(map(_spec, graph.inputs)), tuple(map(_spec, graph.outputs))
    return GraphSpec(f"{name}.onnx", opset, inputs, outputs, layers_of(graph))


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    dtype = "float32" if value.dtype is ir.DataType.FLOAT else value.dtype.name.lower()
    return TensorSpec(str(value.name), dtype, shape)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
