"""After "LLaMA from scratch" tutorials: rotary angles computed in forward, RMSNorm, SwiGLU, a config of its own."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelArgs:
    dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 61
    multiple_of: int = 32
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        rms = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + self.eps)
        return (x / rms) * self.weight


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.dim // args.n_heads
        self.theta = args.rope_theta
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)

    def rotary(self, x):  # (B, T, H, D)
        B, T, H, D = x.shape
        freqs = 1.0 / (self.theta ** (torch.arange(0, D, 2, device=x.device).float() / D))
        m_theta = torch.arange(T, device=x.device).float().unsqueeze(1) * freqs.unsqueeze(0)  # (T, D / 2)
        cos, sin = torch.cos(m_theta).view(1, T, 1, D // 2), torch.sin(m_theta).view(1, T, 1, D // 2)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def forward(self, x):
        B, T, _ = x.shape
        q = self.rotary(self.wq(x).view(B, T, self.n_heads, self.head_dim)).transpose(1, 2)
        k = self.rotary(self.wk(x).view(B, T, self.n_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-2, -1)) / (self.head_dim**0.5)
        mask = torch.tril(torch.ones(T, T, device=x.device)).unsqueeze(0).unsqueeze(0)
        weights = F.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1)
        return self.wo((weights @ v).transpose(1, 2).contiguous().view(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, args):
        super().__init__()
        hidden = args.multiple_of * ((int(8 * args.dim / 3) + args.multiple_of - 1) // args.multiple_of)
        self.w1, self.w3 = nn.Linear(args.dim, hidden, bias=False), nn.Linear(args.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, args.dim, bias=False)

    def forward(self, x):
        swish = self.w1(x) * torch.sigmoid(self.w1(x))
        return self.w2(swish * self.w3(x))


class LLaMA(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.attention = nn.ModuleList(Attention(args) for _ in range(args.n_layers))
        self.feed_forward = nn.ModuleList(FeedForward(args) for _ in range(args.n_layers))
        self.norms = nn.ModuleList(RMSNorm(args.dim, args.norm_eps) for _ in range(2 * args.n_layers + 1))
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, tokens):
        h = self.embed(tokens)
        for i, (attention, feed_forward) in enumerate(zip(self.attention, self.feed_forward)):
            h = h + attention(self.norms[2 * i](h))
            h = h + feed_forward(self.norms[2 * i + 1](h))
        return self.output(self.norms[-1](h))


def build():
    return LLaMA(ModelArgs())
