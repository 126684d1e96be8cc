"""Modules that keep states of fixed size, as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, HIDDEN = 29, 16


class Language(nn.Module):
    """ids (batch, seq) -> logits (batch, seq, vocab), with `mix` between a table of words and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(VOCAB, HIDDEN), nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError("a language model without a mix")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        return self.head(self.norm(x + self.mix(x)))


def shift(function: Callable[[torch.Tensor], torch.Tensor]) -> type[Language]:
    """A module whose token sees the one before it: `function` moves (batch, seq, hidden) by one."""

    class Shifted(Language):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2 * HIDDEN, HIDDEN)

        def mix(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.cat([x, function(x)], -1)).tanh()

    return Shifted


def assigned(x: torch.Tensor) -> torch.Tensor:
    moved = torch.zeros_like(x)
    moved[:, 1:] = x[:, :-1]
    return moved


class Convolved(Language):
    """`options` are of the convolution; `front` zeros are put before the first position."""

    def __init__(self, kernel: int, *, front: int = 0, **options: int) -> None:
        super().__init__()
        self.front = front
        self.convolution = nn.Conv1d(HIDDEN, HIDDEN, kernel, **options)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x.transpose(1, 2), (self.front, 0))
        return F.silu(self.convolution(x)).transpose(1, 2)


class Trimmed(Convolved):
    """Zeros on both sides, and the outputs behind the last token cut off by the length."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.convolution(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class Chomped(Convolved):
    """The same, cut off from the end."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.convolution(x.transpose(1, 2))[:, :, : -self.convolution.padding[0]]).transpose(1, 2)


class TwoInARow(Language):
    """A stack of dilated convolutions: what the second keeps is made by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(HIDDEN, HIDDEN, 2, dilation=1)
        self.second = nn.Conv1d(HIDDEN, HIDDEN, 2, dilation=2)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.pad(x.transpose(1, 2), (1, 0))).relu()
        return self.second(F.pad(y, (2, 0))).transpose(1, 2)


class OnlyPaddedOnce(TwoInARow):
    """Zeros for both in front of the first: between them there are more positions than tokens."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(F.pad(x.transpose(1, 2), (3, 0))).relu()).transpose(1, 2)


class Filtered(Language):
    """A short filter written as a sum of moved copies."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(3, HIDDEN))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 2, 0))
        return sum(self.taps[i] * padded[:, i : i + x.shape[1]] for i in range(3))


class Windows(Language):
    """The same by unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(HIDDEN, 3))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return (F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1) * self.taps).sum(-1)


class LearnedStart(Language):
    """A learned vector stands before the first token, not zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, HIDDEN))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.cat([self.start.expand(x.shape[0], -1, -1), x], 1)[:, :-2]
        return before.tanh() + torch.cat([self.start[:1].expand(x.shape[0], 1, HIDDEN), x[:, :-1]], 1)


class PairsOfWords(Language):
    """Ids themselves are moved: a table of pairs; 7 stands before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Embedding(VOCAB * VOCAB, HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        before = F.pad(ids, (1, -1), value=7)
        return self.head(self.norm(self.words(ids) + self.pairs(before * VOCAB + ids)))


class ConvolvedAttention(Convolved):
    """A convolution before attention: a cache of keys and values beside the state."""

    def __init__(self) -> None:
        super().__init__(3, groups=HIDDEN, front=2)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(super().mix(x)).view(*x.shape[:2], 6, 8).transpose(1, 2).split(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


class OverAPlane(Language):
    """A 2-d convolution, over positions and over features."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, (2, 3), padding=(0, 1))
        self.join = nn.Linear(3 * HIDDEN, HIDDEN)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convolution(F.pad(x, (0, 0, 1, 0))[:, None])  # (batch, 3, seq, hidden)
        return self.join(y.permute(0, 2, 1, 3).flatten(2).relu())


SHIFTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pad and cut": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "pad by less than nothing": lambda x: F.pad(x, (0, 0, 1, -1)),
    "zero pad": lambda x: nn.ZeroPad2d((0, 0, 1, -1))(x),
    "cat zeros": lambda x: torch.cat([torch.zeros(x.shape[0], 1, HIDDEN), x[:, :-1]], 1),
    "cat zeros like": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1),
    "cat and cut": lambda x: torch.cat([x.new_zeros(x.shape[0], 2, HIDDEN), x], 1)[:, : x.shape[1]],
    "assigned": assigned,
    "between heads": lambda x: F.pad(x.unflatten(2, (2, 8)).transpose(1, 2), (0, 0, 1, -1)).transpose(1, 2).flatten(2),
    "difference": lambda x: x - F.pad(x, (0, 0, 1, -1), value=0.5),
    "moving sum": lambda x: x.cumsum(1) - F.pad(x.cumsum(1), (0, 0, 3, 0))[:, : x.shape[1]],
}  # fmt: skip

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: Convolved(4, front=3, groups=HIDDEN),
    "grouped without bias": lambda: Convolved(3, front=2, groups=4, bias=False),
    "dilated": lambda: Convolved(3, front=4, dilation=2),
    "trimmed": lambda: Trimmed(4, padding=3, groups=HIDDEN),
    "chomped": lambda: Chomped(3, padding=4, dilation=2),
    "two in a row": TwoInARow,
    "padded once": OnlyPaddedOnce,
    "filtered": Filtered,
    "windows": Windows,
    "learned start": LearnedStart,
    "pairs of words": PairsOfWords,
    "before attention": ConvolvedAttention,
    "over a plane": OverAPlane,
}
