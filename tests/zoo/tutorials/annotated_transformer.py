"""After "The Annotated Transformer": its blocks as a language model under `subsequent_mask`, log-probabilities out."""

import copy
import math

import torch
import torch.nn as nn
from torch.nn.functional import log_softmax


def clones(module, N):
    return nn.ModuleList([copy.deepcopy(module) for _ in range(N)])


class LayerNorm(nn.Module):
    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.a_2, self.b_2, self.eps = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features)), eps

    def forward(self, x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class SublayerConnection(nn.Module):
    def __init__(self, size, dropout):
        super().__init__()
        self.norm, self.dropout = LayerNorm(size), nn.Dropout(dropout)

    def forward(self, x, sublayer):
        return x + self.dropout(sublayer(self.norm(x)))


def subsequent_mask(size):
    return torch.triu(torch.ones(1, size, size), diagonal=1).type(torch.uint8) == 0


def attention(query, key, value, mask, dropout):
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    p_attn = scores.masked_fill(mask == 0, -1e9).softmax(dim=-1)
    return torch.matmul(dropout(p_attn), value), p_attn


class MultiHeadedAttention(nn.Module):
    def __init__(self, h, d_model, dropout=0.1):
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linears = clones(nn.Linear(d_model, d_model), 4)
        self.attn, self.dropout = None, nn.Dropout(p=dropout)

    def forward(self, query, key, value, mask=None):
        mask = mask.unsqueeze(1)  # Same mask applied to all h heads.
        nbatches = query.size(0)
        query, key, value = [
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value))
        ]
        x, self.attn = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class Layer(nn.Module):
    def __init__(self, d_model, h, d_ff, dropout=0.1):
        super().__init__()
        self.self_attn, self.sublayer = (
            MultiHeadedAttention(h, d_model),
            clones(SublayerConnection(d_model, dropout), 2),
        )
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))

    def forward(self, x, mask):
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, mask))
        return self.sublayer[1](x, self.feed_forward)


class LanguageModel(nn.Module):
    def __init__(self, vocab=61, N=2, d_model=48, d_ff=96, h=3, max_len=96):
        super().__init__()
        self.lut, self.d_model, self.norm = nn.Embedding(vocab, d_model), d_model, LayerNorm(d_model)
        position, pe = torch.arange(0, max_len).unsqueeze(1), torch.zeros(max_len, d_model)
        div_term = torch.exp(torch.arange(0, d_model, 2) * -(math.log(10000.0) / d_model))
        pe[:, 0::2], pe[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))
        self.layers, self.proj = clones(Layer(d_model, h, d_ff), N), nn.Linear(d_model, vocab)

    def forward(self, x):
        mask = subsequent_mask(x.size(-1))
        x = self.lut(x) * math.sqrt(self.d_model)
        x = x + self.pe[:, : x.size(1)].requires_grad_(False)
        for layer in self.layers:
            x = layer(x, mask)
        return log_softmax(self.proj(self.norm(x)), dim=-1)


def build():
    return LanguageModel()
