"""Turns what a caller encodes, texts, pairs of texts or ids, into rows of ids for an encoder. Knows no graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError, LengthError
from tfinfer.tokens.tokenizer import Tokenizer, _translate

Ids = npt.NDArray[np.int64]
Text = str | tuple[str, str] | Sequence[int]
AT_ONCE = 1024  # texts tokenised together: what the tokenizer says of a text is much larger than its ids


class TruncationWarning(UserWarning):
    """Some texts were longer than the model's longest length and were cut, as the caller allowed."""


@dataclass(frozen=True, eq=False)
class Row:
    """One text as ids, (tokens,); `types` are its token types, None where all are 0."""

    ids: Ids
    types: Ids | None = None
    cut: bool = False


def listed(texts: Any) -> tuple[list[Any], bool]:
    """The texts one by one, and whether there was just one; a row of whole numbers is one text.

    Raises:
        InputError: what came is neither a text nor several.
    """
    if isinstance(texts, str) or _is_row(texts):
        return [texts], True
    items = list(iterable(texts))
    if isinstance(texts, tuple) and items and all(isinstance(item, str) for item in items):
        raise InputError("texts: a tuple of texts is a pair: give [(first, second)] for one, a list for several texts")
    return items, False


def iterable(texts: Any) -> Iterable[Any]:
    """`texts` if it is several of them in an order. Raises InputError."""
    wrong = isinstance(texts, (str, bytes, bytearray, Mapping, Set))
    if wrong or not (isinstance(texts, Iterable) or hasattr(texts, "__getitem__")):
        raise InputError(f"texts: expected a list or another sequence of texts, got {type(texts).__name__}")
    return texts  # type: ignore[no-any-return]


def _is_row(value: Any) -> bool:
    """Whether a value is numbers one after the other."""
    if isinstance(value, (bytes, bytearray)):
        return False
    if isinstance(value, Sequence):
        return len(value) > 0 and isinstance(value[0], (Number, np.generic)) and not isinstance(value[0], str)
    if getattr(value, "ndim", None) != 1 or not hasattr(value, "__array__"):
        return False
    return np.asarray(value).dtype.kind in "biuf"


def _is_text(item: Any) -> bool:
    pair = isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item)
    return isinstance(item, str) or pair


class RowMaker:
    """Makes rows that an encoder can take: ids of its vocabulary, at most `longest` of them."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, longest: int) -> None:
        self.tokenizer, self.vocab_size, self.longest = tokenizer, vocab_size, longest

    def rows(self, texts: Sequence[Any], *, first: int = 0, truncate: bool = False) -> list[Row]:
        """A row for each text, pair or row of ids.

        Args:
            first: number of the first text in the caller's counting, for messages.
            truncate: cut what is too long instead of refusing it; special tokens at the end stay.

        Raises:
            InputError: no text, no ids in it, or ids outside the vocabulary. LengthError: it is too long.
        """
        rows: list[Row] = []
        for start in range(0, len(texts), AT_ONCE):
            rows += self._some(texts[start : start + AT_ONCE], first + start, truncate)
        return rows

    def _some(self, texts: Sequence[Any], first: int, truncate: bool) -> list[Row]:
        encodings = iter(self._tokenize([text for text in texts if _is_text(text)], first))
        rows = []
        for number, text in enumerate(texts, first):
            name = f"text {number}"
            if not _is_text(text):
                rows.append(self._row(_ids(text, name), None, name, truncate))
                continue
            encoding = next(encodings)
            cut = truncate and len(encoding.ids) > self.longest
            if cut:
                encoding = self._cut(text, name)
            types = np.array(encoding.type_ids, np.int64)
            row = self._row(np.array(encoding.ids, np.int64), types if types.any() else None, name, False)
            rows.append(Row(row.ids, row.types, cut))
        return rows

    def _tokenize(self, texts: list[Any], first: int) -> list[Any]:
        """What the tokenizer says of texts and pairs, special tokens included."""
        if not texts:
            return []
        if self.tokenizer is None:
            raise InputError("this folder has no tokenizer, so a text cannot be used: give lists of ids")
        with _translate(InputError, f"texts {first} and following: the tokenizer cannot encode them"):
            return list(self.tokenizer._inner.encode_batch_fast(texts))

    def _cut(self, text: Any, name: str) -> Any:
        """What the tokenizer says of as much of a text as fits; of a pair, the longer one is cut first."""
        assert self.tokenizer is not None
        inner = self.tokenizer._inner
        with _translate(InputError, f"{name}: the tokenizer cannot cut it"):
            parts = [inner.encode(part, add_special_tokens=False) for part in _parts(text)]
            room = self.longest - inner.num_special_tokens_to_add(len(parts) == 2)
            if room >= len(parts):
                for part, size in zip(parts, _shares([len(part.ids) for part in parts], room)):
                    part.truncate(size)
                return inner.post_process(parts[0], parts[1] if len(parts) == 2 else None)
        raise LengthError(f"{name}: special tokens alone fill the model's longest length, {self.longest}")

    def _row(self, ids: Ids, types: Ids | None, name: str, truncate: bool) -> Row:
        """A checked row."""
        if not len(ids):
            raise InputError(f"{name}: expected at least one token, got none")
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            top = self.vocab_size - 1
            raise InputError(f"{name}: ids must be from 0 to {top}, the model's vocabulary; got {int(wrong[0])}")
        if len(ids) <= self.longest:
            return Row(ids, types)
        if truncate:
            return Row(self._cut_ids(ids), None, True)
        raise LengthError(
            f"{name}: {len(ids)} tokens are more than the model's longest length, {self.longest}: "
            "shorten it, or cut it with truncate=True (--truncate)"
        )

    def _cut_ids(self, ids: Ids) -> Ids:
        """As many ids as fit; special ones at the end, where a tokenizer knows them, stay there."""
        kept = 0
        while self.tokenizer and kept < self.longest - 1 and self.tokenizer.is_silent(int(ids[-1 - kept])):
            kept += 1
        return np.concatenate([ids[: self.longest - kept], ids[len(ids) - kept :]])


def _parts(text: Any) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each of one or two parts fits: the shorter one keeps up to half."""
    if len(lengths) == 1:
        return [room]
    short = min(min(lengths), room // 2)
    return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


def _ids(value: Any, name: str) -> Ids:
    """(tokens,) of a caller's row of ids."""
    wanted = f"{name}: expected a text, a tuple of two texts, or a row of ids"
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{wanted}: {error}") from error
    if array.ndim != 1:
        raise InputError(f"{wanted}; got {type(value).__name__}" + (f" of shape {array.shape}" if array.ndim else ""))
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{wanted}, whole numbers that is; got {type(value).__name__} of {array.dtype}")
    if array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{name}: {int(array.max())} is no id")
    return np.ascontiguousarray(array, np.int64)
