"""Which rows go through an encoder together: rows of like length, so that little of a batch is padding.

Works on lengths alone; `pad` makes the arrays. Imports errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError

Ids = npt.NDArray[np.int64]
# Tokens of one batch, padding counted, which bounds the memory of its activations. On the CPU those of more tokens
# leave its caches: 256 texts of 8 to 256 tokens took 6.3 s with 8192 and 5.3 s with 1024 (two layers of BERT-base).
BUDGETS = {"cpu": 1024, "cuda": 8192}


def batches(lengths: Sequence[int], most: int, *, ragged: bool, budget: int) -> Iterator[list[int]]:
    """Every row's number once, in batches: the longest rows first, so that memory is highest at once.

    Args:
        lengths: tokens of each row.
        most: rows of a batch at most.
        ragged: whether rows of different lengths may share a batch.
        budget: rows times the longest of them at most; a row that is longer goes alone.

    Raises:
        InputError: `most` or `budget` is not positive.
    """
    if most < 1 or budget < 1:
        raise InputError(f"expected batches of at least one row and one token, got {most} and {budget}")
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: equal ones stay in their order
        longest = lengths[batch[0]] if batch else 0
        full = len(batch) == most or (len(batch) + 1) * longest > budget
        if batch and (full or (not ragged and lengths[row] != longest)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad(rows: Sequence[Ids], value: int) -> tuple[Ids, Ids]:
    """The rows filled with `value` to the right, and a mask that is 1 where there is a token: both (batch, seq)."""
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.full(mask.shape, value, np.int64)
    ids[mask == 1] = np.concatenate(rows)
    return ids, mask
