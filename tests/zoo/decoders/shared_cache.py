"""Two attention layers that read the keys and values of the first (cross-layer attention, YOCO): one cache for both."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, makes_keys):
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim) if makes_keys else None

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, shared=None):
        q = self.split_heads(self.q(x))
        if self.kv is not None:
            shared = tuple(self.split_heads(t) for t in self.kv(x).chunk(2, dim=-1))
        k, v = shared
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)), shared


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.attention = nn.ModuleList([Attention(dim, heads, True), Attention(dim, heads, False)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.ff = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x, shared = self.embed(ids) + self.pos(torch.arange(ids.shape[1])), None
        for i, (attention, ff) in enumerate(zip(self.attention, self.ff)):
            y, shared = attention(self.norms[2 * i](x), shared)
            x = x + y
            x = x + ff(self.norms[2 * i + 1](x))
        return self.head(x)


def build():
    return Decoder()
