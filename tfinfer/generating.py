"""A decoder or encoder-decoder with its tokenizer: text or ids in, completions out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from tfinfer import speculation
from tfinfer.batcher import Batcher
from tfinfer.completion import Chunk, Completion, Growing, Timings, Usage, telling
from tfinfer.conversation import Conversation, open_conversation
from tfinfer.errors import InputError, ManifestError
from tfinfer.manifest import FILE_NAME, Manifest
from tfinfer.model import Messages, Model, Prompt
from tfinfer.request import Options, Request, Settings, read_settings
from tfinfer.session.cache import Cache
from tfinfer.session.choose import open_decoder
from tfinfer.session.encoder_decoder import EncoderDecoder
from tfinfer.session.pool import CachePool
from tfinfer.session.prefix import Seats, seat
from tfinfer.tokens.beams import Penalties, beam_search
from tfinfer.tokens.generate import Batch, check_lengths
from tfinfer.tokens.hypotheses import Hypothesis
from tfinfer.tokens.sampling import choose
from tfinfer.tokens.speculate import Speculating
from tfinfer.tokens.text import RowText


class GeneratingModel(Model):
    """A model that generates. Every call has its own cache, lent by a small pool with what it still holds."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        cuda_graph: bool | None = False,
    ) -> None:
        super().__init__(manifest, folder)
        _check_token_ids(manifest)
        self.decoder = open_decoder(manifest, folder, device=device, threads=threads, cuda_graph=cuda_graph)
        self.device, self.threads, self.reason = self.decoder.device, self.decoder.threads, self.decoder.reason
        self._pool = CachePool(self.decoder.open_cache)

    def close(self) -> None:
        """Let graphs and caches go; later calls raise ClosedError."""
        with self._lock:
            self._closed = True
        self._pool.close()
        self.decoder.close()

    # -- caches -------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _lent(self, request: Request) -> Iterator[Cache]:
        """A cache for a request, given back however the request ends."""
        reuses = self._reuses(request)
        cache = self._pool.lend(request.slots, request.capacity, request.prompts if reuses else ())
        try:
            cache.leaves = reuses
            if request.sources:  # steps read all that there is room for, so there is no more than this request needs
                cache.lay_out_sources(request.source_capacity)
            yield cache
        except GeneratorExit:
            raise
        except BaseException:
            cache.close()  # what it holds may be half written, or not finite
            raise
        finally:
            if not cache.closed:
                self._pool.give_back(cache)

    def _reuses(self, request: Request) -> bool:
        """Whether what caches hold spares some of a request; a graph that appends one token at a time is slow at it."""
        return request.settings.reuse_prefix and not request.sources and not self.manifest.appends_one

    def _seats(self, request: Request, cache: Cache) -> Seats | None:
        """A slot for each prompt, with what it holds: a source, or a beginning; None for empty ones."""
        if request.sources:
            return self._encoded(request, cache)
        return seat(self.decoder, cache, request.prompts) if self._reuses(request) else None

    # -- requests -----------------------------------------------------------------------------------------------
    def _checked(self, ids: Sequence[int]) -> list[int]:
        """Ids that the model can take: of a source where there is one."""
        decoder = self.decoder
        check = decoder.check_source if isinstance(decoder, EncoderDecoder) else decoder.check_ids
        return [int(i) for i in check(ids)]

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        if isinstance(prompt, str) and not ids:
            raise InputError(f"the text {prompt!r} has no tokens: a prompt needs at least one")
        return self._checked(ids)

    def _given(self, prompt: Prompt | Sequence[Prompt] | Messages) -> tuple[list[list[int]], bool]:
        """Every prompt or source as ids, and whether there was just one."""
        if isinstance(prompt, str):
            return [self._ids(prompt)], True
        items: list[Any] = list(prompt)
        if items and isinstance(items[0], Mapping):
            text = self.render_chat(items)
            return [self._checked(self._need_tokenizer("a conversation").encode(text, add_special_tokens=False))], True
        if items and all(
            isinstance(item, (str, Sequence)) or (hasattr(item, "__array__") and getattr(item, "ndim", 0))
            for item in items
        ):
            return [self._ids(item) for item in items], False
        return [self._ids(items)], True

    def _settings(self, options: Options) -> Settings:
        """The options of a call, checked for this model."""
        settings = read_settings(options, self.manifest)
        if settings.stop:
            self._need_tokenizer("a stop string")
        speculation.check(self, settings)
        return settings

    def _request(self, prompt: Prompt | Sequence[Prompt] | Messages, options: Options) -> tuple[Request, bool]:
        """A checked request, and whether it has just one prompt."""
        settings = self._settings(options)
        given, single = self._given(prompt)
        most, longest = settings.limits.max_tokens, self.manifest.max_length
        if not isinstance(self.decoder, EncoderDecoder):
            return Request(settings, given, [], check_lengths(given, most, longest)), single
        starts = [list(self.manifest.token_ids.decoder_start) for _ in given]
        capacity = check_lengths(starts, most, longest, "a beginning of the target")
        return Request(settings, starts, given, capacity), single

    # -- generation ---------------------------------------------------------------------------------------------
    def generate(  # type: ignore[override]
        self, prompt: Prompt | Sequence[Prompt] | Messages, **options: Unpack[Options]
    ) -> Any:
        """Continue a prompt, or decode a source, or several at once.

        Args:
            prompt: a text, a list of ids, a list of either (of different lengths, each as if it were alone), or
                messages with `role` and `content` where the folder has a chat template. An encoder-decoder encodes it,
                and its own first ids are the beginning of the target, not part of what is returned.
            max_tokens (required), temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
            presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, seed=None, stop=None (strings),
            stop_ids=None (the model's own; [] for none), logprobs=0 (how many per token), cancel=None (an Event).
            num_beams=1 (above it, a beam search, which takes no sampling, stop strings or logprobs),
            length_penalty=1.0, early_stopping=False (True, "never"), num_return_sequences=1: see `BeamParams`.
            reuse_prefix=True (what the caches of earlier calls hold of a prompt is not computed again; False neither
            takes nor leaves anything there).
            lookup=False (draft tokens from what stands in the text already), draft=None (a smaller model, loaded, of
            the same vocabulary, that drafts): the same tokens, sampled ones by the same distribution, sooner.

        Returns a Completion, or a list of them for a list of prompts; with num_return_sequences above 1 a list of at
        most so many, best first, in place of each Completion. Raises InputError or LengthError.
        """
        request, single = self._request(prompt, options)
        if request.settings.searches:
            found = self._search(request)
            several = request.settings.beams.num_return_sequences > 1
            finished: list[Any] = found if several else [best for best, *_ in found]
        else:
            completions = [Growing() for _ in request.prompts]
            for chunk in self._chunks(request):
                completions[chunk.index].add(chunk)
            finished = [growing.completion(self.tokenizer is not None) for growing in completions]
        return finished[0] if single else finished

    def stream(  # type: ignore[override]
        self, prompt: Prompt | Sequence[Prompt] | Messages, **options: Unpack[Options]
    ) -> Iterator[Chunk]:
        """As `generate`, token by token. Leaving the loop, or closing the iterator, frees the slots.

        The arguments are checked at once, before the first chunk is asked for.
        """
        request, _ = self._request(prompt, options)
        if request.settings.searches:
            raise InputError("which beam is best is known at the end alone: use generate, or num_beams=1 to stream")
        return self._chunks(request)

    def conversation(self, path: str | os.PathLike[str] | None = None) -> Conversation:
        """A conversation, whose turns compute only what is new; from `path`, the one that its `save` wrote.

        Raises InputError for an encoder-decoder, SnapshotError for a file that is no conversation with this model.
        """
        self._check_open()
        if isinstance(self.decoder, EncoderDecoder):
            raise InputError(
                "a conversation is of a decoder: what an encoder-decoder says belongs to one source: use generate"
            )
        return open_conversation(self, path)

    def batcher(self, slots: int = 8, *, capacity: int = 256, piece: int = 128, reuse_prefix: bool = True) -> Batcher:
        """What lets callers in different threads share every step: see `Batcher`. Raises InputError for what has none.

        slots: how many prompts go on together. capacity: positions that each has room for at first; it grows. piece:
        how many tokens of a prompt that joins are run at once, which is how long the others wait. reuse_prefix: whether
        what one prompt left, or holds, is used for others that begin with it.
        """
        self._check_open()
        return Batcher(self, slots, capacity, piece, reuse_prefix)

    def _chunks(self, request: Request) -> Iterator[Chunk]:
        with self._lent(request) as cache:
            yield from self._run(request, cache, None)

    def _encoded(self, request: Request, cache: Cache) -> Seats:
        """A slot for each source, which is encoded into it."""
        decoder = self.decoder
        assert isinstance(decoder, EncoderDecoder)
        slots = [cache.acquire() for _ in request.sources]
        for slot, source in zip(slots, request.sources):
            decoder.encode(cache, slot, source)
        nothing = [0] * len(slots)
        return Seats(slots, nothing, nothing)

    def _run(self, request: Request, cache: Cache, seats: Seats | None) -> Generator[Chunk]:
        """The tokens of all prompts, each in its seat; the seats are released in the end."""
        with speculation.speculating(self, request) as speculating:
            yield from self._continue(request, cache, seats, speculating)

    def _continue(
        self, request: Request, cache: Cache, seats: Seats | None, speculating: Speculating | None
    ) -> Generator[Chunk]:
        started, settings = time.perf_counter(), request.settings
        seats = self._seats(request, cache) if seats is None else seats
        reused = seats.reused if seats else [0] * len(request.prompts)
        batch = Batch(
            speculating or self.decoder,
            cache,
            request.prompts,
            settings.params,
            settings.limits,
            self.manifest.num_logits,
            settings.cancel,
            slots=seats.slots if seats else None,
            held=seats.held if seats else (),
            choose=speculating.choose if speculating else choose,
        )
        rows = telling(self.tokenizer, request, started)
        with contextlib.closing(batch.tokens()) as tokens:
            for token in tokens:
                row = rows[token.index]
                if row.text.stopped:
                    continue
                if seats and row.first is None and not request.sources:
                    cache.keep(seats.slots[row.index])  # it holds the prompt, to which another answer may go back
                drafted = speculating.counts(row.index) if speculating else ()
                chunk = row.chunk(token, time.perf_counter(), reused[row.index], drafted)
                if chunk.finish_reason is not None:
                    batch.finish(row.index)
                yield chunk

    def _search(self, request: Request) -> list[list[Completion]]:
        """The best sequences of every prompt, by beam search."""
        started, settings = time.perf_counter(), request.settings
        params, vocab_size = settings.params, self.manifest.num_logits
        adjusts = params.logit_bias or params.needs_history
        with self._lent(request) as cache:
            seats = self._seats(request, cache)
            held = seats.held if seats else [0] * len(request.prompts)
            found = beam_search(
                self.decoder,
                cache,
                [prompt[n:] for prompt, n in zip(request.prompts, held)],
                settings.beams,
                settings.limits,
                vocab_size,
                slots=seats.slots if seats else None,
                adjust=Penalties(params, request.prompts, vocab_size) if adjusts else None,
                cancel=settings.cancel,
                # transformers forces all but the first of these, and counts what it forces
                counted_before=len(request.prompts[0]) - 1 if request.sources else 0,
            )
        timings = Timings(time.perf_counter() - started, 0.0)
        return [
            [
                self._completed(hypothesis, request, index, timings, seats.reused[index] if seats else 0)
                for hypothesis in hypotheses
            ]
            for index, hypotheses in enumerate(found)
        ]

    def _completed(self, found: Hypothesis, request: Request, index: int, timings: Timings, reused: int) -> Completion:
        row = RowText(self.tokenizer, request.shown[index], ())
        pieces = [row.push(token, None)[0] for token in found.token_ids]
        pieces.append(row.push(None, found.finish_reason)[0])
        text = None if self.tokenizer is None else "".join(piece for piece in pieces if piece)
        usage = Usage(len(request.given[index]), len(found.token_ids), reused)
        return Completion(text, found.token_ids, found.finish_reason, usage, timings, score=found.score)


def _check_token_ids(manifest: Manifest) -> None:
    """The ids that are fed and forced on the manifest's word exist. Raises ManifestError."""
    ids = manifest.token_ids
    forced = () if ids.forced_eos is None else (ids.forced_eos,)
    for name, values, size in (
        ("decoder_start", ids.decoder_start, manifest.vocab_size),
        ("forced_eos", forced, manifest.num_logits),
    ):
        if wrong := [i for i in values if not 0 <= i < size]:
            raise ManifestError(f"{FILE_NAME}: token_ids: expected {name} to be from 0 to {size - 1}, got {wrong[0]}")
