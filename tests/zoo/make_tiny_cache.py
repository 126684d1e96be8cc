"""Make the folder with a cache of 8 bits that the runtime's tests use where torch was never installed.

    python tests/zoo/make_tiny_cache.py tests/runtime/tiny_cache8

A layer whose keys and values are 8 bits wide, behind rotary positions, and one that stays as it is, for its heads are
of 10 features, so that a slot has buffers of both widths; random weights.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tfinfer.export import export_model

VOCAB, HIDDEN, LONGEST = 24, 32, 160


class Layer(nn.Module):
    """Attention of so many heads of `size` features over x (batch, seq, hidden)."""

    def __init__(self, heads: int, size: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.size, self.rotary = heads, size, rotary
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * heads * size)
        self.out = nn.Linear(heads * size, HIDDEN)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        frequencies = 100.0 ** (-torch.arange(self.size // 2) / (self.size // 2))
        angles = torch.arange(x.shape[2])[:, None] * frequencies  # (seq, size / 2)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = (*x.shape[:2], 3, self.heads, self.size)
        q, k, v = self.qkv(self.norm(x)).view(split).permute(2, 0, 3, 1, 4)  # (batch, heads, seq, size) each
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Mixed(nn.Module):
    """ids (batch, seq) -> logits (batch, seq, vocab)"""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Layer(2, 16, True), Layer(2, 10, False)])
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def main(out: Path) -> None:
    torch.manual_seed(0)
    module = Mixed().eval()
    with torch.no_grad():
        for parameter in module.parameters():  # random weights say little: without this the choices are nearly ties
            parameter.mul_(2)
    report = export_model(module, out, max_length=LONGEST, cache="int8", attention=False, overwrite=True)
    for verdict in report.verdicts:
        print(*verdict.lines(), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
