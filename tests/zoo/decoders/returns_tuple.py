"""Returns (logits, loss, hidden states of every layer, attention weights), the third and fourth tuples themselves."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** 0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, mask):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).split(C, -1))
        weights = torch.softmax((q @ k.mT) / self.scale + mask, dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x)), weights


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, vocab)
        mask = torch.zeros(max_len, max_len).masked_fill(~torch.ones(max_len, max_len, dtype=torch.bool).tril(), -1e4)
        self.register_buffer("mask", mask)

    def forward(self, ids, labels=None):
        T = ids.shape[1]
        x = self.embed(ids) + self.pos(torch.arange(T))
        hidden, attentions = (x,), ()
        for block in self.blocks:
            x, weights = block(x, self.mask[:T, :T])
            hidden, attentions = (*hidden, x), (*attentions, weights)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return logits, loss, hidden, attentions


def build():
    return Decoder()
