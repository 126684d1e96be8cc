"""Measures a folder on this machine: load, prefill, decode and the whole way, each apart, with all that explains them.

Prefill and decode are calls of the decoder on a cache, without sampling and text; the whole way is `Model.stream`.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.errors import InputError, LengthError
from tfinfer.generating import GeneratingModel
from tfinfer.integrity import check_files, sha256
from tfinfer.manifest import FILE_NAME, load_manifest
from tfinfer.session.ort import onnxruntime
from tfinfer.version import __version__

SCHEMA = 1
PROMPT_LENGTH, NEW_TOKENS = 128, 64
LEAST_NEW = 2  # the first one comes from prefill: a step needs a second
BUSY = 0.5  # load average per processor from which other work is likely to be in the figures
ENOUGH = {"p50": 1, "p90": 10, "p99": 100}  # samples below which a percentile is only the worst one
DEFINITIONS = {
    "open": "from the manifest to a model that can generate: graph, weights and tokenizer; once, in a new process",
    "hash check": "reading every file for its SHA-256; the files are then in the page cache when the graph is opened",
    "prefill": "all prompts of the batch, one after the other, into an empty cache, until the last logits are there",
    "step": "one new token for every sequence of the batch: Decoder.step, without choosing the token",
    "end to end": "Model.stream with greedy choice, without stop ids, from the call to its last token",
    "first token": "from the call of Model.stream to its first token of the first prompt",
    "tokens/s": "prefill: prompt tokens; decode and end to end: new tokens; all sequences of the batch together",
}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """What is measured, and how often."""

    prompt_length: int
    new_tokens: int
    batch: int
    repeats: int
    warmup: int


def plan(
    max_length: int,
    *,
    prompt_length: int | None = None,
    new_tokens: int | None = None,
    batch: int = 1,
    repeats: int = 5,
    warmup: int = 1,
) -> Workload:
    """The workload that fits; None is a length that may shrink. Raises InputError or LengthError for what was asked."""
    for name, value, least in (
        ("prompt_length", prompt_length, 1),
        ("new_tokens", new_tokens, LEAST_NEW),
        ("batch", batch, 1),
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if new_tokens is None:
        room = max_length - (prompt_length or min(PROMPT_LENGTH, 2 * max_length // 3))
        new_tokens = max(LEAST_NEW, min(NEW_TOKENS, room))
    if prompt_length is None:
        prompt_length = max(1, min(PROMPT_LENGTH, max_length - new_tokens))
    if prompt_length + new_tokens > max_length:
        both = f"a prompt of {prompt_length} tokens and {new_tokens} new ones"
        raise LengthError(f"{both} would pass the model's longest length, {max_length}")
    return Workload(prompt_length, new_tokens, batch, repeats, warmup)


def run(
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    command_line: str = "",
    progress: Progress = lambda stage: None,
    **asked: Any,
) -> dict[str, Any]:
    """Measure a folder; `asked` are the arguments of `plan`. Returns plain values, all times in seconds."""
    path = Path(folder)
    manifest = load_manifest(path)
    if manifest.kind != "decoder":
        raise InputError(f"{path}: bench measures decoders; this is an {manifest.kind}")
    work = plan(manifest.max_length, **asked)
    progress("load")
    busy = _load_average()
    check, import_seconds = _timed(lambda: check_files(path, manifest)), _timed(onnxruntime)
    started = time.perf_counter()
    with GeneratingModel(manifest, path, device=device, threads=threads) as model:
        opened = time.perf_counter() - started
        resident = _status("VmRSS")
        vocabulary = min(manifest.vocab_size, manifest.num_logits)
        prompts = np.random.default_rng(0).integers(0, vocabulary, (work.batch, work.prompt_length))
        with _no_garbage_collection():
            prefill, steps, cache_bytes = _measure_decoder(model, prompts, work, progress)
            whole, firsts = _measure_stream(model, prompts, work, progress)
        environment = _environment(model, path) | {"load_average": busy, "command_line": command_line}
    return {
        "schema": SCHEMA,
        "workload": asdict(work),
        "load": {"import_seconds": import_seconds, "hash_check_seconds": check, "open_seconds": opened},
        "prefill": _figures(prefill, prompts.size),
        "decode": _figures(steps, work.batch),
        "end_to_end": _figures(whole, work.batch * work.new_tokens) | {"first_token_seconds": summary(firsts)},
        "memory": {"rss_after_load": resident, "rss_peak": _status("VmHWM"), "cache_bytes": cache_bytes},
        "environment": environment,
        "definitions": DEFINITIONS,
        "warnings": _warnings(busy),
    }


def _figures(samples: Sequence[float], tokens: int) -> dict[str, Any]:
    """What is said of calls that take `tokens` each."""
    return {"tokens_per_second": tokens * len(samples) / sum(samples), "seconds": summary(samples), "samples": samples}


def summary(samples: Sequence[float]) -> dict[str, float | None]:
    """Percentiles (None where there are too few samples), mean, standard deviation and both ends."""
    values = np.asarray(samples)
    found: dict[str, float | None] = {
        name: float(np.percentile(values, int(name[1:]))) if len(values) >= least else None
        for name, least in ENOUGH.items()
    }
    ends = {"min": float(values.min()), "max": float(values.max())}
    return found | {"mean": float(values.mean()), "std": float(values.std())} | ends


# -- measuring ----------------------------------------------------------------------------------------------------
def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would fall into one of the steps."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _measure_decoder(
    model: GeneratingModel, prompts: Any, work: Workload, progress: Progress
) -> tuple[list[float], list[float], int]:
    """Seconds of every prefill and of every step, and the bytes of the cache."""
    decoder = model.decoder
    cache = decoder.open_cache(work.batch, work.prompt_length + work.new_tokens)
    ids = np.ascontiguousarray(prompts[:, 0])
    prefill: list[float] = []
    steps: list[float] = []
    try:
        for turn in range(work.warmup + work.repeats):
            progress(f"prefill and decode: round {turn + 1} of {work.warmup + work.repeats}")
            slots = [cache.acquire() for _ in range(work.batch)]
            times = [_timed(lambda: [decoder.prefill(cache, slot, row) for slot, row in zip(slots, prompts)])]  # noqa: B023
            times += [_timed(lambda: decoder.step(cache, slots, ids)) for _ in range(work.new_tokens - 1)]  # noqa: B023
            if turn >= work.warmup:
                prefill.append(times[0])
                steps += times[1:]
            cache.reset()
        return prefill, steps, cache.nbytes
    finally:
        cache.close()


def _measure_stream(
    model: GeneratingModel, prompts: Any, work: Workload, progress: Progress
) -> tuple[list[float], list[float]]:
    """Seconds of every whole run of the public loop, and of the first token in each."""
    rows = [row.tolist() for row in prompts]
    whole: list[float] = []
    firsts: list[float] = []
    for turn in range(work.warmup + work.repeats):
        progress(f"end to end: round {turn + 1} of {work.warmup + work.repeats}")
        started = time.perf_counter()
        stream = model.stream(rows, max_tokens=work.new_tokens, stop_ids=[], reuse_prefix=False)
        next(stream)
        first = time.perf_counter() - started
        for _ in stream:
            pass
        if turn >= work.warmup:
            whole.append(time.perf_counter() - started)
            firsts.append(first)
    return whole, firsts


# -- what explains the figures ------------------------------------------------------------------------------------
def _environment(model: GeneratingModel, folder: Path) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": asdict(model.threads),
        "device": model.device,
        "device_reason": model.reason,
        "onnxruntime": str(onnxruntime().__version__),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "tfinfer": __version__,
        "model": model.manifest.source.reference,
        "dtype": model.manifest.dtype,
        "manifest_sha256": sha256(folder / FILE_NAME),
        "file_bytes": sum(file.bytes for file in model.manifest.files.values()),
        "utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _load_average() -> tuple[float, float, float] | None:
    try:
        return os.getloadavg()
    except (AttributeError, OSError):
        return None


def _warnings(busy: tuple[float, float, float] | None) -> list[str]:
    cores = os.cpu_count() or 1
    if busy is None or busy[0] <= BUSY * cores:
        return []
    return [f"the load average was {busy[0]:.2f} on {cores} processors before it began: other work is in these figures"]


def _status(name: str) -> int | None:
    """A figure of this process's memory in bytes, None where the system does not say."""
    if sys.platform != "linux":
        return None
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(kib) * 1024 for kib in found), None)
