"""How many tokens to draft: by how often drafts were right, and by what passes were measured to take.

Knows numbers only: no tokens, no graph, no clock.
"""

from __future__ import annotations

from collections import deque

LENGTHS = (1, 2, 4, 8, 16)  # of drafts; what a pass takes is measured for each
MARGIN = 1.05  # what speculating must promise, for estimates are noisy
_MEMORY = 0.95  # what an outcome weighs after the next one: about the last twenty count
_LATEST = 5  # measurements of one kind of pass that are kept
_STALE = 96  # passes, or up to twice as many, after which a measurement counts no more: it may have been disturbed
_HOPE = 1 / 8  # of a step, for each further token of a pass that was not measured: hopeful, so that it is tried
_PAUSE = 16  # tokens


class Pace:
    """Chooses the length of the next draft.

    With `a` the share of drafted tokens that were right lately (of the same kind), a draft of `k` tokens makes

        E(k) = 1 + a + a^2 + ... + a^k

    tokens, and takes

        S(k) = D(k) + T(k + 1) + R(k)

    seconds: D(k) for the draft, T(n) for a pass of n tokens, and for a model whose states cannot be taken back
    R(k) = (1 - a^k) (T(k + 1) - T(1)), the accepted tokens fed once more. A step of the plain loop makes one token in
    T(1). The `k` of LENGTHS with the largest E(k) T(1) / S(k) is taken where that is at least MARGIN, otherwise none.
    T and D are the least of the last few measurements; what was not measured twice lies between its neighbours, or a
    little above the nearest shorter one. Until T(1) is known, nothing is drafted.

    free: guesses cost nothing, and so are judged while none are made: drafting begins again as soon as it would pay.
    Otherwise it pauses for 16 tokens, then starts with a new estimate, and each further pause is twice as long until
    drafting pays again. redo: whether R is paid.
    """

    def __init__(self, *, free: bool, redo: bool = False) -> None:
        self.free, self.redo = free, redo
        self._prior = 0.25 if free else 0.5  # what is judged without being made need not be believed in
        self._passes, self._drafts = _Seconds(), _Seconds()
        self._right: dict[int, tuple[float, float]] = {}  # by kind: right ones and all, the older the lighter
        self._pause, self._wait = _PAUSE, 0

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long; one of one token is a step of the plain loop."""
        if tokens == 1 or tokens - 1 in LENGTHS:
            self._passes.add(tokens, seconds)

    def drafted(self, tokens: int, seconds: float) -> None:
        """A draft of so many tokens took so long."""
        self._drafts.add(tokens, seconds)

    def judged(self, kind: int, right: bool) -> None:
        """A drafted token of this kind was accepted or not."""
        good, count = self._right.get(kind, (0.0, 0.0))
        self._right[kind] = good * _MEMORY + right, count * _MEMORY + 1

    def acceptance(self, kind: int) -> float:
        """The share of right ones, as if there had been two before the first one."""
        good, count = self._right.get(kind, (0.0, 0.0))
        return (good + 2 * self._prior) / (count + 2)

    def length(self, kind: int, most: int) -> int:
        """How many tokens to draft, at most `most`; 0 where it does not pay."""
        step = self._passes.known.get(1)
        if most < 1 or step is None:
            return 0
        if self._wait:
            self._wait -= 1
            if not self._wait:
                self._right.clear()
            return 0
        gain, length = 0.0, 0
        # All tokens of an endless draft for the shortest pass: mostly that is too little, and is soon reckoned.
        if step >= MARGIN * (1 - self.acceptance(kind)) * self._passes.of(2, step):
            gain, length = max((self.gain(kind, k, step), k) for k in LENGTHS if k <= most)
        if gain >= MARGIN:
            if self.acceptance(kind) > 0.5:  # it was seen to pay; at first it is only hoped for
                self._pause = _PAUSE
            return length
        if not self.free:
            self._wait, self._pause = self._pause, 2 * self._pause
        return 0

    def gain(self, kind: int, length: int, step: float) -> float:
        """How many times the plain loop's tokens per second such a draft promises, T(1) being `step`; see the class."""
        a, seconds = self.acceptance(kind), self._passes.of(length + 1, step)
        made = (1 - a ** (length + 1)) / (1 - a)
        if self.redo:
            seconds += (1 - a**length) * max(0.0, seconds - step)
        if not self.free:
            seconds += self._drafts.of(length, step)
        return made * step / seconds


class _Seconds:
    """What passes of each number of tokens took lately."""

    def __init__(self) -> None:
        self._latest: dict[int, deque[float]] = {}
        self._when: dict[int, int] = {}
        self._now = 0
        # The least of each that was measured twice: the first of a shape takes longer, and one may be disturbed.
        self.known: dict[int, float] = {}

    def add(self, tokens: int, seconds: float) -> None:
        self._now += 1
        if self._now % _STALE == 0:
            self._forget()
        latest = self._latest.get(tokens)
        if latest is None:
            latest = self._latest[tokens] = deque(maxlen=_LATEST)
        latest.append(seconds)
        self._when[tokens] = self._now
        if len(latest) > 1:
            self.known[tokens] = min(latest)

    def _forget(self) -> None:
        for stale in [n for n, when in self._when.items() if self._now - when >= _STALE]:
            del self._latest[stale], self._when[stale]
            self.known.pop(stale, None)

    def of(self, tokens: int, step: float) -> float:
        """Seconds of a pass of so many tokens; `step` is what further ones are measured by that were not tried."""
        if tokens in self.known:
            return self.known[tokens]
        below = max((n for n in self.known if n < tokens), default=0)
        above = min((n for n in self.known if n > tokens), default=0)
        least = self.known.get(below, 0.0)
        if not above:
            return least + (tokens - below) * step * _HOPE
        return least + max(0.0, self.known[above] - least) * (tokens - below) / (above - below)
