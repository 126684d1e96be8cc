"""Two measurements of `tfinfer bench` side by side: which phase became slower, and whether that is more than noise.

The steps of one round share what the machine did meanwhile, so a round counts as one sample: its median.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.errors import InputError
from tfinfer.measure.ranks import mann_whitney, ratio_of_medians

SCHEMA = 2
SIGNIFICANT = 0.05
# Where the samples of each phase stand, and whether there are several in a round.
PHASES = {
    "first token": "first_token",
    "prefill": "prefill",
    "decode": "decode",
    "per token": "per_token",
    "token gaps": "between_tokens",
    "end to end": "end_to_end",
}
STARTS = {"cold start": "cold", "warm start": "warm"}
# What must be the same for times to mean anything; the first is refused in any case.
WORKLOAD = "workload"
MACHINE = ("cpu", "cores", "device")
MODEL = ("model", "dtype", "manifest_sha256")
TOLD = ("threads", "settings", "onnxruntime", "numpy", "python", "platform", "tfinfer")


@dataclass(frozen=True)
class Row:
    """One phase: medians of both sides in seconds, their ratio with its 95% interval, and the test's p."""

    name: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    p: float
    samples: tuple[int, int]

    @property
    def significant(self) -> bool:
        return self.p <= SIGNIFICANT

    def slower_than(self, share: float) -> bool:
        """Whether it became slower by more than a share, and that is no noise."""
        return self.ratio > 1 + share and self.significant


@dataclass(frozen=True)
class Comparison:
    """All phases that both sides measured, and what else differs between them."""

    rows: tuple[Row, ...]
    differences: tuple[str, ...]


def read(path: Path) -> dict[str, Any]:
    """A file of `tfinfer bench DIR --json FILE`. Raises InputError for anything else."""
    again = "measure again with `tfinfer bench DIR --json FILE.json`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected the JSON of `tfinfer bench`: {error}; {again}") from error
    if not isinstance(found, dict) or "schema" not in found:
        raise InputError(f"{path}: expected what `tfinfer bench` measured, found something else; {again}")
    if found["schema"] != SCHEMA:
        raise InputError(f"{path}: measured by another tfinfer (schema {found['schema']!r}, not {SCHEMA}); {again}")
    if missing := [
        name for name in ("workload", "environment", *PHASES.values()) if not isinstance(found.get(name), dict)
    ]:
        raise InputError(f"{path}: lacks {', '.join(missing)}; {again}")
    absent = [name for name in (*MACHINE, *MODEL) if name not in found["environment"]]
    if absent or not _is_count(found["workload"].get("repeats")):
        raise InputError(f"{path}: lacks {', '.join(absent) or 'how often it was repeated'}; {again}")
    return found


def compare(before: Path, after: Path, *, force: bool = False) -> Comparison:
    """Set two files side by side.

    Raises InputError where one cannot be read, the workloads differ or, without `force`, model or machine do.
    """
    one, other = read(before), read(after)
    if one[WORKLOAD] != other[WORKLOAD]:
        what = _listed(one[WORKLOAD], other[WORKLOAD], sorted({*one[WORKLOAD], *other[WORKLOAD]}))
        raise InputError(f"{before} and {after} measured different work: {what}; measure both with the same options")
    told = []
    for names, what in ((MODEL, "models"), (MACHINE, "machines")):
        if found := _listed(one["environment"], other["environment"], names):
            if not force:
                raise InputError(f"{before} and {after} are of different {what}: {found}; --force compares them anyway")
            told.append(f"different {what}: {found}")
    if found := _listed(one["environment"], other["environment"], TOLD):
        told.append(f"also differs: {found}")
    for path, data in ((before, one), (after, other)):
        warnings = data.get("warnings")
        told += [f"{path}: {warning}" for warning in (warnings if isinstance(warnings, list) else [])]
    return Comparison(tuple(_rows(before, one, after, other)), tuple(told))


def _listed(one: dict[str, Any], other: dict[str, Any], names: Any) -> str:
    pairs = ((name, one.get(name), other.get(name)) for name in names)
    return ", ".join(f"{name} {_short(a)} and {_short(b)}" for name, a, b in pairs if a != b)


def _short(value: Any) -> str:
    """A hash by its beginning, a count of threads without its reason."""
    if isinstance(value, dict):
        value = value.get("count", value)
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _rows(before: Path, one: dict[str, Any], after: Path, other: dict[str, Any]) -> Iterator[Row]:
    for name, key in PHASES.items():
        x, y = _rounds(before, one, key), _rounds(after, other, key)
        yield _row(name, x, y)
    for name, key in STARTS.items():
        starts = [_starts(path, data, key) for path, data in ((before, one), (after, other))]
        if all(starts):
            yield _row(name, *starts)


def _row(name: str, before: list[float], after: list[float]) -> Row:
    _, p = mann_whitney(before, after)
    sizes = (len(before), len(after))
    return Row(name, float(np.median(before)), float(np.median(after)), *ratio_of_medians(before, after), p, sizes)


def _rounds(path: Path, data: dict[str, Any], key: str) -> list[float]:
    """The median of every round."""
    samples, repeats = _times(path, data[key].get("samples"), key), data["workload"]["repeats"]
    if len(samples) % repeats or not samples:
        raise InputError(f"{path}: {key} has {len(samples)} samples, which are no {repeats} rounds; measure again")
    found: list[float] = np.median(np.reshape(samples, (repeats, -1)), axis=1).tolist()
    return found


def _starts(path: Path, data: dict[str, Any], key: str) -> list[float]:
    starts = data.get("starts")
    listed = starts.get(key) if isinstance(starts, dict) else None
    if not isinstance(listed, list):
        return []
    return _times(path, [start.get("seconds") if isinstance(start, dict) else None for start in listed], "starts")


def _times(path: Path, values: Any, what: str) -> list[float]:
    if not isinstance(values, list) or not all(map(_is_time, values)):
        raise InputError(f"{path}: {what} has samples that are no times; measure again")
    return values


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
