"""Make the folder with running sums that the runtime's tests use where torch was never installed.

    python tests/zoo/make_tiny_states.py tests/runtime/tiny_states

A layer of attention and one of linear attention, so that a slot has both positions and states; random weights.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tfinfer.export import export_model

VOCAB, HIDDEN, LONGEST = 24, 16, 80


class Linear(nn.Module):
    """ids (batch, seq) -> logits (batch, seq, vocab)"""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(LONGEST, HIDDEN)
        self.attention = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.linear = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = self.attention(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        q, k, v = self.linear(self.norm(x)).chunk(3, dim=-1)
        q, k = F.elu(q) + 1, F.elu(k) + 1  # (batch, seq, hidden)
        sums = torch.cumsum(k[..., :, None] * v[..., None, :], dim=1)  # (batch, seq, hidden, hidden)
        weights = torch.cumsum(k, dim=1)
        y = (q[..., :, None] * sums).sum(-2) / (q * weights).sum(-1, keepdim=True)
        return self.head(x + y)


def main(out: Path) -> None:
    torch.manual_seed(0)
    module = Linear().eval()
    with torch.no_grad():
        for parameter in module.parameters():  # random weights say little: without this the choices are nearly ties
            parameter.mul_(2)
    report = export_model(module, out, max_length=LONGEST, attention=False, overwrite=True)
    print(*report.verdicts[0].lines(), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
