"""nn.TransformerEncoder under a causal mask, batch first, norm first, with `is_causal=True`."""

import torch
from torch import nn


class Decoder(nn.Module):
    def __init__(self, vocab=61, d_model=48, nhead=3, num_layers=2, max_len=96):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, d_model), nn.Embedding(max_len, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, nhead, dim_feedforward=4 * d_model, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.head = nn.Linear(d_model, vocab)

    def forward(self, ids):
        T = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=ids.device)
        x = self.embed(ids) + self.pos(torch.arange(T, device=ids.device))
        return self.head(self.encoder(x, mask=mask, is_causal=True))


def build():
    return Decoder()
