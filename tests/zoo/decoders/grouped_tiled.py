"""Key heads repeated as a whole with `repeat`, so that neighbouring query heads read different ones."""

import torch
import torch.nn.functional as F
from torch import nn


class TiledAttention(nn.Module):
    def __init__(self, dim, heads=4, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * kv_heads * self.head_dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).view(B, T, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        k = k.repeat(1, self.heads // self.kv_heads, 1, 1)
        v = v.repeat(1, self.heads // self.kv_heads, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=64, layers=2, max_len=96):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.attention = nn.ModuleList(TiledAttention(dim) for _ in range(layers))
        self.ffn = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.ELU(), nn.Linear(dim, dim)) for _ in range(2))
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[-1]))
        for attention, ffn in zip(self.attention, self.ffn):
            x = F.layer_norm(x + attention(x), x.shape[-1:])
            x = F.layer_norm(x + ffn(x), x.shape[-1:])
        return self.head(x)


def build():
    return Decoder()
