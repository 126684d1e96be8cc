"""A decoder or encoder-decoder with its tokenizer: text or ids in, completions out."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

from tfinfer.completion import Chunk, Completion, Timings, Usage
from tfinfer.errors import ClosedError, InputError
from tfinfer.manifest import Manifest
from tfinfer.model import Messages, Model, Prompt
from tfinfer.session.cache import Cache
from tfinfer.session.decoder import Decoder
from tfinfer.tokens.generate import Batch, Limits, check_lengths
from tfinfer.tokens.sampling import SamplingParams
from tfinfer.tokens.stop import stop_strings
from tfinfer.tokens.text import RowText

SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt, with the defaults that `Model.generate` names."""

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


@dataclass(frozen=True)
class _Request:
    """A checked call of `generate` or `stream`."""

    prompts: list[list[int]]
    params: SamplingParams
    limits: Limits
    stop: tuple[str, ...]
    capacity: int
    cancel: threading.Event | None


class GeneratingModel(Model):
    """A model that generates. Every call has its own cache, taken from a small pool under a lock."""

    def __init__(self, manifest: Manifest, folder: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(manifest, folder)
        self.decoder = Decoder(manifest, folder, device=device, threads=threads)
        self.device, self.threads, self.reason = self.decoder.device, self.decoder.threads, self.decoder.reason
        self._pool: list[Cache] = []

    def close(self) -> None:
        """Let graph and caches go; later calls raise ClosedError."""
        with self._lock:
            self._closed = True
            for cache in self._pool:
                cache.close()
            self._pool.clear()
        self.decoder.close()

    def _borrow(self, slots: int, capacity: int) -> Cache:
        with self._lock:
            if self._closed:
                raise ClosedError("the model was closed: load it again")
            for cache in self._pool:
                if cache.slots == slots and cache.capacity >= capacity:
                    self._pool.remove(cache)
                    return cache
        return self.decoder.open_cache(slots, capacity)

    def _give_back(self, cache: Cache) -> None:
        cache.reset()
        with self._lock:
            if not self._closed and len(self._pool) < 2:
                self._pool.append(cache)

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        if isinstance(prompt, str) and not ids:
            raise InputError(f"the text {prompt!r} has no tokens: a prompt needs at least one")
        return [int(i) for i in self.decoder.check_ids(ids)]

    def _prompts(self, prompt: Prompt | Sequence[Prompt] | Messages) -> tuple[list[list[int]], bool]:
        """Every prompt as ids, and whether there was just one."""
        if isinstance(prompt, str):
            return [self._ids(prompt)], True
        items: list[Any] = list(prompt)
        if items and isinstance(items[0], Mapping):
            text = self.render_chat(items)
            ids = self._need_tokenizer("a conversation").encode(text, add_special_tokens=False)
            return [[int(i) for i in self.decoder.check_ids(ids)]], True
        if items and all(
            isinstance(item, (str, Sequence)) or (hasattr(item, "__array__") and getattr(item, "ndim", 0))
            for item in items
        ):
            return [self._ids(item) for item in items], False
        return [self._ids(items)], True

    def _request(self, prompt: Prompt | Sequence[Prompt] | Messages, options: Options) -> tuple[_Request, bool]:
        """A checked request, and whether it has just one prompt."""
        if unknown := sorted(set(options) - Options.__annotations__.keys()):
            raise InputError(f"unknown option {', '.join(unknown)}; there are {', '.join(Options.__annotations__)}")
        if "max_tokens" not in options:
            raise InputError("max_tokens is required: the most tokens to generate")
        params = SamplingParams(**{n: options[n] for n in SAMPLING if n in options})  # type: ignore[literal-required]
        params.check_vocab(self.manifest.num_logits)
        stop_ids = options.get("stop_ids")
        ends = self.manifest.token_ids.eos if stop_ids is None else tuple(int(i) for i in stop_ids)
        limits = Limits(options["max_tokens"], frozenset(ends), options.get("logprobs", 0))
        stops = stop_strings(options.get("stop"))
        if stops:
            self._need_tokenizer("a stop string")
        prompts, single = self._prompts(prompt)
        capacity = check_lengths(prompts, limits.max_tokens, self.manifest.max_length)
        return _Request(prompts, params, limits, stops, capacity, options.get("cancel")), single

    # -- generation ---------------------------------------------------------------------------------------------
    def generate(  # type: ignore[override]
        self, prompt: Prompt | Sequence[Prompt] | Messages, **options: Unpack[Options]
    ) -> Any:
        """Continue a prompt, or several at once.

        Args:
            prompt: a text, a list of ids, a list of either (of different lengths, each as if it were alone), or
                messages with `role` and `content` where the folder has a chat template.
            max_tokens (required), temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
            presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, seed=None, stop=None (strings),
            stop_ids=None (the model's own; [] for none), logprobs=0 (how many per token), cancel=None (an Event).

        Returns a Completion, or a list of them for a list of prompts. Raises InputError or LengthError.
        """
        request, single = self._request(prompt, options)
        completions = [_Growing(index, len(ids)) for index, ids in enumerate(request.prompts)]
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
        return self._chunks(request)

    def _chunks(self, request: _Request) -> Iterator[Chunk]:
        """Borrow a cache for a request, and give it back however the request ends."""
        cache = self._borrow(len(request.prompts), request.capacity)
        try:
            yield from self._run(request, cache)
        except GeneratorExit:
            raise
        except BaseException:
            cache.close()  # what it holds may be half written, or not finite
            raise
        finally:
            if cache.buffers:
                self._give_back(cache)

    def _run(self, request: _Request, cache: Cache) -> Iterator[Chunk]:
        started = time.perf_counter()
        batch = Batch(
            self.decoder,
            cache,
            request.prompts,
            request.params,
            request.limits,
            self.manifest.num_logits,
            request.cancel,
        )
        texts = [RowText(self.tokenizer, ids, request.stop) for ids in request.prompts]
        firsts: dict[int, float] = {}
        counts = [0] * len(texts)
        with contextlib.closing(batch.tokens()) as tokens:
            for token in tokens:
                row = token.index
                if texts[row].stopped:
                    continue
                now = time.perf_counter()
                firsts.setdefault(row, now)
                counts[row] += token.token_id is not None
                text, reason = texts[row].push(token.token_id, token.finish_reason)
                ids = () if token.token_id is None else (token.token_id,)
                if reason is None:
                    yield Chunk(row, text, ids, None, token.logprobs)
                    continue
                batch.finish(row)
                usage = Usage(len(request.prompts[row]), counts[row])
                timings = Timings(firsts[row] - started, now - firsts[row])
                yield Chunk(row, text, ids, reason, token.logprobs, usage, timings)


class _Growing:
    """Collects the chunks of one prompt."""

    def __init__(self, index: int, prompt_tokens: int) -> None:
        self.chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def completion(self, has_text: bool) -> Completion:
        last = self.chunks[-1]
        assert last.finish_reason
        assert last.usage
        assert last.timings
        logprobs = tuple(c.logprobs for c in self.chunks if c.logprobs is not None)
        return Completion(
            text="".join(c.text for c in self.chunks if c.text) if has_text else None,
            token_ids=tuple(i for c in self.chunks for i in c.token_ids),
            finish_reason=last.finish_reason, usage=last.usage, timings=last.timings, logprobs=logprobs or None,
        )  # fmt: skip
