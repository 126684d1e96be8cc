"""Turns text into ids and ids into text, whole or as they come, through a `tokenizer.json`.

Knows nothing of models, prompts' lengths or stop rules. A file or a text that makes the Rust side panic becomes an
error of the tree. Imports tokenizers and errors.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
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
    except BaseException as cause:
        raise _translated(cause, error, message) from cause


def _translated(cause: BaseException, error: type[TfinferError], message: str) -> TfinferError:
    """What the Rust side raised as an `error`; raises what is none of its business again."""
    if isinstance(cause, Exception):
        return error(f"{message}: {_brief(cause)}")
    if type(cause).__name__ != "PanicException":  # pyo3's class cannot be imported; KeyboardInterrupt must pass
        raise cause
    return error(f"{message}: it panicked: {_brief(cause)}")


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
        self._bytes = _byte_tokens(inner)

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
        try:
            return str(self._inner.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))
        except BaseException as cause:
            raise _translated(cause, InputError, f"ids: {self._name} cannot decode them") from cause

    def label(self, token: int) -> str:
        """One token as people would call it: its text, or its name where it is no text of its own."""
        text = self.decode([token], skip_special_tokens=False)
        return text if text and _UNKNOWN not in text else str(self._inner.id_to_token(token) or token)

    def is_silent(self, token: int, skip_special_tokens: bool = True) -> bool:
        """Whether decoding leaves this id out: a special token that is skipped, or one the file does not know."""
        try:
            return (skip_special_tokens and token in self._special) or self._inner.id_to_token(token) is None
        except BaseException as cause:
            raise _translated(cause, InputError, f"ids: {self._name} cannot decode {token}") from cause

    def byte_of(self, token: int) -> int | None:
        """Return the byte that a byte-fallback token stands for, None for all other tokens."""
        return self._bytes.get(token)


def _byte_tokens(inner: tokenizers.Tokenizer) -> dict[int, int]:
    """Return the byte of each byte token, nothing if the decoder does not join them; it is asked rather than read."""
    found = {byte: inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    values = {token: byte for byte, token in found.items() if token is not None}
    joined = len(values) == len(found) and inner.decode(list(values)[65:67]) == "AB"
    return values if joined else {}


class StreamDecoder:
    """Turns ids into text as they come: never half a character, and all pieces together are the whole text.

    Every push decodes a window of the last ids and returns what is new in it. Up to three replacement characters at
    the end are held back, since they may be the beginning of a character; the next ids or `flush` settle them. With
    `prompt_ids` the pieces continue the prompt's text, so a leading space survives. Byte-fallback decoders turn a
    whole run of byte tokens into replacement characters if one of them is wrong; characters of the run that were
    complete before the wrong byte came have been returned and stay.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = [token for token in prompt_ids if not tokenizer.is_silent(token, skip_special_tokens)]
        # The window's text that needs no sending any more. What the prompt leaves incomplete is sent with its rest.
        self._sent = self._decode(self._window[: len(self._window) - self._incomplete_bytes()])
        if not self._incomplete_bytes():
            self._move_window(self._sent)

    def push(self, token: int) -> str:
        """Take the next id and return the text that became certain."""
        if self._tokenizer.is_silent(token, self._skip):
            return ""
        self._window.append(token)
        if self._incomplete_bytes():
            return ""
        text = self._decode(self._window)
        held = 0 if self._tokenizer.byte_of(token) is not None else _held(text)
        piece = self._take(text, len(text) - held)
        if len(self._window) > _WINDOW:
            self._move_window(text)
        return piece

    def flush(self) -> str:
        """Return what was held back; call it when no more ids come."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _incomplete_bytes(self) -> int:
        """Return how many byte tokens at the window's end are a beginning of a character."""
        if not self._window or self._tokenizer.byte_of(self._window[-1]) is None:
            return 0
        values = map(self._tokenizer.byte_of, reversed(self._window))
        run = bytes(takewhile(lambda byte: byte is not None, values))[::-1]  # type: ignore[arg-type]
        try:
            run.decode()
        except UnicodeDecodeError as error:
            return len(run) - error.start if error.reason == "unexpected end of data" else 0
        return 0

    def _take(self, text: str, end: int) -> str:
        start = len(self._sent)
        if not text.startswith(self._sent):  # the prompt ended within a character, which is now complete
            start -= _held(self._sent)
        self._sent = text[: max(start, end)]
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
