"""What a call of `generate` or `stream` asks for, checked before anything runs. Knows no graph and no text."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict

from tfinfer.errors import InputError
from tfinfer.manifest import Manifest
from tfinfer.tokens.generate import Limits
from tfinfer.tokens.hypotheses import BeamParams
from tfinfer.tokens.sampling import SamplingParams
from tfinfer.tokens.stop import stop_strings

if TYPE_CHECKING:
    from tfinfer.generating import GeneratingModel

SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
BEAMS = tuple(field.name for field in dataclasses.fields(BeamParams))
DRAWN = ("temperature", "top_k", "top_p", "min_p", "seed")  # what a beam search, which draws nothing, has no use for


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt, with the defaults that `GeneratingModel.generate` names."""

    max_tokens: Required[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    logprobs: int
    cancel: threading.Event | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return_sequences: int
    reuse_prefix: bool
    lookup: bool
    draft: GeneratingModel | None


@dataclass(frozen=True)
class Settings:
    """The options of a call, checked. `params` forbids the ids that the model suppresses.

    draft: the model that drafts; whether it can is `speculation.check`'s to say.
    """

    params: SamplingParams
    beams: BeamParams
    limits: Limits
    stop: tuple[str, ...]
    cancel: threading.Event | None
    reuse_prefix: bool = True
    lookup: bool = False
    draft: GeneratingModel | None = None

    @property
    def speculates(self) -> bool:
        """Whether tokens are drafted."""
        return self.lookup or self.draft is not None

    @property
    def searches(self) -> bool:
        """Whether it is a beam search."""
        return self.beams.num_beams > 1


@dataclass(frozen=True)
class Request:
    """A checked call.

    prompts: ids that the decoder continues. sources: of an encoder-decoder, ids that the encoder takes, one for each.
    capacity: the longest sequence that may come of it.
    """

    settings: Settings
    prompts: list[list[int]]
    sources: list[list[int]]
    capacity: int

    @property
    def given(self) -> list[list[int]]:
        """The ids of what the caller gave."""
        return self.sources or self.prompts

    @property
    def shown(self) -> list[list[int]]:
        """The ids that the text of each completion goes on from; of a target there are none."""
        return [[] for _ in self.sources] or self.prompts

    @property
    def slots(self) -> int:
        return len(self.prompts) * self.settings.beams.num_beams

    @property
    def source_capacity(self) -> int:
        """The longest source, 0 where there is none."""
        return max(map(len, self.sources), default=0)


def read_settings(options: Mapping[str, Any], manifest: Manifest) -> Settings:
    """Check the options of a call for a model. Raises InputError."""
    if unknown := sorted(set(options) - Options.__annotations__.keys()):
        raise InputError(f"unknown option {', '.join(unknown)}; there are {', '.join(Options.__annotations__)}")
    if "max_tokens" not in options:
        raise InputError("max_tokens is required: the most tokens to generate")
    params = SamplingParams(**{name: options[name] for name in SAMPLING if name in options})
    params.check_vocab(manifest.num_logits)
    ids, stop_ids = manifest.token_ids, options.get("stop_ids")
    ends = ids.eos if stop_ids is None else tuple(int(i) for i in stop_ids)
    limits = Limits(options["max_tokens"], frozenset(ends), options.get("logprobs", 0), ids.forced_eos)
    stop = stop_strings(options.get("stop"))
    beams = BeamParams(**{"num_beams": 1, **{name: options[name] for name in BEAMS if name in options}})
    lookup, draft = options.get("lookup", False), options.get("draft")
    if not isinstance(lookup, bool):
        raise InputError(f"lookup: expected True or False, got {lookup!r}")
    _check_beams(beams, params, limits, stop)
    if lookup and draft is not None:
        raise InputError("lookup and draft: both propose tokens: give one of them")
    if beams.num_beams > 1 and (lookup or draft is not None):
        asked, count = "lookup" if lookup else "draft", beams.num_beams
        raise InputError(f"{asked}: not for a beam search: leave it out, or give num_beams=1 instead of {count}")
    suppressed = [i for i in ids.suppressed if 0 <= i < manifest.num_logits]
    reuse = options.get("reuse_prefix", True)
    if not isinstance(reuse, bool):
        raise InputError(f"expected reuse_prefix to be True or False, got {reuse!r}")
    cancel = options.get("cancel")
    return Settings(_without(params, suppressed), beams, limits, stop, cancel, reuse, lookup, draft)


def _check_beams(beams: BeamParams, params: SamplingParams, limits: Limits, stop: tuple[str, ...]) -> None:
    """What was asked for goes together."""
    if beams.num_beams == 1:
        if changed := _changed(beams, BeamParams(1), BEAMS):
            raise InputError(f"{', '.join(changed)}: for a beam search only: give num_beams above 1 as well")
        return
    asked = _changed(params, SamplingParams(), DRAWN)
    asked += ["stop"] * bool(stop) + ["logprobs"] * bool(limits.logprobs)
    if asked:
        raise InputError(
            f"{', '.join(asked)}: not for a beam search, which draws nothing, ends at stop ids alone and reports its "
            f"score: leave it out, or give num_beams=1 instead of {beams.num_beams}"
        )


def _changed(given: object, default: object, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(given, name) != getattr(default, name)]


def _without(params: SamplingParams, suppressed: Sequence[int]) -> SamplingParams:
    """Parameters that never choose these ids, whatever bias was asked for."""
    if not suppressed:
        return params
    return dataclasses.replace(params, logit_bias={**(params.logit_bias or {}), **dict.fromkeys(suppressed, -math.inf)})
