"""An encoder with its tokenizer: texts or ids in, vectors out; and any other graph by the names of its inputs."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.errors import InputError, NonFiniteLogitsError
from tfinfer.manifest import Manifest, PoolingSpec
from tfinfer.model import Array, Model
from tfinfer.session.encoder import Encoder
from tfinfer.tokens.batching import BUDGETS, batches, pad
from tfinfer.tokens.pooling import POOLED, choose, normalized, pool
from tfinfer.tokens.rows import Row, RowMaker, TruncationWarning, iterable, listed

__all__ = ["EncodingModel", "TruncationWarning"]

WINDOW = 32  # batches of a stream that are sorted by length together
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class _Call:
    """The checked options of `encode` or `encode_iter`."""

    batch_size: int
    pooling: PoolingSpec
    output: str
    truncate: bool


class EncodingModel(Model):
    """A model that encodes. Texts are sorted by length and run in batches of a budget of tokens."""

    def __init__(self, manifest: Manifest, folder: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(manifest, folder)
        self.encoder = Encoder(manifest, folder, device=device, threads=threads)
        self.device, self.threads, self.reason = self.encoder.device, self.encoder.threads, self.encoder.reason
        self._maker = RowMaker(self.tokenizer, self.encoder.vocab_size, self.encoder.max_length)

    def close(self) -> None:
        """Let the graph go; later calls raise ClosedError."""
        super().close()
        self.encoder.close()

    # -- encoding -----------------------------------------------------------------------------------------------
    def encode(  # type: ignore[override]
        self,
        texts: Any,
        *,
        batch_size: int = 32,
        pooling: str | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        show_progress: bool | Progress | None = None,
    ) -> Any:
        """The vectors of texts, in the order given.

        Args:
            texts: a text, a row of ids (special tokens included, no padding), or a list of texts, tuples
                (first, second) of texts that belong together, and rows of ids.
            batch_size: rows that run together at most.
            pooling: "mean", "cls", "last", "none" or "pooled" (the module's own); None is the folder's own or "mean".
            normalize: scale vectors to length 1; None is the folder's own or False.
            truncate: cut texts that are too long, with a TruncationWarning, instead of raising LengthError.
            show_progress: called with (texts done, texts in all) after every batch; True writes them to stderr.

        Returns (n, hidden) float32; (hidden,) for one text; with "none" (tokens, hidden) for each text, in a list.
        Raises InputError, LengthError or NonFiniteLogitsError, and then nothing was returned.
        """
        call = self._call(batch_size, pooling, normalize, truncate)
        progress = _progress(show_progress)
        items, single = listed(texts)
        rows = self._maker.rows(items, truncate=call.truncate)
        _warn_of_cuts(sum(row.cut for row in rows), len(rows), self.encoder.max_length)
        vectors = self._vectors(rows, call, 0, progress)
        return vectors[0] if single else vectors

    def encode_iter(  # type: ignore[override]
        self,
        texts: Iterable[Any],
        *,
        batch_size: int = 32,
        window: int | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
    ) -> Iterator[Any]:
        """The vectors of a stream of texts, in its order, in constant memory.

        `window` texts, by default 32 batches (with "none" one batch), are taken from the stream, sorted by length and
        run; their vectors come in arrays (at most batch_size, hidden), with "none" in lists. Options are checked at
        once, a text when its window is read: what came before an error stays valid. Other arguments as in `encode`;
        the TruncationWarning comes at the end of the stream.
        """
        call = self._call(batch_size, pooling, normalize, truncate)
        if window is None:
            window = batch_size * (1 if call.pooling.mode == "none" else WINDOW)
        return self._stream(iter(iterable(texts)), call, _whole("window", window))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Every output of the graph by name, for arrays by the names of its inputs.

        An attention mask that is left out is all ones, token types all zeros. Whole numbers and floats are brought to
        the declared types where that is safe. Raises InputError or LengthError.
        """
        self._check_open()
        return self.encoder.run(inputs)

    def pooling(self, pooling: str | None = None, normalize: bool | None = None) -> PoolingSpec:
        """What `encode` does when it is given these. Raises InputError for what does not fit this encoder."""
        encoder = self.encoder
        outputs = [tensor.name for tensor in encoder.graph.outputs]
        return choose(pooling, normalize, self.manifest.pooling, encoder.roles, outputs)

    def _call(self, batch_size: int, pooling: str | None, normalize: bool | None, truncate: bool) -> _Call:
        self._check_open()
        self.encoder.check_takes_texts()
        chosen, roles = self.pooling(pooling, normalize), self.encoder.roles
        output = roles.pooled if chosen.mode == POOLED else roles.hidden_states
        assert output is not None, "pooling was checked against the roles"
        return _Call(_whole("batch_size", batch_size), chosen, output, bool(truncate))

    def _stream(self, texts: Iterator[Any], call: _Call, window: int) -> Iterator[Any]:
        done = cut = 0
        while items := list(itertools.islice(texts, window)):
            rows = self._maker.rows(items, first=done, truncate=call.truncate)
            vectors = self._vectors(rows, call, done)
            done, cut = done + len(rows), cut + sum(row.cut for row in rows)
            for start in range(0, len(rows), call.batch_size):
                yield vectors[start : start + call.batch_size]
        _warn_of_cuts(cut, done, self.encoder.max_length)

    def _vectors(self, rows: Sequence[Row], call: _Call, first: int, progress: Progress | None = None) -> Any:
        """An array, or a list where the tokens of a text keep their own vectors; `first` is the first row's number."""
        each = call.pooling.mode == "none"
        found: Any = [None] * len(rows) if each else np.zeros((len(rows), self._width(call.output)), np.float32)
        done, ragged = 0, self.encoder.roles.attention_mask is not None
        for batch in batches(
            [len(row.ids) for row in rows], call.batch_size, ragged=ragged, budget=BUDGETS[self.device]
        ):
            for number, vector in zip(batch, self._batch([rows[i] for i in batch], call)):
                if not np.isfinite(vector).all():
                    advice = ": export it with --dtype fp32" if self.manifest.dtype != "float32" else ""
                    raise NonFiniteLogitsError(f"text {first + number}: the model computed NaN or infinity{advice}")
                found[number] = vector
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
        return found

    def _batch(self, rows: Sequence[Row], call: _Call) -> Iterable[Array]:
        """The vector of each row, or the vectors of its tokens."""
        ids, mask = pad([row.ids for row in rows], self.manifest.token_ids.pad or 0)
        types = None
        if any(row.types is not None for row in rows):
            types, _ = pad([np.zeros_like(row.ids) if row.types is None else row.types for row in rows], 0)
        found = self.encoder.encode(ids, mask, types, output=call.output)
        lengths = [len(row.ids) for row in rows]
        mode, scaled = call.pooling.mode, call.pooling.normalize
        if mode == "none":
            each = [row[:length].astype(np.float32) for row, length in zip(found, lengths)]
            return [normalized(row) for row in each] if scaled else each
        vectors = found.astype(np.float32) if mode == POOLED else pool(found, lengths, mode)
        return normalized(vectors) if scaled else vectors

    def _width(self, output: str) -> int:
        """The size of a vector."""
        width = next(tensor.shape for tensor in self.encoder.graph.outputs if tensor.name == output)[-1]
        assert isinstance(width, int), "the encoder checked it when it was opened"
        return width


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)


def _progress(asked: bool | Progress | None) -> Progress | None:
    if asked is None or asked is False:
        return None
    if asked is True:
        return _to_stderr
    if not callable(asked):
        raise InputError(f"show_progress: expected True, a function of (done, total) or None, got {asked!r}")
    return asked


def _to_stderr(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done} of {total} texts" + ("\n" if done == total else ""))
    sys.stderr.flush()


def _warn_of_cuts(cut: int, total: int, longest: int) -> None:
    if cut:
        text = f"{cut} of {total} texts were longer than {longest} tokens and were cut"
        warnings.warn(text, TruncationWarning, stacklevel=3)
