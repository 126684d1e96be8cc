"""nanochat's way: rotary and q/k norm without weights, squared ReLU, norm without weights, capped logits."""

import torch
import torch.nn.functional as F
from torch import nn


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def apply_rotary_emb(x, cos, sin):
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    return torch.cat([x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos], 3).to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.c_q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.c_k, self.c_v = (nn.Linear(dim, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.c_proj = nn.Linear(dim, dim, bias=False)
        self.c_fc, self.c_out = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def attn(self, x, cos_sin):
        B, T, C = x.size()
        q = self.c_q(x).view(B, T, self.heads, self.head_dim)
        k, v = (w(x).view(B, T, self.kv_heads, self.head_dim) for w in (self.c_k, self.c_v))
        cos, sin = cos_sin
        q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
        q, k = norm(q), norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1))

    def forward(self, x, cos_sin):
        x = x + self.attn(norm(x), cos_sin)
        return x + self.c_out(F.relu(self.c_fc(norm(x))).square())


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=64, heads=4, kv_heads=2, layers=2, rotary_seq_len=960):
        super().__init__()
        self.wte, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab, bias=False)
        self.h = nn.ModuleList(Block(dim, heads, kv_heads) for _ in range(layers))
        channels = torch.arange(0, dim // heads, 2, dtype=torch.float32)
        freqs = torch.outer(torch.arange(rotary_seq_len).float(), 1.0 / (10000 ** (channels / (dim // heads))))
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, idx, targets=None):
        T = idx.size(1)
        assert self.cos.size(1) >= T, f"Sequence length grew beyond the rotary embeddings cache: {T}"
        cos_sin = self.cos[:, :T], self.sin[:, :T]
        x = norm(self.wte(idx))
        for block in self.h:
            x = block(x, cos_sin)
        logits = self.head(norm(x)).float()
        return 15 * torch.tanh(logits / 15)


def build():
    return Decoder()
