"""How a folder's numbers are to be stored: what may be asked for, and what goes together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from tfinfer.errors import InputError

from . import small_cache
from .kinds.choose import KINDS
from .small import RECIPES, Small, check
from .small_cache import Cached

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLAVORS = ("ort", "standard")


@dataclass(frozen=True)
class Chosen:
    """What was asked for, checked.

    dtype: "fp32", "fp16", "bf16", "int8" or "int4". width: the dtype of activations, and of the cache where `cached`
    leaves it as wide. small: of weights of a few bits.
    """

    dtype: str
    width: str
    small: Small
    cached: Cached


def choose(
    dtype: str, flavor: str, kind: str, activations: str, small: Small, cache: str,
    calibration: str | os.PathLike[str] | None, also: Sequence[str],
) -> Chosen:  # fmt: skip
    """Raises InputError for what is unknown, and for what does not go together."""
    for name, value, known in (("dtype", dtype, DTYPES | RECIPES), ("flavor", flavor, FLAVORS), ("kind", kind, KINDS)):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
    if flavor == "standard" and dtype in RECIPES:
        raise InputError(f"{dtype} needs operators that are not ONNX's own: leave the flavor at 'ort'")
    text = None if calibration is None else Path(calibration)
    cached = Cached(cache, text if cache == "int8" else None)
    if cached.calibration is None or small.quantiser_of(dtype) == "gptq":
        small = replace(small, calibration=text)
    check(small, dtype)
    width = _width(dtype, activations)
    small_cache.check(cached, width, flavor, also)
    return Chosen(dtype, width, small, cached)


def _width(dtype: str, activations: str) -> str:
    """The dtype of activations. Raises InputError for one that does not go with the weights'."""
    if activations not in DTYPES:
        raise InputError(f"unknown activations {activations!r}: expected one of {', '.join(DTYPES)}")
    if dtype in RECIPES:
        return activations
    if activations != "fp32":
        raise InputError(
            f"activations are for weights of a few bits: give the dtype int8 or int4 with {activations} activations, "
            f"or the dtype {activations} alone, not {dtype}"
        )
    return dtype
