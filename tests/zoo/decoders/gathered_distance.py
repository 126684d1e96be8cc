"""A bias that each query computes for every distance, gathered to its keys; a sink that scales what is attended to."""

import torch
import torch.nn.functional as F
from torch import nn


class RelativeAttention(nn.Module):
    def __init__(self, dim, heads, d_rel=4, extent=16):
        super().__init__()
        self.heads, self.extent = heads, extent
        self.q, self.k, self.v, self.r = (nn.Linear(dim, n) for n in (dim, dim, dim, heads * d_rel))
        self.profiles = nn.Parameter(torch.randn(d_rel, extent))
        self.sinks, self.out = nn.Parameter(torch.randn(heads)), nn.Linear(dim, dim)

    def relative(self, x, distance):
        logits = (self.r(x).unflatten(-1, (self.heads, -1)) @ self.profiles).transpose(1, 2)  # (b, heads, t, extent)
        index = distance.clamp(0, self.extent - 1).expand(*logits.shape[:2], -1, -1)
        return logits.gather(-1, index).masked_fill((distance < 0) | (distance >= self.extent), 0.0)

    def forward(self, x):
        b, t, dim = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        positions = torch.arange(t)
        distance = positions[:, None] - positions[None, :]
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.relative(x, distance)
        scores = scores.masked_fill(distance < 0, float("-inf"))
        share = torch.sigmoid(torch.logsumexp(scores, dim=-1) - self.sinks.view(1, -1, 1))
        y = F.softmax(scores, dim=-1) @ v * share.unsqueeze(-1)
        return self.out(y.transpose(1, 2).reshape(b, t, dim))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(dim), RelativeAttention(dim, heads)
        self.ln2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
        )

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2):
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.tok(ids))))


def build():
    return Decoder()
