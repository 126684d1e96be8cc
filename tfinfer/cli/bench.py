"""`tfinfer bench`: how long starting, prefill and decoding take on this machine. `bench compare` has its own file."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tfinfer.cli import options
from tfinfer.cli.bench_compare import compare
from tfinfer.cli.console import Status, duration, many, remark, say_json, size, table
from tfinfer.errors import InputError


class Bench(click.Command):
    """`bench DIR`, `bench compare A B`, and `--json` with or without a file behind it."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["compare"]:
            return compare.make_context("bench compare", args[1:], parent, **extra)
        return super().make_context(info_name, _named_file(args), parent, **extra)


def _named_file(args: list[str]) -> list[str]:
    """`--json FILE.json` as an option of its own; a flag alone, or before the folder, stays what it is."""
    found: list[str] = []
    for place, argument in enumerate(args):
        if argument == "--":
            return found + args[place:]
        if argument.startswith("--json="):
            found += ["--json-file", argument.removeprefix("--json=")]
        elif found[-1:] == ["--json"] and argument.endswith(".json"):
            found[-1:] = ["--json-file", argument]
        else:
            found.append(argument)
    return found


@click.command("bench", cls=Bench)
@options.folder
@click.option("--prompt-length", type=int, metavar="N", help="Tokens of each prompt; default 128, or what fits.")
@click.option("--new-tokens", type=int, metavar="N", help="Tokens made after it; default 64, or what fits.")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Sequences decoded together.")
@click.option("--repeats", type=int, default=5, show_default=True, metavar="N", help="How often it is measured.")
@click.option("--warmup", type=int, default=1, show_default=True, metavar="N", help="Rounds before that, not counted.")
@click.option(
    "--starts", type=int, default=3, show_default=True, metavar="N", help="New processes, cold and warm each."
)
@click.option("--json-file", type=click.Path(path_type=Path), hidden=True)
@options.compute
@options.cuda_graph
@options.common
def command(
    folder: Path,
    device: str,
    threads: int | None,
    cuda_graph: bool,
    as_json: bool,
    json_file: Path | None,
    **asked: Any,
) -> None:
    """Measure start, prefill and decode; compare two measurements.

    The prompts are random ids and no id stops a sequence, so every run does the same work. Lengths that are asked for
    must fit into the model's longest length; the defaults shrink to fit.

    \b
    --json FILE.json                        keeps every sample in a file, beside the table
    tfinfer bench compare A.json B.json     compares two such files (see tfinfer bench compare --help)
    """
    from tfinfer.bench import run

    if json_file is not None:
        _check_file(json_file)
    with Status() as status:
        line = shlex.join(["tfinfer", *sys.argv[1:]])
        result = run(
            folder,
            device=device,
            threads=threads,
            cuda_graph=cuda_graph,
            command_line=line,
            progress=status,
            **asked,
        )
    if json_file is not None:
        _write(json_file, result)
    if as_json:
        say_json(result)
        return
    table(_rows(result))
    for warning in result["warnings"]:
        remark(f"warning: {warning}")


def _check_file(path: Path) -> None:
    """Raises InputError for a place where nothing can be written, before anything is measured."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path}: expected a file to write in a folder that is there")


def _write(path: Path, result: dict[str, Any]) -> None:
    made = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        made.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(made, path)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    environment, work = result["environment"], result["workload"]
    load1 = environment["load_average"]
    cores = f"{environment['cores']} processors" + (f", load {load1[0]:.2f}" if load1 else "")
    yield "machine", f"{environment['cpu']}, {cores}; {environment['platform']}"
    versions = f"onnxruntime {environment['onnxruntime']}, Python {environment['python']}, numpy {environment['numpy']}"
    yield "software", f"tfinfer {environment['tfinfer']}, {versions}"
    yield "model", f"{environment['model']}, {environment['dtype']}, manifest {environment['manifest_sha256'][:12]}"
    yield (
        "compute",
        f"{environment['device']} ({environment['device_reason']}); threads {environment['threads']['reason']}",
    )
    sizes = f"prompt {work['prompt_length']}, new {work['new_tokens']}, batch {work['batch']}"
    yield "workload", f"{sizes}; {many(work['repeats'], 'repeat')} after {many(work['warmup'], 'round')} of warm-up"
    load = result["load"]
    apart = f"import {duration(load['import_seconds'])}, hash check {duration(load['hash_check_seconds'])}"
    yield "load", f"open {duration(load['open_seconds'])}; apart from it: {apart}"
    for name, starts in result["starts"].items():
        if starts:
            yield "start", _start(name, starts)
    yield "prefill", _spread(result["prefill"])
    yield "decode", _spread(result["decode"])
    whole = result["end_to_end"]
    yield "end to end", _spread(whole)
    for name, key in (("first token", "first_token"), ("per token", "per_token"), ("token gaps", "between_tokens")):
        yield name, _percentiles(result[key]["seconds"])
    memory = result["memory"]
    kinds = (("after load", memory["rss_after_load"]), ("peak", memory["rss_peak"]))
    resident = [f"{name} {size(count)}" for name, count in kinds if count]
    yield "memory", f"resident {', '.join(resident) or 'unknown here'}; cache {size(memory['cache_bytes'])}"
    moved = result["moved"]
    apart = f"weights {size(moved['weight_bytes_per_step'])} and cache {size(moved['cache_bytes_per_step'])} a step"
    speed = f"{size(moved['bytes_per_second'])}/s at the median step"
    yield "moved", f"{size(moved['bytes_per_token'])} per token: {apart}; {speed}"
    yield from (("definitions", f"{name}: {text}") for name, text in result["definitions"].items())
    yield "at", f"{environment['utc']}, {environment['command_line']}"


def _spread(figures: dict[str, Any]) -> str:
    count = len(figures["samples"])
    return f"{figures['tokens_per_second']:.1f} tokens/s; {many(count, 'sample')}, {_percentiles(figures['seconds'])}"


def _start(name: str, starts: list[dict[str, Any]]) -> str:
    """Medians of some starts, and what they read from the disk."""
    middle = {key: statistics.median(start[key] for start in starts) for key in ("seconds", "load", "first_token")}
    read = [start["read_bytes"] for start in starts if start["read_bytes"] is not None]
    disk = f", {size(statistics.median(read))} from disk" if read else ""
    apart = f"load {duration(middle['load'])}, first token {duration(middle['first_token'])}"
    return f"{name} {duration(middle['seconds'])}; {many(len(starts), 'sample')}; of it {apart}{disk}"


def _percentiles(found: dict[str, Any]) -> str:
    """The percentiles of some times, those that there are enough of."""
    names = ("p50", "p90", "p95", "p99")
    return ", ".join(f"{name} {duration(found[name])}" for name in names if found[name] is not None)
