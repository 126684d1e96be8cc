"""nn.MultiheadAttention, sequence first, whose weights are averaged over heads and returned beside the logits."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Linear(dim * 2, dim))

    def forward(self, x):
        attn_mask = torch.full((len(x), len(x)), -float("Inf"), device=x.device, dtype=x.dtype)
        attn_mask = torch.triu(attn_mask, diagonal=1)
        x = self.ln_1(x)
        a, weights = self.attn(x, x, x, attn_mask=attn_mask, average_attn_weights=True)
        x = x + a
        return x + self.mlp(self.ln_2(x)), weights


class GPT2(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, num_positions=96):
        super().__init__()
        self.token_embeddings, self.position_embeddings = nn.Embedding(vocab, dim), nn.Embedding(num_positions, dim)
        self.sos = nn.Parameter(torch.zeros(dim))
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids):
        x = ids.transpose(0, 1)  # (T, B)
        length, batch = x.shape
        h = self.token_embeddings(x) + self.sos
        positions = torch.arange(length, device=x.device).unsqueeze(-1)
        h = h + self.position_embeddings(positions).expand_as(h)
        for layer in self.layers:
            h, weights = layer(h)
        return self.head(self.ln_f(h)).transpose(0, 1)


def build():
    return GPT2()
