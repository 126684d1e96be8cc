"""Turns pieces of text into what may be shown of them: nothing from a stop string on, wherever the pieces are cut.

Works on text only; stop ids are the generation loop's. Imports errors.
"""

from collections.abc import Sequence

from tfinfer.errors import InputError


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the stop strings as a tuple; an empty one would stop before the first token and is refused."""
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise InputError(f"stop: expected a string, a list of strings or None; got {stop!r}")
    if not all(strings):
        raise InputError(f"stop: expected strings of at least one character; got {stop!r}; leave the empty one out")
    return tuple(dict.fromkeys(strings))


class StopMatcher:
    """Hold back what may be the beginning of a stop string, and drop the stop string and what follows it.

    The text ends at the first place where any stop string is complete, as if it came character by character; of
    several that end there, the longest is dropped.
    """

    def __init__(self, stop: str | Sequence[str] | None) -> None:
        self._stops = stop_strings(stop)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, None while there is none."""
        return self._matched

    def push(self, text: str) -> str:
        """Take the next piece and return what is safe to show; nothing any more after a match."""
        if self._matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self._matched = min(found)
            self._held = ""
            return text[:start]
        safe = len(text) - self._undecided(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """Return what was held back; call it when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of the text with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        ends = (text[len(text) - size :] for size in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
