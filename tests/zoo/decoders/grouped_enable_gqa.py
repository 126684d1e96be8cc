"""Grouped heads by F.scaled_dot_product_attention(enable_gqa=True), heads of 10 features, which few kernels take."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, head_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))

    def attend(self, x):
        bsz, seqlen, _ = x.shape
        kv_size = self.kv_heads * self.head_dim
        q, k, v = self.wqkv(x).split([self.heads * self.head_dim, kv_size, kv_size], dim=-1)
        q = q.view(bsz, seqlen, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(bsz, seqlen, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(bsz, seqlen, self.kv_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, self.heads * self.head_dim))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=4, kv_heads=2, head_dim=10, layers=2, max_len=96):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.Sequential(*[Block(dim, heads, kv_heads, head_dim) for _ in range(layers)])
        self.head = nn.Linear(dim, vocab)

    def forward(self, idx):
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))[None]
        return self.head(self.blocks(x))


def build():
    return Decoder()
