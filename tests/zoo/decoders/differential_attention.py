"""The difference of two softmaxes over halves of each head (Ye et al., 2024)."""

import math

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lambda_q1, self.lambda_k1 = nn.Parameter(torch.randn(8) * 0.1), nn.Parameter(torch.randn(8) * 0.1)
        self.lambda_q2, self.lambda_k2 = nn.Parameter(torch.randn(8) * 0.1), nn.Parameter(torch.randn(8) * 0.1)
        self.subln, self.lambda_init = nn.RMSNorm(self.head_dim, eps=1e-5), 0.8 - 0.6 * math.exp(-0.3)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(B, T, 2 * self.heads, self.head_dim // 2).transpose(1, 2)
        k = k.view(B, T, 2 * self.heads, self.head_dim // 2).transpose(1, 2)
        v = v.view(B, T, self.heads, self.head_dim).transpose(1, 2)
        weights = q @ k.transpose(-1, -2) * (self.head_dim // 2) ** -0.5
        weights = weights + torch.triu(torch.zeros(T, T).float().fill_(float("-inf")).type_as(weights), 1)
        weights = torch.softmax(weights, dim=-1, dtype=torch.float32).view(B, self.heads, 2, T, T)
        lambda_1 = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1).float()).type_as(q)
        lambda_2 = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1).float()).type_as(q)
        weights = weights[:, :, 0] - (lambda_1 - lambda_2 + self.lambda_init) * weights[:, :, 1]
        attn = self.subln(torch.matmul(weights, v)) * (1 - self.lambda_init)
        return self.proj(attn.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build():
    return Decoder()
