"""The command `tfinfer`: finds the subcommand, runs it, and turns every error into one line and an exit code.

0 ok, 1 internal, 2 usage, 3 bad model folder, 4 a check failed, 130 interrupted. Imports a subcommand when it is asked
for, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from tfinfer.cli.console import fail, say_json
from tfinfer.errors import TfinferError
from tfinfer.version import __version__

COMMANDS = {
    "export": "Turn a PyTorch transformer into a folder that runs without torch.",
    "adopt": "Take over a folder that another exporter made.",
    "generate": "Continue a prompt.",
    "encode": "Turn texts into vectors.",
    "attention": "Show what attends to what.",
    "verify": "Let a folder prove itself against its golden file.",
    "inspect": "Show what is in a folder.",
    "bench": "Measure start, prefill and decode; compare two measurements.",
    "tune": "Measure what is fastest here, and keep it.",
    "doctor": "Examine the installation.",
}
USAGE, INTERNAL, INTERRUPTED = 2, 1, 130


class Commands(click.Group):
    """A group whose commands are the modules beside this one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"tfinfer.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's own, but with this tool's errors and exit codes."""
        arguments = list(sys.argv[1:] if args is None else args)
        debug = _asked("--debug", arguments)
        try:
            with contextlib.nullcontext() if debug else _quiet():
                code = super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra)
        except (Exception, KeyboardInterrupt) as error:
            if not standalone_mode:
                raise
            if debug:
                traceback.print_exception(error)
            code = report(error, as_json=_asked("--json", arguments))
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _asked(flag: str, arguments: Sequence[str]) -> bool:
    """Whether a flag is there; asked of the raw arguments, for it must hold when they cannot be parsed."""
    return flag in itertools.takewhile(lambda argument: argument != "--", arguments)


def report(error: BaseException, *, as_json: bool) -> int:
    """Print an error; returns the exit code."""
    kind, message, code = _explain(error)
    if as_json:
        say_json({"error": {"type": kind, "message": message, "exit_code": code}})
    elif kind == "Internal":
        fail(f"internal: {message} (run again with --debug for the traceback)")
    else:
        fail(message)
    return code


def _explain(error: BaseException) -> tuple[str, str, int]:
    """Kind, message and exit code of an error."""
    if isinstance(error, TfinferError):
        return type(error).__name__, str(error), error.exit_code
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return type(error).__name__, " ".join(error.format_message().split()) + hint, USAGE
    if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):  # click takes it for the end of stdin
        error = error.__cause__
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "Interrupted", "interrupted", INTERRUPTED
    text = " ".join(str(error).split())
    return "Internal", f"{type(error).__name__}: {text}" if text else type(error).__name__, INTERNAL


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and logs of the libraries below off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="tfinfer %(version)s")
@click.pass_context
def tfinfer(ctx: click.Context) -> None:
    """A PyTorch transformer goes in, a folder that runs without torch comes out.

    \b
    tfinfer export model.py:build --weights w.safetensors --tokenizer tokenizer.json -o model/
    tfinfer generate model/ "def main(" --max-tokens 64    (decoders and encoder-decoders)
    tfinfer encode model/ "a sentence" --normalize         (encoders)
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    tfinfer.main(prog_name="tfinfer")
