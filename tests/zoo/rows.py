"""The table of decoders: which module, what attention the exporter must read in it, what must come of it.

Imports nothing but the standard library, so that `tests/tables.py` can print it anywhere.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ZOO = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One file with a `build()`.

    attention: as `ways` says it of the manifest. refused: what the error must say where no cache can follow the module.
    waits: why the row cannot pass yet.
    """

    file: str
    attention: str = ""
    refused: str = ""
    waits: str = ""

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def path(self) -> Path:
        return ZOO / self.file

    @property
    def description(self) -> str:
        """The module's own docstring, a line."""
        return (ast.get_docstring(ast.parse(self.path.read_text("utf-8"))) or "").splitlines()[0].rstrip(".")

    @property
    def result(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        return "waits" if self.waits else "64 of 64 tokens"


def ways(manifest: object) -> str:
    """The ways of attention that a manifest reports, and its states."""
    found = [f"{a.count} x {a.operator}: {a.pattern}" for a in manifest.attention]  # type: ignore[attr-defined]
    states = len(manifest.states)  # type: ignore[attr-defined]
    return "; ".join([*found, *([f"{states} running states"] if states else [])])


ROWS = ()
