"""Turns two names from the literature, BERT and GPT, into configs, and BERT's config into its two tasks.

Shapes: B batch, S positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfinfer.errors import InputError

from .config import TransformerConfig
from .encoder import Encoder
from .norms import build_norm

_BERT: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "intermediate_size": 3072,
    "max_length": 512,
    "activation": "gelu",
    "norm_position": "post",
    "norm_eps": 1e-12,
    "embedding_norm": True,
    "num_token_types": 2,
    "position": "learned",
    "dropout": 0.1,
}
_GPT: dict[str, Any] = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "intermediate_size": 3072,
    "max_length": 1024,
    "activation": "gelu_tanh",
    "norm_position": "pre",
    "position": "learned",
    "dropout": 0.1,
}


def bert_config(**changes: Any) -> TransformerConfig:
    """Make the config of BERT base, uncased (Devlin et al. 2018), with any field of the config changed."""
    return TransformerConfig(**(_BERT | changes))


def gpt_config(**changes: Any) -> TransformerConfig:
    """Make the config of GPT-2 small (Radford et al. 2019), for `Decoder`, with any field of the config changed."""
    return TransformerConfig(**(_GPT | changes))


class MaskedLanguageModel(nn.Module):
    """Guess masked words, and whether two texts follow one another: BERT's pre-training (Devlin et al. 2018, 3.1).

    The word head transforms each hidden state and compares it with the embeddings themselves; the sentence-pair head
    reads the pooled first token. A config whose embeddings are not tied raises `InputError`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if not config.tie_embeddings:
            raise InputError(
                "the masked-word head compares with the embeddings themselves, got tie_embeddings=False; set it to True"
            )
        self.encoder = Encoder(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.head.weight = self.encoder.embedding.weight
        nn.init.zeros_(self.head.bias)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.sentence_pair = nn.Linear(config.hidden_size, 2)

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of the words, tied to the head."""
        return self.encoder.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `logits` of each word, `sentence_pair` logits and `hidden_states`; the arguments are `Encoder`'s.

        (batch, seq) -> (batch, seq, vocab), (batch, 2): the second follows the first, or not; (batch, seq, hidden).
        """
        hidden_states = self.encoder(input_ids, attention_mask, token_type_ids)  # (B, S, hidden)
        transformed = self.transform_norm(F.gelu(self.transform(hidden_states)))  # (B, S, hidden)
        pooled = torch.tanh(self.pooler(hidden_states[:, 0]))  # (B, hidden), the first token's
        return {
            "logits": self.head(transformed),  # (B, S, vocab)
            "sentence_pair": self.sentence_pair(pooled),  # (B, 2)
            "hidden_states": hidden_states,
        }
