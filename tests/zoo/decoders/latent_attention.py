"""Latent attention: keys and values from one compressed vector for each token (DeepSeek-V2)."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, rank=16, rope_dim=8):
        super().__init__()
        self.heads, self.head_dim, self.rank, self.rope_dim = heads, dim // heads, rank, rope_dim
        self.q_proj = nn.Linear(dim, heads * (self.head_dim + rope_dim), bias=False)
        self.kv_down = nn.Linear(dim, rank + rope_dim, bias=False)
        self.kv_norm, self.kv_up = nn.RMSNorm(rank), nn.Linear(rank, 2 * dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def rope(self, x):
        T, half = x.shape[-2], self.rope_dim // 2
        angles = torch.outer(torch.arange(T).float(), 10000 ** (-torch.arange(half).float() / half))
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def forward(self, x):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)
        q_nope, q_pe = q.split([self.head_dim, self.rope_dim], dim=-1)
        latent, k_pe = self.kv_down(x).split([self.rank, self.rope_dim], dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).view(B, T, self.heads, 2 * self.head_dim).transpose(1, 2)
        k_nope, v = kv.chunk(2, dim=-1)
        k_pe = self.rope(k_pe[:, None]).expand(B, self.heads, T, self.rope_dim)
        q, k = torch.cat([q_nope, self.rope(q_pe)], -1), torch.cat([k_nope, k_pe], -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


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
