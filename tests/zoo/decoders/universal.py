"""One block called four times (Universal Transformer, ALBERT), told of the depth by a learned vector."""

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
    def __init__(self, vocab=61, dim=48, heads=3, steps=4, max_len=96):
        super().__init__()
        self.embed, self.pos, self.depth = (
            nn.Embedding(vocab, dim),
            nn.Embedding(max_len, dim),
            nn.Embedding(steps, dim),
        )
        self.attn, self.steps = Attention(dim, heads), steps
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm1, self.norm2, self.head = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        for step in range(self.steps):
            x = x + self.depth(torch.tensor(step))
            x = x + self.attn(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        return self.head(x)


def build():
    return Decoder()
