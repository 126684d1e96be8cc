"""Embeddings scaled by the root of the width, beside sines and cosines made for the length at hand."""

import math

import torch
from torch import nn


class SinusoidalPositions(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        T, half = x.shape[1], self.dim // 2
        emb = math.log(10000) / (half - 1)
        emb = torch.exp(torch.arange(half, dtype=torch.float, device=x.device) * -emb)
        emb = torch.arange(T, dtype=torch.float, device=x.device).unsqueeze(1) * emb.unsqueeze(0)
        return torch.cat([torch.sin(emb), torch.cos(emb)], dim=1).view(1, T, -1)


class Head(nn.Module):
    def __init__(self, dim, size):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(dim, size, bias=False) for _ in range(3))

    def forward(self, x):
        T = x.shape[1]
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * self.key.out_features**-0.5
        wei = wei.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf")).softmax(-1)
        return wei @ self.value(x)


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, layers=2):
        super().__init__()
        self.embed, self.embed_scale = nn.Embedding(vocab, dim), math.sqrt(dim)
        nn.init.normal_(self.embed.weight, mean=0, std=dim**-0.5)
        self.positions = SinusoidalPositions(dim)
        self.heads = nn.ModuleList(Head(dim, dim) for _ in range(layers))  # a single head in each layer
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.out = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed_scale * self.embed(ids)
        x = x + self.positions(x)
        for norm, head in zip(self.norms, self.heads):
            x = x + head(norm(x))
        return self.out(x)


def build():
    return Decoder()
