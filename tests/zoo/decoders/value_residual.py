"""The first layer's values mixed into those of later layers by a learned weight (Zhou et al., 2024)."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mix = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, first):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, C // self.heads) for t in self.qkv(x).split(C, dim=-1))
        if first is None:
            first = v
        v = (1 - self.mix) * v + self.mix * first.view_as(v)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view_as(x)), first


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=3, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.layers = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.lambdas = nn.Parameter(torch.ones(layers, 2) * 0.5)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = x0 = F.rms_norm(self.embed(ids) + self.pos(torch.arange(ids.shape[1])), (self.embed.embedding_dim,))
        first = None
        for layer, mix in zip(self.layers, self.lambdas):
            x = mix[0] * x + mix[1] * x0
            y, first = layer(F.rms_norm(x, (x.size(-1),)), first)
            x = x + y
        return self.head(x)


def build():
    return Decoder()
