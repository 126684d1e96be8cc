"""What the inputs of matrices are like: the sums of their products, of the text that the graph runs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tfinfer.manifest import Manifest

from .samples import Ids
from .values import Array, watch

MOST_BYTES = 1 << 30  # of sums that are made together; for more of them the texts run again


@dataclass
class Inputs:
    """What came into a matrix: how many rows (k,), and the sum of each one's product with itself, (k, k) float32."""

    hessian: torch.Tensor
    count: int = 0

    def add(self, value: Array) -> None:
        rows = torch.from_numpy(value).float().reshape(-1, len(self.hessian))
        self.hessian.addmm_(rows.T, rows)
        self.count += len(rows)

    def __add__(self, other: Inputs) -> Inputs:
        return Inputs(self.hessian + other.hessian, self.count + other.count)


def inputs_of(
    manifest: Manifest, folder: Path, widths: Mapping[str, int], pieces: Sequence[Ids]
) -> Iterator[dict[str, Inputs]]:
    """What values of the graph are while it runs on pieces of text, by their names, some of them at a time.

    widths: the last axis of each.
    """
    for names in _groups(widths):
        sums = {name: Inputs(torch.zeros(widths[name], widths[name])) for name in names}

        def add(name: str, value: Array, sums: dict[str, Inputs] = sums) -> None:
            sums[name].add(value)

        watch(manifest, folder, names, pieces, add)
        yield sums


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name, width in widths.items():
        if group and held + 4 * width**2 > MOST_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += 4 * width**2
    if group:
        yield group
