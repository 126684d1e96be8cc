"""nn.TransformerDecoderLayer as a decoder alone, with a single learned vector as its memory."""

import torch
from torch import nn


class Decoder(nn.Module):
    def __init__(self, vocab=61, d_model=48, nhead=3, num_layers=2, max_len=96):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab, d_model), nn.Embedding(max_len, d_model)
        self.memory = nn.Parameter(torch.randn(1, 1, d_model))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(d_model, nhead, 2 * d_model, batch_first=True) for _ in range(num_layers)
        )
        self.fc = nn.Linear(d_model, vocab)

    def forward(self, ids):
        B, T = ids.shape
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        x = self.embedding(ids) + self.position(torch.arange(T))
        memory = self.memory.expand(B, -1, -1)
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.fc(x)


def build():
    return Decoder()
