"""Linears under weight normalisation and spectral normalisation, made anew in every call."""

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
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.layers = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.ff = nn.utils.parametrizations.weight_norm(nn.Linear(dim, dim))
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(dim, vocab))

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]))
            x = x + F.gelu(self.ff(x))
        return self.head(x)


def build():
    return Decoder()
