"""What a decoder's forward needs beside the ids, told from its parameters' names and by trying.

Positions and masks are functions of the length: they are made inside, and the trace sees `module(input_ids)` alone.
What works is what runs, is finite and is causal by its numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tfinfer.errors import CaptureError

from ..capture.modes import inference_mode_of
from ..verify import find_leak
from ..verify.causality import moves_what_follows
from ..verify.reference import logits_of

TRIES = 400  # combinations, of which most fail at once
LENGTH = 7  # at which they are tried
DIFFERS = 0.05  # of the largest number: two ways to fill a parameter are two meanings


@dataclass(frozen=True)
class Given:
    """One way to fill a parameter: a function of the ids (batch, seq)."""

    told: str
    make: Callable[[torch.Tensor], Any]


def _constant(value: Any) -> Given:
    return Given(repr(value), lambda ids: value)


NONE = _constant(None)
POSITIONS = (
    Given("positions (batch, seq)", lambda ids: torch.arange(ids.shape[1]).expand(ids.shape[0], -1)),
    Given("positions (1, seq)", lambda ids: torch.arange(ids.shape[1])[None]),
    Given("positions (seq,)", lambda ids: torch.arange(ids.shape[1])),
)


def _lower(ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=dtype).tril()


def _upper(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)


def _added(ids: torch.Tensor) -> torch.Tensor:
    return torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)


SQUARES = (
    Given("a causal mask, True where it may look", lambda ids: _lower(ids, torch.bool)),
    Given("a causal mask, True where it may not look", _upper),
    Given("a causal mask of ones and zeros", lambda ids: _lower(ids, torch.int64)),
    Given("a causal mask of 1.0 and 0.0", lambda ids: _lower(ids, torch.float32)),
    Given("a causal mask to be added, of 0 and -inf", _added),
)


def _shaped(given: Given, shape: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Given:
    return Given(f"{given.told}, {shape}", lambda ids: change(given.make(ids), ids))


CAUSAL = (
    *(_shaped(square, "(seq, seq)", lambda mask, ids: mask) for square in SQUARES),
    *(_shaped(square, "(1, 1, seq, seq)", lambda mask, ids: mask[None, None]) for square in SQUARES),
    *(_shaped(square, "(batch, seq, seq)", lambda mask, ids: mask.expand(ids.shape[0], -1, -1)) for square in SQUARES),
    *(
        _shaped(square, "(batch, 1, seq, seq)", lambda mask, ids: mask.expand(ids.shape[0], 1, -1, -1))
        for square in SQUARES
    ),
)


def _ones(dtype: torch.dtype) -> Given:
    return Given(f"a mask of no padding, {dtype} ones (batch, seq)", lambda ids: torch.ones(ids.shape, dtype=dtype))


ONES = tuple(map(_ones, (torch.int64, torch.bool, torch.float32)))
NO_PADDING = Given("a mask of no padding, False (batch, seq)", lambda ids: torch.zeros(ids.shape, dtype=torch.bool))


class WithGiven(nn.Module):
    """A module as a function of its ids alone; what else it needs is made of their shape."""

    def __init__(self, module: nn.Module, ids: str | None, given: Mapping[str, Given], named: bool) -> None:
        super().__init__()
        self.training = module.training
        self.module, self.ids, self.given, self.named = module, ids, dict(given), named

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Return what the module returns for `input_ids` (batch, seq): its tensors, by name where they have names."""
        made = {name: given.make(input_ids) for name, given in self.given.items()}
        out = self.module(input_ids, **made) if self.ids is None else self.module(**{self.ids: input_ids}, **made)
        return _tensors_of(out) if self.named else out


def as_decoder(module: nn.Module) -> nn.Module:
    """A module as a function of ids alone; itself where it is one.

    Raises CaptureError where nothing that is a function of the length makes it run and be causal; the message names the
    parameters and shows a wrapper.
    """
    parameters = _parameters(module)
    if not parameters:
        return module
    ids = next((p for p in parameters if not _hints(p.name, "mask", "pos")), parameters[0])
    others = [p for p in parameters if p is not ids]
    options = {p.name: _constant(False) for p in others if p.name == "use_cache" and p.default not in (False, p.empty)}
    name = None if ids is parameters[0] else ids.name
    needed = [p for p in others if p.default is p.empty]
    plain = WithGiven(module, name, options, False)
    if needed:
        plain = _satisfied(module, name, options, needed)
    out = _run(plain, torch.zeros(2, LENGTH, dtype=torch.int64))
    strange = not isinstance(out, Exception) and not _is_known(out)
    if strange:
        return WithGiven(module, name, plain.given, True)
    return plain if needed or options or name else module


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        found = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _hints(name: str, *parts: str) -> bool:
    return any(part in name.lower() for part in parts)


def ways(parameter: inspect.Parameter) -> tuple[Given, ...]:
    """What to try for a parameter, the likeliest first."""
    name, kind = parameter.name, parameter.annotation
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    if kind == "bool":
        return (_constant(False), _constant(True))
    if kind == "int" or _hints(name, "start", "offset"):
        return (_constant(0),)
    if _hints(name, "pos"):
        flat = POSITIONS[::-1] if _hints(name, "cache") else POSITIONS
        return (*flat, NONE)
    if _hints(name, "past", "cache", "target", "label"):
        return (NONE,)
    if _hints(name, "pad"):
        return (NO_PADDING, *ONES, NONE, *CAUSAL)
    if name == "attention_mask":
        return (*ONES, NONE, *CAUSAL, NO_PADDING)
    if _hints(name, "mask"):
        return (NONE, *CAUSAL, *ONES, NO_PADDING)
    return (*POSITIONS, *CAUSAL, *ONES, NO_PADDING, NONE)


