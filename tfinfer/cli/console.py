"""What the commands print, and where: results to stdout, everything else to stderr. Knows nothing of models."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

# A folder's strings and a model's tokens are untrusted: on a terminal their control characters would be commands.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """`text` with control characters written out, all but line ends and tabs."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def say(text: str = "", *, newline: bool = True) -> None:
    """Print a result."""
    click.echo(clean(text) if sys.stdout.isatty() else text, nl=newline)


def remark(text: str) -> None:
    """Print something about a result, to stderr."""
    click.echo(clean(text), err=True)


def fail(text: str) -> None:
    """Print an error."""
    mark = "error:" if os.environ.get("NO_COLOR") else click.style("error:", fg="red", bold=True)
    click.echo(f"{mark} {clean(text)}", err=True)  # click takes the color away where stderr is no terminal


def say_json(value: dict[str, Any]) -> None:
    """Print one object, plain ASCII so that no terminal's encoding can break it."""
    click.echo(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Iterable[tuple[str, str]]) -> None:
    """Print (name, value) lines; a name is left out where it repeats the one above."""
    above = None
    for name, value in rows:
        say(f"{name if name != above else '':<12} {value}")
        above = name


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


class Status:
    """One line on stderr that says what is being done: rewritten in place on a terminal, else a line each if `verbose`.

    stages: the names of all that will be done, in order: a bar before the line then says how far it is. What is being
    done may say more behind its stage's name and a colon. A context manager; leaving it wipes the line.
    """

    def __init__(self, verbose: bool = False, stages: Sequence[str] = ()) -> None:
        self._verbose, self._stages = verbose, stages
        self._live = not verbose and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._width = 0

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self._show("")

    def __call__(self, stage: str) -> None:
        if self._verbose:
            remark(stage)
        self._show(f"{self._bar(stage)}{stage} ...")

    def _bar(self, stage: str) -> str:
        name = stage.partition(":")[0]
        if name not in self._stages:
            return ""
        done, count = self._stages.index(name), len(self._stages)
        return f"[{'#' * (2 * done + 1)}{'.' * (2 * (count - done) - 1)}] {done + 1}/{count} "

    def _show(self, text: str) -> None:
        if not self._live or (not text and not self._width):
            return
        text = clean(text)[: shutil.get_terminal_size().columns - 1]
        click.echo(f"\r{text:<{self._width}}{'' if text else chr(13)}", nl=False, err=True)
        self._width = len(text)
