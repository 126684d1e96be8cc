"""Transformer-XL's relative positions: two learned biases, and a shift by padding and viewing (Dai et al., 2019)."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim, self.dim = heads, dim // heads, dim
        self.qkv, self.r_net, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.r_w_bias, self.r_r_bias = (nn.Parameter(torch.randn(heads, self.head_dim) * 0.1) for _ in range(2))
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0.0, dim, 2.0) / dim)))

    def rel_shift(self, x):
        zero_pad = torch.zeros((x.size(0), x.size(1), x.size(2), 1), device=x.device, dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=-1)
        x_padded = x_padded.view(x.size(0), x.size(1), x.size(3) + 1, x.size(2))
        return x_padded[:, :, 1:].view_as(x)

    def forward(self, x):
        B, T, C = x.shape
        pos_seq = torch.arange(T - 1, -1, -1.0, device=x.device)
        sinusoid = torch.outer(pos_seq, self.inv_freq)
        r = torch.cat([sinusoid.sin(), sinusoid.cos()], dim=-1)  # (T, dim), the longest distance first
        q, k, v = (t.view(B, T, self.heads, self.head_dim) for t in self.qkv(x).chunk(3, dim=-1))
        r = self.r_net(r).view(T, self.heads, self.head_dim)
        AC = torch.einsum("bind,bjnd->bnij", q + self.r_w_bias, k)
        BD = self.rel_shift(torch.einsum("bind,jnd->bnij", q + self.r_r_bias, r))
        scores = ((AC + BD) / self.head_dim**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -float("inf"))
        return self.o(torch.einsum("bnij,bjnd->bind", scores.softmax(-1), v).reshape(B, T, C))


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
