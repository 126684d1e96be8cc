"""A mask of truth values made in forward, -inf by masked_fill, and the head's last position as (batch, vocab)."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (w(x).reshape(b, n, self.heads, -1).permute(0, 2, 1, 3) for w in (self.to_q, self.to_k, self.to_v))
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        mask = torch.ones(n, n, device=x.device).triu(1).bool()
        dots.masked_fill_(mask, float("-inf"))
        out = torch.matmul(dots.softmax(dim=-1), v)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, d))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, depth=2, heads=3, max_len=96):
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.pos = nn.Parameter(torch.randn(1, max_len, dim) * 0.02)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(
                nn.ModuleList(
                    [
                        nn.LayerNorm(dim),
                        Attention(dim, heads),
                        nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)),
                    ]
                )
            )
        self.to_logits = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.tok(ids) + self.pos[:, : ids.shape[1]]
        for norm, attn, ff in self.layers:
            x = attn(norm(x)) + x
            x = ff(x) + x
        return self.to_logits(x[:, -1])


def build():
    return Decoder()
