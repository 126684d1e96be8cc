"""One decoder graph over a cache of slots: ids in, logits out. Knows neither tokens' meaning, nor sampling, nor text.

A prompt is prefilled alone into its slot, a row of the buffers by pointer; a step runs all given slots together, each
at its own length. The cache and its states are bound as past and as present, so nothing of them is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import ClosedError, IncompatibleModelError, InputError, LengthError, ProviderError
from tfinfer.manifest import PROMPT, Manifest
from tfinfer.session.bound_step import BoundStep
from tfinfer.session.cache import Cache
from tfinfer.session.device_step import DeviceStep
from tfinfer.session.failures import run_bound
from tfinfer.session.memory import ELEMENT_TYPES, CudaMemory, HostMemory
from tfinfer.session.ort import onnxruntime, version
from tfinfer.session.pages import LEAST, enlarge_meanwhile, own_memory
from tfinfer.session.prompt import PromptGraph
from tfinfer.session.providers import listed_providers
from tfinfer.session.recorded import open_recording
from tfinfer.session.select import WORTH, Selecting
from tfinfer.session.settings import OnCpu
from tfinfer.session.tuned import open_graph

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# A long prompt goes through in pieces of this many tokens, which bounds the memory of its activations. Attention is
# computed for a whole piece and masked, so small pieces waste less of it: behind 1,024 tokens of SmolLM2-135M's shape
# 256 are 1.02 (float32) to 1.11 (int8 by channel) times as fast as 512, in Qwen3-0.6B's as fast.
PREFILL_CHUNK = 256
READ_CHUNK = 512  # by the graph that reads prompts, which widens its weights once for each


class Decoder:
    """A decoder's graph, opened on one device.

    Several threads may use one Decoder at once, each with a cache of its own: the session keeps no state of a call.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        how: OnCpu | None = None,
        cuda_graph: bool | None = False,
    ) -> None:
        """Open it. how: threads and switches on the CPU; by default what the folder's tuning or `threads` says."""
        check_runtime(manifest)
        assert manifest.roles is not None, "the manifest has no decoder"
        self.manifest, self.roles = manifest, manifest.roles
        device, why_not = without_cuda(manifest, device)
        graph = manifest.graphs["decoder"]
        is_large = sum(file.bytes for file in manifest.files.values()) >= LEAST
        before = own_memory() if is_large else []
        opened, self.recording, self.not_recorded = open_recording(
            lambda records: open_graph(folder, graph, device, threads, how, records), manifest, cuda_graph
        )
        self.device, self.threads, self.reason = opened.device, opened.threads, why_not or opened.reason
        self.settings = opened.settings
        self._session: Any = opened.session
        if self.device == "cpu" and is_large:
            enlarge_meanwhile(before, own_memory())
        self._check_signature()
        self.prompts = self._prompts(folder, threads, how)
        self.memory: HostMemory | CudaMemory = CudaMemory() if self.device == "cuda" else HostMemory()
        self.step_kind: type[BoundStep] | type[DeviceStep] = BoundStep if self.device == "cpu" else DeviceStep
        self.selecting = self._open_selecting()

    def _check_signature(self) -> None:
        """The graph has the inputs and outputs that the manifest says."""
        roles, cache = self.roles, self.manifest.cache
        session = self._session
        found = {
            v.name for v in (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
        }
        # Of what the encoder makes a decoder takes what it needs.
        self.cross = tuple(spec for spec in self.manifest.cross if spec.name in found)
        given = (roles.position_ids, roles.logits_to_keep, roles.source_mask, roles.use_cache_branch)
        wanted = {roles.input_ids, roles.attention_mask, roles.logits, *(name for name in given if name is not None)}
        wanted |= {name for entry in cache for name in (entry.past, entry.present)}
        wanted |= {name for state in self.manifest.states for name in (state.past, state.present)}
        wanted |= {spec.name for spec in self.cross}
        if odd := sorted(found ^ wanted):
            raise IncompatibleModelError(f"the graph and the manifest disagree on {', '.join(odd[:8])}")
        graph = self.manifest.graphs["decoder"]
        specs = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
        # A graph of another exporter may give logits of every row, and in half width.
        self.all_logits = self.manifest.all_rows and roles.logits_to_keep is None
        self.logits_dtype = np.dtype(specs[roles.logits].dtype)
        axes = () if roles.logits_to_keep is None else specs[roles.logits_to_keep].shape
        self.keep_shape = tuple(axis if isinstance(axis, int) else 1 for axis in axes)
        self.keep_required = roles.logits_to_keep in {value.name for value in session.get_inputs()}

    def _prompts(self, folder: Path, threads: int | None, how: OnCpu | None) -> PromptGraph | None:
        """What reads long prompts; None where the folder has no graph for it, or a device computes."""
        graph = self.manifest.graphs.get(PROMPT)
        if graph is None or self.device != "cpu":
            return None
        roles = self.roles
        wanted = {name for name in (roles.input_ids, roles.attention_mask, roles.position_ids) if name is not None}
        wanted |= {name for entry in self.manifest.cache for name in (entry.past, entry.present)}
        wanted |= {name for state in self.manifest.states for name in (state.past, state.present)}
        files = [folder / name for name in self.manifest.files]
        return PromptGraph(lambda: open_graph(folder, graph, "cpu", threads, how), files, wanted)

    def _open_selecting(self) -> Selecting | None:
        """What finds the best logits on a device; None where copying all of them is as good, or all there is."""
        if self.device == "cpu" or self.manifest.num_logits < WORTH:
            return None
        try:
            return Selecting(self.manifest.num_logits, str(self.logits_dtype), self.device, self.threads)
        except (ProviderError, IncompatibleModelError):
            return None

    @property
    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """What is held while it computes: recordings share with all other runs the memory for what lies between."""
        return contextlib.nullcontext() if self.recording is None else self.memory.turn

    @property
    def selects(self) -> bool:
        """Whether `step_best` copies less than `step`."""
        return self.selecting is not None

    def close(self) -> None:
        """Let the graph go; calls after this raise ClosedError."""
        self._session = self.selecting = self.recording = None
        if self.prompts is not None:
            self.prompts.close()

    def open_cache(self, slots: int = 1, capacity: int = 256) -> Cache:
        """An empty cache of `slots` sequences of up to `capacity` positions; it grows when a slot needs more."""
        manifest, longest = self.manifest, self.manifest.max_length
        return Cache(
            manifest.cache, self.memory, slots, min(capacity, longest), longest, manifest.states,
            window=manifest.keeps_window,
        )  # fmt: skip

    def check_ids(self, ids: Sequence[int] | Ids) -> Ids:
        """(n,) int64. Raises InputError for no ids, ids that are no whole numbers, or ids outside the vocabulary."""
        return checked_ids(ids, self.manifest.vocab_size)

    # -- running ------------------------------------------------------------------------------------------------
    def prefill(self, cache: Cache, slot: int, ids: Sequence[int] | Ids, *, keep: int = 1) -> Logits:
        """Append `ids` to a slot; returns the logits of the last `keep` of them, (keep, num_logits); 0: of none.

        Raises InputError for wrong ids and LengthError past the model's longest length. Whatever is raised, the slot
        then holds what it did.
        """
        array = self.check_ids(ids)
        most = len(array) if self.manifest.all_rows else 1
        if not 0 <= keep <= most:
            raise InputError(f"expected keep to be from 0 to {most} for {len(array)} positions, got {keep}")
        before, longest = cache.length(slot), self.manifest.max_length
        if before + len(array) > longest:
            raise LengthError(f"{before} + {len(array)} positions are more than the model's longest length, {longest}")
        if len(array) <= cache.most_at_once:
            cache.reserve(slot, len(array))
        snapshot = cache.snapshot(slot)
        logits = []
        try:
            left = len(array)
            for piece, reads_only in self._pieces(array, before, cache, keep):
                cache.reserve(slot, len(piece))
                left -= len(piece)
                wanted = max(0, min(len(piece), keep - left))
                found = self._append(cache, slot, piece, 0 if reads_only else max(1, wanted))
                logits.append(found[len(found) - wanted :])
                cache.ids[slot] += piece.tolist()
        except Exception:
            cache.restore(slot, snapshot)
            raise
        kept: Logits = np.concatenate(logits)
        return kept

    def _pieces(self, ids: Ids, past: int, cache: Cache, keep: int) -> list[tuple[Ids, bool]]:
        """What of a prompt goes through at once, behind `past` positions, and whether by the graph that only reads."""
        size, wide = min(PREFILL_CHUNK, cache.most_at_once), min(READ_CHUNK, cache.most_at_once)
        read = 0 if self.prompts is None else self.prompts.share(len(ids) - keep, wide)
        pieces = [(ids[at : min(at + wide, read)], True) for at in range(0, read, wide)]
        ids, past = ids[read:], past + read
        first = min(size, len(ids)) if past == 0 or not self.manifest.appends_one else 0
        step = 1 if self.manifest.appends_one else size
        rest = [ids[:first]] * (first > 0) + [ids[at : at + step] for at in range(first, len(ids), step)]
        return pieces + [(piece, False) for piece in rest]

    def _append(self, cache: Cache, slot: int, ids: Ids, keep: int) -> Logits:
        """The logits of the last `keep` of `ids`; 0: by the graph that only reads, which gives none."""
        row = cache.row(slot)
        past, roles = int(cache.lengths[row]), self.roles
        binding = self._opened(reads_only := keep == 0).io_binding()
        total = past - int(cache.dropped[row]) + len(ids)
        held = [ids[None], np.ones((1, total), np.int64), np.arange(past, past + len(ids))[None]]
        for name, array in zip((roles.input_ids, roles.attention_mask, roles.position_ids), held):
            if name is not None:
                binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        logits = np.empty((1, len(ids) if self.all_logits else keep, self.manifest.num_logits), self.logits_dtype)
        if keep:
            self._bind_keep(binding, keep)
            binding.bind_output(roles.logits, "cpu", 0, self.logits_dtype, logits.shape, logits.ctypes.data)
        self._bind_cache(binding, cache, row, 1)
        self._run(binding, reads_only=reads_only)
        cache.lengths[row] += len(ids)
        return logits[0, logits.shape[1] - keep :].astype(np.float32, copy=False)

    def _bind_keep(self, binding: Any, keep: int) -> None:
        """Ask for the logits of the last `keep` positions, where the graph can be asked."""
        if self.roles.logits_to_keep is not None:
            kept = np.full(self.keep_shape, keep, np.int64)
            value = onnxruntime().OrtValue.ortvalue_from_numpy(kept)
            binding.bind_ortvalue_input(self.roles.logits_to_keep, value)

    def step(self, cache: Cache, slots: Sequence[int], ids: Sequence[int] | Ids) -> Logits:
        """Append one id to each of `slots`; returns their logits, (slots, num_logits), valid until the next step.

        ids: (slots,), taken as they are: they come from this model's logits or were checked by the caller. A step that
        fails keeps the lengths; states may be half changed then, so release the slots of a model that has some.
        """
        _check_each_has_one(slots, ids)
        bound = self._bound(cache, slots)
        logits = bound.run(ids)
        _note(cache, slots, ids)
        return logits

    def step_best(
        self, cache: Cache, slots: Sequence[int], ids: Sequence[int] | Ids, count: int
    ) -> tuple[Logits, Ids | None]:
        """As `step`, of the `count` largest logits of each slot alone: (slots, count), falling, and their ids.

        All logits and None where a device has no better way, or equal ones may go on behind the last.
        """
        _check_each_has_one(slots, ids)
        bound = self._bound(cache, slots)
        found = bound.run_best(ids, count) if isinstance(bound, DeviceStep) else (bound.run(ids), None)
        _note(cache, slots, ids)
        return found

    def _bound(self, cache: Cache, slots: Sequence[int]) -> BoundStep | DeviceStep:
        """A step over `slots`, with room for one position more: the last one where it is the same."""
        for slot in slots:
            cache.reserve(slot, 1)
        first = cache.arrange(slots)
        bound, kind = cache.bound, self.step_kind
        if not isinstance(bound, kind) or bound.key != (id(self), cache.generation, first, len(slots)):
            bound = cache.bound = kind(self, cache, first, len(slots))
        return bound

    def _binding(self) -> Any:
        return self._opened().io_binding()

    def _opened(self, reads_only: bool = False) -> Any:
        """The session of the decoder's graph, or of the one that reads prompts."""
        session = self.prompts.session if reads_only and self.prompts else self._session
        if session is None:
            raise ClosedError("the model was closed: load it again")
        return session

    def _bind_cache(self, binding: Any, cache: Cache, row: int, rows: int) -> None:
        for entry, pointer in zip(self.manifest.cache, cache.pointers(row)):
            shape = (rows, entry.num_kv_heads, cache.capacity, entry.head_dim)
            kind = ELEMENT_TYPES[entry.dtype]
            binding.bind_input(entry.past, self.device, 0, kind, shape, pointer)
            binding.bind_output(entry.present, self.device, 0, kind, shape, pointer)
        for state, pointer in zip(self.manifest.states, cache.states.pointers(row)):
            kind = ELEMENT_TYPES[state.dtype]
            binding.bind_input(state.past, self.device, 0, kind, (rows, *state.shape), pointer)
            binding.bind_output(state.present, self.device, 0, kind, (rows, *state.shape), pointer)

    def _run(self, binding: Any, options: Any = None, reads_only: bool = False) -> None:
        """options: of a step that is recorded; without them nothing is."""
        session, recording = self._opened(reads_only), self.recording
        with self.turn:
            how = options or (recording.plain if recording else None)
            run_bound(session, binding, "the tokens given", self.device, how)


def _check_each_has_one(slots: Sequence[int], ids: Sequence[int] | Ids) -> None:
    if len(ids) != len(slots):
        raise InputError(f"expected an id for each of {len(slots)} slots, got {len(ids)}")


def _note(cache: Cache, slots: Sequence[int], ids: Sequence[int] | Ids) -> None:
    """The ids (slots,) of a step that was made belong to what the slots hold."""
    for slot, token in zip(slots, ids):
        cache.ids[slot].append(int(token))


def checked_ids(ids: Sequence[int] | Ids, vocab_size: int) -> Ids:
    """(n,) int64. Raises InputError for no ids, ids that are no whole numbers, or ids outside the vocabulary."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"expected a row of at least one id, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise InputError(f"expected ids that are whole numbers, got {array.dtype}")
    wrong = array[(array < 0) | (array >= vocab_size)]
    if wrong.size:
        raise InputError(f"ids must be from 0 to {vocab_size - 1}, the model's vocabulary; got {int(wrong[0])}")
    return np.ascontiguousarray(array, np.int64)


def without_cuda(manifest: Manifest, device: str) -> tuple[str, str]:
    """The device to open, and why it is not CUDA where `auto` was asked for a graph that CUDA would not run itself.

    onnxruntime would run such a node on the CPU without a word, with copies to and fro. For `cuda` a ProviderError.
    """
    fused = any(attention.operator == "GroupQueryAttention" for attention in manifest.attention)
    if device == "cpu" or manifest.dtype != "float32" or not fused:
        return device, ""
    if "CUDAExecutionProvider" not in listed_providers(onnxruntime()):  # opening it will say so
        return device, ""
    mend = "--dtype fp16, bf16 or --flavor standard" if manifest.weights is None else "--activations fp16 or bf16"
    why = f"CUDA has no float32 kernel of GroupQueryAttention: export with {mend}"
    if device == "auto":
        return "cpu", f"cpu: {why}"
    if device == "cuda":
        raise ProviderError(why)
    return device, ""


def check_runtime(manifest: Manifest) -> None:
    """Raises IncompatibleModelError where the installed onnxruntime is older than the graph needs."""
    wanted = manifest.requires.get("onnxruntime", "0")
    installed = version()
    needed = tuple(int(part) for part in wanted.split(".") if part.isdigit())
    if installed[: len(needed)] < needed:
        have = ".".join(map(str, installed))
        raise IncompatibleModelError(
            f"the graph needs onnxruntime {wanted} or newer, {have} is installed: pip install -U onnxruntime"
        )
