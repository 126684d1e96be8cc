"""A small decoder around one operation."""

import torch
import torch.nn.functional as F
from torch import nn


class Applies(nn.Module):
    """Attention, then `operation` of the hidden state and a positive vector, then the head."""

    def __init__(self, operation):
        super().__init__()
        self.tokens, self.head, self.operation = nn.Embedding(31, 16), nn.Linear(16, 31), operation
        self.vector = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(self.operation(x, self.vector))
