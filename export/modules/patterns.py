"""Turns a length into a mask that says which positions attend to which; it depends on the positions alone.

Shapes: S positions; a mask is (S, S), query by key, True where the query may attend. Every position sees itself.
"""

import torch
from torch import Tensor

from .checks import AttentionPattern, check_pattern


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Make the mask under which a position attends to itself and to what stands before it: (length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def pattern_mask(
    length: int,
    pattern: AttentionPattern = "full",
    *,
    causal: bool = False,
    window: int | None = None,
    block_size: int | None = None,
    num_global_tokens: int | None = None,
    segment_size: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Make the mask of an attention pattern, (length, length), without what stands behind a query where `causal`.

    full: everything. sliding_window: keys less than `window` positions away, the query's own among them, "Longformer"
    (Beltagy et al. 2020, 3.1). block_local_global: the query's own block of `block_size`; the first
    `num_global_tokens` positions also see all and are seen by all, as in Longformer and "Big Bird" (Zaheer et al.
    2020). segmented: the query's own segment of `segment_size` and nothing else. hierarchical: its own segment, and of
    each other segment the last token as a summary, the "fixed" pattern of "Generating Long Sequences with Sparse
    Transformers" (Child et al. 2019, 4.2) with one summary token.
    """
    check_pattern(
        pattern,
        window=window,
        block_size=block_size,
        num_global_tokens=num_global_tokens,
        segment_size=segment_size,
    )
    position = torch.arange(length, device=device)  # (S,)
    query, key = position[:, None], position[None, :]  # (S, 1), (1, S)
    if window is not None:
        mask = (query - key).abs() < window  # (S, S)
    elif block_size is not None and num_global_tokens is not None:
        local = query // block_size == key // block_size  # (S, S)
        mask = local | (query < num_global_tokens) | (key < num_global_tokens)  # (S, S)
    elif segment_size is not None:
        mask = query // segment_size == key // segment_size  # (S, S)
        if pattern == "hierarchical":
            mask = mask | _is_last_of_segment(key, segment_size)  # (S, S)
    else:
        mask = torch.ones(length, length, dtype=torch.bool, device=device)
    return mask & causal_mask(length, device) if causal else mask


def _is_last_of_segment(key: Tensor, segment_size: int) -> Tensor:
    """Tell the last token of each whole segment: an unfinished one has none, or what follows would change it."""
    return key % segment_size == segment_size - 1  # (1, S)
