"""Learned positions through a buffer of ids that is sliced (`position_ids[:, :seq_length]`), as BERT has it."""

import math

import torch
from torch import nn


class Embeddings(nn.Module):
    def __init__(self, vocab, hidden, max_positions):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, hidden, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_positions, hidden)
        self.LayerNorm, self.dropout = nn.LayerNorm(hidden, eps=1e-12), nn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(max_positions).expand((1, -1)))

    def forward(self, input_ids):
        seq_length = input_ids.size(1)
        position_ids = self.position_ids[:, :seq_length]
        embeddings = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class SelfAttention(nn.Module):
    def __init__(self, hidden, heads, max_positions):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, hidden // heads
        self.query, self.key, self.value = (
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, hidden),
        )
        self.dense, self.dropout = nn.Linear(hidden, hidden), nn.Dropout(0.1)
        causal = torch.tril(torch.ones((max_positions, max_positions), dtype=torch.uint8))
        self.register_buffer("mask", causal.view(1, 1, max_positions, max_positions), persistent=False)

    def transpose_for_scores(self, x):
        new_x_shape = x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)
        return x.view(new_x_shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states):
        T = hidden_states.size(1)
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        attention_scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        attention_scores = attention_scores / math.sqrt(self.attention_head_size)
        extended_mask = (1.0 - self.mask[:, :, :T, :T].to(attention_scores.dtype)) * -10000.0
        attention_probs = nn.functional.softmax(attention_scores + extended_mask, dim=-1)
        context_layer = torch.matmul(self.dropout(attention_probs), value_layer).permute(0, 2, 1, 3).contiguous()
        return self.dense(context_layer.view(context_layer.size()[:-2] + (-1,)))


class Decoder(nn.Module):
    def __init__(self, vocab=61, hidden=48, heads=3, layers=2, max_positions=96):
        super().__init__()
        self.embeddings = Embeddings(vocab, hidden, max_positions)
        self.attention = nn.ModuleList(SelfAttention(hidden, heads, max_positions) for _ in range(layers))
        self.intermediate = nn.ModuleList(nn.Linear(hidden, 4 * hidden) for _ in range(layers))
        self.output = nn.ModuleList(nn.Linear(4 * hidden, hidden) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, eps=1e-12) for _ in range(2 * layers))
        self.predictions = nn.Linear(hidden, vocab)

    def forward(self, input_ids):
        x = self.embeddings(input_ids)
        for i, attention in enumerate(self.attention):
            x = self.norms[2 * i](attention(x) + x)
            x = self.norms[2 * i + 1](self.output[i](nn.functional.gelu(self.intermediate[i](x))) + x)
        return self.predictions(x)


def build():
    return Decoder()
