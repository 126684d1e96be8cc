"""A small encoder-decoder that reads dates: the definition of the shipped example, as a user would write it.

PyTorch's own layers, normalised first, with learned positions; the masks are made inside from the ids. There is no
cache in it and nothing of tfinfer. The ids are single characters: the source is a date as people write it, the target
is <s>, the ISO date and </s>.
"""

import torch
from torch import nn

PAD = 0


class DateReader(nn.Module):
    def __init__(self, vocab=46, dim=128, heads=4, ffn=256, layers=2, longest=48):
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.source_positions = nn.Embedding(longest, dim)
        self.target_positions = nn.Embedding(longest, dim)
        encoder_layer = nn.TransformerEncoderLayer(dim, heads, ffn, dropout=0.0, batch_first=True, norm_first=True)
        decoder_layer = nn.TransformerDecoderLayer(dim, heads, ffn, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(encoder_layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder_layer, layers, nn.LayerNorm(dim))
        self.head = nn.Linear(dim, vocab)

    def encode(self, src):  # (B, S)
        positions = torch.arange(src.shape[1], device=src.device)
        x = self.tokens(src) + self.source_positions(positions)  # (B, S, dim)
        return self.encoder(x, src_key_padding_mask=src == PAD)  # (B, S, dim)

    def decode(self, tgt, memory, src_padding=None):  # (B, T), (B, S, dim), True where the source is padding: (B, S)
        T = tgt.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(T, device=tgt.device)
        x = self.tokens(tgt) + self.target_positions(torch.arange(T, device=tgt.device))  # (B, T, dim)
        x = self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=src_padding)
        return self.head(x)  # (B, T, vocab)

    def forward(self, src, tgt):
        return self.decode(tgt, self.encode(src), src == PAD)


def build():
    return DateReader()
