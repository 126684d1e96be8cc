"""Embeddings factorised into a narrow table and a projection (ALBERT), and back again for the head."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, narrow=12, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, narrow), nn.Embedding(max_len, narrow)
        self.up, self.down = nn.Linear(narrow, dim, bias=False), nn.Linear(dim, narrow, bias=False)
        self.layers = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.norms, self.bias = (
            nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers)),
            nn.Parameter(torch.zeros(vocab)),
        )

    def forward(self, ids):
        x = self.up(self.embed(ids) + self.pos(torch.arange(ids.shape[1])))
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.down(F.gelu(x)) @ self.embed.weight.T + self.bias


def build():
    return Decoder()
