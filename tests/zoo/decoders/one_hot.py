"""Ids as one-hot vectors times a matrix, for tokens and for positions."""

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
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.vocab, self.max_len = vocab, max_len
        self.embed, self.pos = nn.Linear(vocab, dim, bias=False), nn.Linear(max_len, dim)
        self.layers = nn.ModuleList(Attention(dim, heads) for _ in range(layers))

    def forward(self, ids):
        positions = F.one_hot(torch.arange(ids.shape[1]), self.max_len).float()
        x = self.embed(F.one_hot(ids, self.vocab).float()) + self.pos(positions)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]))
        return x @ self.embed.weight


def build():
    return Decoder()
