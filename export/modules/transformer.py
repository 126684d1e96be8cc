"""Turns token ids into logits with a stack of blocks; knows neither text nor sampling nor any cache.

Shapes: B batch, S positions.
"""

from torch import Tensor, nn

from .blocks import Block, build_norm
from .config import TransformerConfig
from .positions import RotaryPositions, build_positions


class Decoder(nn.Module):
    """Predict at every position the token that comes next, from it and what stands before it.

    The decoder of "Attention Is All You Need" (Vaswani et al. 2017) without its cross-attention, as in "Improving
    Language Understanding by Generative Pre-Training" (Radford et al. 2018). With pre-norm a last norm closes the
    stack. A tied head is the embedding's own matrix: "Using the Output Embedding to Improve Language Models" (Press and
    Wolf 2016).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=config.hidden_size**-0.5)  # logits of a tied head near unit scale
        self.positions = build_positions(config)
        self.dropout = nn.Dropout(config.dropout)
        rotary = None  # one table for all blocks
        if config.position == "rotary":
            rotary = RotaryPositions(config.head_dim, config.max_length, config.rope_theta)
        self.blocks = nn.ModuleList(Block(config, causal=True, rotary=rotary) for _ in range(config.num_layers))
        self.norm: nn.Module = nn.Identity()
        if config.norm_position == "pre":
            self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the next token at every position: (batch, seq) -> (batch, seq, vocab)."""
        x = self.dropout(self.positions(self.embedding(input_ids)))  # (B, S, hidden)
        for block in self.blocks:
            x = block(x)  # (B, S, hidden)
        logits: Tensor = self.head(self.norm(x))  # (B, S, vocab)
        return logits
