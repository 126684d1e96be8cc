"""Returns a dict with the logits among other things."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ln = nn.LayerNorm(dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(self.ln(x)).chunk(3, dim=2))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, vocab=61, dim=48, heads=3, layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(layers)])
        self.head, self.value = nn.Linear(dim, vocab), nn.Linear(dim, 1)

    def forward(self, input_ids):
        x = self.blocks(self.embed(input_ids) + self.pos(torch.arange(input_ids.shape[1])))
        return {"last_hidden_state": x, "value": self.value(x).squeeze(-1), "logits": self.head(x)}


def build():
    return Decoder()
