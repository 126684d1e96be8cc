"""`tfinfer bench`: how long loading, prefill and decoding take on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tfinfer.cli import options
from tfinfer.cli.console import Status, duration, many, remark, say_json, size, table


@click.command("bench")
@options.folder
@click.option("--prompt-length", type=int, metavar="N", help="Tokens of each prompt; default 128, or what fits.")
@click.option("--new-tokens", type=int, metavar="N", help="Tokens made after it; default 64, or what fits.")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Sequences decoded together.")
@click.option("--repeats", type=int, default=5, show_default=True, metavar="N", help="How often it is measured.")
@click.option("--warmup", type=int, default=1, show_default=True, metavar="N", help="Rounds before that, not counted.")
@options.compute
@options.common
def command(folder: Path, device: str, threads: int | None, as_json: bool, **asked: Any) -> None:
    """Measure load, prefill and decode.

    The prompts are random ids and no id stops a sequence, so every run does the same work. Lengths that are asked for
    must fit into the model's longest length; the defaults shrink to fit.
    """
    from tfinfer.bench import run

    with Status() as status:
        line = shlex.join(["tfinfer", *sys.argv[1:]])
        result = run(folder, device=device, threads=threads, command_line=line, progress=status, **asked)
    if as_json:
        say_json(result)
        return
    table(_rows(result))
    for warning in result["warnings"]:
        remark(f"warning: {warning}")


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
    yield "prefill", _spread(result["prefill"])
    yield "decode", _spread(result["decode"])
    whole = result["end_to_end"]
    yield "end to end", _spread(whole)
    yield "end to end", f"first token {_percentiles(whole['first_token_seconds'])}"
    memory = result["memory"]
    kinds = (("after load", memory["rss_after_load"]), ("peak", memory["rss_peak"]))
    resident = [f"{name} {size(count)}" for name, count in kinds if count]
    yield "memory", f"resident {', '.join(resident) or 'unknown here'}; cache {size(memory['cache_bytes'])}"
    yield from (("definitions", f"{name}: {text}") for name, text in result["definitions"].items())
    yield "at", f"{environment['utc']}, {environment['command_line']}"


def _spread(figures: dict[str, Any]) -> str:
    count = len(figures["samples"])
    return f"{figures['tokens_per_second']:.1f} tokens/s; {many(count, 'sample')}, {_percentiles(figures['seconds'])}"


def _percentiles(found: dict[str, Any]) -> str:
    """The percentiles of some times, those that there are enough of."""
    return ", ".join(f"{name} {duration(found[name])}" for name in ("p50", "p90", "p99") if found[name] is not None)
