"""`tfinfer bench compare`: two measurements side by side, and whether the second is slower."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tfinfer.cli import options
from tfinfer.cli.console import duration, remark, say, say_json, table

if TYPE_CHECKING:
    from tfinfer.measure.compare import Comparison

FAILED = 4


class Share(click.ParamType):  # type: ignore[type-arg]  # generic in new versions alone
    """A number of percent, with or without its sign: 5% and 5 are 0.05."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if not re.fullmatch(r"\d+(\.\d+)?%?", value.strip()):
            self.fail(f"expected percent, as 5%; got {value!r}", param, ctx)
        return float(value.strip().rstrip("%")) / 100


@click.command("compare")
@click.argument("before", metavar="A.json", type=click.Path(path_type=Path))
@click.argument("after", metavar="B.json", type=click.Path(path_type=Path))
@click.option("--fail-if-slower", type=Share(), metavar="5%", help="Exit with 4 where B is slower by more, and surely.")
@click.option("--force", is_flag=True, help="Compare other models and machines too.")
@options.common
@click.pass_context
def compare(
    ctx: click.Context, before: Path, after: Path, fail_if_slower: float | None, force: bool, as_json: bool
) -> None:
    """Compare two measurements of `tfinfer bench DIR --json FILE.json`.

    For each phase the ratio of B to A with its 95% interval, and the p of a rank test (Mann-Whitney U, two-sided) over
    the rounds' medians: at 0.05 or less the difference is no noise within these two runs. Five rounds are enough to
    tell. What the machine did between the two runs no test can see: measure in turns, more than once.
    """
    from tfinfer.measure.compare import compare as compared

    found = compared(before, after, force=force)
    slower = [row.name for row in found.rows if fail_if_slower is not None and row.slower_than(fail_if_slower)]
    if as_json:
        rows = [asdict(row) | {"significant": row.significant} for row in found.rows]
        say_json({"rows": rows, "differences": found.differences, "slower": slower})
    else:
        for difference in found.differences:
            remark(f"note: {difference}")
        table(_rows(found))
        if fail_if_slower is not None:
            what = ", ".join(slower) or "no phase"
            say(f"slower by more than {fail_if_slower:.1%}, and significantly: {what}")
    if slower:
        ctx.exit(FAILED)


def _rows(found: Comparison) -> Iterator[tuple[str, str]]:
    for row in found.rows:
        times = f"{duration(row.before)} to {duration(row.after)}"
        sure = "significant" if row.significant else "no clear difference"
        few = "" if min(row.samples) > 3 else ": too few samples to tell"
        yield row.name, f"{row.ratio:.3f} x ({row.low:.3f} to {row.high:.3f}), {times}, p {row.p:.3g}, {sure}{few}"
