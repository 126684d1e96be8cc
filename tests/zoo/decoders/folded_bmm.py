"""Batch and heads folded into one axis for bmm, sequence first, as fairseq has it."""

import torch
import torch.nn.functional as F
from torch import nn


def fill_with_neg_inf(t):
    return t.float().fill_(float("-inf"))


class MultiheadAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.k_proj, self.v_proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.q_proj, self.out_proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, query, attn_mask):
        tgt_len, bsz, embed_dim = query.size()
        q = self.q_proj(query) * self.scaling
        k, v = self.k_proj(query), self.v_proj(query)
        q = q.contiguous().view(tgt_len, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        k = k.contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        v = v.contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        attn_weights = torch.bmm(q, k.transpose(1, 2))  # (B * H, T, T)
        attn_weights = attn_weights + attn_mask.unsqueeze(0)
        attn_probs = F.softmax(attn_weights, dim=-1, dtype=torch.float32).type_as(attn_weights)
        attn = torch.bmm(attn_probs, v)
        attn = attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim)
        return self.out_proj(attn)


class TransformerDecoderLayer(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.fc1, self.fc2 = nn.Linear(embed_dim, 4 * embed_dim), nn.Linear(4 * embed_dim, embed_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim)

    def forward(self, x, mask):
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class TransformerLM(nn.Module):
    def __init__(self, vocab=61, embed_dim=48, num_heads=3, layers=2, max_positions=96):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(vocab, embed_dim), nn.Embedding(max_positions, embed_dim)
        self.layers = nn.ModuleList([TransformerDecoderLayer(embed_dim, num_heads) for _ in range(layers)])

    def buffered_future_mask(self, tensor):
        dim = tensor.size(0)
        return torch.triu(fill_with_neg_inf(torch.zeros([dim, dim])), 1)

    def forward(self, prev_output_tokens):
        positions = torch.arange(prev_output_tokens.size(1), device=prev_output_tokens.device)
        x = self.embed_tokens(prev_output_tokens) + self.embed_positions(positions)
        x = x.transpose(0, 1)  # (T, B, C)
        mask = self.buffered_future_mask(x)
        for layer in self.layers:
            x = layer(x, mask)
        return F.linear(x.transpose(0, 1), self.embed_tokens.weight)


def build():
    return TransformerLM()
