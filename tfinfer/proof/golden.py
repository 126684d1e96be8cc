"""The golden file: the cases of a proof and PyTorch's logits for them, so that a folder proves itself without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import CorruptModelError
from tfinfer.proof.cases import Call, Case, Row

FILE_NAME = "golden.npz"
# Logits are kept for the last rows of each call up to about this many bytes in all.
BUDGET = 8 << 20
Vectors = Mapping[Row, npt.NDArray[np.float32]]


def save(
    path: Path,
    cases: Sequence[Case],
    expected: Sequence[Vectors],
    greedy: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> None:
    """Write cases, the expected logits of as many rows as the budget allows, and greedy (prompt, continuation)."""
    width = next(iter(expected[0].values())).nbytes
    room = max(2 * len(cases), BUDGET // width) // len(cases)
    arrays: dict[str, npt.NDArray[Any]] = {"greedy_prompt": greedy[0], "greedy_tokens": greedy[1]}
    described = []
    for number, (case, vectors) in enumerate(zip(cases, expected)):
        rows = _last_rows([row for row in case.rows if row in vectors], room)
        arrays[f"logits_{number}"] = np.stack([vectors[row] for row in rows])
        for i, sequence in enumerate(case.sequences):
            arrays[f"sequence_{number}_{i}"] = sequence
        described.append(
            {
                "name": case.name,
                "slots": case.slots,
                "calls": [[c.op, c.slot, list(c.ids), c.length] for c in case.calls],
                "rows": [[r.call, r.row, r.sequence, r.position] for r in rows],
                "sequences": len(case.sequences),
            }
        )
    arrays["cases"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _last_rows(rows: Sequence[Row], room: int) -> list[Row]:
    """At most `room` rows, the last one of each call first, evenly over the calls."""
    last = {row.call: row for row in rows}
    chosen = list(last.values())
    if len(chosen) > room:
        chosen = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, room).astype(int))]
    rest = [row for row in rows if row not in chosen]
    spread = (
        np.unique(np.linspace(0, len(rest) - 1, min(len(rest), room - len(chosen))).astype(int))
        if rest and room > len(chosen)
        else []
    )
    picked = {*chosen, *(rest[i] for i in spread)}
    return [row for row in rows if row in picked]


def load(path: Path) -> tuple[list[Case], list[Vectors], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Read a golden file; nothing in it is executed. Raises CorruptModelError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            described = json.loads(arrays["cases"].tobytes())
            cases, expected = [], []
            for number, case in enumerate(described):
                sequences = [arrays[f"sequence_{number}_{i}"] for i in range(case["sequences"])]
                calls = [Call(op, slot, tuple(ids), length) for op, slot, ids, length in case["calls"]]
                rows = [Row(*row) for row in case["rows"]]
                cases.append(Case(case["name"], case["slots"], calls, rows, sequences))
                expected.append(dict(zip(rows, arrays[f"logits_{number}"])))
            return cases, expected, (arrays["greedy_prompt"], arrays["greedy_tokens"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CorruptModelError(f"{path}: is no golden file: {error}") from error
