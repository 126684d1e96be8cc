"""Small causal decoders on one base, none with a cache in it, for the tests of the exporter; the zoo is decoders/.

Each takes ids (B, T) and returns logits (B, T, vocab); `MODULES` names them all.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, DIM, HEADS, LONGEST = 61, 48, 3, 96


class Base(nn.Module):
    """Two layers of attention and feed-forward; a subclass says how it attends and where positions come in."""

    head_dim = DIM // HEADS

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def embed(self, ids):
        return self.tokens(ids)

    def split(self, x, layer):
        B, T, _ = x.shape
        return (t.view(B, T, HEADS, -1).transpose(1, 2) for t in self.qkv[layer](x).split(DIM, dim=-1))  # (B, H, T, D)

    def attend(self, x, layer):
        q, k, v = self.split(x, layer)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(x.shape)

    def hidden(self, ids):
        x = self.embed(ids)
        for layer in range(2):
            x = x + self.out[layer](self.attend(self.norms[2 * layer](x), layer))
            x = x + self.ffn[layer](self.norms[2 * layer + 1](x))
        return x

    def forward(self, ids):
        return self.head(self.hidden(ids))


class Learned(Base):
    """GPT-2's way: a learned embedding for each position."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(LONGEST, DIM)

    def embed(self, ids):
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))


class LastOnly(Learned):
    """nanoGPT's way: the head sees the last position alone, and a sequence that is too long is refused."""

    def forward(self, ids):
        assert ids.shape[1] <= LONGEST
        return self.head(self.hidden(ids)[:, [-1], :])


class Tril(Learned):
    """A `tril` buffer and a softmax by hand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tril", torch.tril(torch.ones(LONGEST, LONGEST)))

    def attend(self, x, layer):
        q, k, v = self.split(x, layer)
        T = x.shape[1]
        scores = (q @ k.transpose(-2, -1)) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(x.shape)


class Alibi(Base):
    """A bias by distance, a slope for each head (Press et al., 2021)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))

    def attend(self, x, layer):
        q, k, v = self.split(x, layer)
        at = torch.arange(x.shape[1])
        distance = at[None, :] - at[:, None]  # (T, T)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1]) + distance * self.slopes[:, None, None]
        scores = torch.where(distance > 0, torch.tensor(float("-inf")), scores)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Window(Learned):
    """Each token sees the last five."""

    def attend(self, x, layer):
        q, k, v = self.split(x, layer)
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at[None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 5))
        return y.transpose(1, 2).reshape(x.shape)


class Chunked(Learned):
    """Causal within chunks of eight: a mask that is neither a window nor a function of the distance."""

    def attend(self, x, layer):
        q, k, v = self.split(x, layer)
        at = torch.arange(x.shape[1])
        mask = (at[:, None] >= at[None, :]) & (at[:, None] // 8 == at[None, :] // 8)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(x.shape)


class Rotary(Base):
    """Rotary positions in halves, and two key/value heads for four query heads, repeated by `expand`."""

    def __init__(self, heads=4, kv_heads=2, head_dim=16):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q = nn.ModuleList(nn.Linear(DIM, heads * head_dim, bias=False) for _ in range(2))
        self.k = nn.ModuleList(nn.Linear(DIM, kv_heads * head_dim, bias=False) for _ in range(2))
        self.v = nn.ModuleList(nn.Linear(DIM, kv_heads * head_dim, bias=False) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(heads * head_dim, DIM, bias=False) for _ in range(2))
        self.register_buffer("frequencies", 10000 ** -(torch.arange(0, head_dim, 2) / head_dim))

    def rotate(self, x):
        angles = torch.outer(torch.arange(x.shape[2]).float(), self.frequencies)  # (T, D / 2)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def attend(self, x, layer):
        B, T, _ = x.shape
        q = self.q[layer](x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k[layer](x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v[layer](x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = self.rotate(q), self.rotate(k)
        group = self.heads // self.kv_heads
        k, v = (
            t[:, :, None].expand(B, self.kv_heads, group, T, self.head_dim).reshape(B, self.heads, T, -1)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, -1)


class OneKeyHead(Rotary):
    """One key/value head for all, broadcast by the product, scores by hand."""

    def __init__(self):
        super().__init__(kv_heads=1)

    def attend(self, x, layer):
        B, T, _ = x.shape
        q = self.rotate(self.q[layer](x).view(B, T, self.heads, self.head_dim).transpose(1, 2))
        k = self.rotate(self.k[layer](x).view(B, T, 1, self.head_dim).transpose(1, 2))  # (B, 1, T, D)
        v = self.v[layer](x).view(B, T, 1, self.head_dim).transpose(1, 2)
        scores = q @ k.mT / math.sqrt(self.head_dim)
        scores = scores + torch.triu(torch.full((T, T), float("-inf")), diagonal=1)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)


class OddHeads(Rotary):
    """Heads of size 10, which GroupQueryAttention refuses."""

    def __init__(self):
        super().__init__(head_dim=10)


class ComplexRotary(Rotary):
    """Rotary positions as complex numbers, as Meta's Llama has them."""

    def rotate(self, x):
        T = x.shape[2]
        angles = torch.outer(torch.arange(T).float(), self.frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None, None]).flatten(3).type_as(x)


class SoftCap(Learned):
    """Scores bent by tanh before the mask, as Gemma 2 does: no operator's scale or bias."""

    def attend(self, x, layer):
        q, k, v = self.split(x, layer)
        T = x.shape[1]
        scores = 5.0 * torch.tanh(q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1]) / 5.0)
        scores = scores.masked_fill(torch.ones(T, T).triu(1) == 1, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


class WeightsTwice(Learned):
    """Weights that are used twice, so that no attention operator fits."""

    def attend(self, x, layer):
        q, k, v = self.split(x, layer)
        T = x.shape[1]
        scores = q @ k.mT / math.sqrt(k.shape[-1]) + torch.full((T, T), float("-inf")).triu(1)
        weights = scores.softmax(-1)
        return (weights @ v + (weights * weights) @ v).transpose(1, 2).reshape(x.shape)


MODULES = {
    c.__name__: c
    for c in (
        Learned, LastOnly, Tril, Alibi, Window, Chunked, Rotary, OneKeyHead, OddHeads, SoftCap, ComplexRotary,
        WeightsTwice,
    )
}  # fmt: skip
