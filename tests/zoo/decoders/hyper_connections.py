"""Four residual streams mixed by learned matrices around each layer (hyper-connections, Zhu et al., 2024)."""

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


class HyperConnection(nn.Module):
    def __init__(self, streams, layer, dim):
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(dim)
        self.read = nn.Parameter(torch.eye(streams)[0])
        self.write = nn.Parameter(torch.ones(streams))
        self.mix = nn.Parameter(torch.eye(streams) + 0.1 * torch.randn(streams, streams))
        self.dynamic = nn.Parameter(torch.randn(dim, streams) * 0.1)

    def forward(self, streams):  # (B, T, S, C)
        width = self.read + torch.tanh(F.layer_norm(streams, streams.shape[-1:]) @ self.dynamic).mean(2)  # (B, T, S)
        x = torch.einsum("bts,btsc->btc", width, streams)
        y = self.layer(self.norm(x))
        return torch.einsum("sr,btsc->btrc", self.mix, streams) + y.unsqueeze(2) * self.write[:, None]


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, streams=4, max_len=96):
        super().__init__()
        self.embed, self.pos, self.streams = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim), streams
        mlps = [nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(layers)]
        sublayers = [sub for mlp in mlps for sub in (Attention(dim, heads), mlp)]
        self.layers = nn.ModuleList(HyperConnection(streams, sub, dim) for sub in sublayers)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        x = x.unsqueeze(2).repeat(1, 1, self.streams, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.sum(dim=2))


def build():
    return Decoder()
