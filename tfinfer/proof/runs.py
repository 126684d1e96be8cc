"""What a proof does with an encoder: arrays in, arrays out, compared row by row. Knows no module.

The same runs are made against the module's outputs when a folder is made, and against its golden file wherever it is
used.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import CorruptModelError
from tfinfer.proof.compare import Difference

Array = npt.NDArray[Any]
# The bytes of expected rows that a golden file keeps of each output in each run.
ROW_BYTES = 1 << 20


@dataclass(frozen=True)
class Run:
    """Inputs by name, and for each output what is expected, with NaN where nothing is: (..., features) float32."""

    name: str
    inputs: dict[str, Array]
    expected: dict[str, Array]


def thinned(expected: Array) -> Array:
    """As many of the rows as a golden file has room for, evenly, the last among them; the others become NaN."""
    rows = expected.reshape(-1, expected.shape[-1]).astype(np.float32)
    there = np.flatnonzero(~np.isnan(rows).all(axis=1))
    room = max(2, ROW_BYTES // max(1, rows[0].nbytes))
    if len(there) > room:
        kept = there[np.unique(np.linspace(0, len(there) - 1, room).astype(int))]
        mask = np.ones(len(rows), bool)
        mask[kept] = False
        rows[mask] = np.nan
    return rows.reshape(expected.shape)


def compare_run(encoder: Any, run: Run, dtype: str) -> Difference:
    """Run one case; every expected row must come."""
    difference = Difference(dtype, run.name)
    outputs = encoder.run(run.inputs)
    for name, expected in run.expected.items():
        got = np.asarray(outputs[name], np.float32)
        if got.shape != expected.shape:
            difference.refuse(f"{name}: expected shape {expected.shape}, got {got.shape}")
            continue
        width = expected.shape[-1]
        for number, (one, other) in enumerate(zip(expected.reshape(-1, width), got.reshape(-1, width))):
            # A row may be one number for each token, with padding behind; NaN anywhere else is refused.
            there = np.flatnonzero(~np.isnan(one))
            if there.size:
                difference.add(one[: there[-1] + 1], other[: there[-1] + 1], f"row {number} of {name}")
    return difference


def prove_runs(
    encoder: Any, dtype: str, runs: Sequence[Run], progress: Callable[[str], None] = lambda name: None
) -> tuple[Difference, ...]:
    """Make every run on `encoder`, an open `Encoder`, and compare."""
    differences = []
    for run in runs:
        progress(run.name)
        differences.append(compare_run(encoder, run, dtype))
    return tuple(differences)


def save(path: Path, runs: Sequence[Run]) -> None:
    """Write the runs with as many of the expected rows as there is room for."""
    described = [{"name": r.name, "inputs": list(r.inputs), "expected": list(r.expected)} for r in runs]
    arrays: dict[str, Array] = {"runs": np.frombuffer(json.dumps(described).encode(), np.uint8)}
    for number, run in enumerate(runs):
        arrays |= {f"in_{number}_{i}": array for i, array in enumerate(run.inputs.values())}
        arrays |= {f"out_{number}_{i}": thinned(array) for i, array in enumerate(run.expected.values())}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> list[Run]:
    """Read a golden file; nothing in it is executed. Raises CorruptModelError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            runs = []
            for number, described in enumerate(json.loads(arrays["runs"].tobytes())):
                inputs = {name: arrays[f"in_{number}_{i}"] for i, name in enumerate(described["inputs"])}
                expected = {name: arrays[f"out_{number}_{i}"] for i, name in enumerate(described["expected"])}
                runs.append(Run(described["name"], inputs, expected))
            return runs
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptModelError(f"{path}: is no golden file of an encoder: {error}") from error
