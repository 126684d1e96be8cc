"""The options that several commands share, and the kinds of values that only a command line needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
MAX_TOKENS = 128
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def common(command: F) -> F:
    """`--json` and `--debug`; the latter is read by `main`, which also must know it when the rest is wrong."""
    debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks, warnings and logs.")
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, errors too.")(debug(command))


def compute(command: F) -> F:
    """`--device` and `--threads`. The library checks both, so that its errors are the only ones."""
    threads = click.option("--threads", type=int, metavar="N", help="Threads to compute with; default: all there are.")
    device = click.option(
        "--device", default="cpu", show_default=True, metavar="cpu|cuda|auto", help="Where to compute."
    )
    return device(threads(command))


def cuda_graph(command: F) -> F:
    """`--cuda-graph`, for commands that run steps of a decoder."""
    text = "Record the steps of a decoder on CUDA and replay them; an error where that cannot be."
    return click.option("--cuda-graph", is_flag=True, help=text)(command)


def folder(command: F) -> F:
    """The folder that `tfinfer export` made, or `tfinfer adopt` took over."""
    return click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))(command)


class IdList(click.ParamType):  # type: ignore[type-arg]  # generic in new versions alone
    """Ids with commas between them; an empty text is an empty list."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in value.split(",")] if value.strip() else []
        except ValueError:
            self.fail(f"expected whole numbers with commas between them, as 1,2,3; got {value!r}", param, ctx)


class Bias(click.ParamType):  # type: ignore[type-arg]  # generic in new versions alone
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


class EarlyStopping(click.ParamType):  # type: ignore[type-arg]  # generic in new versions alone
    """no, yes or never as the library has them: False, True, "never"."""

    name = "early stopping"
    values: dict[str, bool | str] = {"no": False, "yes": True, "never": "never"}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | str:
        if isinstance(value, bool):
            return value
        if value not in self.values:
            self.fail(f"expected {', '.join(self.values)}; got {value!r}", param, ctx)
        return self.values[value]


# The arguments of `Model.generate`: name, type and default, metavar, help. The library checks the values.
_SAMPLING = (
    ("max_tokens", int, None, "N", f"Most tokens to make; default {MAX_TOKENS}, or what fits."),
    ("temperature", float, 0.0, "T", "0, the default, is greedy."),
    ("top_k", int, 0, "K", "Only the K likeliest; 0 is off."),
    ("top_p", float, 1.0, "P", "Only the likeliest up to this sum; 1 is off."),
    ("min_p", float, 0.0, "P", "Only those above this part of the likeliest; 0 is off."),
    ("repetition_penalty", float, 1.0, "R", "On what is in the prompt or was made; 1 is off."),
    ("presence_penalty", float, 0.0, "R", "On what was made; 0 is off."),
    ("frequency_penalty", float, 0.0, "R", "On what was made, each time; 0 is off."),
    ("logit_bias", Bias(), (), "ID=BIAS", "Add to a logit; repeatable."),
    ("seed", int, None, "N", "Same seed, same tokens."),
    ("stop", str, (), "TEXT", r"End before this text; repeatable; \n, \t, \r and \\ are understood."),
    ("stop_ids", IdList(), None, "1,2", 'Ids that end it; default the model\'s own, "" for none.'),
    ("logprobs", int, 0, "N", "Log-probabilities of each token and of the N likeliest."),
    ("num_beams", int, 1, "N", "Beam search with N beams; 1 is off."),
    ("length_penalty", float, 1.0, "X", "Of a beam search: above 0 favours long sequences, below 0 short ones."),
    ("early_stopping", EarlyStopping(), False, "no|yes|never", "When a beam search ends; default no."),
    ("num_return_sequences", int, 1, "N", "So many sequences of a beam search, best first, each on its own line."),
)
SAMPLING = tuple(name for name, *_ in _SAMPLING)


def speculation(command: F) -> F:
    """`--lookup` and `--draft`: what proposes tokens."""
    path = click.Path(path_type=Path)
    draft = click.option(
        "--draft", type=path, metavar="DIR", help="A smaller model of the same vocabulary drafts tokens."
    )
    lookup = click.option(
        "--lookup", is_flag=True, help="Draft tokens from the text so far: for output that repeats it."
    )
    return lookup(draft(command))


def sampling(command: F) -> F:
    """The options of generation, by the names of `Model.generate` with dashes."""
    for name, kind, default, metavar, text in reversed(_SAMPLING):
        flag = f"--{name.replace('_', '-')}"
        several = default == ()
        value = None if several else default
        command = click.option(flag, type=kind, default=value, multiple=several, metavar=metavar, help=text)(command)
    return command


def unescape(text: str) -> str:
    r"""A text from the shell with \n, \t, \r and \\ as the characters they stand for."""
    return re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match[1]], text)
