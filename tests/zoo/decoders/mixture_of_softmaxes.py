"""The head is a mixture of softmaxes, whose logarithm is returned (Yang et al., 2017)."""

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


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, experts=4, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.attn, self.norm, self.experts = Attention(dim, heads), nn.LayerNorm(dim), experts
        self.prior, self.latent = nn.Linear(dim, experts, bias=False), nn.Linear(dim, experts * dim)
        self.decoder = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        x = x + self.attn(self.norm(x))
        B, T, C = x.shape
        latent = torch.tanh(self.latent(x)).view(-1, C)
        logit = self.decoder(latent)
        prior = F.softmax(self.prior(x).contiguous().view(-1, self.experts), -1)
        prob = F.softmax(logit, -1).view(-1, self.experts, logit.size(-1))
        prob = (prob * prior.unsqueeze(2).expand_as(prob)).sum(1)
        return torch.log(prob.add_(1e-8)).view(B, T, -1)


def build():
    return Decoder()
