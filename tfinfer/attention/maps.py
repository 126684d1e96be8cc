"""The weights of one kind of attention with the tokens they stand between. Knows no model and draws nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfinfer.errors import InputError

_ABOVE_ONE = 1e-3  # what a narrow type may round a weight to


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """All layers of one kind of attention, (heads, query, key) each; rows attend, columns are attended to.

    Raises:
        InputError: a layer is not (heads, query tokens, key tokens), or holds what is no weight from 0 to 1.
    """

    name: str  # "self", "encoder", "decoder" or "cross"
    query_tokens: tuple[str, ...]
    key_tokens: tuple[str, ...]
    weights: tuple[NDArray[np.float32], ...]
    layers: tuple[int, ...] = ()  # their numbers in the model, where some were picked; empty: 0, 1, 2, ...
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        tokens = (len(self.query_tokens), len(self.key_tokens))
        if not self.weights or 0 in tokens:
            raise InputError(f"attention {self.name!r}: expected at least one layer and one token; got none")
        for number, layer in zip(self.layer_numbers, self.weights):
            if layer.ndim != 3 or layer.shape[1:] != tokens or not layer.shape[0]:
                raise InputError(
                    f"attention {self.name!r}, layer {number}: expected (heads, {tokens[0]}, {tokens[1]}), "
                    f"as many as there are tokens; got {layer.shape}"
                )
            if not (layer.min() >= 0 and layer.max() <= 1 + _ABOVE_ONE):  # NaN is neither
                raise InputError(
                    f"attention {self.name!r}, layer {number}: expected weights from 0 to 1; got {layer.min()} to "
                    f"{layer.max()}: run `tfinfer verify` on the folder"
                )

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The number of every layer in the model."""
        return self.layers or tuple(range(len(self.weights)))

    @property
    def head_numbers(self) -> tuple[int, ...]:
        """The number of every head in the model, of the layer that has the most."""
        return self.heads or tuple(range(max(layer.shape[0] for layer in self.weights)))

    def stacked(self) -> NDArray[np.float32]:
        """All layers in one array, (layers, heads, query, key).

        Raises:
            InputError: the layers differ in heads.
        """
        counts = [layer.shape[0] for layer in self.weights]
        if len(set(counts)) > 1:
            raise InputError(
                f"attention {self.name!r}: expected layers with equally many heads; got {counts}: "
                "read `weights` layer by layer, or pick one layer"
            )
        return np.stack(self.weights)

    def pick(self, layer: int | None = None, head: int | None = None) -> AttentionMap:
        """One layer, one head of each, or both, by their numbers in the model (from 0), which they keep.

        Raises:
            InputError: there is no such layer, or no such head in one of the layers.
        """
        layers, weights = self.layer_numbers, self.weights
        if layer is not None:
            at = _find(layer, layers, f"attention {self.name!r}: layer")
            layers, weights = layers[at : at + 1], weights[at : at + 1]
        heads = self.heads
        if head is not None:
            where = f"attention {self.name!r}: head"
            fewest = min(array.shape[0] for array in weights)
            at = _find(head, self.head_numbers[:fewest], where)
            heads, weights = (head,), tuple(array[at : at + 1] for array in weights)
        return dataclasses.replace(self, weights=weights, layers=layers, heads=heads)


def _find(number: int, among: Sequence[int], what: str) -> int:
    """The place of a number."""
    if number not in among:
        one = len(among) == 1
        there = f"{among[0]}, the only one" if one else f"one of {len(among)}, {among[0]} to {among[-1]}"
        raise InputError(f"{what} {number} is not there: expected {there}")
    return among.index(number)
