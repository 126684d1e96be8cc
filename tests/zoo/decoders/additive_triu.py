"""An additive mask, `torch.full(..., -inf).triu(1)`, made once and handed to every layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask):
        interim_shape = (*x.shape[:2], self.n_heads, self.d_head)
        q, k, v = (t.view(interim_shape).transpose(1, 2) for t in self.in_proj(x).chunk(3, dim=-1))
        weight = q @ k.transpose(-1, -2)
        weight = weight / math.sqrt(self.d_head)
        weight = F.softmax(weight + mask, dim=-1)
        output = (weight @ v).transpose(1, 2)
        return self.out_proj(output.reshape(x.shape))


class Layer(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, n_heads)
        self.linear1, self.linear2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        residue = x
        x = self.linear1(self.norm2(x))
        x = x * torch.sigmoid(1.702 * x)  # QuickGELU
        return self.linear2(x) + residue


class Decoder(nn.Module):
    def __init__(self, vocab=61, d_model=48, n_heads=3, n_layers=2, n_tokens=96):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, d_model)
        self.position_embedding = nn.Parameter(torch.randn(n_tokens, d_model))
        self.layers = nn.ModuleList(Layer(d_model, n_heads) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab, bias=False)

    def forward(self, tokens):
        T = tokens.shape[-1]
        mask = torch.full((T, T), float("-inf"), device=tokens.device).triu(1)
        x = self.token_embedding(tokens) + self.position_embedding[:T]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def build():
    return Decoder()
