"""How large the values of a decoder's float32 graph become while it runs on text of its own and on random ids.

What a mask puts in place of a hidden score is no value: it is as low as it can be in any width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tfinfer.manifest import Manifest
from tfinfer.proof.prove import open_session

from .samples import random_ids, write_text
from .values import watch

ROWS, LENGTH = 4, 64  # of text of its own, and as many of random ids
HIDING = -1e4  # constants as low as this hide scores
NEAR = 0.01  # what lies so near to a hiding constant, relatively, is one with a score added to it


@dataclass
class Magnitudes:
    """The largest finite magnitude of each value by its name; where and how much was looked at."""

    tokens: int
    origin: str
    largest: dict[str, float] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> float:
        return 0.0 if value is None else self.largest.get(str(value.name), 0.0)


def magnitudes(manifest: Manifest, folder: Path, graph: ir.Graph) -> Magnitudes:
    """Run a folder's decoder and watch all that `graph`, which is the folder's, computes in floats."""
    decoder = open_session(manifest, folder)
    try:
        length = min(LENGTH, manifest.max_length)
        written = write_text(decoder, ROWS, length)
        others = random_ids(min(manifest.vocab_size, manifest.num_logits), ROWS, length)
    finally:
        decoder.close()
    found = Magnitudes(written.tokens + others.tokens, f"{written.origin} and {others.origin}")
    hiding = _hiding(graph.initializers.values())

    def take(name: str, array: npt.NDArray[Any]) -> None:
        if array.dtype.kind == "f":
            found.largest[name] = max(found.largest.get(name, 0.0), _largest(array, hiding))

    watch(manifest, folder, _names(graph), [*written.pieces, *others.pieces], take)
    return found


def _names(graph: ir.Graph) -> list[str]:
    """What the nodes give, as far as anybody reads it."""
    outputs = (value for node in graph for value in node.outputs)
    return [str(value.name) for value in outputs if value.name and (value.uses() or value.is_graph_output())]


def _hiding(constants: Iterable[ir.Value]) -> npt.NDArray[np.float64]:
    """The very low numbers among constants, each once."""
    found: set[float] = set()
    for value in constants:
        tensor = value.const_value
        if tensor is not None and tensor.dtype is ir.DataType.FLOAT:
            array = tensor.numpy()
            low = array[np.isfinite(array) & (array <= HIDING)]
            found |= {float(number) for number in np.unique(low)[:64]}
    return np.array(sorted(found))


def _largest(array: npt.NDArray[Any], hiding: npt.NDArray[np.float64]) -> float:
    if not array.size:
        return 0.0
    largest = max(float(array.max()), -float(array.min()))  # of nearly all values this is it
    if np.isfinite(largest) and not (hiding.size and largest > -hiding.max() * (1 - NEAR)):
        return largest
    sizes = np.abs(array[np.isfinite(array)].astype(np.float64))
    for number in -hiding:
        if not sizes.size or sizes.max() < number * (1 - NEAR):
            continue
        sizes = sizes[np.abs(sizes - number) > NEAR * number]
    return float(sizes.max(initial=0.0))
