"""`tfinfer inspect`: what the manifest of a folder says. Opens no graph, so it needs no onnxruntime."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tfinfer.cli import options
from tfinfer.cli.console import many, say_json, size, table

if TYPE_CHECKING:
    from tfinfer.manifest import Manifest, TensorSpec
    from tfinfer.precision import WeightsSpec

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}


@click.command("inspect")
@options.folder
@click.option("--check", is_flag=True, help="Also compare every file with its SHA-256.")
@click.option("--nodes", is_flag=True, help="Also list the operators of each graph, layer by layer.")
@options.common
def command(folder: Path, check: bool, nodes: bool, as_json: bool) -> None:
    """Show what is in a folder.

    Kind, graphs, cache, pooling, sizes, where it came from and what its proof measured, all from its manifest.
    """
    from tfinfer.integrity import check_files
    from tfinfer.manifest import PROMPT, load_manifest
    from tfinfer.session import tuned
    from tfinfer.session.prompt import least_here

    manifest = load_manifest(folder)
    if check:
        check_files(folder, manifest)
        tuned.read(folder)
    if as_json:
        sizes = {"cache": memory_sizes(manifest), "file_bytes": _file_bytes(manifest), "checked": check}
        sizes |= {"prompts_from": least_here()} if PROMPT in manifest.graphs else {}
        say_json({"folder": str(folder), **sizes, "tuning": _tuning(folder), "manifest": dataclasses.asdict(manifest)})
        return
    here = [*_prompts(manifest), ("tuning", _tuning(folder))]
    rows = [*_rows(manifest), *here, *(_node_rows(manifest) if nodes else ())]
    table([("folder", str(folder)), *rows])
    if check:
        table([("checked", f"{many(len(manifest.files), 'file')} as they were exported")])


def _tuning(folder: Path) -> str:
    """Whether what `tfinfer tune` measured applies here; what is damaged is told, for the rest can still be shown."""
    from tfinfer.errors import ModelError
    from tfinfer.session import tuned

    try:
        return tuned.state(folder)
    except ModelError as error:
        return f"cannot be used: {error}"


def _prompts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Which graph reads prompts on this processor, of a folder that has one for it."""
    from tfinfer.manifest import PROMPT
    from tfinfer.session.prompt import least_here

    if PROMPT in manifest.graphs:
        least = least_here()
        few = f"{manifest.graphs[PROMPT].file} reads those of {least} tokens and more, by products in float32"
        yield "prompts", f"on this processor {few}" if least else "read by the decoder's graph on this processor"


def memory_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes that one sequence keeps: of its cache, of its states, and of what the encoder gave for its source."""
    per_token = sum(entry.num_kv_heads * entry.head_dim * BYTES[entry.dtype] for entry in manifest.cache)
    return {
        "bytes_per_token": per_token,
        "bytes_at_max_length": per_token * manifest.max_length,
        "state_bytes": sum(math.prod(state.shape) * BYTES[state.dtype] for state in manifest.states),
        "bytes_per_source_token": sum(
            math.prod(size for size in given.shape if isinstance(size, int)) * BYTES[given.dtype]
            for given in manifest.cross
        ),
    }


def _file_bytes(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files.values())


def _rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield from _kind_rows(manifest)
    yield "special ids", _special(manifest)
    yield "text", ", ".join(_text_files(manifest)) or "no tokenizer"
    for name, graph in manifest.graphs.items():
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in graph.opset.items())
        yield "graph", f"{name}: {graph.file} ({opsets})"
        for role, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            for tensor in _grouped(tensors):
                yield "graph", f"  {role} {tensor}"
    for attention in manifest.attention:
        reason = f": {attention.reason}" if attention.reason else ""
        yield "attention", f"{attention.count} x {attention.operator} ({attention.pattern}){reason}"
    yield from _memory_rows(manifest)
    yield from (("maps", f"{maps.name}: {many(len(maps.outputs), 'layer')}") for maps in manifest.maps)
    for name, file in manifest.files.items():
        yield "files", f"{name} {size(file.bytes)}"
    yield "files", f"{size(_file_bytes(manifest))} in all"
    yield from _origin_rows(manifest)
    yield from _proof_rows(manifest)


def _node_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The operators from one attention to the next; graphs of other exporters are not opened to count them."""
    for name, graph in manifest.graphs.items():
        total = sum(layer.count * sum(layer.operators.values()) for layer in graph.layers)
        yield "nodes", f"{name}: {many(total, 'node')}" if graph.layers else f"{name}: its exporter did not tell"
        for layer in graph.layers:
            listed = ", ".join(f"{count} {operator}" for operator, count in layer.operators.items())
            yield "nodes", f"  {layer.count} x {sum(layer.operators.values())}: {listed}"


