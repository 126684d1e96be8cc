"""Embeddings, residuals, scores and logits each scaled by a number of its own (Granite, MiniCPM, muP)."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, multiplier=0.11):
        super().__init__()
        self.heads, self.multiplier = heads, multiplier
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.multiplier)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.layers = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.embedding_multiplier, self.residual_multiplier, self.logits_scaling = 12.0, 0.22, 8.0
        self.output_multiplier = nn.Parameter(torch.tensor(1.5), requires_grad=False)

    def forward(self, ids):
        x = self.embed(ids) * self.embedding_multiplier + self.pos.weight[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (x.shape[-1],))) * self.residual_multiplier
        logits = F.linear(x, self.embed.weight) / self.logits_scaling
        return logits * self.output_multiplier


def build():
    return Decoder()
