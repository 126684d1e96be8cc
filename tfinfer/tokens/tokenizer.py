"""Turns text into ids and ids into text, whole or as they come, through a `tokenizer.json`.

Knows nothing of models, prompts' lengths or stop rules. A file or a text that makes the Rust side panic becomes an
error of the tree. Imports tokenizers and errors.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

import tokenizers

from tfinfer.errors import CorruptModelError, InputError, TfinferError

_UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character, or not one yet
_PENDING = 3  # bytes that a UTF-8 character can have before its last one
_CONTEXT = 8  # ids kept before the new ones, so that decoders that strip the first space do not strip ours
_WINDOW = 24  # ids decoded at most per push while characters come out whole
_GARBAGE_WINDOW = 64  # the same for ids that never make a character


@contextmanager
def _translate(error: type[TfinferError], message: str) -> Iterator[None]:
    """Turn what the Rust side raises into `error`, its panics too, which are no `Exception`."""
    try:
        yield
    except Exception as cause:
        raise error(f"{message}: {_brief(cause)}") from cause
    except BaseException as cause:
        if type(cause).__name__ != "PanicException":  # pyo3's class cannot be imported; KeyboardInterrupt must pass
            raise
        raise error(f"{message}: it panicked: {_brief(cause)}") from cause


def _brief(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__


class Tokenizer:
    """A `tokenizers.Tokenizer` without truncation and padding, whose failures are errors of the tree."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "tokenizer") -> None:
        inner.no_truncation()  # a prompt that is too long is refused later, never cut in silence
        inner.no_padding()
        self._inner = inner
        self._name = name
        added: dict[int, Any] = inner.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Tokenizer":
        """Load a `tokenizer.json`."""
        name = fspath(path)
        with _translate(CorruptModelError, f"{name}: expected a tokenizer.json that `tokenizers` can load"):
            return cls(tokenizers.Tokenizer.from_file(name), name)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        if not isinstance(text, str):
            raise InputError(f"text: expected a string to encode; got {type(text).__name__}")
        with _translate(InputError, f"text: {self._name} cannot encode it"):
            return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; ids that the file does not know have none."""
        with _translate(InputError, f"ids: {self._name} cannot decode them"):
            return str(self._inner.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))

    def is_silent(self, token: int, skip_special_tokens: bool = True) -> bool:
        """Whether decoding leaves this id out: a special token that is skipped, or one the file does not know."""
        with _translate(InputError, f"ids: {self._name} cannot decode {token}"):
            return (skip_special_tokens and token in self._special) or self._inner.id_to_token(token) is None


class StreamDecoder:
    """Turns ids into text as they come: never half a character, and all pieces together are the whole text.

    Every push decodes a window of the last ids and returns what is new in it. Up to three replacement characters at
    the end are held back, since they may be the beginning of a character; the next ids or `flush` settle them. With
    `prompt_ids` the pieces continue the prompt's text, so a leading space survives. Byte-fallback decoders turn a
    whole run of bytes into replacement characters if one of them is wrong; characters of the run that were complete
    before the wrong byte came are kept here.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = [token for token in prompt_ids if not tokenizer.is_silent(token, skip_special_tokens)]
        self._sent = self._decode(self._window)  # the window's text that needs no sending any more
        self._move_window(self._sent)

    def push(self, token: int) -> str:
        """Take the next id and return the text that became certain."""
        if self._tokenizer.is_silent(token, self._skip):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        piece = self._take(text, len(text) - _held(text)) if self._is_settled(text) else ""
        if len(self._window) > _WINDOW:
            self._move_window(text)
        return piece

    def flush(self) -> str:
        """Return what was held back; call it when no more ids come."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _is_settled(self, text: str) -> bool:
        """Whether what stands before the held characters will stay.

        Byte-fallback decoders show a run of bytes as replacement characters, those sent as characters too, for as
        long as the last character of the run is not complete.
        """
        return not _held(text) or text.startswith(self._sent) or len(self._window) > _GARBAGE_WINDOW

    def _take(self, text: str, end: int) -> str:
        start = len(self._sent)
        if not text.startswith(self._sent):  # the prompt ended within a character, which is now complete
            start -= _held(self._sent)
        if end <= start and text.startswith(self._sent):
            return ""
        self._sent = text[:end]
        return text[start:end]

    def _move_window(self, text: str) -> None:
        """Drop the oldest ids, from a place where the text of the rest does not depend on them."""
        start = self._clean_start(text)
        if start is None and len(self._window) > _GARBAGE_WINDOW:
            start = len(self._window) - _CONTEXT
        if not start:
            return
        self._window = self._window[start:]
        rest = self._decode(self._window)
        unsent = len(text) - len(self._sent)
        self._sent = rest[: max(0, len(rest) - unsent)]

    def _clean_start(self, text: str) -> int | None:
        last = len(self._window) - _CONTEXT
        return next((i for i in range(last, max(0, last - _CONTEXT), -1) if self._is_clean(i, text)), None)

    def _is_clean(self, start: int, text: str) -> bool:
        """Whether the ids from `start` decode, after a whole character, to the end of the text, some of it sent."""
        rest = self._decode(self._window[start:])
        cut = len(text) - len(rest)
        whole = not rest.startswith(_UNKNOWN) and not text[:cut].endswith(_UNKNOWN)
        return whole and text.endswith(rest) and cut < len(self._sent)


def _held(text: str) -> int:
    """Return how many replacement characters at the end may yet become a character."""
    return min(_PENDING, len(text) - len(text.rstrip(_UNKNOWN)))
