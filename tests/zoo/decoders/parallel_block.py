"""Attention and feed-forward in parallel from one norm and one fused projection (PaLM), one key/value head."""

import torch
import torch.nn.functional as F
from torch import einsum, nn


class LayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class SwiGLU(nn.Module):
    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def rotate_half(x):
    x1, x2 = x.reshape(*x.shape[:-1], 2, -1).unbind(dim=-2)
    return torch.cat((-x2, x1), dim=-1)


class ParallelTransformerBlock(nn.Module):
    def __init__(self, dim, dim_head=16, heads=4, ff_mult=2):
        super().__init__()
        self.norm = LayerNorm(dim)
        attn_inner_dim, ff_inner_dim = dim_head * heads, dim * ff_mult
        self.fused_dims = (attn_inner_dim, dim_head, dim_head, (ff_inner_dim * 2))
        self.heads, self.scale = heads, dim_head**-0.5
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim_head, 2).float() / dim_head)))
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.fused_dims), bias=False)
        self.attn_out = nn.Linear(attn_inner_dim, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(ff_inner_dim, dim, bias=False))

    def forward(self, x):
        n, device = x.shape[1], x.device
        x = self.norm(x)
        q, k, v, ff = self.fused_attn_ff_proj(x).split(self.fused_dims, dim=-1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, n, d); k and v are (b, n, d)
        freqs = einsum("i , j -> i j", torch.arange(n, device=device), self.inv_freq)
        freqs = torch.cat((freqs, freqs), dim=-1)
        q, k = ((t * freqs.cos()) + (rotate_half(t) * freqs.sin()) for t in (q, k))
        sim = einsum("b h i d, b j d -> b h i j", q * self.scale, k)
        causal_mask = torch.ones((n, n), device=device, dtype=torch.bool).triu(1)
        sim = sim.masked_fill(causal_mask, -torch.finfo(sim.dtype).max)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        attn = sim.softmax(dim=-1)
        out = einsum("b h i j, b j d -> b h i d", attn, v)
        return self.attn_out(out.transpose(1, 2).flatten(2)) + self.ff_out(ff)


class PaLM(nn.Module):
    def __init__(self, num_tokens=61, dim=48, depth=2):
        super().__init__()
        self.embed = nn.Embedding(num_tokens, dim)
        self.blocks = nn.ModuleList([ParallelTransformerBlock(dim) for _ in range(depth)])
        self.norm, self.to_logits = LayerNorm(dim), nn.Linear(dim, num_tokens, bias=False)
        self.to_logits.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) + x
        return self.to_logits(self.norm(x))


def build():
    return PaLM()
