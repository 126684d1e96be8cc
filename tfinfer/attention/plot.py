"""Attention maps into a PNG through matplotlib: every layer and head as a tile, or one map with its tokens."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfinfer.attention.maps import AttentionMap
from tfinfer.errors import InputError, MissingDependencyError

MOST_LABELS = 60  # tokens named along one axis; beyond that every second, third, ...
_DPI = 150
_RAMP = ("#eef1f4", "#cfe3e6", "#93c9ce", "#4a9fb9", "#2b6a9f", "#1d3b7a", "#141c4f")  # as on the page
_KINDS = {
    "self": "Self-attention",
    "encoder": "Encoder self-attention",
    "decoder": "Decoder self-attention",
    "cross": "Cross-attention, decoder to encoder",
}


def require() -> Any:
    """matplotlib, with what a picture needs of it loaded.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingDependencyError(
            "drawing a PNG needs matplotlib: pip install 'tfinfer[plot]', or write an .html, which needs nothing"
        ) from error


def save_png(maps: Sequence[AttentionMap], path: Path, title: str = "") -> None:
    """Draw every map below the other, whatever the suffix of `path`.

    Raises:
        InputError: there are no maps.
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require()
    if not maps:
        raise InputError("expected at least one attention map to draw; got none")
    sizes = [_inches(item) for item in maps]
    figure = matplotlib.figure.Figure(
        figsize=(max(width for width, _ in sizes), sum(height for _, height in sizes)), layout="constrained"
    )  # not through pyplot, which keeps state for the process and may look for a screen
    parts = figure.subfigures(len(maps), 1, squeeze=False, height_ratios=[height for _, height in sizes])
    for part, item in zip(parts[:, 0], maps):
        _draw(matplotlib, part, item)
    figure.suptitle(title, fontsize=11, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # a character that no font has becomes a box
        figure.savefig(path, format="png", dpi=_DPI)


def _draw(matplotlib: Any, part: Any, item: AttentionMap) -> None:
    axes = part.subplots()
    top = max(float(layer.max()) for layer in item.weights)
    scale = matplotlib.colors.PowerNorm(0.5, 0, top or 1)
    colors = matplotlib.colors.LinearSegmentedColormap.from_list("tfinfer", _RAMP).with_extremes(bad="none")
    image = axes.imshow(_mosaic(item), cmap=colors, norm=scale, interpolation="auto", aspect="auto")
    part.colorbar(image, ax=axes, label="weight (colour by its square root)", fraction=0.04, pad=0.02)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)
    kind = _KINDS.get(item.name, item.name)
    if _is_single(item):
        _name_tokens(axes, item)
        kind += f", layer {item.layer_numbers[0]}, head {item.head_numbers[0]}"
    else:
        _name_tiles(axes, item)
    axes.set_title(kind, fontsize=10, parse_math=False)


def _is_single(item: AttentionMap) -> bool:
    return len(item.weights) == 1 and item.weights[0].shape[0] == 1


def _inches(item: AttentionMap) -> tuple[float, float]:
    """Width and height of a map in a picture."""
    queries, keys = len(item.query_tokens), len(item.key_tokens)
    if _is_single(item):
        return min(3 + 0.22 * keys, 16), min(2.4 + 0.22 * queries, 15)
    tile = min(max(max(queries, keys) / 60, 0.8), 1.4, 16 / len(item.head_numbers))
    return 2.5 + tile * len(item.head_numbers), 1.3 + tile * len(item.weights)


def _mosaic(item: AttentionMap) -> NDArray[np.float32]:
    """Layers below each other, heads beside each other, NaN between them and where a layer has fewer heads."""
    rows, columns, gaps = len(item.query_tokens), len(item.key_tokens), _gaps(item)
    heads = len(item.head_numbers)
    shape = len(item.weights), rows + gaps[0], heads, columns + gaps[1]
    tiles = np.full(shape, np.nan, np.float32)
    for place, layer in enumerate(item.weights):
        tiles[place, :rows, : layer.shape[0], :columns] = layer.transpose(1, 0, 2)
    return tiles.reshape(shape[0] * shape[1], shape[2] * shape[3])


def _gaps(item: AttentionMap) -> tuple[int, int]:
    """Empty rows and columns after each tile."""
    if _is_single(item):
        return 0, 0
    return math.ceil(len(item.query_tokens) / 16), math.ceil(len(item.key_tokens) / 16)


def _name_tiles(axes: Any, item: AttentionMap) -> None:
    rows, columns = len(item.query_tokens), len(item.key_tokens)
    heads, layers, gaps = item.head_numbers, item.layer_numbers, _gaps(item)
    axes.set_xticks([(columns - 1) / 2 + place * (columns + gaps[1]) for place in range(len(heads))], heads)
    axes.set_yticks([(rows - 1) / 2 + place * (rows + gaps[0]) for place in range(len(layers))], layers)
    axes.set(xlabel="head", ylabel="layer")
    axes.tick_params(length=0)


def _name_tokens(axes: Any, item: AttentionMap) -> None:
    """Tokens along both axes; `$` in them is no formula."""
    for axis, tokens in ((axes.xaxis, item.key_tokens), (axes.yaxis, item.query_tokens)):
        places = range(0, len(tokens), math.ceil(len(tokens) / MOST_LABELS))
        labels = [visible(tokens[place]) for place in places]
        axis.set_ticks(list(places), labels, fontsize=8, parse_math=False)
    axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel="is attended to", ylabel="attends")


def visible(token: str) -> str:
    """A token with its blanks shown, short enough for a label."""
    shown = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in shown)
    return f"{shown[:19]}…" if len(shown) > 20 else shown or "⟨empty⟩"
