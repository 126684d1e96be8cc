"""A cache of 8 bits: what it goes together with, and how the graphs of a folder come to have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from tfinfer.errors import InputError
from tfinfer.manifest import CacheSpec, Manifest
from tfinfer.precision import SmallCacheSpec
from tfinfer.session.decoder import Decoder

from . import graph_files
from .calibration import Calibration, cache_ranges, random_ids
from .capture import AttentionReport
from .kinds import Job
from .passes import small_cache

CACHES = ("float32", "int8")
WIDE = "float32"  # as wide as the activations
# Beyond its range a number is cut, which does far more harm than coarser steps: of the shipped decoder on held-out text
# a range of 0.8 does twenty times as much (in divergence), one of 1.1 a tenth more.
HEADROOM = 1.1
LONGEST = 2048  # positions of the one long piece: what a module adds to its keys by position shows there


def check(cache: str, width: str, flavor: str, also: Sequence[str]) -> None:
    """Raises InputError for an unknown cache, and for what one of int8 does not go with. width: of activations."""
    if cache not in CACHES:
        raise InputError(f"unknown cache {cache!r}: expected one of {', '.join(CACHES)}")
    if cache == WIDE:
        return
    if flavor == "standard":
        raise InputError("an int8 cache needs an operator that is not ONNX's own: leave the flavor at 'ort'")
    if width != "fp32":
        raise InputError(
            "an int8 cache is proved on a CPU, beside activations in float32: give the dtype fp32, int8 or int4, and "
            f"no activations in {width}"
        )
    if also:
        raise InputError(f"{also[0]} makes the cache itself, in float32: leave the cache so, or leave --also out")


class Rounding:
    """The cache of a decoder's graph, to be rounded when the float32 one has been proved.

    Raises InputError for what has no cache that can be, before anything is computed.
    """

    def __init__(self, job: Job) -> None:
        if set(job.graphs) != {"decoder"}:
            kind = "an encoder-decoder" if "decoder" in job.graphs else "an encoder"
            raise InputError(f"an int8 cache is for decoders, this is {kind}: leave the cache at float32")
        self._model = job.graphs["decoder"]
        self._entries = small_cache.entries(self._model.graph)
        if not self._entries:
            raise InputError(_why_none(job.attention))

    def run(
        self, graphs: Mapping[str, ir.Model], draft: Manifest, folder: Path, calibration: Calibration
    ) -> SmallCacheSpec:
        """Round it in a folder, whose graphs these are, by the ranges that it shows there."""
        text = calibration.ids(draft, folder)
        decoder = Decoder(draft, folder)
        try:
            words = min(draft.vocab_size, draft.num_logits)
            pieces = [*text.pieces, *random_ids(words, 1, min(draft.max_length, LONGEST)).pieces]
            ranges = cache_ranges(decoder, pieces, {entry.past: entry.pairs for entry in self._entries})
        finally:
            decoder.close()
        scales = {past: small_cache.scales_of(HEADROOM * found) for past, found in ranges.items()}
        small_cache.run(self._model, scales)
        (folder / graph_files.WEIGHTS).unlink()
        graph_files.save(graphs, folder)
        return SmallCacheSpec(8, len(scales), text.origin, kept=len(draft.cache) - len(scales))


def _why_none(attention: Iterable[AttentionReport]) -> str:
    others = dict.fromkeys(f"{a.operator} ({a.pattern})" for a in attention)
    return (
        "an int8 cache needs GroupQueryAttention over keys and values that nothing else fills or reads; this module "
        f"has {'; '.join(others) or 'states of fixed size'}: leave the cache at float32"
    )


def check_agreement(found: float, wanted: float | None) -> None:
    """Raises InputError where the cache alone costs more of the first choices than weights may together with it."""
    if wanted is not None and found < wanted:
        raise InputError(
            f"with an int8 cache {found:.4f} of the proof's first choices are PyTorch's, weights in float32 still, and "
            f"keep_agreement asks for {wanted}: ask for less, or leave the cache at float32"
        )


def as_in_graph(cache: Sequence[CacheSpec], model: ir.Model) -> tuple[CacheSpec, ...]:
    """The entries with the widths that they have in a graph."""
    small = {value.name for value in model.graph.inputs if value.dtype is ir.DataType.INT8}
    return tuple(replace(entry, dtype="int8") if entry.past in small else entry for entry in cache)
