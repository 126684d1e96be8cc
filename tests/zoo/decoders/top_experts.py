"""A mixture of experts that asks the best two of four, each expert over a mask of all tokens."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Experts(nn.Module):
    def __init__(self, dim, hidden, experts, chosen):
        super().__init__()
        self.router, self.chosen = nn.Linear(dim, experts), chosen
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(experts)
        )

    def forward(self, x):
        logits = self.router(x)
        top_k_logits, indices = logits.topk(self.chosen, dim=-1)
        zeros = torch.full_like(logits, float("-inf"))
        gates = F.softmax(zeros.scatter(-1, indices, top_k_logits), dim=-1)  # (B, T, E), most of it 0
        return sum(gates[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.attn = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.moe = nn.ModuleList(Experts(dim, 2 * dim, 4, 2) for _ in range(layers))
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        for attn, moe in zip(self.attn, self.moe):
            x = x + attn(F.layer_norm(x, x.shape[-1:]))
            x = x + moe(F.layer_norm(x, x.shape[-1:]))
        return self.head(x)


def build():
    return Decoder()
