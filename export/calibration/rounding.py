"""Every matrix of a graph rounded for the inputs that it gets on text."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from tfinfer.manifest import Manifest

from ..passes.blocks import Blocks
from ..passes.gptq import rounded
from ..passes.quantise import Made, Narrow, Recipe, narrow
from .hessians import Inputs, inputs_of
from .samples import Ids


def round_for_inputs(
    manifest: Manifest, folder: Path, model: ir.Model, recipe: Recipe, pieces: Sequence[Ids]
) -> Made:  # fmt: skip
    """What matrices of `model`, the float32 graph that lies in `folder`, become; `quantise.run` takes it."""
    left = narrow(model, recipe)
    widths = {name: matrix.k for matrix in left for name in matrix.inputs}
    made: Made = {}
    known: dict[str, Inputs] = {}
    for found in inputs_of(manifest, folder, widths, pieces):
        known |= found
        ready = [matrix for matrix in left if known.keys() >= set(matrix.inputs)]
        made |= {matrix.key: _rounded(matrix, known, recipe) for matrix in ready}
        left = [matrix for matrix in left if matrix.key not in made]
        wanted = {name for matrix in left for name in matrix.inputs}
        known = {name: inputs for name, inputs in known.items() if name in wanted}
    return made


def _rounded(matrix: Narrow, known: Mapping[str, Inputs], recipe: Recipe) -> Blocks:
    inputs = functools.reduce(operator.add, (known[name] for name in matrix.inputs))
    given = recipe.of_product(matrix.k)
    return rounded(matrix.matrix(), inputs.hessian, inputs.count, *given, symmetric=recipe.symmetric)
