"""Partial rotary: a quarter of each head turns, the rest passes (GPT-NeoX), queries and keys split from one linear."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads, rotary_pct=0.25, max_len=96):
        super().__init__()
        self.num_heads, self.head_size = num_heads, hidden_size // num_heads
        self.rotary_ndims = int(self.head_size * rotary_pct)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, self.rotary_ndims, 2).float() / self.rotary_ndims))
        emb = torch.cat([torch.outer(torch.arange(max_len).float(), inv_freq)] * 2, dim=-1)
        self.register_buffer("cos_cached", emb.cos()[None, None], persistent=False)  # (1, 1, max, rotary)
        self.register_buffer("sin_cached", emb.sin()[None, None], persistent=False)

    def rotate(self, x, seq_len):
        cos, sin = self.cos_cached[:, :, :seq_len], self.sin_cached[:, :, :seq_len]
        rot, passed = x[..., : self.rotary_ndims], x[..., self.rotary_ndims :]
        half = self.rotary_ndims // 2
        turned = torch.cat((-rot[..., half:], rot[..., :half]), dim=-1)
        return torch.cat((rot * cos + turned * sin, passed), dim=-1)

    def forward(self, hidden_states):
        B, T, _ = hidden_states.shape
        qkv = self.query_key_value(hidden_states)
        qkv = qkv.view(B, T, self.num_heads, 3 * self.head_size)  # each head has its q, k, v together
        query = qkv[..., : self.head_size].permute(0, 2, 1, 3)
        key = qkv[..., self.head_size : 2 * self.head_size].permute(0, 2, 1, 3)
        value = qkv[..., 2 * self.head_size :].permute(0, 2, 1, 3)
        query, key = self.rotate(query, T), self.rotate(key, T)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dense(out.permute(0, 2, 1, 3).contiguous().view(B, T, -1))


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.h_to_4h, self.h_from_4h = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.attention(self.input_layernorm(x)) + x
        return self.h_from_4h(F.gelu(self.h_to_4h(self.post_attention_layernorm(x)))) + x


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=64, heads=2, layers=2):
        super().__init__()
        self.embed_in = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([Layer(dim, heads) for _ in range(layers)])
        self.final_layer_norm, self.embed_out = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, input_ids):
        x = self.embed_in(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.embed_out(self.final_layer_norm(x))


def build():
    return Decoder()
