"""Weights of a few bits: what may be asked for, and the smallest ones that agree with the module as often as wanted."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tfinfer.errors import InputError
from tfinfer.manifest import PROMPT, Manifest
from tfinfer.precision import WeightsSpec
from tfinfer.proof.prove import Verdict

from . import graph_files
from .calibration import Calibration, CalibrationIds
from .calibration.rounding import round_for_inputs
from .passes import quantise
from .passes.quantise import Made, Recipe, weights_of
from .prompt import prompt_graph

# The head and the embedding keep 8 bits unless asked: a rounding there is a rounding of every token.
RECIPES = {"int8": Recipe(8, 8, 128), "int4": Recipe(4, 8, 128)}
BLOCK_SIZES = (32, 64, 128)
HEAD_BITS = (4, 8)
QUANTISERS = ("rtn", "gptq")
GROUPS = 24  # of neighbouring matrices, whose damage is measured together

Graphs = dict[str, ir.Model]
# Of graphs and what their manifest says of the weights: what they compute; True: by the short cases alone.
Prove = Callable[[Graphs, WeightsSpec, bool], Verdict]
Judge = Callable[[Recipe, bool], Verdict]  # of a recipe: what its graph computes; True: by the short cases alone


@dataclass(frozen=True)
class Small:
    """What a user asks of small weights beside their bits.

    block_size: numbers that share a scale, 32, 64 or 128; None: 128. symmetric: without zero points. keep: patterns
    of the names of weights that stay float32. agreement: the least share of first choices that must be PyTorch's, for
    which matrices are widened where that helps most. quantiser: "rtn" or "gptq"; None: gptq for
    4 bits, rtn for 8, where gptq gains next to nothing. head_bits: of the last product and of the embedding; None: 8.
    per_channel: products of 8 bits have a scale for each channel in place of blocks, for products of whole numbers:
    all of them with int8, the head with int4.
    """

    block_size: int | None = None
    symmetric: bool = True
    keep: tuple[str, ...] = ()
    agreement: float | None = None
    quantiser: str | None = None
    head_bits: int | None = None
    per_channel: bool = False

    def quantiser_of(self, dtype: str) -> str:
        return self.quantiser or ("gptq" if dtype == "int4" else "rtn")

    def recipe(self, dtype: str, weights: Sequence[tuple[str, ...]]) -> Recipe:
        """The recipe to begin with; weights: the names of each. Raises InputError for a pattern that fits none."""
        names = [name for several in weights for name in several]
        for pattern in self.keep:
            if not fnmatch.filter(names, pattern):
                raise InputError(f"keep: no weight is named {pattern!r}; there are {_some(names)}")
        base = RECIPES[dtype]
        size, head_bits = self.block_size or base.block_size, self.head_bits or base.head_bits
        return replace(
            base, head_bits=head_bits, block_size=size, symmetric=self.symmetric, per_channel=self.per_channel,
            keep=self.keep,
        )  # fmt: skip


def check(small: Small, dtype: str) -> None:
    """Raises InputError for values out of range, and for all of them where the weights are not to be small."""
    if small.block_size is not None and small.block_size not in BLOCK_SIZES:
        raise InputError(
            f"expected block_size to be one of {', '.join(map(str, BLOCK_SIZES))}, got {small.block_size!r}"
        )
    if small.agreement is not None and not 0 < small.agreement <= 1:
        raise InputError(f"expected keep_agreement to be above 0 and at most 1, got {small.agreement!r}")
    if small.quantiser not in (None, *QUANTISERS):
        raise InputError(f"unknown quantiser {small.quantiser!r}: expected one of {', '.join(QUANTISERS)}")
    if small.head_bits not in (None, *HEAD_BITS):
        raise InputError(f"expected head_bits to be one of {', '.join(map(str, HEAD_BITS))}, got {small.head_bits!r}")
    if small != Small() and dtype not in RECIPES:
        raise InputError(
            "block sizes, scales by channel, bits of the head, zero points, kept weights, agreements and quantisers "
            f"are for weights of a few bits: give the dtype int8 or int4, not {dtype}"
        )
    # A head is rounded no more coarsely than all the rest is: what it loses reaches every token.
    if small.head_bits is not None and small.head_bits < RECIPES[dtype].bits:
        raise InputError(
            f"expected head_bits to be 8 with the dtype {dtype}, got {small.head_bits}: give the dtype int4 for a head "
            "of 4 bits, or leave head_bits out"
        )
    if small.per_channel and small.head_bits == 4:
        raise InputError(
            "a scale for each channel is for products of 8 bits, and with int4 and head_bits 4 there are none: leave "
            "out either per_channel or head_bits"
        )
    if small.per_channel and not small.symmetric:
        raise InputError("a scale for each channel has no zero point: leave out either per_channel or asymmetric")


def check_calibrates(small: Small, dtype: str) -> None:
    """Raises InputError where the weights have no use for a text."""
    if dtype not in RECIPES:
        raise InputError(
            "a calibration text is for weights of 4 bits and for an int8 cache: give the dtype int4 or the cache int8, "
            f"or leave the text out of an export in {dtype}"
        )
    if small.quantiser_of(dtype) == "rtn":
        why = "was asked for" if small.quantiser else f"is what {dtype} takes by itself"
        raise InputError(
            f"a calibration text is for the quantiser gptq, but rtn {why}: give quantiser gptq or an int8 cache, or "
            "leave the text out"
        )


class Shrinking:
    """The graphs of a folder with weights of a few bits, written and proved as often as recipes are tried.

    Raises InputError for names that no weight has, before anything is computed.
    """

    def __init__(
        self, graphs: Mapping[str, ir.Model], folder: Path, small: Small, dtype: str, reads_prompts: bool = True
    ) -> None:
        self.whole, self.folder, self.small = graphs, folder, small
        self.reads_prompts = reads_prompts  # whether to add the graph that reads prompts by products in float32
        self.quantiser = small.quantiser_of(dtype)
        self.ids: CalibrationIds | None = None
        self._weights = [names for model in graphs.values() for names in weights_of(model)]
        self._recipe = small.recipe(dtype, self._weights)
        self._made: Made = {}
        self._written: tuple[Recipe, Verdict] | None = None  # of the last recipe that was judged by all cases
        self.graphs: Graphs = {}  # those of the last recipe
        self.spec: WeightsSpec | None = None

    def calibrate(self, manifest: Manifest, calibration: Calibration) -> None:
        """Round the matrices for their inputs; in the folder lie the float32 graphs, and `manifest` is theirs."""
        self.ids = calibration.ids(manifest, self.folder)
        self._made |= round_for_inputs(manifest, self.folder, self.whole["decoder"], self._recipe, self.ids.pieces)

    def run(self, prove: Prove) -> Verdict:
        """Leave in the folder what was asked for; what it computes."""

        def judge(recipe: Recipe, brief: bool) -> Verdict:
            return self._judge(recipe, brief, prove)

        recipe = self._recipe
        if self.small.agreement is not None:
            recipe = narrowest(recipe, [names[0] for names in self._weights], self.small.agreement, judge)
        if self._written is not None and self._written[0] == recipe:
            return self._written[1]
        return judge(recipe, False)

    def _judge(self, recipe: Recipe, brief: bool, prove: Prove) -> Verdict:
        """Write the graphs by a recipe and prove them."""
        self.graphs = {name: model.clone() for name, model in self.whole.items()}
        count = sum(quantise.run(model, recipe, self._made) for model in self.graphs.values())
        if self.reads_prompts and (model := prompt_graph(self.graphs["decoder"])) is not None:
            self.graphs[PROMPT] = model
        (self.folder / graph_files.WEIGHTS).unlink()
        graph_files.save(self.graphs, self.folder)
        self.spec = WeightsSpec(
            recipe.bits, recipe.head_bits, recipe.block_size, recipe.symmetric, count,
            per_channel=recipe.per_channel, wider=len(set(recipe.wider) - set(recipe.keep)),
            kept=sum(len(weights_of(self.graphs[name])) for name in self.whole),
            quantiser=self.quantiser, calibration=self.ids.origin if self.ids else None,
            calibration_tokens=self.ids.tokens if self.ids else 0,
        )  # fmt: skip
        verdict = prove(self.graphs, self.spec, brief)
        self.spec = replace(self.spec, agreement=round(verdict.agreement, 4))
        self._written = None if brief else (recipe, verdict)
        return verdict


def narrowest(recipe: Recipe, names: Sequence[str], wanted: float, judge: Judge) -> Recipe:
    """The recipe that widens as few matrices as needed for an agreement of `wanted`.

    Groups of neighbouring matrices are widened one at a time and judged by the short cases: those that gain most come
    first, to blocks of 8 bits and then to their own width. How many of these steps are needed is found by halving,
    each judged by all cases.
    """
    if judge(recipe, False).agreement >= wanted:
        return recipe
    steps = _steps(recipe, names, judge)
    # `low` steps are too few; with all of them the graph is the float32 one, which was proved.
    low, high = 0, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        if judge(_widened(recipe, steps[:middle]), False).agreement >= wanted:
            high = middle
        else:
            low = middle
    return _widened(recipe, steps[:high])


def _steps(recipe: Recipe, names: Sequence[str], judge: Judge) -> list[tuple[str, tuple[str, ...]]]:
    """What may be widened, and how, in the order of what it gains: all to blocks of 8 bits first, if they have less."""
    groups = [tuple(map(str, part)) for part in np.array_split(np.array(names), min(GROUPS, len(names)))]

    def loss(how: str, group: tuple[str, ...]) -> tuple[float, float]:
        verdict = judge(_widened(recipe, [(how, group)]), True)
        return -verdict.agreement, sum(case.worst for case in verdict.cases)

    ways = ("wider", "keep") if recipe.bits < 8 or recipe.per_channel else ("keep",)
    order = {group: loss(ways[0], group) for group in groups}
    groups.sort(key=order.__getitem__)
    return [(how, group) for how in ways for group in groups]


def _widened(recipe: Recipe, steps: Sequence[tuple[str, tuple[str, ...]]]) -> Recipe:
    names = {how: tuple(name for way, group in steps if way == how for name in group) for how in ("wider", "keep")}
    return replace(recipe, wider=recipe.wider + names["wider"], keep=recipe.keep + names["keep"])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
