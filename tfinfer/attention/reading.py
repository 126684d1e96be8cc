"""What attends to what in a text: runs the graph "attention" of a folder, all positions at once. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.attention.maps import AttentionMap
from tfinfer.errors import InputError, LengthError
from tfinfer.manifest import Manifest
from tfinfer.session.providers import open_session
from tfinfer.session.threads import thread_count
from tfinfer.tokens.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]


class AttentionReader:
    """The graph of attention's weights, opened on the CPU."""

    def __init__(self, manifest: Manifest, folder: Path, tokenizer: Tokenizer | None, threads: int | None) -> None:
        """Raises InputError for a folder without such a graph."""
        if not manifest.maps:
            raise InputError(
                "this folder has no graph of attention's weights: its module has no softmax over positions that is "
                "followed, or it was exported with --no-attention or in a narrow dtype"
            )
        self.manifest, self.tokenizer = manifest, tokenizer
        path = folder / manifest.graphs["attention"].file
        self._session: Any = open_session(path, device="cpu", threads=thread_count(threads)).session
        self._takes = {value.name for value in self._session.get_inputs()}

    def check(self, ids: Sequence[int], source: bool = False) -> Ids:
        """(n,) int64. Raises InputError for no ids or ids outside the vocabulary, LengthError for too many."""
        manifest = self.manifest
        words = manifest.source_vocab_size if source else manifest.vocab_size
        longest = manifest.max_source_length if source else manifest.max_length
        row = np.asarray(ids)
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
            raise InputError(f"expected at least one id, whole numbers all of them; got {ids!r}")
        if row.min() < 0 or row.max() >= words:
            raise InputError(
                f"ids must be from 0 to {words - 1}, the model's vocabulary; got {row.min()} to {row.max()}"
            )
        if len(row) > longest:
            raise LengthError(
                f"{len(row)} tokens are longer than the model's longest length, {longest}: shorten the text"
            )
        return row.astype(np.int64)

    def maps(self, ids: Ids, source: Ids | None = None) -> list[AttentionMap]:
        """One map for each stack of attention; ids: (seq,), source: (source,) of an encoder-decoder."""
        feeds = {"input_ids": ids[None], "source_ids": source, "token_type_ids": np.zeros_like(ids)[None]}
        if source is not None:
            feeds["source_ids"] = source[None]
        names = [name for entry in self.manifest.maps for name in entry.outputs]
        found = self._session.run(names, {name: feeds[name] for name in self._takes})
        weights = dict(zip(names, found))
        own = self._labels(ids)
        other = own if source is None else self._labels(source)
        tokens = {"self": (own, own), "decoder": (own, own), "encoder": (other, other), "cross": (own, other)}
        return [
            AttentionMap(entry.name, *tokens[entry.name], tuple(weights[name][0] for name in entry.outputs))
            for entry in self.manifest.maps
        ]

    def _labels(self, ids: Ids) -> tuple[str, ...]:
        if self.tokenizer is None:
            return tuple(map(str, ids.tolist()))
        return tuple(map(self.tokenizer.label, ids.tolist()))
