"""Turns vectors into vectors of a common scale: layer norm, RMS norm, batch norm.

Shapes: B batch, S positions.
"""

import torch
from torch import Tensor, nn

from .checks import Norm, check_choice


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale: "Root Mean Square Layer Normalization" (Zhang and
    Sennrich 2019).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight: (..., hidden) -> (..., hidden)."""
        exact = x.float()  # in half precision the squares would overflow
        mean_square = exact.pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        return (exact * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


class BatchNorm(nn.BatchNorm1d):
    """Standardise each feature over all positions of the batch: "Batch Normalization" (Ioffe and Szegedy 2015).

    In training every position, padding and later ones among them, moves the statistics of all the others; in
    evaluation the statistics are those collected, so that it is one fixed scale and shift of each feature.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised features, scaled and shifted: (batch, seq, hidden) -> (batch, seq, hidden)."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)  # features stand on axis 1: (B, hidden, S)


def build_norm(norm: Norm, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """Make a norm of vectors: "Layer Normalization" (Ba, Kiros and Hinton 2016), `RMSNorm` or `BatchNorm`."""
    check_choice("norm", norm, Norm)
    if norm == "rms_norm":
        return RMSNorm(hidden_size, eps)
    if norm == "batch_norm":
        return BatchNorm(hidden_size, eps=eps)
    return nn.LayerNorm(hidden_size, eps=eps)
