"""Rotary positions of pairs (GPT-J, RoFormer): x[..., ::2] and x[..., 1::2], tables by repeat_interleave."""

import torch
from torch import nn


def rotate_every_two(x):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


class RoFormerAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dense = nn.Linear(dim, dim)

    def rope(self, x):
        T = x.shape[1]
        theta = 10000 ** (-2 * torch.arange(0, self.head_dim // 2, dtype=torch.float) / self.head_dim)
        angle = torch.einsum("i,j->ij", torch.arange(T, dtype=torch.float), theta)  # (T, D / 2)
        sin = torch.repeat_interleave(angle.sin(), 2, dim=-1)[None, :, None, :]
        cos = torch.repeat_interleave(angle.cos(), 2, dim=-1)[None, :, None, :]
        return x * cos + rotate_every_two(x) * sin

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.heads, self.head_dim) for f in (self.query, self.key, self.value))
        q, k = self.rope(q), self.rope(k)
        q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        scores = torch.matmul(q, k.transpose(-1, -2)) / (self.head_dim**0.5)
        mask = (1.0 - torch.tril(torch.ones(T, T))) * -10000.0
        probs = nn.Softmax(dim=-1)(scores + mask[None, None])
        return self.dense(torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous().view(B, T, C))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim, padding_idx=0)
        self.attention = nn.ModuleList([RoFormerAttention(dim, heads) for _ in range(layers)])
        self.ffn = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 3 * dim), nn.Tanh(), nn.Linear(3 * dim, dim)) for _ in range(layers)]
        )
        self.norm = nn.ModuleList([nn.LayerNorm(dim, eps=1e-12) for _ in range(2 * layers)])
        self.decoder = nn.Linear(dim, vocab)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for i in range(len(self.attention)):
            x = self.norm[2 * i](x + self.attention[i](x))
            x = self.norm[2 * i + 1](x + self.ffn[i](x))
        return self.decoder(x)


def build():
    return Decoder()
