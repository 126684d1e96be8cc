"""An exported folder, ready to generate: text or ids in, completions out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Required, TypedDict, Unpack

from tfinfer.completion import Chunk, Completion, Timings, Usage
from tfinfer.errors import ClosedError, CorruptModelError, InputError
from tfinfer.integrity import check_files
from tfinfer.manifest import Manifest, load_manifest
from tfinfer.session.cache import Cache
from tfinfer.session.decoder import Decoder
from tfinfer.tokens.chat import ChatTemplate
from tfinfer.tokens.generate import Batch, Limits, check_lengths
from tfinfer.tokens.sampling import SamplingParams
from tfinfer.tokens.stop import stop_strings
from tfinfer.tokens.text import RowText
from tfinfer.tokens.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))


def load(
    folder: str | os.PathLike[str], *, device: str = "cpu", threads: int | None = None, check_hashes: bool = True
) -> Model:
    """Open a folder that `tfinfer export` made.

    Args:
        device: "cpu", "cuda" (an error unless CUDA really opens) or "auto" (`model.reason` says what it took).
        threads: of the computation; by default what the process may use (see `tfinfer doctor`).
        check_hashes: compare every file with its SHA-256 first.

    Raises ModelError for a folder that cannot be served, ProviderError for a device that does not open.
    """
    path = Path(folder)
    manifest = load_manifest(path)
    check_files(path, manifest, check_hashes)
    return Model(manifest, path, device=device, threads=threads)


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


class Model:
    """A decoder with its tokenizer. Make one with `tfinfer.load`.

    Safe for calls from several threads: the session is shared, every call has its own cache (taken from a small pool
    under a lock) and its own bindings. Not to be carried through a fork: load in each process.
    """

    def __init__(self, manifest: Manifest, folder: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        self.manifest = manifest
        self.tokenizer = Tokenizer.from_file(folder / manifest.text.tokenizer) if manifest.text.tokenizer else None
        self.chat_template = self._read_template(folder)
        self.generation_config = self._read_generation_config(folder)
        self.decoder = Decoder(manifest, folder, device=device, threads=threads)
        self.device, self.threads, self.reason = self.decoder.device, self.decoder.threads, self.decoder.reason
        self._pool: list[Cache] = []
        self._lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return (
            f"<tfinfer {self.manifest.kind} {self.manifest.source.reference} on {self.device}, {self.manifest.dtype}>"
        )

    def _read_template(self, folder: Path) -> ChatTemplate | None:
        text = self.manifest.text
        if text.chat_template is None:
            return None
        return ChatTemplate((folder / text.chat_template).read_text(encoding="utf-8"), text.special_tokens)

    def _read_generation_config(self, folder: Path) -> dict[str, Any]:
        name = self.manifest.text.generation_config
        if name is None:
            return {}
        try:
            return dict(json.loads((folder / name).read_text(encoding="utf-8")))
        except ValueError as error:
            raise CorruptModelError(f"{folder / name}: is not JSON: {error}") from error

    # -- life ---------------------------------------------------------------------------------------------------
    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    # -- prompts ------------------------------------------------------------------------------------------------
    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special ones its tokenizer adds."""
        return self._need_tokenizer("a text").encode(text)

    def render_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The text that the model's chat template makes of messages with `role` and `content`."""
        if self.chat_template is None:
            raise InputError("this folder has no chat template: give a text or ids instead of messages")
        return self.chat_template.render(list(messages), add_generation_prompt=add_generation_prompt)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"this folder has no tokenizer, so {what} cannot be used: give lists of ids")
        return self.tokenizer

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
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
    def generate(self, prompt: Prompt | Sequence[Prompt] | Messages, **options: Unpack[Options]) -> Any:
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

    def stream(self, prompt: Prompt | Sequence[Prompt] | Messages, **options: Unpack[Options]) -> Iterator[Chunk]:
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
