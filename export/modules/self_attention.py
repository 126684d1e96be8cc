"""Turns a sequence into what each position gathers, with one head and nothing around it: how textbooks begin.

Shapes: B batch, S positions, D size of a query and key, E size of a value.
"""

import torch
from torch import Tensor, nn

from .checks import KernelForm, Similarity, check_similarity, check_size
from .similarity import attend


class SelfAttention(nn.Module):
    """Project to queries, keys and values of sizes of their own and gather; what comes out are mixed values.

    softmax(q k^T / sqrt(d_k)) v of "Attention Is All You Need" (Vaswani et al. 2017, 3.2.1), without the projection
    back that several heads need.

    Args:
        hidden_size: size of what comes in.
        key_size: size of queries and keys, d_k; `hidden_size` when None.
        value_size: size of values and of what goes out, d_v; `hidden_size` when None.
        bias: whether the three projections have a bias.
        causal: whether a position sees only itself and what stands before it.
        similarity: what makes weights of queries and keys, see `attend`; "general" has a matrix W for q^T W k.
        kernel_form: for "kernel", every weight ("quadratic") or sums over the keys ("linear").
        scale: what scores are multiplied by; the similarity's own factor when None, 1.0 for none.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        key_size: int | None = None,
        value_size: int | None = None,
        bias: bool = False,
        causal: bool = False,
        similarity: Similarity = "scaled_dot",
        kernel_form: KernelForm = "quadratic",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        key_size = hidden_size if key_size is None else key_size
        value_size = hidden_size if value_size is None else value_size
        check_size("hidden_size", hidden_size)
        check_size("key_size", key_size)
        check_size("value_size", value_size)
        check_similarity(similarity, kernel_form, scale)
        self.causal = causal
        self.similarity: Similarity = similarity
        self.kernel_form: KernelForm = kernel_form
        self.scale = scale
        self.q_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, value_size, bias=bias)
        self.general = build_general(similarity, key_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what each position of `x` gathers: (batch, seq, hidden) -> (batch, seq, value_size).

        `mask` is boolean, True where a query may attend, and broadcast to (batch, seq, seq).
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, S, D), (B, S, D), (B, S, E)
        if self.general is not None:
            q = q @ self.general  # (B, S, D)
        gathered = attend(
            q.unsqueeze(1),  # (B, 1, S, D), one head
            k.unsqueeze(1),
            v.unsqueeze(1),
            None if mask is None else mask.unsqueeze(-3),
            similarity=self.similarity,
            scale=self.scale,
            kernel_form=self.kernel_form,
            causal=self.causal,
        )  # (B, 1, S, E)
        return gathered.squeeze(1)  # (B, S, E)


class ParameterFreeAttention(nn.Module):
    """Replace each vector by a mean of all, weighed by how similar they are: softmax(x x^T) x, with nothing to learn.

    The memory read of "End-To-End Memory Networks" (Sukhbaatar et al. 2015, equation 1) with the sequence as its own
    memory; textbooks begin with it and then add the projections of `SelfAttention`.
    """

    def __init__(self, *, causal: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        check_similarity("dot", "quadratic", scale)
        self.causal = causal
        self.scale = scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(x x^T) x: (batch, seq, hidden) -> the same shape; `mask` as in `SelfAttention`."""
        return attend(x, x, x, mask, similarity="dot", scale=self.scale, causal=self.causal)  # (B, S, hidden)


def build_general(similarity: Similarity, key_size: int) -> nn.Parameter | None:
    """Make the matrix W of q^T W k, (key_size, key_size), for similarity "general"; None for any other."""
    if similarity != "general":
        return None
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(key_size, key_size)))
