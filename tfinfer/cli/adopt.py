"""`tfinfer adopt`: a folder of another exporter gets a manifest, without torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tfinfer.cli import options
from tfinfer.cli.console import Status, many, say, say_json, size

if TYPE_CHECKING:
    from tfinfer.adopt import Adopted


@click.command("adopt")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--file", metavar="NAME", help="Which graph is meant, where there are several, as model_q4.onnx.")
@click.option("--max-length", type=int, metavar="N", help="Longest sequence; default: what the folder's files say.")
@click.option("--unproved", is_flag=True, help="Adopt without comparing the graph with itself.")
@click.option("--overwrite", is_flag=True, help="Adopt a folder again.")
@click.option("-v", "--verbose", is_flag=True, help="A line on stderr for each stage.")
@options.common
def command(
    folder: Path, file: str | None, max_length: int | None, unproved: bool, overwrite: bool, verbose: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Take over a folder that another exporter made.

    DIR is one of the onnxruntime-genai model builder, of optimum, or in the layout of transformers.js. Its graph is run
    and compared with itself (cached with uncached passes, padded batches with single texts); then tfinfer.json is
    written into it, and every other command takes it.
    """
    from tfinfer.adopt import adopt

    with Status(verbose) as status:
        adopted = adopt(
            folder, file=file, max_length=max_length, proof=not unproved, overwrite=overwrite, progress=status
        )
    if as_json:
        verdict = dataclasses.asdict(adopted.verdict) if adopted.verdict else None
        say_json({"folder": str(folder), "manifest": dataclasses.asdict(adopted.manifest), "verdict": verdict})
    else:
        for line in _lines(adopted):
            say(line)


def _lines(adopted: Adopted) -> Iterator[str]:
    """What a user wants to know when it is done."""
    manifest, verdict = adopted.manifest, adopted.verdict
    graph = next(iter(manifest.graphs.values()))
    whole = size(sum(file.bytes for file in manifest.files.values()))
    cache = f", cache {manifest.cache_mode}" if manifest.cache else ""
    width = f"{manifest.kind}, {manifest.dtype}{cache}, up to {manifest.max_length} tokens"
    yield f"{adopted.folder}: {graph.file}, {whole}, {width}"
    if verdict is not None:
        worst = max(verdict.cases, key=lambda case: case.excess)
        found = f"{many(len(verdict.cases), 'case')}, {worst.measure} {worst.worst:.1e} at most"
        if verdict.greedy:
            found += f"; {verdict.greedy.identical} of {verdict.greedy.compared} greedy tokens are the whole pass's"
        yield f"compared with itself on {verdict.device}: {found}"
    if manifest.proof.not_run:
        yield f"note: {manifest.proof.not_run}"
    if manifest.appends_one:
        yield "note: behind others this graph takes one position at a time, so that a prompt that goes on is slow"
    prompt = '"..."' if manifest.text.tokenizer else "--ids 1,2,3"
    verb = "encode" if manifest.kind == "encoder" else "generate"
    yield f"next: tfinfer {verb} {shlex.quote(str(adopted.folder))} {prompt}"
