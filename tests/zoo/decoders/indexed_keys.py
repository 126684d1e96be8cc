"""Sparse attention: a small indexer scores the keys, and each query attends to the best few of them (DeepSeek-V3.2)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Indexer(nn.Module):
    def __init__(self, dim, heads=32, head_dim=8, top_k=6):
        super().__init__()
        self.heads, self.head_dim, self.top_k = heads, head_dim, top_k
        self.wq, self.wk = nn.Linear(dim, heads * head_dim, bias=False), nn.Linear(dim, head_dim, bias=False)
        self.k_norm, self.weights = nn.LayerNorm(head_dim), nn.Linear(dim, heads, bias=False)

    def forward(self, x, mask):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.heads, self.head_dim)
        k = self.k_norm(self.wk(x))
        scores = F.relu(torch.einsum("bqhd,bkd->bqhk", q, k) / math.sqrt(self.head_dim))
        scores = torch.einsum("bqh,bqhk->bqk", self.weights(x), scores) + mask
        chosen = scores.topk(min(self.top_k, t), dim=-1).indices
        return torch.full((b, t, t), float("-inf")).scatter_(-1, chosen, 0) + mask


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.indexer = heads, Indexer(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, mask):
        h = self.norm1(x)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(h).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.indexer(h, mask).unsqueeze(1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class SparseDecoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids):
        t = ids.shape[1]
        mask = torch.full((t, t), float("-inf")).triu_(1)
        x = self.tok(ids) + self.pos(torch.arange(t))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def build():
    return SparseDecoder()
