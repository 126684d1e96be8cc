"""What the module itself computes for the cases of a proof: one full pass for each sequence, no cache anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tfinfer.errors import CaptureError, InputError, ProofError
from tfinfer.proof.cases import Case, Row

from ..capture.modes import inference_mode_of
from .head import find_head, only_rows

Ids = npt.NDArray[np.int64]
LONG = 1024  # tokens: from here on only the wanted rows of a pass become logits


class Reference:
    """Full passes of a module. `all_rows` is False for a module that gives the last position's logits alone.

    target, source: of an encoder-decoder, the arguments that take the ids. num_logits: how wide logits are.
    """

    def __init__(
        self, module: nn.Module, all_rows: bool, target: str = "", source: str = "", num_logits: int | None = None
    ) -> None:
        self.module, self.all_rows = module, all_rows
        self.target, self.source, self.num_logits = target, source, num_logits

    def logits(self, ids: Ids, source: Ids | None = None) -> torch.Tensor:
        """ids: (seq,), source: (source,) -> (seq or 1, vocab) float32."""
        row = torch.from_numpy(np.ascontiguousarray(ids))[None]
        with inference_mode_of(self.module):
            if source is None:
                out = logits_of(self.module(row), self.num_logits)
            else:
                given = torch.from_numpy(np.ascontiguousarray(source))[None]
                out = logits_of(self.module(**{self.source: given, self.target: row}), self.num_logits)
        return out.reshape(-1, out.shape[-1]).float()

    def check_takes(self, ceiling: int, source_ceiling: int | None = None) -> None:
        """Raises InputError where the module itself fails at that many tokens, which its trace allows."""
        short = np.ones(2, np.int64)
        self._check_one(ceiling, "--max-length", lambda ids: self.logits(ids, short if self.source else None))
        if source_ceiling is not None:
            self._check_one(source_ceiling, "--max-source-length", lambda ids: self.logits(short, ids))

    @staticmethod
    def _check_one(ceiling: int, option: str, run: Callable[[Ids], object]) -> None:
        def takes(length: int) -> bool:
            try:
                for one in (0, 1):  # one of the two may be padding, which may count for nothing
                    run(np.full(length, one))
            except (IndexError, RuntimeError):
                return False
            return True

        if (longest := longest_taken(takes, ceiling)) < ceiling:
            raise InputError(
                f"the module fails beyond {longest} tokens, which does not show before it runs: give {option} "
                f"{longest} or less"
            )

    def expected(self, case: Case) -> dict[Row, npt.NDArray[np.float32]]:
        """The logits of every row of a case, (vocab,) each."""
        found: dict[Row, npt.NDArray[np.float32]] = {}
        for number, sequence in enumerate(case.sequences):
            rows, source = [row for row in case.rows if row.sequence == number], case.source_of(number)
            if self.all_rows and rows:
                positions = sorted({row.position for row in rows})
                logits = self._rows(sequence, source, positions).numpy().copy()
                found |= {row: logits[positions.index(row.position)] for row in rows}
            else:
                last = _last_of_each_call(rows)
                found |= {row: self.logits(sequence[: row.position + 1], source)[-1].numpy() for row in last}
        return found

    def _rows(self, ids: Ids, source: Ids | None, positions: list[int]) -> torch.Tensor:
        """The logits of some positions, (len(positions), vocab)."""
        if len(ids) >= LONG and self._head is not None:
            with only_rows(self._head, positions, len(ids)):
                kept = self.logits(ids, source)
            if len(kept) == len(positions):
                return kept
        return self.logits(ids, source)[positions]

    @cached_property
    def _head(self) -> nn.Linear | None:
        ids, found = np.zeros(2, np.int64), torch.empty(0)

        def run() -> None:
            nonlocal found
            found = self.logits(ids, ids if self.source else None)

        run()
        return find_head(self.module, run, found.shape[-1])

    def greedy(self, prompt: Ids, count: int, source: Ids | None = None) -> Ids:
        """The next `count` tokens, each from a full pass over everything before it."""
        ids = prompt
        for _ in range(count):
            ids = np.append(ids, int(self.logits(ids, source)[-1].argmax()))
        return ids[len(prompt) :]


def longest_taken(takes: Callable[[int], bool], ceiling: int) -> int:
    """The longest sequence of at most `ceiling` tokens that a module takes: some count their positions by the ids.

    Raises CaptureError where it takes not even two.
    """
    low, high = 2, ceiling + 1
    if takes(ceiling):
        return ceiling
    if not takes(low):
        raise CaptureError("the module fails on texts of two tokens")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) else (low, middle)
    return low


def logits_of(output: Any, vocab: int | None = None) -> torch.Tensor:
    """The logits among what a module returns: named so, or the tensor, or the first one of several as wide as `vocab`.

    Where none is, the first floating-point one.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    leaves = [n for n in torch.utils._pytree.tree_leaves(output) if isinstance(n, torch.Tensor)]
    rows = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.dim() in (2, 3)]
    for leaf in (*(leaf for leaf in rows if leaf.shape[-1] == vocab), *rows):
        return leaf
    raise ProofError(f"the module returned {type(output).__name__} without logits")


def _last_of_each_call(rows: Sequence[Row]) -> list[Row]:
    """Of one sequence: a module that gives its last row alone can be compared there alone."""
    return list({row.call: row for row in rows}.values())
