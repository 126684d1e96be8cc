"""Prompt lookup: what followed the last tokens where they stood before is the guess of what follows now.

Costs a look into a dictionary for each token. Knows ids only.
"""

from __future__ import annotations

from collections.abc import Iterable

from tfinfer.tokens.speculate import Draft

_PLACES = 6  # of earlier places with the same last two tokens, the latest that are looked at
_LONGEST = 32  # tokens that are compared backwards at most


class Lookup:
    """Guesses from the text itself, the prompt and what was generated."""

    free = True

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._behind: dict[tuple[int, int], list[int]] = {}  # two tokens to the places behind them
        self._start = 0
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with `token`."""
        ids = self._ids
        if len(ids) >= 2:  # only now is there something behind the last two
            self._behind.setdefault((ids[-2], ids[-1]), []).append(len(ids))
        ids.append(token)

    def kind(self) -> int | None:
        """The bits of how many of the last tokens stood before: 2 for two or three, 6 for 32; None for no guess."""
        ids = self._ids
        places = self._behind.get((ids[-2], ids[-1])) if len(ids) >= 2 else None
        if not places:
            return None
        longest = 0
        for place in places[: -_PLACES - 1 : -1]:  # of equally long ones the latest
            if (same := self._same(place)) > longest:
                longest, self._start = same, place
                if same == _LONGEST:
                    break
        return longest.bit_length()

    def _same(self, place: int) -> int:
        """How many tokens before `place` are those at the end, two at least."""
        ids, same = self._ids, 2
        while same < _LONGEST and same < place and ids[place - 1 - same] == ids[-1 - same]:
            same += 1
        return same

    def guess(self) -> int:
        """The token that followed."""
        return self._ids[self._start]

    def propose(self, count: int) -> Draft:
        """`count` tokens, after `kind` found where from. Where the place's own end is reached, it repeats itself."""
        ids = self._ids[self._start : self._start + count]
        period = len(self._ids) - self._start
        while len(ids) < count:
            ids.append(ids[len(ids) - period])
        return Draft(ids)

    def close(self) -> None:
        """Nothing is held."""
