"""What only running a graph tells: whether its cache is written in place or concatenated, its sizes, its lengths."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfinfer.adopt.description import Description
from tfinfer.adopt.signature import DecoderParts, listed
from tfinfer.errors import IncompatibleModelError
from tfinfer.manifest import CacheSpec, TensorSpec

ROOM, HELD, NEW = 6, 2, 3  # of a trial: places of the past, how many of them count, and new positions


@dataclass(frozen=True)
class Found:
    """What trials say of a decoder: how its cache goes, its sizes, and which rows of logits it gives."""

    cache_mode: str
    cache: tuple[CacheSpec, ...]
    num_logits: int
    all_rows: bool


def probe(session: Any, parts: DecoderParts, said: Description) -> Found:
    """Run a decoder's graph on zeros. Raises IncompatibleModelError where it does not run, or gives odd shapes."""
    cache = tuple(_entry(past, present.name, said) for past, present in parts.pairs)
    names = [parts.logits, *(entry.present for entry in cache)]

    def run(room: int, held: int, new: int) -> Mapping[str, Any]:
        return dict(zip(names, session.run(names, _feeds(session, parts, cache, room, held, new))))

    # A past with more room than the mask says: only a graph that writes in place gives one as large back.
    outputs = _attempt(lambda: run(ROOM, HELD, 1))
    if isinstance(outputs, dict) and {outputs[entry.present].shape[2] for entry in cache} == {ROOM}:
        mode, whole = "in place", _attempt(lambda: run(ROOM, 0, NEW))
        length = ROOM
    else:
        mode, whole = "concatenated", _attempt(lambda: run(0, 0, NEW))
        length = NEW
    if isinstance(whole, str):
        raise IncompatibleModelError(f"the graph does not run on {NEW} ids and an empty cache: {whole}")
    for entry in cache:
        wanted = (1, entry.num_kv_heads, length, entry.head_dim)
        if (came := whole[entry.present].shape) != wanted:
            raise IncompatibleModelError(
                f"{entry.present}: expected {wanted} for {NEW} ids and an empty cache, got {came}: either the "
                "files beside the graph say other sizes than it has, or this is no cache that grows by position"
            )
    shape = whole[parts.logits].shape
    if len(shape) != 3 or shape[0] != 1 or shape[1] not in (1, NEW):
        raise IncompatibleModelError(f"{parts.logits}: expected (1, {NEW} or 1, vocabulary) for {NEW} ids, got {shape}")
    return Found(mode, cache, int(shape[2]), parts.logits_to_keep is not None or shape[1] == NEW)


def _attempt(run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | str:
    """What came, or what onnxruntime said."""
    try:
        return run()
    except Exception as error:  # onnxruntime's classes have no common root
        return textwrap.shorten(str(error), 300, placeholder=" ...")


def _entry(past: TensorSpec, present: str, said: Description) -> CacheSpec:
    """A cache entry; the sizes are the graph's, or else those of the files beside it."""
    heads = past.shape[1] if isinstance(past.shape[1], int) else said.kv_heads
    width = past.shape[3] if isinstance(past.shape[3], int) else said.head_dim
    if not heads or not width:
        raise IncompatibleModelError(
            f"{listed(past)}: neither the graph nor a genai_config.json or config.json beside it says how many heads "
            "there are and how wide they are"
        )
    return CacheSpec(past.name, present, heads, width, past.dtype)


def _feeds(
    session: Any, parts: DecoderParts, cache: tuple[CacheSpec, ...], room: int, held: int, new: int
) -> dict[str, Any]:
    """Zeros for all: a past of `room` places, of which `held` count, and `new` ids."""
    feeds: dict[str, Any] = {
        parts.input_ids: np.zeros((1, new), np.int64),
        parts.attention_mask: np.ones((1, held + new), np.int64),
    }
    if parts.position_ids is not None:
        feeds[parts.position_ids] = np.arange(held, held + new)[None]
    if parts.logits_to_keep is not None:
        shapes = {value.name: value.shape for value in session.get_inputs()}
        shape = shapes.get(parts.logits_to_keep)
        feeds |= {} if shape is None else {parts.logits_to_keep: np.full(shape, new, np.int64)}
    if parts.use_cache_branch is not None:
        feeds[parts.use_cache_branch] = np.array([held > 0])
    for entry in cache:
        feeds[entry.past] = np.zeros((1, entry.num_kv_heads, room, entry.head_dim), entry.dtype)
    return feeds
