"""The norm behind each residual, as "Attention Is All You Need" has it, with a LayerNorm by hand."""

import torch
import torch.nn.functional as F
from torch import nn


class LayerNormalization(nn.Module):
    def __init__(self, d, eps=1e-5):
        super().__init__()
        self.gamma, self.beta, self.eps = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d)), eps

    def forward(self, inputs):
        mean = inputs.mean(dim=-1, keepdim=True)
        var = ((inputs - mean) ** 2).mean(dim=-1, keepdim=True)
        std = (var + self.eps).sqrt()
        return self.gamma * ((inputs - mean) / std) + self.beta


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.qkv_layer, self.linear_layer = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x, mask):
        batch_size, sequence_length, d_model = x.size()
        qkv = self.qkv_layer(x).reshape(batch_size, sequence_length, self.num_heads, 3 * self.head_dim)
        q, k, v = qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)
        scaled = torch.matmul(q, k.transpose(-1, -2)) / self.head_dim**0.5
        scaled += mask
        values = torch.matmul(F.softmax(scaled, dim=-1), v).permute(0, 2, 1, 3)
        return self.linear_layer(values.reshape(batch_size, sequence_length, self.num_heads * self.head_dim))


class DecoderLayer(nn.Module):
    def __init__(self, d_model, ffn_hidden, num_heads, drop_prob):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, num_heads)
        self.norm1, self.norm2 = LayerNormalization(d_model), LayerNormalization(d_model)
        self.linear1, self.linear2 = nn.Linear(d_model, ffn_hidden), nn.Linear(ffn_hidden, d_model)
        self.dropout1, self.dropout2 = nn.Dropout(drop_prob), nn.Dropout(drop_prob)

    def forward(self, y, mask):
        y = self.norm1(self.dropout1(self.self_attention(y, mask)) + y)
        return self.norm2(self.dropout2(self.linear2(F.relu(self.linear1(y)))) + y)


class Decoder(nn.Module):
    def __init__(self, vocab=61, d_model=48, ffn_hidden=96, num_heads=3, num_layers=2, max_len=96):
        super().__init__()
        self.embedding, self.d_model = nn.Embedding(vocab, d_model), d_model
        self.positions = nn.Parameter(torch.zeros(max_len, d_model).normal_())
        self.layers = nn.ModuleList([DecoderLayer(d_model, ffn_hidden, num_heads, 0.1) for _ in range(num_layers)])
        self.linear = nn.Linear(d_model, vocab)

    def forward(self, x):
        T = x.size(1)
        mask = torch.full([T, T], float("-inf"))
        mask = torch.triu(mask, diagonal=1)
        x = self.embedding(x) + self.positions[:T, :]
        for layer in self.layers:
            x = layer(x, mask)
        return self.linear(x)


def build():
    return Decoder()
