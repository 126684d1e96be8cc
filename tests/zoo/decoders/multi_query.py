"""One key/value head for all queries, broadcast by the product alone (Shazeer, 2019)."""

import math

import torch
from torch import nn


class MultiQueryAttention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.kv_proj = nn.Linear(d_model, 2 * self.d_head)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.d_head).transpose(1, 2)  # (B, H, T, D)
        k, v = self.kv_proj(x)[:, None].chunk(2, dim=-1)  # (B, 1, T, D)
        att = q @ k.transpose(-1, -2) / math.sqrt(self.d_head)
        i = torch.arange(T, device=x.device)
        att = torch.where(i[:, None] >= i[None, :], att, -torch.inf)
        y = att.softmax(dim=-1) @ v
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class Decoder(nn.Module):
    def __init__(self, vocab=61, d_model=48, n_heads=3, n_layers=2, max_len=96):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d_model), nn.Embedding(max_len, d_model)
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            block = nn.Module()
            block.norm = nn.LayerNorm(d_model)
            block.attn = MultiQueryAttention(d_model, n_heads)
            block.mlp = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, 96), nn.GELU(), nn.Linear(96, d_model))
            self.layers.append(block)
        self.head = nn.Linear(d_model, vocab)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[: ids.size(1)]
        for block in self.layers:
            x = x + block.attn(block.norm(x))
            x = x + block.mlp(x)
        return self.head(x)


def build():
    return Decoder()