def _is_told(parameter: inspect.Parameter) -> bool:
    return len(ways(parameter)) <= 2 or _hints(parameter.name, "pos", "mask", "pad", "past", "cache")


def _satisfied(
    module: nn.Module, ids: str | None, options: Mapping[str, Given], needed: list[inspect.Parameter]
) -> WithGiven:
    """The first combination that works; of parameters whose names say nothing, the only one in its meaning."""
    found: list[tuple[WithGiven, torch.Tensor]] = []
    closest = ""
    for combination in itertools.islice(itertools.product(*map(ways, needed)), TRIES):
        given = {p.name: way for p, way in zip(needed, combination)}
        tried = WithGiven(module, ids, {**options, **given}, False)
        result = _result(tried)
        if isinstance(result, str):
            closest = max(closest, result, key=lambda text: "causal" in text)
            continue
        found.append((tried, result))
        if all(map(_is_told, needed)):
            break
    if not found:
        raise CaptureError(_unsatisfied(module, needed, closest))
    first, expected = found[0]
    for other, result in found[1:]:
        differs = (result - expected).abs().max() > DIFFERS * expected.abs().max()
        if differs and not _looked_up(first, other):
            raise CaptureError(_ambiguous(module, needed, first, other))
    return first


def _looked_up(first: WithGiven, other: WithGiven) -> bool:
    """Whether positions are taken for what differs, and the module looks something up with them: no mask is that."""
    differing = [name for name in first.given if first.given[name].told != other.given[name].told]
    for name in differing:
        way = first.given[name]
        if not any(way is known for known in POSITIONS):
            return False
        floating = {**first.given, name: _floating(way)}
        out = _run(WithGiven(first.module, first.ids, floating, False), torch.zeros(2, LENGTH, dtype=torch.int64))
        if not isinstance(out, Exception):
            return False
    return True


def _floating(way: Given) -> Given:
    return Given(way.told, lambda ids: way.make(ids).float())


def _result(tried: WithGiven) -> torch.Tensor | str:
    """The logits of some ids where the module runs, is finite and causal; else why not."""
    vocab = _vocabulary(tried)
    ids = torch.randint(vocab, (3, LENGTH - 2), generator=torch.Generator().manual_seed(0))
    out = _run(tried, ids)
    if isinstance(out, Exception):
        return f"{type(out).__name__}: {str(out).strip().splitlines()[0] if str(out).strip() else ''}"
    try:
        logits = logits_of(out)

        def forward(batch: torch.Tensor) -> torch.Tensor:
            with inference_mode_of(tried):
                return logits_of(tried(batch))

        if logits.dim() != 3 or logits.shape[:2] != ids.shape or not logits.isfinite().all():
            return "gives no finite logits (batch, seq, vocab)"
        if (leak := find_leak(forward, vocab, LENGTH)) is not None:
            return f"not causal: {leak}"
        here, later = moves_what_follows(forward, vocab)
    except Exception as error:  # whatever the user's code raises at another length
        return f"{type(error).__name__}: {error}"
    return logits if here and later else "no token moves what follows it"


def _vocabulary(module: nn.Module) -> int:
    """Ids that every table of the module has."""
    sizes = [part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)]
    return max(2, min(sizes, default=2))


def _run(module: nn.Module, ids: torch.Tensor) -> Any:
    with inference_mode_of(module):
        try:
            return module(ids)
        except Exception as error:
            return error


def _unsatisfied(module: nn.Module, needed: list[inspect.Parameter], closest: str) -> str:
    names = ", ".join(str(p) for p in needed)
    arguments = ", ".join(f"{p.name}=..." for p in needed)
    return (
        f"{type(module).__name__}: forward also needs {names}, and no positions and no masks make it run and be causal "
        f"({closest[:300]}): give each a default, or wrap the module: class Wrapped(nn.Module): "
        f"def forward(self, ids): return self.module(ids, {arguments})"
    )


def _ambiguous(module: nn.Module, needed: list[inspect.Parameter], first: WithGiven, other: WithGiven) -> str:
    differing = [p for p in needed if first.given[p.name].told != other.given[p.name].told]
    names = ", ".join(str(p) for p in differing)
    one, two = (", ".join(w.given[p.name].told for p in differing) for w in (first, other))
    return (
        f"{type(module).__name__}: forward also needs {names}, which runs with {one} and, to another result, "
        f"with {two}: call it positions or mask, or give it a default"
    )


def _is_known(out: Any) -> bool:
    """Whether torch.export takes an output as it is: tensors in tuples, lists, dicts and what is registered as such."""
    leaves = torch.utils._pytree.tree_leaves(out)
    return all(leaf is None or isinstance(leaf, (torch.Tensor, int, float, bool, str)) for leaf in leaves)


def _tensors_of(out: Any) -> Any:
    """The tensors among what a module returns: by name of a dataclass, dict or other object that has them."""
    if isinstance(out, (tuple, list)):
        return tuple(value for value in out if isinstance(value, torch.Tensor))
    if dataclasses.is_dataclass(out):
        items = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    else:
        items = dict(out) if isinstance(out, Mapping) else dict(vars(out))
    return {str(name): value for name, value in items.items() if isinstance(value, torch.Tensor)}
