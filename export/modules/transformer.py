"""Turns token ids into logits with a stack of blocks; knows neither text nor sampling nor any cache.

Shapes: B batch, S positions.
"""

from torch import Tensor, nn

from .config import TransformerConfig
from .stack import Stack, build_embedding


class Decoder(Stack):
    """Predict at every position the token that comes next, from it and what stands before it.

    The decoder of "Attention Is All You Need" (Vaswani et al. 2017) without its cross-attention, as in "Improving
    Language Understanding by Generative Pre-Training" (Radford et al. 2018), or with it, as in the paper. A tied head
    is the embedding's own matrix: "Using the Output Embedding to Improve Language Models" (Press and Wolf 2016).
    """

    def __init__(self, config: TransformerConfig, *, cross_attention: bool = False) -> None:
        embedding = build_embedding(config.vocab_size, config.hidden_size)  # draws its numbers before the blocks
        super().__init__(config, causal=True, cross_attention=cross_attention)
        self.embedding = embedding
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None) -> Tensor:
        """Return the logits of the next token at every position: (batch, seq) -> (batch, seq, vocab).

        With cross-attention, `memory` is (batch, keys, hidden) and `memory_mask` (batch, keys), 1 or True where there
        is a token.
        """
        x = self.place(self.embedding(input_ids))  # (B, S, hidden)
        x = self.run(x, memory=memory, memory_mask=memory_mask)  # (B, S, hidden)
        logits: Tensor = self.head(x)  # (B, S, vocab)
        return logits
