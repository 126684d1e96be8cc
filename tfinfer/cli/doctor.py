"""`tfinfer doctor`: what is installed, what really opens, and what to do about what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tfinfer.cli import options
from tfinfer.cli.console import say, say_json, table

if TYPE_CHECKING:
    from tfinfer.doctor import Report

FAILED = 4


@click.command("doctor")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@options.common
@click.pass_context
def command(ctx: click.Context, folder: Path | None, as_json: bool) -> None:
    """Examine the installation.

    Which onnxruntime is there, which devices really open, how many threads and why; of a model's folder, whether what
    `tfinfer tune` measured applies here. Exits 4 when something needs mending.
    """
    from tfinfer.doctor import examine, tuning

    report, found = examine(), tuning(folder) if folder else None
    if as_json:
        say_json(report.to_dict() | ({"tuning": found} if found else {}))
    else:
        table([*_rows(report), *([("tuning", f"{folder}: {found}")] if found else [])])
        for problem in report.problems:
            say(f"problem: {problem}")
        if not report.problems:
            say("no problems")
    if report.problems:
        ctx.exit(FAILED)


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "tfinfer", f"{report.tfinfer}, Python {report.python}, {report.platform}"
    yield "packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in report.packages.items())
    yield (
        "optional",
        ", ".join(f"{name} {'is there' if there else 'is not'}" for name, there in report.optional.items()),
    )
    wheels = ", ".join(f"{name} {version}" for name, version in report.wheels.items())
    yield "onnxruntime", f"{report.onnxruntime or 'does not load'} (installed: {wheels or 'no wheel'})"
    yield "providers", ", ".join(report.providers) or "none"
    for device in report.devices:
        state = "opens" if device.opens else "does not open" if device.listed else "not in this onnxruntime"
        yield "devices", f"{device.name} {state}: {device.detail}"
    yield "threads", report.threads.reason
    yield "telemetry", report.telemetry
    if report.cpu_flags:
        yield "processor", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in report.cpu_flags.items())
