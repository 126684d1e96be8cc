"""nn.TransformerDecoderLayer as a decoder alone: the sequence is its own memory, under the same causal mask."""

import torch
from torch import nn


class Decoder(nn.Module):
    def __init__(self, vocab=61, d_model=48, nhead=3, num_layers=2, max_len=96):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab, d_model), nn.Embedding(max_len, d_model)
        layer = nn.TransformerDecoderLayer(d_model, nhead, dim_feedforward=2 * d_model, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers)
        self.fc = nn.Linear(d_model, vocab)

    def forward(self, ids):
        T = ids.size(1)
        mask = torch.triu(torch.ones(T, T, dtype=torch.bool, device=ids.device), diagonal=1)
        x = self.embedding(ids) + self.position(torch.arange(T, device=ids.device)).unsqueeze(0)
        x = self.decoder(tgt=x, memory=x, tgt_mask=mask, memory_mask=mask)
        return self.fc(x)


def build():
    return Decoder()
