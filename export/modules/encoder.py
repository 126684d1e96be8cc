"""Turns token ids into hidden states that have seen the whole input, and an input and a beginning into logits.

Shapes: B batch, S source positions, T target positions.
"""

import dataclasses

import torch
from torch import Tensor, nn

from tfinfer.errors import InputError

from .config import TransformerConfig
from .stack import Stack, build_embedding
from .transformer import Decoder


class Encoder(Stack):
    """Let every token see every other: the encoder of "Attention Is All You Need" (Vaswani et al. 2017, 3.1).

    With `config.num_token_types` each token also gets the vector of its type, as in "BERT: Pre-training of Deep
    Bidirectional Transformers for Language Understanding" (Devlin et al. 2018, 3).
    """

    def __init__(self, config: TransformerConfig) -> None:
        embedding = build_embedding(config.vocab_size, config.hidden_size)  # draws its numbers before the blocks
        super().__init__(config, causal=False)
        self.embedding = embedding
        self.token_types = None
        if config.num_token_types:
            self.token_types = build_embedding(config.num_token_types, config.hidden_size)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states: (batch, seq) -> (batch, seq, hidden).

        `attention_mask`, (batch, seq), is 1 where there is a token and 0 for padding; every row needs a token, and
        hidden states of padding mean nothing. `token_type_ids`, (batch, seq), are all 0 when None; giving them to an
        encoder without types raises `InputError`.
        """
        types = self._types(input_ids, token_type_ids)  # (B, S, hidden)
        x = self.place(self.embedding(input_ids), types)  # (B, S, hidden)
        return self.run(x, attention_mask)  # (B, S, hidden)

    def _types(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor | None:
        if self.token_types is None:
            if token_type_ids is not None:
                raise InputError(
                    "this encoder knows no token types, got token_type_ids; leave them out or set num_token_types"
                )
            return None
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)  # (B, S)
        types: Tensor = self.token_types(token_type_ids)  # (B, S, hidden)
        return types


class EncoderDecoder(nn.Module):
    """Read a source and write a target: the transformer of "Attention Is All You Need" (Vaswani et al. 2017, figure 1).

    Both sides have one vocabulary. Tied, one matrix is the embedding of both sides and the head (3.4).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        num_layers = config.num_layers if config.num_decoder_layers is None else config.num_decoder_layers
        self.decoder = Decoder(dataclasses.replace(config, num_layers=num_layers), cross_attention=True)
        if config.tie_embeddings:
            self.encoder.embedding.weight = self.decoder.embedding.weight

    @property
    def embedding(self) -> nn.Embedding:
        """The source's embedding; untied, the target's own is `decoder.embedding`."""
        return self.encoder.embedding

    def encode(self, source_ids: Tensor) -> Tensor:
        """Return the memory of a source: (batch, source) -> (batch, source, hidden)."""
        memory: Tensor = self.encoder(source_ids, self.source_mask(source_ids))  # (B, S, hidden)
        return memory

    def decode(self, target_ids: Tensor, memory: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Return the logits of the next token: (batch, target), (batch, source, hidden) -> (batch, target, vocab).

        `source_mask`, (batch, source), is 1 or True where the memory stands for a token, as `source_mask()` makes it.
        """
        logits: Tensor = self.decoder(target_ids, memory, source_mask)  # (B, T, vocab)
        return logits

    def forward(self, source_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Return the logits of the next target token: (batch, source), (batch, target) -> (batch, target, vocab)."""
        return self.decode(target_ids, self.encode(source_ids), self.source_mask(source_ids))

    def source_mask(self, source_ids: Tensor) -> Tensor | None:
        """Tell what is no padding, (batch, source) -> the same shape; None where the config has no `pad_id`."""
        return None if self.config.pad_id is None else source_ids != self.config.pad_id
