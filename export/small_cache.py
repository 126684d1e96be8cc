"""A cache of 8 bits: what it goes together with, and how the graphs of a folder come to have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from tfinfer.errors import InputError
from tfinfer.manifest import CacheSpec, Manifest, SmallCacheSpec
from tfinfer.session.decoder import Decoder

from . import graph_files
from .calibration import CalibrationIds, cache_ranges, random_ids, read_text, write_text
from .capture import AttentionReport
from .passes import small_cache

CACHES = ("float32", "int8")
WIDE = "float32"  # as wide as the activations
# Beyond its range a number is cut, which does far more harm than coarser steps: of the shipped decoder on held-out text
# a range of 0.8 does twenty times as much (in divergence), one of 1.1 a tenth more.
HEADROOM = 1.1
LONGEST = 2048  # positions of the one long piece: what a module adds to its keys by position shows there


@dataclass(frozen=True)
class Cached:
    """What a user asks of the cache: how wide it is, and the text for its ranges; None: the model's own."""

    dtype: str = WIDE
    calibration: Path | None = None


def check(asked: Cached, dtype: str, flavor: str, also: Sequence[str]) -> None:
    """Raises InputError for an unknown width, and for what an int8 cache does not go with."""
    if asked.dtype not in CACHES:
        raise InputError(f"unknown cache {asked.dtype!r}: expected one of {', '.join(CACHES)}")
    if asked.dtype == WIDE:
        if asked.calibration is not None:
            raise InputError("a text to calibrate on is for an int8 cache: give the cache int8, or leave the text out")
        return
    if flavor == "standard":
        raise InputError("an int8 cache needs an operator that is not ONNX's own: leave the flavor at 'ort'")
    if dtype in ("fp16", "bf16"):
        raise InputError(
            f"an int8 cache is proved on a CPU, beside activations in float32: give the dtype fp32, int8 or int4, "
            f"not {dtype}"
        )
    if also:
        raise InputError(f"{also[0]} makes the cache itself, in float32: leave the cache so, or leave --also out")


def check_graphs(graphs: Mapping[str, ir.Model], attention: Iterable[AttentionReport]) -> None:
    """Whether some entry can be rounded. Raises InputError where there are none, and says what is there instead."""
    if set(graphs) != {"decoder"}:
        kind = "an encoder-decoder" if "decoder" in graphs else "an encoder"
        raise InputError(f"an int8 cache is for decoders, this is {kind}: leave the cache at float32")
    if not small_cache.entries(graphs["decoder"].graph):
        others = dict.fromkeys(f"{a.operator} ({a.pattern})" for a in attention)
        raise InputError(
            "an int8 cache needs GroupQueryAttention over keys and values that nothing else fills or reads; this "
            f"module has {'; '.join(others) or 'states of fixed size'}: leave the cache at float32"
        )


def narrow(
    graphs: Mapping[str, ir.Model], draft: Manifest, folder: Path, asked: Cached, tokenizer: bytes | None
) -> SmallCacheSpec:
    """Round the cache of the graphs in a folder, which are float32, by ranges that they themselves show."""
    wanted = small_cache.entries(graphs["decoder"].graph)
    decoder = Decoder(draft, folder)
    try:
        text = _text(decoder, asked.calibration, tokenizer)
        words = min(draft.vocab_size, draft.num_logits)
        long = random_ids(words, 1, min(draft.max_length, LONGEST))
        ranges = cache_ranges(decoder, [*text.pieces, *long.pieces], {entry.past: entry.pairs for entry in wanted})
    finally:
        decoder.close()
    small_cache.run(
        graphs["decoder"], {past: small_cache.scales_of(HEADROOM * found) for past, found in ranges.items()}
    )
    (folder / graph_files.WEIGHTS).unlink()
    graph_files.save(graphs, folder)
    return SmallCacheSpec(8, len(wanted), text.origin, kept=len(draft.cache) - len(wanted))


def check_agreement(found: float, wanted: float | None) -> None:
    """Raises InputError where the cache alone costs more of the first choices than weights may together with it."""
    if wanted is not None and found < wanted:
        raise InputError(
            f"with an int8 cache {found:.4f} of the proof's first choices are PyTorch's, weights in float32 still, and "
            f"keep_agreement asks for {wanted}: ask for less, or leave the cache at float32"
        )


def _text(decoder: Decoder, file: Path | None, tokenizer: bytes | None) -> CalibrationIds:
    if file is None:
        return write_text(decoder)
    manifest = decoder.manifest
    return read_text(file, tokenizer, manifest.max_length, manifest.vocab_size)


def as_in_graph(cache: Sequence[CacheSpec], model: ir.Model) -> tuple[CacheSpec, ...]:
    """The entries with the widths that they have in a graph."""
    small = {value.name for value in model.graph.inputs if value.dtype is ir.DataType.INT8}
    return tuple(replace(entry, dtype="int8") if entry.past in small else entry for entry in cache)
