"""Grouped heads by `expand` and `reshape`: two key/value heads for four query heads, rotary by outer product."""

import torch
import torch.nn.functional as F
from torch import nn


def repeat_kv(x, n_rep):
    bs, n_kv_heads, slen, head_dim = x.shape
    if n_rep == 1:
        return x
    x = x[:, :, None, :, :].expand(bs, n_kv_heads, n_rep, slen, head_dim)
    return x.reshape(bs, n_kv_heads * n_rep, slen, head_dim)


def rope(x, base=10000.0):
    T, D = x.shape[-2:]
    freqs = base ** (-torch.arange(0, D, 2).float() / D)
    angles = torch.outer(torch.arange(T).float(), freqs)
    cos, sin = angles.cos(), angles.sin()
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class GroupedQueryAttention(nn.Module):
    def __init__(self, d_in, num_heads, num_kv_groups, head_dim):
        super().__init__()
        self.num_heads, self.num_kv_groups, self.head_dim = num_heads, num_kv_groups, head_dim
        self.group_size = num_heads // num_kv_groups
        self.W_query = nn.Linear(d_in, num_heads * head_dim, bias=False)
        self.W_key = nn.Linear(d_in, num_kv_groups * head_dim, bias=False)
        self.W_value = nn.Linear(d_in, num_kv_groups * head_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * head_dim, d_in, bias=False)

    def forward(self, x, mask):
        b, num_tokens, _ = x.shape
        queries = self.W_query(x).view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        keys = self.W_key(x).view(b, num_tokens, self.num_kv_groups, self.head_dim).transpose(1, 2)
        values = self.W_value(x).view(b, num_tokens, self.num_kv_groups, self.head_dim).transpose(1, 2)
        queries, keys = rope(queries), rope(keys)
        keys, values = repeat_kv(keys, self.group_size), repeat_kv(values, self.group_size)
        attn_scores = queries @ keys.transpose(2, 3)
        attn_scores = attn_scores.masked_fill(mask, -torch.inf)
        attn_weights = torch.softmax(attn_scores / self.head_dim**0.5, dim=-1)
        context = (attn_weights @ values).transpose(1, 2).reshape(b, num_tokens, -1)
        return self.out_proj(context)


class Decoder(nn.Module):
    def __init__(self, vocab=61, d=48, heads=4, groups=2, head_dim=16, layers=2):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, d)
        self.att = nn.ModuleList(GroupedQueryAttention(d, heads, groups, head_dim) for _ in range(layers))
        self.fc1, self.fc2, self.fc3 = (nn.ModuleList(nn.Linear(d, d) for _ in range(layers)) for _ in range(3))
        self.norm1, self.norm2 = (nn.ModuleList(nn.RMSNorm(d, eps=1e-6) for _ in range(layers)) for _ in range(2))
        self.out_head = nn.Linear(d, vocab, bias=False)

    def forward(self, in_idx):
        x = self.tok_emb(in_idx)
        num_tokens = x.shape[1]
        mask = torch.triu(torch.ones(num_tokens, num_tokens, device=x.device, dtype=torch.bool), diagonal=1)
        for i, att in enumerate(self.att):
            x = x + att(self.norm1[i](x), mask)
            h = self.norm2[i](x)
            x = x + self.fc3[i](F.silu(self.fc1[i](h)) * self.fc2[i](h))
        return self.out_head(x)


def build():
    return Decoder()
