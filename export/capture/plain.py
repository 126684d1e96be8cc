"""A whole module into ONNX by torch's own exporter, for what is no transformer over ids. Knows no architecture.

torch would unroll a recurrent layer, or make a loop of it; here it becomes the ONNX operator of its kind.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import DeduplicateInitializersPass
from onnxscript.optimizer import fold_constants
from torch import nn
from torch.export import Dim

from tfinfer.errors import CaptureError, InputError

from .modes import inference_mode_of
from .recurrent import GATES, operators_for_recurrent_layers
from .tracing import explain

# Computed as fast as 22 to 24 and by every onnxruntime since 1.18: an Attention of 23 would need 1.28.
OPSET = 21
FLOATS = ("float32", "float64", "float16", "bfloat16")
DTYPES = {name: getattr(torch, name) for name in (*FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool")}
EXPECTED = 'expected name:dtype[axis,...] like "pixels:float32[batch,3,height,width]", every axis a size or a name'
# In a model's metadata: the least and the greatest size of every named axis that the traced path is right for, as JSON.
# Least is never below 2, and at times one too great, because torch takes axes of 1 for special; they work all the same.
RANGES = "tfinfer.ranges"
# Above 1 and all different, as torch.export wants them. Long axes are divisible by what patches and strides divide them
# by, and still longer than 1 afterwards; where that is longer than a module allows, short ones are tried.
LEADING, LONG, SHORT = (3, 5, 7, 9, 15), (96, 160, 224, 352, 416), (11, 13, 17, 19, 23)


@dataclass(frozen=True)
class InputSpec:
    """One input of a module; an axis is a size or a name, and equal names are one size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


