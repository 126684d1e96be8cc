"""Whether a model can speculate as a call asks for, and what drafts for each of its prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tfinfer.errors import ClosedError, InputError
from tfinfer.manifest import Manifest
from tfinfer.model import Model
from tfinfer.request import Request, Settings
from tfinfer.tokens.draft import ModelDraft, Own, Shared
from tfinfer.tokens.lookup import Lookup
from tfinfer.tokens.speculate import Drafter, Speculating
from tfinfer.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tfinfer.generating import GeneratingModel

# Texts that tokenizers of different models split differently.
SAMPLES = (
    "The quick brown fox, 1234567 times.",
    "  def f(x):\n\treturn x**2 != 3\n",
    "Größe naïve — 你好 🙂 <|endoftext|></s>",
)


def check(model: GeneratingModel, settings: Settings) -> None:
    """Raises InputError where the model cannot check drafts, or another one cannot draft for it."""
    if not settings.speculates:
        return
    asked = "lookup" if settings.lookup else "draft"
    if not model.manifest.all_rows:
        raise InputError(
            f"{asked}: this model gives the logits of the last position alone, so drafts cannot be checked in one "
            "pass: leave it out, or export a module that gives the logits of all positions"
        )
    if model.manifest.appends_one:
        raise InputError(
            f"{asked}: this folder's graph continues a cache by one position at a time, so drafts cannot be checked in "
            "one pass: leave it out"
        )
    if settings.draft is not None:
        _check_draft(model, settings.draft)


def _check_draft(model: GeneratingModel, draft: object) -> None:
    if not isinstance(draft, Model):
        raise InputError(f"draft: expected a model that tfinfer.load opened, got {type(draft).__name__}")
    for what, manifest in (("draft", draft.manifest), ("draft: it drafts for decoders; this model", model.manifest)):
        if manifest.kind != "decoder":
            raise InputError(f"{what}: expected a decoder, got an {manifest.kind}: for this one use lookup, or neither")
    if draft._closed:
        raise ClosedError("draft: the model was closed: load it again")
    ours, theirs = model.manifest, draft.manifest
    if (ours.num_logits, ours.vocab_size) != (theirs.num_logits, theirs.vocab_size):
        raise InputError(
            f"draft: expected the vocabulary of this model, {_sizes(ours)}, got {_sizes(theirs)}: choose a smaller "
            "model of the same family"
        )
    if model.tokenizer and draft.tokenizer and not _same_tokens(model, draft, model.tokenizer, draft.tokenizer):
        raise InputError("draft: its tokenizer gives other ids than this model's: choose a model of the same family")


def _sizes(manifest: Manifest) -> str:
    return f"{manifest.vocab_size} ids in and {manifest.num_logits} out"


def _same_tokens(model: Model, draft: Model, ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Equal files, or equal ids for some texts and equal tokens for some ids."""
    files = [one.folder / str(one.manifest.text.tokenizer) for one in (model, draft)]
    if files[0].read_bytes() == files[1].read_bytes():
        return True
    ids = range(0, ours.vocab_size, max(1, ours.vocab_size // 64))
    return (
        ours.vocab_size == theirs.vocab_size
        and all(ours.encode(text) == theirs.encode(text) for text in SAMPLES)
        and all(ours.label(token) == theirs.label(token) for token in ids)
    )


@contextlib.contextmanager
def speculating(model: GeneratingModel, request: Request) -> Iterator[Speculating | None]:
    """The model's decoder, speculating, for one request; None where that was not asked for."""
    settings, manifest = request.settings, model.manifest
    if not settings.speculates:
        yield None
        return
    drafters: list[Drafter]
    if settings.draft is None:
        drafters = [Lookup(ids) for ids in _texts(request, manifest)]
    else:
        drafters = [_drafter(settings.draft, request, ids) for ids in request.prompts]
    most, has_states = settings.limits.max_tokens, bool(manifest.states)
    with contextlib.closing(Speculating(model.decoder, drafters, most, has_states=has_states)) as found:
        yield found


def _texts(request: Request, manifest: Manifest) -> list[list[int]]:
    """What is looked up in: prompts, behind their sources where these are of the same vocabulary."""
    if not request.sources or manifest.source_vocab_size != manifest.num_logits:
        return request.prompts
    return [source + start for source, start in zip(request.sources, request.prompts)]


def _drafter(draft: GeneratingModel, request: Request, ids: list[int]) -> ModelDraft:
    params, manifest = request.settings.params, draft.manifest
    # With a seed a draft draws what the loop will draw, so that the text is that of the plain loop; without one it
    # draws by itself, of which more is accepted.
    draws = Own() if params.temperature and params.seed is None else Shared(params.seed)
    return ModelDraft(
        draft.decoder, ids, params, draws, manifest.num_logits, capacity=request.capacity,
        max_length=manifest.max_length, has_states=bool(manifest.states),
    )  # fmt: skip
