"""How a folder's numbers are to be stored: what may be asked for, and what goes together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfinfer.errors import InputError

from . import small_cache
from .kinds.choose import KINDS
from .small import RECIPES, Small, check, check_calibrates

WIDTHS = ("fp32", "fp16", "bf16")
DTYPES = (*WIDTHS, *RECIPES)
FLAVORS = ("ort", "standard")


@dataclass(frozen=True)
class Chosen:
    """What was asked for, checked.

    dtype: "fp32", "fp16", "bf16", "int8" or "int4". width: the dtype of activations, and of the cache but where
    that is "int8". small: of weights of a few bits. calibration: a text file; None: what the model writes itself.
    """

    dtype: str
    width: str
    small: Small
    cache: str
    calibration: Path | None


def choose(
    dtype: str, flavor: str, kind: str, activations: str, small: Small, cache: str,
    calibration: str | os.PathLike[str] | None, also: Sequence[str],
) -> Chosen:  # fmt: skip
    """Raises InputError for what is unknown, and for what does not go together."""
    for name, value, known in (("dtype", dtype, DTYPES), ("flavor", flavor, FLAVORS), ("kind", kind, KINDS)):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
    if flavor == "standard" and dtype in RECIPES:
        raise InputError(f"{dtype} needs operators that are not ONNX's own: leave the flavor at 'ort'")
    check(small, dtype)
    if calibration is not None and cache != "int8":
        check_calibrates(small, dtype)
    width = _width(dtype, activations)
    if small.per_channel and width != "fp32":
        raise InputError(
            "a scale for each channel is for CPUs, which compute in float32: leave out either per_channel or "
            f"the {width} activations"
        )
    small_cache.check(cache, width, flavor, also)
    return Chosen(dtype, width, small, cache, None if calibration is None else Path(calibration))


def _width(dtype: str, activations: str) -> str:
    """The dtype of activations. Raises InputError for one that does not go with the weights'."""
    if activations not in WIDTHS:
        raise InputError(f"unknown activations {activations!r}: expected one of {', '.join(WIDTHS)}")
    if dtype in RECIPES:
        return activations
    if activations != "fp32":
        raise InputError(
            f"activations are for weights of a few bits: give the dtype int8 or int4 with {activations} activations, "
            f"or the dtype {activations} alone, not {dtype}"
        )
    return dtype
