"""Causality by numbers: change token t, and nothing before t may move, nor any other row of the batch.

It catches what no rule of the graph sees, and needs nothing but the module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Forward = Callable[[torch.Tensor], torch.Tensor]

LENGTHS = (7, 12, 33)  # odd, even, and longer than most windows and chunks at toy size
# How far float noise may move a number, of the largest: an FFT or a running sum spreads that much over all positions.
NOISE = 2e-5


@dataclass(frozen=True)
class Leak:
    """What moved and must not have: `moved` by so much of numbers as large as `scale`."""

    length: int
    token: int  # whose change moved it
    position: int  # that moved
    row: int  # 0: the row of the token
    moved: float
    scale: float
    reaches: int  # how many positions before the token moved

    def __str__(self) -> str:
        size = f"by {self.moved:.2g}, where logits are as large as {self.scale:.2g}"
        if self.row:
            return (
                f"by the numbers the rows of a batch depend on each other: changing token {self.token} of row 0 moved "
                f"position {self.position} of row {self.row} {size}; compute nothing over the batch axis"
            )
        return (
            f"by the numbers it is not causal: changing token {self.token} of {self.length} moved position "
            f"{self.position} {size}; {self._advice()}"
        )

    def _advice(self) -> str:
        if self.reaches > 2:
            return (
                f"{self.reaches} of the {self.token} positions before it moved, as without a causal mask: give "
                "attention one, and sum over no positions"
            )
        ahead = self.token - self.position
        many = "position" if ahead == 1 else "positions"
        return (
            f"a position sees {ahead} {many} ahead: begin the mask's diagonal earlier, or pad a convolution on the "
            "left alone"
        )


def find_leak(forward: Forward, vocab: int, longest: int | None = None) -> Leak | None:
    """The first dependence on a later token or another row, None where there is none or the module is random.

    Args:
        forward: ids (2, seq) to logits (2, seq, vocab); of logits of the last position alone only rows are compared.
        vocab: how many different ids there are.
        longest: the longest sequence that it takes.
    """
    for number, length in enumerate(dict.fromkeys(min(n, longest or n) for n in LENGTHS)):
        ids, base = _base(forward, vocab, length, number)
        if number == 0:
            again = _moved(base, _rows(forward(ids)))
            if again is None or again.max() > 0:
                return None  # random numbers are refused, with their place, where they are made
        for token in _tokens(length, number):
            for new in _others(int(ids[0, token]), vocab):
                leak = _change(forward, ids, base, token, new)
                if leak is not None:  # confirmed among other tokens: noise does not come twice
                    other, other_base = _base(forward, vocab, length, number + len(LENGTHS))
                    if _change(forward, other, other_base, token, new) is not None:
                        return leak
    return None


def _base(forward: Forward, vocab: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(seed))
    return ids, _rows(forward(ids))


def _change(forward: Forward, ids: torch.Tensor, base: torch.Tensor, token: int, new: int) -> Leak | None:
    changed = ids.clone()
    changed[0, token] = new
    return _compare(base, _rows(forward(changed)), ids.shape[1], token)


def moves_what_follows(forward: Forward, vocab: int) -> tuple[bool, bool]:
    """Whether changing a token moves the logits at its place, and those of any later one."""
    ids = torch.randint(vocab, (2, LENGTHS[0]), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % vocab
    moved = _moved(_rows(forward(ids)), _rows(forward(changed)))
    if moved is None:
        return False, False
    return bool((moved[0, 2:] > 0).any()), bool((moved[0, 3:] > 0).any())


def _tokens(length: int, number: int) -> list[int]:
    """The tokens to change: the last always, and fewer the longer the sequence."""
    return list(dict.fromkeys((length - 1, length // 2, 1)[: len(LENGTHS) - number]))


def _others(old: int, vocab: int) -> list[int]:
    """Two other ids, a low one among them, since padding and other special ids often are."""
    low = next((n for n in (0, 1) if n < vocab and n != old), old)
    return [n for n in dict.fromkeys((low, (old + max(1, vocab // 3)) % vocab)) if n != old]


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits as (batch, seq or 1, vocab), in numbers exact enough to be compared."""
    return (logits[:, None] if logits.dim() == 2 else logits).double()


def _moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """(batch, seq): how far each position moved beyond float noise, of the largest finite number; None if shapes do."""
    if before.shape != after.shape:
        return None
    difference = (before - after).abs()
    difference = torch.where((before == after) | (before.isnan() & after.isnan()), 0.0, difference)
    largest = difference.nan_to_num(nan=torch.inf).amax(-1)
    return torch.where(largest > NOISE * _scale(before), largest, 0.0)


def _scale(logits: torch.Tensor) -> float:
    finite = logits[logits.isfinite()].abs()
    return max(float(finite.max()) if finite.numel() else 0.0, torch.finfo(torch.float32).tiny)


def _compare(before: torch.Tensor, after: torch.Tensor, length: int, token: int) -> Leak | None:
    moved = _moved(before, after)
    if moved is None:
        return None
    earlier = moved[0, :token] if moved.shape[1] == length else moved[0, :0]
    for row, found in ((1, moved[1]), (0, earlier)):
        if (found > 0).any():
            position = int(found.argmax())
            reaches = int((found > 0).sum())
            return Leak(length, token, position, row, float(found[position]), _scale(before), reaches)
    return None
