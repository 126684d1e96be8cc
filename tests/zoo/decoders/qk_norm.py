"""Normalised queries and keys with a learned temperature for each head, scores in float32 (ViT-22B, Henry et al.)."""

import torch
import torch.nn.functional as F
from torch import nn


class QKNormAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.log(10.0 * torch.ones(heads, 1, 1)))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature.clamp(max=4.6).exp()
        mask = torch.triu(torch.full((1, 1, T, T), float("-inf")), diagonal=1).type_as(x)
        attn = (attn + mask).float().softmax(dim=-1).type_as(v)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, T, C))


class QKLayerNormAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6), nn.LayerNorm(self.head_dim)

    def forward(self, x):
        B, T, C = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(B, T, self.heads, self.head_dim)).transpose(1, 2)
        v = self.v(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
        return self.o(out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.attention = nn.ModuleList([QKNormAttention(dim, heads), QKLayerNormAttention(dim, heads)])
        self.ff = nn.ModuleList([nn.Sequential(nn.Linear(dim, 96), nn.GELU(), nn.Linear(96, dim)) for _ in range(2)])
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.size(1)))
        for attention, ff in zip(self.attention, self.ff):
            x = x + attention(x)
            x = x + ff(x)
        return self.head(x)


def build():
    return Decoder()
