"""Measures a folder on this machine: start, prefill, decode and the whole way, each apart, with all that explains them.

Prefill and decode are calls of the decoder on a cache, without sampling and text; the whole way is `Model.stream`.
Every sample is kept, so that `bench_compare` can set two measurements side by side.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.errors import InputError
from tfinfer.generating import GeneratingModel
from tfinfer.integrity import check_files, sha256
from tfinfer.manifest import FILE_NAME, Manifest, load_manifest
from tfinfer.measure.busy import busy_warnings, load_average
from tfinfer.measure.runs import Progress, measure_decoder, measure_stream, no_garbage_collection, timed
from tfinfer.measure.starts import StartFailedError, measure
from tfinfer.measure.traffic import Traffic, traffic
from tfinfer.measure.workload import Workload, plan
from tfinfer.session.machine import cpu_model
from tfinfer.session.ort import onnxruntime
from tfinfer.version import __version__

SCHEMA = 2
ENOUGH = {"p50": 1, "p90": 10, "p95": 20, "p99": 100}  # samples below which a percentile is only the worst one
DEFINITIONS = {
    "open": "from the manifest to a model that can generate: graph, weights and tokenizer; once, in a new process",
    "hash check": "reading every file for its SHA-256; the files are then in the page cache when the graph is opened",
    "prefill": "all prompts of the batch, one after the other, into an empty cache, until the last logits are there",
    "step": "one new token for every sequence of the batch: Decoder.step, without choosing the token",
    "end to end": "Model.stream with greedy choice, without stop ids, from the call to its last token",
    "first token": "TTFT: from the call of Model.stream to its first token of the first prompt",
    "per token": "TPOT: in each run, the time from the first token to the last over the steps between them",
    "token gaps": "each time from one token of the first prompt to its next, as the caller of Model.stream sees it",
    "start": "a new process from its call to its first token of a prompt of one: interpreter, imports, load, prefill",
    "cold, warm": "with the folder's files dropped from the page cache before, and with them in it; libraries are warm",
    "moved": "bytes a step reads: stored weights once (rows of tables looked up by id), the cache held halfway, states "
    "twice; all experts of a mixture, so at most. Over the median step: the bandwidth it got",
    "resident": "what the process holds in memory after load, and the most it ever held (VmRSS, VmHWM)",
    "tokens/s": "prefill: prompt tokens; decode and end to end: new tokens; all sequences of the batch together",
}


def run(
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    cuda_graph: bool | None = False,
    starts: int = 0,
    command_line: str = "",
    progress: Progress = lambda stage: None,
    **asked: Any,
) -> dict[str, Any]:
    """Measure a folder; `asked` are the arguments of `plan`. Returns plain values, all times in seconds.

    starts: how many new processes are started, cold and warm each.
    """
    path = Path(folder)
    manifest = load_manifest(path)
    if manifest.kind != "decoder":
        raise InputError(f"{path}: bench measures decoders; this is an {manifest.kind}")
    work = plan(manifest.max_length, **asked)
    if starts < 0:
        raise InputError(f"starts: expected a whole number of at least 0, got {starts}")
    progress("load")
    busy = load_average()
    check, import_seconds = timed(lambda: check_files(path, manifest)), timed(onnxruntime)
    started_new, failure = _measure_starts(path, manifest, device, threads, starts, progress)
    started = time.perf_counter()
    with GeneratingModel(manifest, path, device=device, threads=threads, cuda_graph=cuda_graph) as model:
        opened = time.perf_counter() - started
        resident = _status("VmRSS")
        vocabulary = min(manifest.vocab_size, manifest.num_logits)
        prompts = np.random.default_rng(0).integers(0, vocabulary, (work.batch, work.prompt_length))
        with no_garbage_collection():
            prefill, steps, cache_bytes = measure_decoder(model, prompts, work, progress)
            whole, firsts, gaps = measure_stream(model, prompts, work, progress)
        environment = _environment(model, path) | {"load_average": busy, "command_line": command_line}
    per_token = [(end - first) / (work.new_tokens - 1) for end, first in zip(whole, firsts)]
    halfway = work.prompt_length + work.new_tokens // 2
    moved = traffic(manifest, path, batch=work.batch, length=halfway)
    return {
        "schema": SCHEMA,
        "workload": asdict(work),
        "load": {"import_seconds": import_seconds, "hash_check_seconds": check, "open_seconds": opened},
        "starts": started_new,
        "prefill": _figures(prefill, prompts.size),
        "decode": _figures(steps, work.batch),
        "first_token": _times(firsts),
        "per_token": _times(per_token),
        "between_tokens": _times(gaps),
        "end_to_end": _figures(whole, work.batch * work.new_tokens) | {"first_token_seconds": summary(firsts)},
        "memory": {"rss_after_load": resident, "rss_peak": _status("VmHWM"), "cache_bytes": cache_bytes},
        "moved": _moved(moved, work, steps),
        "environment": environment,
        "definitions": DEFINITIONS,
        "warnings": busy_warnings(busy) + failure,
    }


def _moved(moved: Traffic, work: Workload, steps: Sequence[float]) -> dict[str, Any]:
    return {
        "weight_bytes_per_step": moved.weights,
        "cache_bytes_per_step": moved.cache,
        "bytes_per_token": moved.step // work.batch,
        "bytes_per_second": moved.step / float(np.median(steps)),
    }


def _times(samples: Sequence[float]) -> dict[str, Any]:
    return {"seconds": summary(samples), "samples": samples}


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


def _measure_starts(
    folder: Path, manifest: Manifest, device: str, threads: int | None, starts: int, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Starts of new processes, and a warning where they fail; before this process maps the files itself."""
    if starts == 0:
        return {"cold": [], "warm": []}, []
    progress("start in new processes")
    try:
        return measure(folder, [FILE_NAME, *manifest.files], device, threads, starts), []
    except (StartFailedError, OSError) as error:
        return {"cold": [], "warm": []}, [f"no start was measured, a new process failed: {error}"]


# -- what explains the figures ------------------------------------------------------------------------------------
def _environment(model: GeneratingModel, folder: Path) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": asdict(model.threads),
        "settings": asdict(model.decoder.settings),
        "cuda_graph": model.decoder.recording is not None,
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


__all__ = ["Workload", "plan", "run", "summary"]
