"""The options that several commands share, and the kinds of values that only a command line needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def common(command: F) -> F:
    """`--json` and `--debug`; the latter is read by `main`, which also must know it when the rest is wrong."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks, warnings and logs.")(
        command
    )
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, errors too.")(command)


def compute(command: F) -> F:
    """`--device` and `--threads`. The library checks both, so that its errors are the only ones."""
    command = click.option(
        "--threads", type=int, metavar="N", help="Threads to compute with; default: what is available."
    )(command)
    return click.option(
        "--device", default="cpu", show_default=True, metavar="cpu|cuda|auto", help="Where to compute."
    )(command)


def folder(command: F) -> F:
    """The folder that `tfinfer export` made."""
    return click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))(command)


class IdList(click.ParamType):
    """Ids with commas between them; an empty text is an empty list."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in value.split(",")] if value.strip() else []
        except ValueError:
            self.fail(f"expected whole numbers with commas between them, as 1,2,3; got {value!r}", param, ctx)


class Bias(click.ParamType):
    """ID=BIAS, of which both are numbers."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = value.partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"expected ID=BIAS, as 42=-1.5; got {value!r}", param, ctx)


def unescape(text: str) -> str:
    r"""A text from the shell with \n, \t, \r and \\ as the characters they stand for."""
    return re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match[1]], text)
