"""Checks what a caller feeds to a graph against what its manifest declares, and adds what is known without asking.

onnxruntime would take a negative id for one counted from the end, and says little of what it does not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError, LengthError
from tfinfer.manifest import EncoderRoles, GraphSpec, TensorSpec

Array = npt.NDArray[Any]
KINDS = {"f": "biuf", "i": "biu", "b": "b"}  # what each kind of declared type can be made of


def complete(
    inputs: Mapping[str, Any], graph: GraphSpec, roles: EncoderRoles, vocab_size: int, longest: int
) -> dict[str, Array]:
    """An array of the declared type and shape for every input of the graph.

    A mask that is not given is all ones, token types all zeros. Whole numbers become int64 or a declared float; no
    float becomes a whole number.

    Raises:
        InputError: unknown or missing names, other types or shapes, empty axes, ids outside the vocabulary, masks of
            anything but 0 and 1 or with an empty row. LengthError: more positions than the model's longest length.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(f"expected arrays by name, {_wanted(graph)}; got {type(inputs).__name__}")
    if unknown := [str(name) for name in inputs if name not in {tensor.name for tensor in graph.inputs}]:
        raise InputError(f"the graph has no input {', '.join(sorted(unknown))}: expected {_wanted(graph)}")
    sizes: dict[str, int] = {}
    feeds = {t.name: _fit(inputs[t.name], t, sizes) for t in graph.inputs if t.name in inputs}
    fillers = {roles.attention_mask: 1, roles.token_type_ids: 0}
    for tensor in graph.inputs:
        if tensor.name in feeds:
            continue
        shape = tuple(sizes.get(axis, 0) if isinstance(axis, str) else axis for axis in tensor.shape)
        if tensor.name not in fillers or 0 in shape:
            raise InputError(f"the graph's input {tensor.name} is missing: expected {_wanted(graph)}")
        feeds[tensor.name] = np.full(shape, fillers[tensor.name], tensor.dtype)
    if roles.input_ids is not None:
        _check_ids(feeds[roles.input_ids], roles.input_ids, vocab_size, longest)
    if roles.attention_mask is not None and roles.attention_mask in inputs:
        _check_mask(feeds[roles.attention_mask], roles.attention_mask)
    return feeds


def _wanted(graph: GraphSpec) -> str:
    return ", ".join(describe(tensor) for tensor in graph.inputs)


def describe(tensor: TensorSpec) -> str:
    """A tensor for people: its name, type and shape."""
    return f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def _fit(value: Any, tensor: TensorSpec, sizes: dict[str, int]) -> Array:
    """`value` as declared; `sizes` are those that the named axes have so far."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"expected {describe(tensor)}, got no array: {error}") from error
    shape = f"expected {describe(tensor)}, got shape {array.shape}"
    if array.ndim != len(tensor.shape):
        raise InputError(shape)
    if 0 in array.shape:
        raise InputError(f"{shape}: no axis may be empty")
    for axis, size in zip(tensor.shape, array.shape):
        wanted = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
        if size != wanted:
            other = f": {axis} is {wanted} in another axis" if isinstance(axis, str) else ""
            raise InputError(f"{shape}{other}")
    return _cast(array, tensor)


def _cast(array: Array, tensor: TensorSpec) -> Array:
    """`array` in the declared type, if that keeps its values (rounding to a declared float aside)."""
    if tensor.dtype == "bfloat16":
        raise InputError(f"{describe(tensor)}: numpy has no bfloat16: export with another --dtype to run this graph")
    wanted = np.dtype(tensor.dtype)
    came = f"expected {describe(tensor)}, got {array.dtype}"
    if array.dtype.kind not in KINDS[wanted.kind]:
        raise InputError(came)
    if wanted.kind == "i":
        ends = np.iinfo(wanted)
        if int(array.min()) < ends.min or int(array.max()) > ends.max:
            raise InputError(f"{came} with {int(array.min())} to {int(array.max())}")
    with np.errstate(over="ignore"):
        fitted = array.astype(wanted)
    if wanted.kind == "f" and np.isinf(fitted).sum() != np.isinf(array).sum():
        raise InputError(f"{came} with numbers that are too large for it")
    return np.ascontiguousarray(fitted)


def _check_ids(ids: Array, name: str, vocab_size: int, longest: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise InputError(f"{name}: ids must be from 0 to {vocab_size - 1}, the model's vocabulary; got {wrong[0]}")
    if ids.shape[-1] > longest:
        raise LengthError(f"{name}: {ids.shape[-1]} tokens are more than the model's longest length, {longest}")


def _check_mask(mask: Array, name: str) -> None:
    if mask.min() < 0 or mask.max() > 1:
        raise InputError(f"{name}: expected 1 where there is a token and 0 elsewhere, got {mask.min()} to {mask.max()}")