def parse_input(text: str) -> InputSpec:
    """Read `name:dtype[axis,...]`; `name:dtype[]` is a scalar. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*(\w+)\s*:\s*(\w+)\s*\[(.*)\]\s*", text, re.ASCII)
    if match is None or not match[1].isidentifier():
        raise InputError(f"{EXPECTED}; got {text!r}")
    name, dtype, inside = match.groups()
    if dtype not in DTYPES:
        raise InputError(f"expected the type of {name} to be one of {', '.join(DTYPES)}; got {dtype!r}")
    axes = [axis.strip() for axis in inside.split(",")] if inside.strip() else []
    for axis in axes:
        if not re.fullmatch(r"[1-9][0-9]{0,8}|[A-Za-z_]\w*", axis, re.ASCII):
            raise InputError(f"{EXPECTED}; got the axis {axis!r} in {text!r}")
    return InputSpec(name, DTYPES[dtype], tuple(int(axis) if axis.isdecimal() else axis for axis in axes))


def translate(
    module: nn.Module,
    inputs: Sequence[InputSpec],
    sample: Mapping[str, torch.Tensor] | None = None,
    outputs: Sequence[str] | None = None,
) -> ir.Model:
    """Translate `module(*inputs)` as it stands; by keyword where its forward has a parameter of every input's name.

    Args:
        inputs: what becomes the graph's inputs, names and axes included.
        sample: tensors to trace with, where sizes or values matter; others are made up (integers are 0 and 1).
        outputs: names for the graph's outputs; else the keys of a dict or dataclass, `output_0`... or `output`.

    Raises InputError for inputs or a sample that contradict each other, CaptureError where torch.export or torch.onnx
    refuses the module, an axis with a name is pinned to a size, or a sequence is packed.
    """
    flat, sample, failures = _Flat(module, inputs), sample or {}, []
    for sizes in _sizes(inputs, sample):
        try:
            program = _export(flat, _arguments(inputs, sizes, sample))
            model = _to_onnx(program, flat, outputs)
            _name_axes(model, inputs, program.range_constraints)
            return model
        except CaptureError as error:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "fixed sizes"
            failures.append(CaptureError(f"{error} (traced with {told}; give a sample to trace with other sizes)"))
            failures[-1].__cause__ = error.__cause__ or error
    raise failures[0]


class _Flat(nn.Module):
    """A module whose outputs are a tuple of tensors, each with a name."""

    def __init__(self, module: nn.Module, inputs: Sequence[InputSpec]) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs
        names: list[str] = []
        self.names = lambda: names  # behind a function: torch.export takes back what an attribute is given meanwhile
        parameters = inspect.signature(module.forward).parameters.values()
        known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._by_keyword = known >= {spec.name for spec in inputs}

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes: dict[str, Any] = {}
        for spec, tensor in zip(self.inputs, tensors):
            for axis, size in zip(spec.shape, tensor.shape):
                if isinstance(axis, str):
                    torch._check(size == sizes.setdefault(axis, size))
        named = {spec.name: tensor for spec, tensor in zip(self.inputs, tensors)}
        found = list(_flatten(self.module(**named) if self._by_keyword else self.module(*tensors), ""))
        self.names()[:] = [name for name, _ in found]
        return tuple(tensor.clone() for _, tensor in found)  # an input, or one tensor twice, may be an output too


def _flatten(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an output with their names; what is None is none."""
    if isinstance(value, torch.Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name}_{key}" if name else str(key))
    elif dataclasses.is_dataclass(value):
        yield from _flatten({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, name)
    elif isinstance(value, (tuple, list)):
        named = value._asdict() if hasattr(value, "_asdict") else None
        yield from _flatten(named or {f"{'' if name else 'output_'}{i}": item for i, item in enumerate(value)}, name)
    elif value is not None:
        raise CaptureError(f"expected every output to be a tensor; got {type(value).__name__} for {name or 'output'}")


# -- tracing --------------------------------------------------------------------------------------------------------
def _sizes(inputs: Sequence[InputSpec], sample: Mapping[str, torch.Tensor]) -> list[dict[str, int]]:
    """The sizes of the named axes, in the order to try them; those of a sample are its own."""
    names = [spec.name for spec in inputs]
    if not names or len(set(names)) < len(names) or not set(sample) <= set(names):
        raise InputError(f"expected inputs of different names, and samples of those; got {names} and {list(sample)}")
    given: dict[str, int] = {}
    for spec in inputs:
        if spec.name in sample:
            _measure(spec, sample[spec.name], given)
    axes = dict.fromkeys(axis for spec in inputs for axis in spec.shape if isinstance(axis, str))
    leading = {spec.shape[0] for spec in inputs if spec.shape}
    taken = {*given.values(), *(axis for spec in inputs for axis in spec.shape if isinstance(axis, int))}
    tries = []
    for ladder in (LONG, SHORT):
        first, others = ((size for size in sizes if size not in taken) for sizes in (LEADING, ladder))
        sizes = {axis: given.get(axis) or next(first if axis in leading else others, 0) for axis in axes}
        if not all(sizes.values()):
            raise InputError(f"expected at most {len(LONG) - 1} named axes without a sample; got {', '.join(axes)}")
        if sizes not in tries:
            tries.append(sizes)
    return tries


def _measure(spec: InputSpec, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    """Note the sizes of a sample's named axes; raises InputError where it is not what was declared."""
    fits = tensor.dtype == spec.dtype and tensor.dim() == len(spec.shape)
    for axis, size in zip(spec.shape, tensor.shape):
        fits = fits and (size == axis if isinstance(axis, int) else size > 1 and sizes.setdefault(axis, size) == size)
    if not fits:
        raise InputError(
            f"the sample of {spec.name}: expected {spec.dtype} {spec.shape}, each name one size of at least 2; "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _arguments(
    inputs: Sequence[InputSpec], sizes: Mapping[str, int], sample: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The tensors to trace with; integers are 0 and 1, which are ids of every table."""
    made, generator = [], torch.Generator().manual_seed(0)
    for spec in inputs:
        noise = torch.rand([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], generator=generator)
        made.append(sample.get(spec.name, (noise if spec.dtype.is_floating_point else noise.round()).to(spec.dtype)))
    return tuple(made)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what torch prints, warns of and logs on the way: its errors say what is needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _export(flat: _Flat, arguments: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """Trace; AUTO and not DYNAMIC, which would name a pinned axis by torch's own name for it."""
    axes = [{i: Dim.AUTO for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in flat.inputs]
    try:
        with _quiet(), inference_mode_of(flat), operators_for_recurrent_layers():
            return torch.export.export(flat, arguments, dynamic_shapes=(tuple(axes),))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"torch.export cannot capture the module: {explain(error)}") from error


# -- writing --------------------------------------------------------------------------------------------------------
def _fold_weights(model: ir.Model) -> None:
    """Compute what the weights of recurrent operators are made by: onnxscript folds only what is small by itself."""
    makers, waiting = set[ir.Node](), [v for node in model.graph if node.op_type in GATES for v in node.inputs[1:4]]
    if not waiting:
        return
    while waiting:
        maker = None if (value := waiting.pop()) is None else value.producer()
        if maker is not None and maker not in makers:
            makers.add(maker)
            waiting += maker.inputs
    fold_constants(model, should_fold=lambda node: node in makers, output_size_limit=1 << 40)
    DeduplicateInitializersPass(size_limit=1 << 40)(model)  # a layer that is called twice has one set of weights


def _to_onnx(program: torch.export.ExportedProgram, flat: _Flat, outputs: Sequence[str] | None) -> ir.Model:
    """The graph of a traced module."""
    names, inputs = list(flat.names() if outputs is None else outputs), [spec.name for spec in flat.inputs]
    if len(names) != len(flat.names()) or len({*names, *inputs}) < len(names) + len(inputs):
        raise InputError(f"expected {len(flat.names())} names of outputs, none twice and none an input's; got {names}")
    try:
        with _quiet():
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, input_names=inputs, output_names=names
            )
            assert made is not None
            _fold_weights(made.model)
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise CaptureError(f"torch.onnx cannot write the module: {str(root).strip().splitlines()[0][:400]}") from error
    return made.model


def _name_axes(model: ir.Model, inputs: Sequence[InputSpec], ranges: Mapping[Any, Any]) -> None:
    """Give every size its declared name and note its range; CaptureError where a named axis is one size only."""
    names: dict[str, str] = {}
    for spec, value in zip(inputs, model.graph.inputs, strict=True):
        assert value.shape is not None
        for axis, dim in zip(spec.shape, value.shape):
            if isinstance(axis, str) and str(dim).isdecimal():
                raise CaptureError(f"the axis {axis} of {spec.name} is pinned to {dim}: the module needs that size")
            if isinstance(axis, str):
                names.setdefault(str(dim), axis)
    bounds = {names[str(size)]: (int(r.lower), r.upper) for size, r in ranges.items() if str(size) in names}
    model.metadata_props[RANGES] = json.dumps(
        {axis: [least, int(most) if most.is_Integer else None] for axis, (least, most) in bounds.items()}
    )
    kept = {*model.graph.inputs, *model.graph.outputs}
    inner = [*model.graph.initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in inner:
        if value not in kept and value.name in {v.name for v in kept}:
            value.name = f"inner.{value.name}"
    for value in [*model.graph.inputs, *inner]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    d if isinstance(d, int) else re.sub(r"\w+", lambda m: names.get(m[0], m[0]), str(d))
                    for d in value.shape
                ]
            )
