"""Turns queries and keys into how much each query takes from each key; knows neither heads nor projections.

Shapes: B batch, H heads, S positions, Q query positions, T key positions, D size of a key, E size of a value.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from tfinfer.errors import InputError

from .checks import KernelForm, Similarity
from .patterns import causal_mask


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v, equation 1 of "Attention Is All You Need" (Vaswani et al. 2017, 3.2.1).

    Args:
        q: (..., queries, head_dim).
        k: (..., keys, head_dim).
        v: (..., keys, value_dim).
        mask: boolean, broadcast to (..., queries, keys); True where a query may attend to a key. Every query needs
            at least one such key: the softmax over none is not defined.
        scale: what the scores are multiplied by; 1 / sqrt(head_dim) when None, 1.0 for scores as they are.
        position_bias: what is added to the scaled scores, broadcast to (..., queries, keys).

    Returns:
        (..., queries, value_dim).
    """
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    scores = q @ k.transpose(-2, -1) * scale  # (..., Q, T)
    if position_bias is not None:
        scores = scores + position_bias  # (..., Q, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)  # (..., Q, T), each row sums to 1
    return weights @ v  # (..., Q, value_dim)


def elu_feature_map(x: Tensor) -> Tensor:
    """Return elu(x) + 1, which is above 0: "Transformers are RNNs" (Katharopoulos et al. 2020, equation 7)."""
    return F.elu(x) + 1.0


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weigh values by phi(q) phi(k), divided by their sum, without a softmax (Katharopoulos et al. 2020, equation 3).

    This is the quadratic form: it makes every weight. `mask` is that of `scaled_dot_product_attention`.

    Returns:
        (..., queries, value_dim).
    """
    weights = elu_feature_map(q) @ elu_feature_map(k).transpose(-2, -1)  # (..., Q, T), all above 0
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True) @ v  # (..., Q, value_dim)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Compute `kernel_attention` from sums over the keys, in time linear in them (Katharopoulos et al. 2020, 3.2, 3.3).

    Args:
        q: (batch, heads, seq, head_dim).
        k: (batch, heads, seq, head_dim).
        v: (batch, heads, seq, value_dim).
        key_mask: boolean, broadcast to (batch, heads, 1, seq); True where there is a key. A sum has no place for a
            mask that differs between queries: it raises `InputError`.
        causal: whether a query sees only its own position and what stands before it: the sums then run along.

    Returns:
        (batch, heads, seq, value_dim).
    """
    phi_q, phi_k = elu_feature_map(q), elu_feature_map(k)  # (B, H, S, D)
    if key_mask is not None:
        if key_mask.dim() < 2 or key_mask.shape[-2] != 1:
            raise InputError(
                f"kernel_form 'linear' takes one mask for all queries, (batch, 1, 1, keys), got one of shape "
                f"{tuple(key_mask.shape)}; use kernel_form='quadratic' for a mask that differs between queries"
            )
        phi_k = phi_k * key_mask.transpose(-2, -1)  # (B, H, S, D) * (B, 1, S, 1): a hidden key adds nothing
    if not causal:
        kv = phi_k.transpose(-2, -1) @ v  # (B, H, D, E)
        z = phi_k.sum(dim=2, keepdim=True)  # (B, H, 1, D)
        return phi_q @ kv / (phi_q * z).sum(dim=-1, keepdim=True)  # (B, H, S, E)
    kv = (phi_k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim=2)  # (B, H, S, D, E)
    z = phi_k.cumsum(dim=2)  # (B, H, S, D)
    return (phi_q.unsqueeze(-2) @ kv).squeeze(-2) / (phi_q * z).sum(-1, keepdim=True)  # (B, H, S, E)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    similarity: Similarity = "scaled_dot",
    scale: float | None = None,
    kernel_form: KernelForm = "quadratic",
    causal: bool = False,
    position_bias: Tensor | None = None,
) -> Tensor:
    """Gather values by the similarity of that name; for "general" the query has been projected by W already.

    dot: softmax(q k^T) v, and general with a projected query: "Effective Approaches to Attention-based Neural Machine
    Translation" (Luong et al. 2015, equation 8). scaled_dot: `scaled_dot_product_attention`. kernel: `kernel_attention`
    or, in its linear form, `linear_attention`. `scale` is what scores are multiplied by instead of the similarity's own
    factor. A `position_bias` with "kernel", which has no scores to add it to, raises `InputError`.

    Returns:
        (batch, heads, queries, value_dim) of q (batch, heads, queries, head_dim) and as many heads of keys and values.
    """
    if similarity == "kernel" and position_bias is not None:
        raise InputError(
            "a position bias is added to the scores of a softmax and similarity 'kernel' has none, got one; "
            "leave it out or use another similarity"
        )
    if kernel_form == "linear":
        return linear_attention(q, k, v, mask, causal=causal)
    if causal:
        earlier = causal_mask(q.shape[-2], q.device)  # (Q, Q)
        mask = earlier if mask is None else earlier & mask
    if similarity == "kernel":
        return kernel_attention(q, k, v, mask)
    if similarity != "scaled_dot" and scale is None:
        scale = 1.0
    return scaled_dot_product_attention(q, k, v, mask, scale, position_bias)
