"""A module that takes `(ids, positions)`: its caller says where each token stands, for a table and for rotation."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim))

    def rope(self, x, positions):
        angles = (positions[..., None].float() * self.inv_freq)[:, None]  # (B, 1, T, D / 2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def forward(self, x, positions):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rope(q, positions), self.rope(k, positions), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.attention = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids, positions):
        x = self.tokens(ids) + self.places(positions)
        for norm, attention in zip(self.norms, self.attention):
            x = x + attention(norm(x), positions)
        return self.head(x)


def build():
    return Decoder()
