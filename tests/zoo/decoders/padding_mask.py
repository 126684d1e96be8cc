"""A mask made of the ids themselves: what is padding, token 0, is seen by nobody (`make_std_mask`)."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9)
        return self.proj((F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(B, T, C))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.layers = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers)), nn.Linear(dim, vocab)

    @staticmethod
    def make_std_mask(tgt, pad=0):
        tgt_mask = (tgt != pad).unsqueeze(-2)  # (B, 1, T)
        T = tgt.size(-1)
        return tgt_mask & torch.tril(torch.ones(1, T, T)).type_as(tgt_mask)

    def forward(self, ids):
        mask = self.make_std_mask(ids)
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), mask)
        return self.head(x)


def build():
    return Decoder()
