"""An encoder: ids, or whatever else a module takes, into hidden states and every other output by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn

from tfinfer.errors import CaptureError, InputError
from tfinfer.manifest import EncoderRoles, Manifest
from tfinfer.proof import runs
from tfinfer.proof.prove import Verdict, open_session, prove_encoder
from tfinfer.proof.runs import Run

from ..capture import AttentionReport, Kind, Observed, capture_encoder
from ..capture.encoder import CapturedEncoder, parts_of
from ..capture.plain import InputSpec, translate
from ..verify import EncoderReference, expected_runs, observe, runs_of_ids
from .job import Asked, Progress

if TYPE_CHECKING:
    from ..sources.forms import EncoderForm

NAMES = {
    Kind.IDS: "input_ids",
    Kind.MASK: "attention_mask",
    Kind.PADDING: "attention_mask",
    Kind.TYPES: "token_type_ids",
}


class EncoderJob:
    """An export of an encoder over ids, every position of which may see every other."""

    def __init__(self, form: EncoderForm, asked: Asked, pad_id: int) -> None:
        self.form, self.pad_id = form, pad_id
        self.captured = self._capture(asked.max_length, asked.flavor)
        longest = _longest(form, self.captured.max_length, asked.max_length)
        if longest < self.captured.max_length:
            self.captured = self._capture(longest, asked.flavor)
        self.graphs: Mapping[str, ir.Model] = {"encoder": self.captured.model}
        self.attention, self.module_length = self.captured.attention, self.captured.module_length

    def _capture(self, max_length: int | None, flavor: str) -> CapturedEncoder:
        return capture_encoder(self.form.module, list(self.form.arguments), max_length=max_length, flavor=flavor)

    @property
    def inputs(self) -> set[str]:
        return {str(value.name) for value in self.captured.model.graph.inputs}

    def fields(self, dtype: str) -> dict[str, Any]:
        taken = {name: name if name in self.inputs else None for name in ("attention_mask", "token_type_ids")}
        roles = EncoderRoles(
            input_ids="input_ids",
            hidden_states=self.captured.hidden_states,
            pooled=self.captured.pooled,
            **taken,
        )
        lengths = {"vocab_size": self.captured.vocab_size, "max_length": self.captured.max_length}
        return {"kind": "encoder", "encoder": roles, **lengths, **NOTHING_CACHED}

    def expect(self, progress: Progress) -> list[Run]:
        reference = EncoderReference(self.form.module, self.form.arguments)
        outputs = [str(value.name) for value in self.captured.model.graph.outputs]
        sizes = (self.captured.vocab_size, self.captured.max_length, self.pad_id)
        return runs_of_ids(reference, outputs, self.inputs, *sizes, progress)

    def save(self, path: Path, expected: list[Run]) -> None:
        runs.save(path, expected)

    def verdict(
        self, manifest: Manifest, folder: Path, expected: list[Run], device: str, progress: Progress
    ) -> Verdict:
        return encoder_verdict(manifest, folder, expected, device, progress)

    def observe(self) -> Observed | None:
        return observe(self.captured.trace, self.captured.max_length)


def _longest(form: EncoderForm, ceiling: int, asked: int | None) -> int:
    """The longest text, at most `ceiling`, that the module takes. Raises InputError where more was asked for."""
    longest = EncoderReference(form.module, form.arguments).longest(ceiling)
    if asked is not None and longest < asked:
        raise InputError(f"the module takes at most {longest} tokens, not {asked}: give --max-length {longest} or less")
    return longest


class _ByName(nn.Module):
    """An encoder over ids under the names that every graph of ours has."""

    def __init__(self, form: EncoderForm) -> None:
        super().__init__()
        self.module, self.arguments = form.module, form.arguments

    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        named = {argument.name: given[NAMES[argument.kind]] for argument in self.arguments}
        for argument in self.arguments:
            if argument.kind is Kind.PADDING:
                named[argument.name] = attention_mask == 0
        return self.module(**named)


def plain_form(form: EncoderForm) -> tuple[nn.Module, list[InputSpec], EncoderRoles]:
    """An encoder as a module whose inputs have our names, those inputs, and their roles."""
    names = list(dict.fromkeys(NAMES[argument.kind] for argument in form.arguments))
    inputs = [InputSpec(name, torch.int64, ("batch", "seq")) for name in names]
    taken = {name: name if name in names else None for name in ("attention_mask", "token_type_ids")}
    return _ByName(form), inputs, EncoderRoles(input_ids="input_ids", **taken)


class PlainJob:
    """An export of a module as torch translates it, for what takes no ids or has an operation that is not followed."""

    def __init__(
        self, module: nn.Module, inputs: Sequence[InputSpec], why: str, roles: EncoderRoles, longest: int,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.module, self.inputs, self.longest, self.limit = module, tuple(inputs), longest, limit
        self.model = translate(module, inputs)
        self.roles = replace(roles, **_parts_by_shape(self.model)) if roles.input_ids else roles
        self.graphs: Mapping[str, ir.Model] = {"encoder": self.model}
        self.attention = [AttentionReport("torch's own translation", "as written", why)] if why else []
        self.module_length: int | None = None

    def fields(self, dtype: str) -> dict[str, Any]:
        lengths = {"vocab_size": 0, "max_length": self.longest}
        return {"kind": "encoder", "encoder": self.roles, **lengths, **NOTHING_CACHED}

    def expect(self, progress: Progress) -> list[Run]:
        return expected_runs(self.module, self.inputs, self.model, self.limit, progress)

    def save(self, path: Path, expected: list[Run]) -> None:
        runs.save(path, expected)

    def verdict(
        self, manifest: Manifest, folder: Path, expected: list[Run], device: str, progress: Progress
    ) -> Verdict:
        return encoder_verdict(manifest, folder, expected, device, progress)

    def observe(self) -> Observed | None:
        return None


class TranslatedJob(PlainJob):
    """An export of an encoder over ids as torch translates it, proved as one that is followed."""

    def __init__(self, form: EncoderForm, asked: int | None, longest: int, why: str, pad_id: int) -> None:
        module, inputs, roles = plain_form(form)
        super().__init__(module, inputs, why, roles, asked or longest)
        self.form, self.pad_id = form, pad_id
        self.longest = _longest(form, self.longest, asked)
        self.vocab_size = _words(self.model)

    def fields(self, dtype: str) -> dict[str, Any]:
        return super().fields(dtype) | {"vocab_size": self.vocab_size}

    def expect(self, progress: Progress) -> list[Run]:
        reference = EncoderReference(self.form.module, self.form.arguments)
        outputs = [str(value.name) for value in self.model.graph.outputs]
        takes = {str(value.name) for value in self.model.graph.inputs}
        return runs_of_ids(reference, outputs, takes, self.vocab_size, self.longest, self.pad_id, progress)


def _words(model: ir.Model) -> int:
    """How many rows the table has in which a graph looks its ids up. Raises CaptureError where there is none."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    tables = [node.inputs[0] for node in ids.consumers() if node.op_type == "Gather" and node.inputs[1] is ids]
    rows = [table.const_value.shape[0] for table in tables if table is not None and table.const_value is not None]
    if not rows:
        raise CaptureError("the ids are looked up in no table of weights, so that none says which ids there are")
    return min(count for count in rows if isinstance(count, int))


def _parts_by_shape(model: ir.Model) -> dict[str, str | None]:
    """The outputs of a translated encoder that are hidden states, and a vector of the whole text."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for value in model.graph.outputs:
        assert value.shape is not None
        shapes[str(value.name)] = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    hidden, pooled = parts_of(shapes)
    return {"hidden_states": hidden, "pooled": pooled}


NOTHING_CACHED: dict[str, Any] = {"roles": None, "cache": (), "num_logits": 0, "all_rows": True}


def encoder_verdict(manifest: Manifest, folder: Path, expected: list[Run], device: str, progress: Progress) -> Verdict:
    session = open_session(manifest, folder, device=device)
    try:
        return prove_encoder(session, manifest.dtype, expected, lambda run: progress(f"proof: {run}"))
    finally:
        session.close()
