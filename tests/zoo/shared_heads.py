"""A tutorial's decoder: all heads share one projection, and scores are scaled by the width of the embedding."""

import torch
from torch import nn


class SharedHeads(nn.Module):
    """Attention whose heads, slices of the embedding, go through one linear each for queries, keys and values."""

    def __init__(self, embed, heads):
        super().__init__()
        self.embed, self.heads, self.head_dim = embed, heads, embed // heads
        self.values = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.keys = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.queries = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.out = nn.Linear(embed, embed)

    def forward(self, values, keys, queries, mask):
        B, T, _ = queries.shape
        values = self.values(values.reshape(B, T, self.heads, self.head_dim))
        keys = self.keys(keys.reshape(B, T, self.heads, self.head_dim))
        queries = self.queries(queries.reshape(B, T, self.heads, self.head_dim))
        energy = torch.einsum("nqhd,nkhd->nhqk", [queries, keys])  # (B, heads, T, T)
        energy = energy.masked_fill(mask == 0, float("-1e10"))
        attention = torch.softmax(energy / self.embed**0.5, dim=3)  # not the head's size: the tutorial's habit
        return self.out(torch.einsum("nhql,nlhd->nqhd", [attention, values]).reshape(B, T, self.embed))


class Block(nn.Module):
    """Attention and a feed-forward net, each normalised behind its residual."""

    def __init__(self, embed, heads, expansion=4, dropout=0.1):
        super().__init__()
        self.attention = SharedHeads(embed, heads)
        self.norm1, self.norm2 = nn.LayerNorm(embed), nn.LayerNorm(embed)
        self.feed_forward = nn.Sequential(
            nn.Linear(embed, expansion * embed), nn.ReLU(), nn.Linear(expansion * embed, embed)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        x = self.dropout(self.norm1(self.attention(x, x, x, mask) + x))
        return self.dropout(self.norm2(self.feed_forward(x) + x))


class SharedDecoder(nn.Module):
    """ids (B, T) -> logits (B, T, vocab)."""

    def __init__(self, vocab=61, embed=48, layers=2, heads=3, longest=64):
        super().__init__()
        self.words, self.positions = nn.Embedding(vocab, embed), nn.Embedding(longest, embed)
        self.layers = nn.ModuleList(Block(embed, heads) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(embed, vocab)

    def make_mask(self, ids):
        B, T = ids.shape
        return torch.tril(torch.ones((T, T))).expand(B, 1, T, T).to(ids.device)

    def forward(self, ids):
        B, T = ids.shape
        positions = torch.arange(0, T).expand(B, T).to(ids.device)
        x = self.dropout(self.words(ids) + self.positions(positions))
        mask = self.make_mask(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)
