"""T5's relative bias: buckets of distance, shared by all layers, no scale (Raffel et al., 2019)."""

import math

import torch
from torch import nn


class RelativePositionBias(nn.Module):
    def __init__(self, heads, num_buckets=8, max_distance=32):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def bucket(self, relative_position):
        n = torch.max(-relative_position, torch.zeros_like(relative_position))
        max_exact = self.num_buckets // 2
        is_small = n < max_exact
        large = max_exact + (
            torch.log(n.float() / max_exact) / math.log(self.max_distance / max_exact) * (self.num_buckets - max_exact)
        ).to(torch.long)
        large = torch.min(large, torch.full_like(large, self.num_buckets - 1))
        return torch.where(is_small, n, large)

    def forward(self, length):
        context_position = torch.arange(length, dtype=torch.long)[:, None]
        memory_position = torch.arange(length, dtype=torch.long)[None, :]
        values = self.relative_attention_bias(self.bucket(memory_position - context_position))
        return values.permute(2, 0, 1).unsqueeze(0)  # (1, heads, T, T)


class T5Norm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.wi, self.wo = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.norm1, self.norm2 = T5Norm(dim), T5Norm(dim)

    def forward(self, x, bias):
        h = self.norm1(x)
        q, k, v = (w(h).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2)) + bias
        attn = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        x = x + self.o((attn @ v).transpose(1, 2).contiguous().view(x.shape))
        return x + self.wo(torch.relu(self.wi(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.bias = RelativePositionBias(heads)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids):
        T = ids.shape[1]
        causal = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)
        x, bias = self.embed(ids), self.bias(T) + causal
        for block in self.blocks:
            x = block(x, bias)
        return self.head(x)


def build():
    return Decoder()
