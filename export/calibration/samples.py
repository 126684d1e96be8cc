"""The ids to calibrate on: of a text that a user names, or else of texts that the model itself writes.

Text of a model's own has the statistics of what it was trained on, without the data (LLM-QAT, Liu et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError
from tfinfer.manifest import Manifest
from tfinfer.proof.prove import open_session
from tfinfer.session.decoder import Decoder
from tfinfer.tokens.tokenizer import Tokenizer

from ..sources.text import parse_tokenizer

Ids = npt.NDArray[np.int64]

PIECE = 256  # tokens of a text that stand together
MOST_PIECES = 64
MOST_CHARACTERS = 1 << 20  # of a file, from its beginning: what is behind them is not read
ROWS, LENGTH = 32, 128  # of texts that the model writes


@dataclass(frozen=True)
class CalibrationIds:
    """Pieces of text, (1, seq) each, and where they are from, for people."""

    pieces: tuple[Ids, ...]
    origin: str

    @property
    def tokens(self) -> int:
        return sum(piece.size for piece in self.pieces)


def read_text(file: Path, tokenizer: bytes | None, max_length: int, vocab_size: int) -> CalibrationIds:
    """Pieces of a text file, evenly over it, with the special tokens that the tokenizer puts around a text.

    Raises InputError for a file without text, a model without a tokenizer, and a tokenizer of other ids.
    """
    if tokenizer is None:
        raise InputError(
            f"{file}: a text to calibrate on needs a tokenizer, and the source has none: give --tokenizer FILE"
        )
    encoder = Tokenizer(parse_tokenizer(tokenizer, "tokenizer.json"))
    front, back = _around(encoder)
    ids = encoder.encode(_text(file), add_special_tokens=False)
    size = min(PIECE, max_length) - len(front) - len(back)
    if size < 1:
        raise InputError(f"the model's longest length, {max_length}, has no room for text: calibrate without a file")
    parts = [ids[at : at + size] for at in range(0, len(ids), size)]
    pieces = [[*front, *part, *back] for part in parts]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise InputError(
            f"{file}: expected a text of several tokens to calibrate on, got {len(ids)}: give a longer one"
        )
    if (largest := max(map(max, pieces))) >= vocab_size:
        raise InputError(f"{file}: the tokenizer makes id {largest} of it, but the model knows {vocab_size}")
    chosen = np.unique(np.linspace(0, len(pieces) - 1, min(len(pieces), MOST_PIECES)).astype(int))
    return CalibrationIds(tuple(np.array([pieces[i]], np.int64) for i in chosen), file.name)


def write_text(decoder: Decoder, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> CalibrationIds:
    """Texts that the model writes at temperature 1, each from an id at random; the same ones for the same seed."""
    manifest, rng = decoder.manifest, np.random.default_rng(seed)
    length = min(length, manifest.max_length)
    words = min(manifest.vocab_size, manifest.num_logits)
    written = rng.integers(0, words, (rows, 1))
    cache = decoder.open_cache(rows, length)
    try:
        slots = [cache.acquire() for _ in range(rows)]
        logits = np.concatenate([decoder.prefill(cache, slot, ids) for slot, ids in zip(slots, written)])
        while written.shape[1] < length:
            chosen = _drawn(logits[:, :words], rng)
            written = np.concatenate([written, chosen[:, None]], axis=1)
            if written.shape[1] < length:
                logits = decoder.step(cache, slots, chosen)
    finally:
        cache.close()
    return CalibrationIds(tuple(written[:, None]), "its own text")


def own_text(manifest: Manifest, folder: Path) -> CalibrationIds:
    """What the decoder in a folder writes."""
    decoder = open_session(manifest, folder)
    try:
        return write_text(decoder)
    finally:
        decoder.close()


class Calibration:
    """The text of one export: what a user named, or else what the float32 graph writes, once, when it is asked for."""

    def __init__(self, named: CalibrationIds | None) -> None:
        self._ids = named

    def ids(self, manifest: Manifest, folder: Path) -> CalibrationIds:
        """The text; in the folder lie graphs that write it where there is none yet, and `manifest` is theirs."""
        self._ids = self._ids or own_text(manifest, folder)
        return self._ids


def _drawn(logits: npt.NDArray[np.float32], rng: np.random.Generator) -> Ids:
    """A token for each row, by the chances that its logits give: the largest with Gumbel's noise on it."""
    return (logits + rng.gumbel(size=logits.shape)).argmax(-1)


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


def _text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(MOST_CHARACTERS)
    except OSError as error:
        raise InputError(f"{file}: expected a text file to calibrate on: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected plain text in UTF-8 to calibrate on: {error}") from error


def random_ids(words: int, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> CalibrationIds:
    """Ids at random, for a model that writes no text."""
    ids = np.random.default_rng(seed).integers(0, words, (rows, 1, length))
    return CalibrationIds(tuple(ids), "random ids")
