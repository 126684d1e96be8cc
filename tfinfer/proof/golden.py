"""The golden file: the cases of a proof and PyTorch's logits for them, so that a folder proves itself without torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import CorruptModelError
from tfinfer.proof.cases import Call, Case, Row

FILE_NAME = "golden.npz"
# Logits are kept for the last rows of each call up to about this many bytes in all.
BUDGET = 8 << 20
FEW = 4
Ids = npt.NDArray[np.int64]
Vectors = Mapping[Row, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Golden:
    """The cases of a proof, for each the logits that are expected, and a greedy continuation."""

    cases: Sequence[Case]
    expected: Sequence[Vectors]
    prompt: Ids
    tokens: Ids
    source: Ids | None = None  # of the prompt, for an encoder-decoder

    def brief(self) -> Golden:
        """The first few cases, which are short, and no continuation."""
        return Golden(self.cases[:FEW], self.expected[:FEW], self.prompt, self.tokens[:0], self.source)


def save(path: Path, golden: Golden) -> None:
    """Write the cases with the expected logits of as many of their rows as the budget allows."""
    width = next(iter(golden.expected[0].values())).nbytes
    room = max(2 * len(golden.cases), BUDGET // width) // len(golden.cases)
    arrays: dict[str, npt.NDArray[Any]] = {"greedy_prompt": golden.prompt, "greedy_tokens": golden.tokens}
    if golden.source is not None:
        arrays["greedy_source"] = golden.source
    described = []
    for number, (case, vectors) in enumerate(zip(golden.cases, golden.expected)):
        rows = _last_rows([row for row in case.rows if row in vectors], room)
        arrays[f"logits_{number}"] = np.stack([vectors[row] for row in rows])
        for i, sequence in enumerate(case.sequences):
            arrays[f"sequence_{number}_{i}"] = sequence
        for i, source in enumerate(case.sources):
            arrays[f"source_{number}_{i}"] = source
        described.append(_described(case, rows))
    arrays["cases"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _described(case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "name": case.name,
        "slots": case.slots,
        "calls": [[c.op, c.slot, list(c.ids), c.length] for c in case.calls],
        "rows": [[r.call, r.row, r.sequence, r.position] for r in rows],
        "sequences": len(case.sequences),
        "slot_of": case.slot_of,
        "sources": len(case.sources),
    }


def _last_rows(rows: Sequence[Row], room: int) -> list[Row]:
    """At most `room` rows: the last one of each call first, then others, evenly."""
    chosen = _evenly(list({row.call: row for row in rows}.values()), room)
    rest = [row for row in rows if row not in set(chosen)]
    picked = {*chosen, *_evenly(rest, room - len(chosen))}
    return [row for row in rows if row in picked]


def _evenly(rows: list[Row], count: int) -> list[Row]:
    places = np.linspace(0, len(rows) - 1, min(len(rows), max(0, count))).astype(int)
    return [rows[i] for i in np.unique(places)]


def load(path: Path) -> Golden:
    """Read a golden file; nothing in it is executed. Raises CorruptModelError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            cases: list[Case] = []
            expected: list[Vectors] = []
            for number, described in enumerate(json.loads(arrays["cases"].tobytes())):
                sequences = [arrays[f"sequence_{number}_{i}"] for i in range(described["sequences"])]
                calls = [Call(op, slot, tuple(ids), length) for op, slot, ids, length in described["calls"]]
                rows = [Row(*row) for row in described["rows"]]
                sources = [arrays[f"source_{number}_{i}"] for i in range(described.get("sources", 0))]
                slot_of = described.get("slot_of", [])
                cases.append(Case(described["name"], described["slots"], calls, rows, sequences, slot_of, sources))
                expected.append(dict(zip(rows, arrays[f"logits_{number}"])))
            source = arrays.get("greedy_source")
            return Golden(cases, expected, arrays["greedy_prompt"], arrays["greedy_tokens"], source)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptModelError(f"{path}: is no golden file: {error}") from error
