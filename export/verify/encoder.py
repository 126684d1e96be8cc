"""What an encoder computes for the runs of its proof: each text alone, so that padding is proved to change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from tfinfer.errors import InputError, ProofError
from tfinfer.proof.runs import Run, thinned

from ..capture.modes import inference_mode_of
from ..capture.outputs import tensors_of
from ..capture.plain import RANGES, InputSpec
from ..capture.trace import Argument, Kind
from .reference import longest_taken

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
# Sizes of named axes for the runs of a module that takes something else than ids; none of them was traced.
SIZES = ((1, 48, 64, 40), (2, 64, 33, 57), (4, 40, 80, 32))


@dataclass(frozen=True)
class EncoderReference:
    """Full passes of an encoder over ids."""

    module: nn.Module
    arguments: Sequence[Argument]

    def outputs(self, ids: Array, types: Array) -> dict[str, torch.Tensor]:
        """ids, types: (seq,) -> every output, (1, ...) each, of one text without padding."""
        row = torch.from_numpy(ids)[None]
        return self._run(row, torch.ones_like(row), torch.from_numpy(types)[None])

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {Kind.IDS: ids, Kind.TYPES: types, Kind.MASK: mask, Kind.PADDING: mask == 0}
        with inference_mode_of(self.module):
            return tensors_of(self.module(**{a.name: given[a.kind] for a in self.arguments}))

    def minds_padding(self, pad_id: int) -> bool:
        """Whether the module's own results for a text change with padding behind it, which its mask tells."""
        ids = torch.tensor([[1, 1, 1, pad_id, pad_id]])
        mask = torch.tensor([[1, 1, 1, 0, 0]])
        padded = self._run(ids, mask, torch.zeros_like(ids))
        alone = self._run(ids[:, :3], mask[:, :3], torch.zeros_like(ids[:, :3]))
        for one, other in zip(alone.values(), padded.values()):
            kept = other[:, :3] if other.dim() > 1 and other.shape[1] != one.shape[1] else other
            if one.is_floating_point() and not torch.allclose(one, kept, atol=1e-4, rtol=1e-4):
                return True
        return False

    def longest(self, ceiling: int) -> int:
        """The longest text of at most `ceiling` tokens that the module itself takes: some count positions by the ids.

        Raises CaptureError where it takes not even two.
        """
        return longest_taken(self._takes, ceiling)

    def _takes(self, length: int) -> bool:
        ids = torch.arange(2)[:, None].expand(2, length)  # one of the two may be padding, which may count for nothing
        try:
            self._run(ids, torch.ones_like(ids), torch.zeros_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True


def runs_of_ids(
    reference: EncoderReference,
    outputs: Sequence[str],
    takes: Collection[str],
    vocab_size: int,
    max_length: int,
    pad_id: int,
    progress: Progress,
) -> list[Run]:
    """Texts of many lengths, alone and together; `takes` are the inputs of the graph."""
    rng = np.random.default_rng(0)
    ragged = "attention_mask" in takes
    found = []
    for name, lengths in _cases(max_length, ragged):
        progress(f"proof: PyTorch, {name}")
        rows = [rng.integers(0, vocab_size, n) for n in lengths]
        types = [(np.arange(n) >= max(1, n // 2)).astype(np.int64) for n in lengths]
        inputs = {"input_ids": _padded(rows, pad_id)}
        if ragged:
            inputs["attention_mask"] = _padded([np.ones(n, np.int64) for n in lengths], 0)
        if "token_type_ids" in takes:
            inputs["token_type_ids"] = _padded(types, 0)
        if "token_type_ids" not in takes:
            types = [np.zeros(n, np.int64) for n in lengths]
        alone = [reference.outputs(row, own) for row, own in zip(rows, types)]
        found.append(Run(name, inputs, {name: _together(alone, i, max(lengths)) for i, name in enumerate(outputs)}))
    return found


def _cases(max_length: int, ragged: bool) -> Iterator[tuple[str, list[int]]]:
    cases = [
        ("one token", [1]),
        ("a text", [29]),
        ("three texts of one length", [12, 12, 12]),
    ]
    if ragged:
        cases += [("three texts of different lengths", [17, 2, 9]), ("a long text beside a token", [60, 1])]
    cases.append(("the longest length", [max_length]))
    for name, lengths in cases:
        yield name, [min(n, max_length) for n in lengths]


def _padded(rows: Sequence[Array], value: int) -> Array:
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=value) for row in rows]).astype(np.int64)


def _together(alone: Sequence[dict[str, torch.Tensor]], output: int, longest: int) -> Array:
    """One output of several texts as a batch gives it, with NaN at the padding; as many rows as a proof compares."""
    pieces = [list(outputs.values())[output][0].float().numpy() for outputs in alone]
    if len({piece.shape for piece in pieces}) > 1:  # a vector of a text is as long for every text
        ends = [[(0, longest - len(piece)), *[(0, 0)] * (piece.ndim - 1)] for piece in pieces]
        pieces = [np.pad(piece, end, constant_values=np.nan) for piece, end in zip(pieces, ends)]
    stacked = np.stack(pieces)
    return thinned(stacked if stacked.ndim > 1 else stacked[:, None])


def expected_runs(
    module: nn.Module, inputs: Sequence[InputSpec], model: ir.Model, longest: int | None, progress: Progress
) -> list[Run]:
    """Batches of made-up inputs of many sizes, as the module computes them.

    longest: what no axis but the first may pass. Raises InputError where the module fails at a size.
    """
    names = [str(value.name) for value in model.graph.outputs]
    ranges = json.loads(model.metadata_props.get(RANGES, "{}"))
    found = []
    for number, sizes in enumerate(SIZES):
        progress(f"proof: PyTorch, sizes {number + 1} of {len(SIZES)}")
        axes = list(dict.fromkeys(axis for spec in inputs for axis in spec.shape if isinstance(axis, str)))
        known = {}
        for i, axis in enumerate(axes):
            limits = (sizes[i % len(sizes)], ranges.get(axis, [0, None])[1], longest if i else None)
            known[axis] = min(n for n in limits if n)
        given = {spec.name: _made_up(spec, known, number) for spec in inputs}
        told = ", ".join(f"{axis} {size}" for axis, size in known.items()) or "fixed sizes"
        try:
            with inference_mode_of(module):
                out = tensors_of(module(**{name: torch.from_numpy(array) for name, array in given.items()}))
        except Exception as error:
            raise InputError(
                f"the module fails with {told}: {type(error).__name__}: {str(error).splitlines()[0]}; "
                "give --max-length where its axes have a limit"
            ) from error
        if len(out) != len(names):
            raise ProofError(f"the module returns {len(out)} tensors, its graph {len(names)}")
        expected = {name: thinned(value.float().numpy()) for name, value in zip(names, out.values())}
        found.append(Run(told, given, expected))
    return found


def _made_up(spec: InputSpec, known: dict[str, int], seed: int) -> Array:
    shape = [known[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    rng = np.random.default_rng(seed)
    if spec.dtype.is_floating_point:
        return rng.normal(size=shape).astype(np.float32)
    return rng.integers(0, 2, shape).astype(str(spec.dtype).removeprefix("torch."))
