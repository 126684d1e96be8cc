"""The README's tables, made of the rows that the tests prove: `python tests/tables.py zoo [--write]`.

A table is a function without arguments that gives lines of markdown; its name stands in TABLES and in two comments in
the README, `<!-- zoo -->` and `<!-- /zoo -->`, between which `--write` puts it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"


def markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table of cells, in which nothing may end a cell early."""
    lines = [header, tuple("---" for _ in header), *rows]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines]


def zoo() -> list[str]:
    """Decoders as people write them: module, ways of attention in it, result."""
    sys.path.insert(0, str(TESTS / "zoo"))
    from rows import ROWS  # the standard library is all that it needs

    cells = [(f"`{row.name}`: {row.description}", row.attention or "-", row.result) for row in ROWS]
    return markdown(("module", "ways of attention in it", "result"), cells)


def families() -> list[str]:
    """Thirty causal families of transformers: family, ways of attention in it, result."""
    sys.path.insert(0, str(TESTS / "families"))
    from thirty import table

    return table()


def refused() -> list[str]:
    """What the last sweep over all families found (`make families`): the share, and those that did not pass."""
    swept = json.loads((TESTS / "families" / "swept.json").read_text("utf-8"))
    passed, ran = swept["passed"], swept["ran"]
    share = (
        f"On {swept['date']}, with transformers {swept['transformers']}: {swept['families']} families, of which "
        f"PyTorch runs {ran} at toy size; {passed} of these pass ({passed / ran:.1%}). The others:"
    )
    rows = [(r["family"], r["result"], r["why"]) for r in swept["failed"]]
    return [share, "", *markdown(("family", "result", "reason"), rows)]


TABLES: dict[str, Callable[[], list[str]]] = {"zoo": zoo, "families": families, "refused": refused}


def written(name: str, text: str) -> str | None:
    """What stands between the markers of a table, or None where there are none."""
    _, begins, rest = text.partition(f"<!-- {name} -->\n")
    inside, ends, _ = rest.partition(f"<!-- /{name} -->")
    return inside if begins and ends else None


def write(name: str, text: str) -> str:
    """The text with the table between its markers; exits where it has none."""
    before = written(name, text)
    if before is None:
        raise SystemExit(f"the text has no <!-- {name} --> and <!-- /{name} --> to put the table between")
    marked = f"<!-- {name} -->\n"
    return text.replace(f"{marked}{before}<!-- /{name} -->", f"{marked}{made(name)}<!-- /{name} -->")


def made(name: str) -> str:
    return "".join(f"{line}\n" for line in TABLES[name]())


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a table of the README, or write it there.")
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--write", action="store_true", help="put it between its markers in the README")
    options = parser.parse_args()
    if options.write:
        README.write_text(write(options.name, README.read_text("utf-8")), "utf-8")
    else:
        print(made(options.name), end="")


if __name__ == "__main__":
    main()
