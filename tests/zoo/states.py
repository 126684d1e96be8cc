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


class Recurrent(Language):
    """A recurrent layer of torch's own: `kind` is LSTM, GRU or RNN."""

    def __init__(self, kind: str, **options: bool | int | str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(HIDDEN, HIDDEN, **options)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        y, _ = self.layer(x)
        return y if self.layer.batch_first else y.transpose(0, 1)


class GivenState(Language):
    """The first hidden values are learned; the last ones go out beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(HIDDEN, HIDDEN, 2, batch_first=True)
        self.first = nn.Parameter(torch.randn(2, 2, HIDDEN))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        h, c = self.first[:, :, None].expand(-1, -1, ids.shape[0], -1)
        y, last = self.layer(self.words(ids), (h.contiguous(), c.contiguous()))
        return self.head(self.norm(y)), last


class RecurrentAttention(Recurrent):
    """Attention over what a recurrent layer makes."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        y = super().mix(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, is_causal=True).transpose(1, 2).flatten(2)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent("LSTM", batch_first=True),
    "three layers of lstm": lambda: Recurrent("LSTM", num_layers=3, dropout=0.1),
    "gru": lambda: Recurrent("GRU", num_layers=2, batch_first=True),
    "gru without bias": lambda: Recurrent("GRU", bias=False),
    "rnn": lambda: Recurrent("RNN", batch_first=True),
    "rnn with relu": lambda: Recurrent("RNN", nonlinearity="relu"),
    "given state": GivenState,
    "and attention": lambda: RecurrentAttention("GRU", batch_first=True),
}


class Looped(Language):
    """A recurrence h_t = a_t h_{t-1} + b_t written as a loop; `step` says how."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(HIDDEN, 2 * HIDDEN)

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.into(x).chunk(2, -1)
        return a.sigmoid(), b

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.gates(x)
        h, ys = torch.zeros(x.shape[0], HIDDEN), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + b[:, t]
            ys.append(h)
        return torch.stack(ys, 1)


class Assigning(Looped):
    """The same, written into a tensor made before."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.gates(x)
        h, y = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
        for t in range(x.shape[1]):
            h = a[:, t] * h + b[:, t]
            y[:, t] = h.tanh()
        return y


class Unbound(Looped):
    """The same over unbound positions, joined by cat; what the state was before goes out, so the last step is dead."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.gates(x)
        h, ys = x.new_full((x.shape[0], 1, HIDDEN), 0.25), []
        for a_t, b_t in zip(a.split(1, 1), b.split(1, 1)):
            ys.append(b_t - h)
            h = a_t * h + b_t
        return torch.cat(ys, dim=1)


class Cell(Looped):
    """A cell of torch's own, called for each position."""

    def __init__(self, kind: str = "GRUCell", **options: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(HIDDEN, HIDDEN, **options)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        h, ys = torch.zeros(x.shape[0], HIDDEN), []
        for x_t in x.unbind(1):
            h = self.cell(x_t, h)
            ys.append(h)
        return torch.stack(ys, dim=1)


class LongCell(Cell):
    """The cell that has two values."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], HIDDEN)
        y = torch.empty_like(x)
        for t in range(x.size(1)):
            h, c = self.cell(x[:, t], (h, c))
            y[:, t] = h
        return y


class SelectiveScan(Language):
    """A minimal Mamba block: causal convolution, input-dependent steps, a state for each channel."""

    def __init__(self, width: int = 24, size: int = 4) -> None:
        super().__init__()
        self.width, self.size = width, size
        self.into, self.out = nn.Linear(HIDDEN, 2 * width), nn.Linear(width, HIDDEN)
        self.convolution = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.select, self.step = nn.Linear(width, 2 * size), nn.Linear(width, width)
        self.rates = nn.Parameter(torch.log(torch.arange(1, size + 1).float()).repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        x, gate = self.into(x).chunk(2, dim=-1)
        x = F.silu(self.convolution(x.transpose(1, 2))[..., :length].transpose(1, 2))
        B, C = self.select(x).chunk(2, dim=-1)
        delta = F.softplus(self.step(x))  # (batch, length, width)
        A = torch.exp(delta[..., None] * -torch.exp(self.rates))  # (batch, length, width, size)
        Bx = delta[..., None] * B[:, :, None] * x[..., None]
        h, ys = torch.zeros(batch, self.width, self.size, device=x.device), []
        for t in range(length):
            h = A[:, t] * h + Bx[:, t]
            ys.append(torch.einsum("bws,bs->bw", h, C[:, t]))
        y = torch.stack(ys, dim=1) + x * self.skip
        return self.out(y * F.silu(gate))


class LinearAttention(Language):
    """The recurrence of linear attention with decay, over heads; two sums that start otherwise than with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.decay = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Parameter(torch.rand(2, 1, 1))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (6, 8)).transpose(1, 2).split(2, 1)  # (batch, heads, seq, dim)
        k, q = F.elu(k) + 1, F.elu(q) + 1
        state, norm, ys = x.new_zeros(x.shape[0], 2, 8, 8), x.new_ones(x.shape[0], 2, 8), []
        for t in range(x.shape[1]):
            state = self.decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            norm = norm + k[:, :, t]
            y = (q[:, :, t, None] @ state).squeeze(2) / (q[:, :, t] * norm).sum(-1, keepdim=True)
            ys.append(y)
        return torch.stack(ys, 2).transpose(1, 2).flatten(2)


class TwoLoops(Language):
    """Two layers that each loop, the second over what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Looped(), Cell()

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.second.mix(x + self.first.mix(x))


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "stacked": Looped,
    "assigned": Assigning,
    "split and joined": Unbound,
    "a cell": Cell,
    "a plain cell": lambda: Cell("RNNCell", nonlinearity="relu"),
    "a cell of two values": lambda: LongCell("LSTMCell"),
    "selective scan": SelectiveScan,
    "linear attention": LinearAttention,
    "two loops": TwoLoops,
}
