"""How many tokens to draft: by how often drafts were right, and by what passes were measured to take.

Knows numbers only: no tokens, no graph, no clock.
"""

from __future__ import annotations

from collections import deque

LENGTHS = (1, 2, 4, 8, 16)  # of drafts; what a pass takes is measured for each
MARGIN = 1.1  # what speculating must promise, for estimates are noisy
_MEMORY = 0.95  # what an outcome weighs after the next one: about the last twenty count
_LATEST = 5  # measurements of one kind of pass that are kept
_STALE = 96  # passes, or up to twice as many, after which a measurement counts no more: it may have been disturbed
_HOPE = 1 / 8  # of a step, for each further token of a pass that was not measured: hopeful, so that it is tried
_LEDGER = 0.9  # what the outcome of a pass weighs after the next one
_ENOUGH = 4  # passes with drafts, before these are judged by what they made
_PAUSE, _LONGEST_PAUSE = 16, 64  # tokens


class Pace:
    """Chooses the length of the next draft.

    With `a` the share of drafted tokens that were right lately (of the same kind, a higher one being better), a draft
    of `k` tokens makes

        E(k) = 1 + a + a^2 + ... + a^k

    tokens, and takes

        S(k) = D(k) + T(k + 1) + R(k)

    seconds: D(k) for the draft, T(n) for a pass of n tokens, and for a model whose states cannot be taken back
    R(k) = (1 - a^k) (T(k + 1) - T(1)), the accepted tokens fed once more. A step of the plain loop makes one token in
    T(1). The `k` of LENGTHS with the largest E(k) T(1) / S(k) is taken where that is at least MARGIN, otherwise none.
    T and D are the least of the last few measurements; what was not measured twice lies between its neighbours, or a
    little above the nearest shorter one. Until T(1) is known, nothing is drafted.

    That is a promise. What drafts really made of the last dozen is added up beside it: where the plain loop would have
    made more in their time, drafting pauses for 16 tokens, and for twice as many each time until it pays again.

    free: guesses cost nothing, and so are judged while none are made: drafting begins as soon as it would pay, and no
    pause is longer than 64 tokens. Otherwise it pauses also where nothing is promised, then starts with a new
    estimate. redo: whether R is paid.
    """

    def __init__(self, *, free: bool, redo: bool = False) -> None:
        self.free, self.redo = free, redo
        self._prior = 0.2 if free else 0.5  # what is judged without being made is tried when it was right once
        self._passes, self._drafts = _Seconds(), _Seconds()
        self._right: dict[int, tuple[float, float]] = {}  # by kind: right ones and all, the older the lighter
        self._pause, self._wait = _PAUSE, 0
        self._tried, self._made, self._spent = 0, 0.0, 0.0  # passes with drafts, their tokens and seconds

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long; one of one token is a step of the plain loop."""
        if tokens == 1 or tokens - 1 in LENGTHS:
            self._passes.add(tokens, seconds)
        if tokens > 1:
            self._tried += 1
            self._made = self._made * _LEDGER + 1
            self._spent = self._spent * _LEDGER + self._passes.known.get(tokens, seconds)  # disturbed or not

    def drafted(self, tokens: int, seconds: float) -> None:
        """A draft of so many tokens took so long."""
        self._drafts.add(tokens, seconds)
        self._spent += self._drafts.known.get(tokens, seconds)

    def repaired(self, seconds: float) -> None:
        """A step took so long, for it had to feed right tokens once more."""
        self._made, self._spent = self._made + 1, self._spent + seconds

    def judged(self, kind: int, right: bool, *, made: bool = True) -> None:
        """A guess of this kind was right or not; `made`: it was drafted."""
        good, count = self._right.get(kind, (0.0, 0.0))
        self._right[kind] = good * _MEMORY + right, count * _MEMORY + 1
        self._made += made and right

    def acceptance(self, kind: int) -> float:
        """The share of right ones of a kind, as if there had been two more before, as good as those of lower kinds."""
        share = self._prior
        for lower in range(kind + 1):
            if lower in self._right:
                good, count = self._right[lower]
                share = (good + 2 * share) / (count + 2)
        return share

    def length(self, kind: int, most: int) -> int:
        """How many tokens to draft, at most `most`; 0 where it does not pay."""
        step = self._passes.known.get(1)
        if most < 1 or step is None:
            return 0
        if self._wait:
            self._wait -= 1
            if not self._wait and not self.free:
                self._right.clear()
            return 0
        if self._loses(step):
            return self._rest()
        gain, length = 0.0, 0
        # All tokens of an endless draft for the shortest pass: mostly that is too little, and is soon reckoned.
        if step >= MARGIN * (1 - self.acceptance(kind)) * self._passes.of(2, step):
            gain, length = max((self.gain(kind, k, step), k) for k in LENGTHS if k <= most)
        if gain >= MARGIN:
            return length
        return 0 if self.free else self._rest()

    def _loses(self, step: float) -> bool:
        """Whether the plain loop would have made more in the time of the last drafts."""
        if self._tried < _ENOUGH:
            return False
        if self._made * step >= MARGIN * self._spent:
            self._pause = _PAUSE
        return self._made * step < self._spent

    def _rest(self) -> int:
        """Draft nothing for a while."""
        self._wait = self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if self.free else 2 * self._pause
        self._tried, self._made, self._spent = 0, 0.0, 0.0
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
