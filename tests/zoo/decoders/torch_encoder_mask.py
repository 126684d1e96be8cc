"""nn.TransformerEncoder, sequence first, causal by a mask of floats from `(triu(ones) == 1).transpose`."""

import torch
from torch import nn


class TransformerLM(nn.Module):
    def __init__(self, ntoken=61, ninp=48, nhead=3, nhid=96, nlayers=2, max_len=96):
        super().__init__()
        self.encoder, self.positions = nn.Embedding(ntoken, ninp), nn.Embedding(max_len, ninp)
        layer = nn.TransformerEncoderLayer(ninp, nhead, nhid, dropout=0.2)
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers)
        self.decoder = nn.Linear(ninp, ntoken)

    def _generate_square_subsequent_mask(self, sz):
        mask = (torch.triu(torch.ones(sz, sz)) == 1).transpose(0, 1)
        return mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)

    def forward(self, ids):
        src = ids.t()
        mask = self._generate_square_subsequent_mask(src.size(0)).to(src.device)
        src = self.encoder(src) + self.positions(torch.arange(src.size(0)))[:, None]
        return self.decoder(self.transformer_encoder(src, mask)).permute(1, 0, 2)


def build():
    return TransformerLM()