def _shape(small: WeightsSpec) -> str:
    """Of which numbers weights of a few bits are made."""
    blocks = f"in blocks of {small.block_size}"
    if small.per_channel and small.bits == 8:
        told = f"int8 by channel, embedding {blocks}"
    elif small.per_channel:
        told = f"int{small.bits} {blocks}, head int8 by channel, embedding int8"
    else:
        told = f"int{small.bits} {blocks}, head and embedding int{small.head_bits}"
    if small.symmetric is False:
        told += ", with zero points"
    if small.wider or small.kept:
        wider = "in int8 by blocks" if small.per_channel else "wider in int8"
        told += f", {small.wider} of them {wider}, {small.kept} in float32"
    if small.calibration is not None:
        told += f", {small.quantiser} on {many(small.calibration_tokens, 'token')} of {small.calibration}"
    return told


def _kind_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What goes in and comes out, and how much of it."""
    source, target = manifest.max_source_length, f"up to {manifest.max_length} tokens"
    lengths = f"source up to {source} tokens, target {target}" if source else target
    yield "kind", f"{manifest.kind}, {manifest.dtype}, flavor {manifest.flavor}, {lengths}"
    if (small := manifest.weights) is not None:
        yield "weights", f"{_shape(small)}; {_first_choices(small.agreement)}"
    if (found := manifest.range) is not None:
        operators = f"{many(found.kept, 'operator')} float32 for values above {found.limit:,.0f}"
        yield "range", f"up to {found.largest:,.4g} in {many(found.tokens, 'token')} of {found.origin}; {operators}"
    ids = f"{manifest.vocab_size} ids in" if manifest.vocab_size else "takes no ids"
    first = f"{manifest.source_vocab_size} ids of a source in, " if manifest.source_vocab_size else ""
    last = f", {manifest.num_logits} logits out" if manifest.roles else ""
    yield "vocabulary", f"{first}{ids}{last}"
    if manifest.keeps_window:
        yield "window", f"the cache may forget what is more than {many(manifest.keeps_window, 'position')} back"
    if manifest.kind == "encoder":
        yield "pooling", _pooling(manifest)


def _first_choices(agreement: float) -> str:
    return f"{agreement:.1%} of the proof's first choices are PyTorch's"


def _pooling(manifest: Manifest) -> str:
    """What `encode` does with the outputs when it is not told."""
    roles, own = manifest.encoder, manifest.pooling
    if roles is None or (roles.hidden_states is None and roles.pooled is None):
        return "none: no hidden states and no pooled vector come out; run gives every output"
    if roles.hidden_states is None:
        mode = "the module's own"
    else:
        mode = own.mode if own else "mean, for the model names none"
    return mode + (", normalized" if own and own.normalize else "")


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


def _memory_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What a sequence keeps between steps; nothing for an encoder."""
    kinds = Counter((e.num_kv_heads, e.head_dim, e.dtype, e.window) for e in manifest.cache)
    for (heads, width, dtype, window), count in kinds.items():
        seen = f", window {window}" if window else ""
        yield "cache", f"{many(count, 'buffer')} of {many(heads, 'head')} x {width}, {dtype}{seen}"
    sizes = memory_sizes(manifest)
    if manifest.cache_mode != "in place":
        yield "cache", f"{manifest.cache_mode}: every step copies it, and rows of different lengths run one by one"
    if manifest.cache:
        whole = size(sizes["bytes_at_max_length"])
        yield "cache", f"{sizes['bytes_per_token']} bytes per token, {whole} at {manifest.max_length} tokens"
    if (small := manifest.small_cache) is not None:
        wide = f", {many(small.kept, 'buffer')} as wide as before" if small.kept else ""
        yield "cache", f"ranges from {small.calibration}{wide}; {_first_choices(small.agreement)}"
    alike = Counter((state.shape, state.dtype) for state in manifest.states)
    for (shape, dtype), number in alike.items():
        yield "states", f"{many(number, 'state')} of ({', '.join(map(str, shape))}), {dtype}"
    if manifest.states:
        yield "states", f"{size(sizes['state_bytes'])} for each sequence, at any length"
    if manifest.cross:
        whole = size(sizes["bytes_per_source_token"] * manifest.max_source_length)
        each = f"{sizes['bytes_per_source_token']} bytes per source token"
        tensors = many(len(manifest.cross), "tensor")
        yield "cross", f"{tensors} from the encoder, {each}, {whole} at {manifest.max_source_length} tokens"


def _origin_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    from tfinfer.manifest import ADOPTED

    source = manifest.source
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    done = "adopted" if source.kind == ADOPTED else "exported"
    yield "source", f"{source.reference} ({source.kind}), {done} {source.created} with {versions}"
    yield "needs", ", ".join(f"{name} {version} or newer" for name, version in manifest.requires.items()) or "nothing"


def _proof_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    from tfinfer.proof.prove import reference_of

    proof = manifest.proof
    for case in proof.cases:
        yield "proof", f"{case.name}: {case.measure} {case.measured:.1e} (allowed {case.allowed:g})"
    golden = f"golden file {proof.golden}" if proof.golden else "no golden file"
    greedy = f"{proof.greedy_tokens} greedy tokens as {reference_of(manifest)}'s; " if proof.greedy_tokens else ""
    yield "proof", f"on {proof.device}: {greedy}{golden}"
    if proof.not_run:
        yield "proof", proof.not_run
