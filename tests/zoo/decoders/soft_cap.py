"""Scores bent by tanh before the mask, and logits by another, as Gemma 2 does."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, soft_cap):
        super().__init__()
        self.heads, self.head_dim, self.soft_cap = heads, dim // heads, soft_cap
        self.qkv_proj, self.o_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x, mask):
        B, T, _ = x.shape
        xq, xk, xv = self.qkv_proj(x).view(B, T, 3, self.heads, self.head_dim).unbind(2)
        q, k, v = xq.transpose(1, 2) * self.head_dim**-0.5, xk.transpose(1, 2), xv.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = scores / self.soft_cap
        scores = torch.tanh(scores)
        scores = scores * self.soft_cap
        scores = scores + mask
        scores = nn.functional.softmax(scores.float(), dim=-1).type_as(q)
        output = torch.matmul(scores, v)
        return self.o_proj(output.transpose(1, 2).contiguous().view(B, T, -1))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embedder, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.attention = nn.ModuleList(Attention(dim, heads, soft_cap=5.0) for _ in range(layers))
        self.gate, self.up, self.down = (nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers)) for _ in range(3))
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in range(4 * layers))
        self.final_logit_softcapping = 30.0

    def forward(self, ids):
        T = ids.shape[1]
        mask = torch.triu(torch.full((1, 1, T, T), -2.3819763e38), diagonal=1)
        x = self.embedder(ids) + self.pos(torch.arange(T))
        for i, attention in enumerate(self.attention):  # norms before and behind every sublayer
            before, after, before_ff, after_ff = self.norms[4 * i : 4 * i + 4]
            x = x + after(attention(before(x), mask))
            h = before_ff(x)
            h = nn.functional.gelu(self.gate[i](h), approximate="tanh") * self.up[i](h)
            x = x + after_ff(self.down[i](h))
        logits = torch.matmul(x, self.embedder.weight.t())
        logits = logits / self.final_logit_softcapping
        return torch.tanh(logits) * self.final_logit_softcapping


def build():
    return Decoder()
