"""`tfinfer inspect`: what the manifest of a folder says. Opens no graph, so it needs no onnxruntime."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tfinfer.cli import options
from tfinfer.cli.console import many, say_json, size, table

if TYPE_CHECKING:
    from tfinfer.manifest import Manifest, TensorSpec

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}


@click.command("inspect")
@options.folder
@click.option("--check", is_flag=True, help="Also compare every file with its SHA-256.")
@options.common
def command(folder: Path, check: bool, as_json: bool) -> None:
    """Show what is in a folder.

    Kind, graphs, cache, sizes, where it came from and what its proof measured, all from its manifest.
    """
    from tfinfer.integrity import check_files
    from tfinfer.manifest import load_manifest

    manifest = load_manifest(folder)
    if check:
        check_files(folder, manifest)
    if as_json:
        sizes = {"cache": cache_sizes(manifest), "file_bytes": _file_bytes(manifest), "checked": check}
        say_json({"folder": str(folder), **sizes, "manifest": dataclasses.asdict(manifest)})
        return
    table([("folder", str(folder)), *_rows(manifest)])
    if check:
        table([("checked", f"{many(len(manifest.files), 'file')} as they were exported")])


def cache_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of the cache of one sequence."""
    per_token = sum(entry.num_kv_heads * entry.head_dim * BYTES[entry.dtype] for entry in manifest.cache)
    return {"bytes_per_token": per_token, "bytes_at_max_length": per_token * manifest.max_length}


def _file_bytes(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files.values())


def _rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "kind", f"{manifest.kind}, {manifest.dtype}, flavor {manifest.flavor}, up to {manifest.max_length} tokens"
    yield "vocabulary", f"{manifest.vocab_size} ids in, {manifest.num_logits} logits out"
    yield "special ids", _special(manifest)
    yield "text", ", ".join(_text_files(manifest)) or "no tokenizer: ids in, ids out"
    for name, graph in manifest.graphs.items():
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in graph.opset.items())
        yield "graph", f"{name}: {graph.file} ({opsets})"
        for role, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            for tensor in _grouped(tensors):
                yield "graph", f"  {role} {tensor}"
    for attention in manifest.attention:
        reason = f": {attention.reason}" if attention.reason else ""
        yield "attention", f"{attention.count} x {attention.operator} ({attention.pattern}){reason}"
    yield from _cache_rows(manifest)
    for name, file in manifest.files.items():
        yield "files", f"{name} {size(file.bytes)}"
    yield "files", f"{size(_file_bytes(manifest))} in all"
    yield from _origin_rows(manifest)
    yield from _proof_rows(manifest)


def _special(manifest: Manifest) -> str:
    ids = manifest.token_ids
    eos = ",".join(map(str, ids.eos)) or "none"
    return f"bos {'none' if ids.bos is None else ids.bos}, eos {eos}, pad {'none' if ids.pad is None else ids.pad}"


def _text_files(manifest: Manifest) -> list[str]:
    text = manifest.text
    return [name for name in (text.tokenizer, text.chat_template, text.generation_config) if name]


def _grouped(tensors: tuple[TensorSpec, ...]) -> Iterator[str]:
    """A line for each tensor; those that differ in a number of their name alone share one."""
    alike: dict[tuple[str, str, Any], list[str]] = {}
    for tensor in tensors:
        pattern = ".".join("*" if part.isdigit() else part for part in tensor.name.split("."))
        alike.setdefault((pattern, tensor.dtype, tensor.shape), []).append(tensor.name)
    for (pattern, dtype, shape), names in alike.items():
        count = f" x {len(names)}" if len(names) > 1 else ""
        yield f"{pattern if count else names[0]}{count}: {dtype} ({', '.join(map(str, shape))})"


def _cache_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    kinds = Counter((e.num_kv_heads, e.head_dim, e.dtype, e.window) for e in manifest.cache)
    for (heads, width, dtype, window), count in kinds.items():
        seen = f", window {window}" if window else ""
        yield "cache", f"{many(count, 'buffer')} of {many(heads, 'head')} x {width}, {dtype}{seen}"
    sizes = cache_sizes(manifest)
    whole = size(sizes["bytes_at_max_length"])
    yield "cache", f"{sizes['bytes_per_token']} bytes per token, {whole} at {manifest.max_length} tokens"


def _origin_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    source = manifest.source
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    yield "source", f"{source.reference} ({source.kind}), exported {source.created} with {versions}"
    yield "needs", ", ".join(f"{name} {version} or newer" for name, version in manifest.requires.items()) or "nothing"


def _proof_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    proof = manifest.proof
    for case in proof.cases:
        yield "proof", f"{case.name}: {case.measure} {case.measured:.1e} (allowed {case.allowed:g})"
    golden = f"golden file {proof.golden}" if proof.golden else "no golden file"
    yield "proof", f"on {proof.device}: {proof.greedy_tokens} greedy tokens as PyTorch's; {golden}"
    if proof.not_run:
        yield "proof", proof.not_run
