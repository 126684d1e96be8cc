"""`tfinfer tune`: what is fastest for a folder on this machine, measured once and kept beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tfinfer.cli import options
from tfinfer.cli.console import Status, duration, many, remark, say_json, table

if TYPE_CHECKING:
    from tfinfer.tune import Duel, Report


@click.command("tune")
@options.folder
@click.option(
    "--prompt", "prompt_length", type=int, metavar="N", help="Tokens of the prompt; default 128 or what fits."
)
@click.option("--tokens", "new_tokens", type=int, metavar="N", help="Tokens made after it; default 32 or what fits.")
@click.option("--quick", is_flag=True, help="Fewer rounds and tokens: finds only large gains.")
@options.common
def command(folder: Path, prompt_length: int | None, new_tokens: int | None, quick: bool, as_json: bool) -> None:
    """Measure what is fastest here, and keep it.

    Thread counts and switches of onnxruntime, two at a time in turns. What is clearly faster, with the same result, is
    written to DIR/tfinfer.tune.json; loading the folder on this machine then uses it, unless threads are asked for.
    Needs the memory of the model twice. Give it a machine that does nothing else.
    """
    from tfinfer.tune import tune

    with Status(verbose=not as_json) as status:
        report = tune(folder, prompt_length=prompt_length, new_tokens=new_tokens, quick=quick, progress=status)
    if as_json:
        say_json(report.to_dict())
    else:
        table(_rows(report))
        for warning in report.warnings:
            remark(f"warning: {warning}; tune again where nothing else runs, unless this is how it will be")


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    from tfinfer.tune import CHANCE, GAIN, OBJECTIVE, describe

    yield "machine", report.machine
    yield "objective", OBJECTIVE
    yield "workload", f"{report.work}; in turns, after a round of warm-up"
    yield "rule", f"taken at a gain of {GAIN:.0%} or more that chance gives in at most {CHANCE:.0%} of cases"
    for duel in report.duels:
        yield "tried", _line(duel)
    kept = " (the default: nothing was clearly faster)" if report.chosen == report.default else ""
    yield "chosen", describe(report.chosen) + kept
    yield "written", str(report.file)


def _line(duel: Duel) -> str:
    from tfinfer.tune import describe

    spread = f"{duel.ratio:.2f} x the time ({min(duel.request):.2f} to {max(duel.request):.2f})"
    times = f"{many(len(duel.request), 'round')}, {duration(duel.seconds[0])}, {duration(duel.seconds[1])}"
    return f"{describe(duel.candidate)} against {describe(duel.against)}: {spread}; {times}: {duel.verdict}"
