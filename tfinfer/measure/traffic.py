"""How many bytes a decode step has to move: the weights that it reads, read off the graph, and the cache.

A step on a CPU or GPU waits for memory; these bytes over its time say how much of the machine's bandwidth it gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tfinfer.integrity import NESTED, fields
from tfinfer.manifest import Manifest

# Operators that read a row of these inputs for each id, not all of them.
_BY_ROW = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3)}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
# A concatenating graph reads the past, writes the present and reads that again.
_PASSES = {"in place": 1, "concatenated": 3}


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step for all sequences of a batch."""

    weights: int
    cache: int

    @property
    def step(self) -> int:
        return self.weights + self.cache


def traffic(manifest: Manifest, folder: Path, *, batch: int, length: int) -> Traffic:
    """Of a decoder's step, where every sequence holds `length` positions."""
    model = memoryview((folder / manifest.graphs["decoder"].file).read_bytes())
    held = sum(entry.num_kv_heads * entry.head_dim * _BYTES[entry.dtype] for entry in manifest.cache)
    states = 2 * sum(math.prod(state.shape) * _BYTES[state.dtype] for state in manifest.states)
    seen = min(length, manifest.keeps_window or length)
    return Traffic(_weights(model, batch), batch * (held * seen * _PASSES[manifest.cache_mode] + states))


@dataclass(frozen=True)
class _Tensor:
    name: str
    place: tuple[str, int] | None  # in a file: tensors may share it
    nbytes: int
    rows: int


def _weights(model: memoryview, batch: int) -> int:
    """Every stored tensor once, those that are only looked up by row with a row for each sequence."""
    whole, by_row = _uses(model)
    counted: dict[object, int] = {}
    for tensor in _tensors(model):
        looked_up = tensor.name in by_row - whole and tensor.rows > 0
        moved = min(tensor.nbytes, batch * tensor.nbytes // tensor.rows) if looked_up else tensor.nbytes
        key = tensor.place or tensor.name
        counted[key] = max(moved, counted.get(key, 0))
    return sum(counted.values())


def _uses(model: memoryview) -> tuple[set[str], set[str]]:
    """Names that some operator reads as a whole, and names that one looks up rows in."""
    whole: set[str] = set()
    by_row: set[str] = set()
    for node in _messages(model, "model", "node"):
        inputs = [bytes(value).decode() for number, value in fields(node) if number == 1 and not isinstance(value, int)]
        operator = next((bytes(v).decode() for n, v in fields(node) if n == 4 and not isinstance(v, int)), "")
        for place, name in enumerate(inputs):
            (by_row if place in _BY_ROW.get(operator, ()) else whole).add(name)
    return whole, by_row


def _tensors(model: memoryview) -> Iterator[_Tensor]:
    for data in _messages(model, "model", "tensor"):
        name, inside, rows = "", 0, 0
        outside: dict[str, str] = {}
        for number, value in fields(data):
            if number == 1:  # the first axis, by itself or the first byte group of a packed list
                rows = rows or (value if isinstance(value, int) else _first_varint(value))
            elif isinstance(value, int):
                continue
            elif number == 8:
                name = bytes(value).decode()
            elif number == 13:
                entry = {n: bytes(v).decode() for n, v in fields(value) if not isinstance(v, int)}
                outside[entry.get(1, "")] = entry.get(2, "")
            else:  # raw or typed data
                inside += len(value)
        if outside:
            place = (outside.get("location", ""), int(outside.get("offset", 0)))
            yield _Tensor(name, place, int(outside.get("length", 0)), rows)
        else:
            yield _Tensor(name, None, inside, rows)


def _messages(data: memoryview, kind: str, wanted: str) -> Iterator[memoryview]:
    """Every message of one kind, wherever it is nested."""
    for number, value in fields(data):
        inner = NESTED.get(kind, {}).get(number)
        if inner is None or isinstance(value, int):
            continue
        if inner == wanted:
            yield value
        yield from _messages(value, inner, wanted)


def _first_varint(data: memoryview) -> int:
    result = shift = 0
    for byte in data:
        result |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return result
