"""Attention sinks: a learned score for each head beside the keys, dropped behind the softmax (gpt-oss)."""

import torch
from torch import nn


def sdpa(Q, K, V, S, sm_scale):
    # Q: (batch, tokens, heads, dim), S: a sink for each head
    n_tokens = Q.shape[1]
    QK = torch.einsum("bqhd,bkhd->bhqk", Q, K) * sm_scale
    mask = torch.triu(Q.new_full((n_tokens, n_tokens), -float("inf")), diagonal=1)
    QK = QK + mask[None, None, :, :]
    S = S.reshape(1, -1, 1, 1).expand(QK.shape[0], -1, n_tokens, -1)
    QK = torch.cat([QK, S], dim=-1)
    W = torch.softmax(QK, dim=-1)
    W = W[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", W, V).flatten(2)


class AttentionBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.sm_scale = heads, (dim // heads) ** -0.5
        self.sinks = nn.Parameter(torch.randn(heads))
        self.norm, self.qkv, self.out = nn.RMSNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        return x + self.out(sdpa(q, k, v, self.sinks, self.sm_scale))


class MLPBlock(nn.Module):
    def __init__(self, dim, limit=7.0):
        super().__init__()
        self.limit, self.norm = limit, nn.RMSNorm(dim)
        self.mlp1, self.mlp2 = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        t = self.mlp1(self.norm(x))
        x_glu, x_linear = t[..., ::2], t[..., 1::2]
        x_glu, x_linear = x_glu.clamp(min=None, max=self.limit), x_linear.clamp(min=-self.limit, max=self.limit)
        return x + self.mlp2(x_glu * torch.sigmoid(1.702 * x_glu) * (x_linear + 1))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.block = nn.ModuleList()
        for _ in range(layers):
            self.block += [AttentionBlock(dim, heads), MLPBlock(dim)]
        self.norm, self.unembedding = nn.RMSNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.block:
            x = block(x)
        return self.unembedding(self.norm(x))


def build():
    return Decoder()
