"""SwiGLU, GEGLU, ReGLU and F.glu, a feed-forward of each kind, one behind the other."""

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


class GatedFeedForward(nn.Module):
    def __init__(self, dim, hidden, activation):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Linear(dim, hidden)
        self.activation = activation

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        kinds = [F.silu, F.gelu, F.relu]
        self.ff = nn.ModuleList(GatedFeedForward(dim, 32 * 2, kind) for kind in kinds)
        self.ff.append(nn.Sequential(nn.Linear(dim, 4 * dim), nn.GLU(), nn.Linear(2 * dim, dim)))
        self.attn = nn.ModuleList(Attention(dim, heads) for _ in self.ff)
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in self.ff)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        for attn, norm, ff in zip(self.attn, self.norm, self.ff):
            x = x + attn(norm(x))
            x = x + ff(norm(x))
        return self.head(x)


def build():
    return Decoder()
