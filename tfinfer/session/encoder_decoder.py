"""Both graphs of an encoder-decoder: a source is encoded once into its slot, and every step reads it there.

What the encoder makes is copied once, when it is made. Prefill and steps bind it where it lies, as they do the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.errors import ClosedError, IncompatibleModelError, InputError, LengthError
from tfinfer.manifest import Manifest
from tfinfer.session.bound_step import BoundStep
from tfinfer.session.cache import Cache
from tfinfer.session.cross import Sources, sized
from tfinfer.session.decoder import Decoder, Ids, Logits, checked_ids
from tfinfer.session.device_step import DeviceStep
from tfinfer.session.encoder import Encoder
from tfinfer.session.failures import run_bound
from tfinfer.session.memory import ELEMENT_TYPES, Buffer
from tfinfer.session.settings import OnCpu


class EncoderDecoder(Decoder):
    """A decoder whose slots each have a source: `encode` gives it to one, before anything is prefilled into it.

    Several threads may use one EncoderDecoder at once, each with a cache of its own.
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
        super().__init__(manifest, folder, device=device, threads=threads, how=how, cuda_graph=cuda_graph)
        self.encoder = Encoder(manifest, folder, device=self.device, threads=threads, how=how)
        self.encoder.check_takes_texts()
        outputs = {(output.name, output.dtype) for output in self.encoder.graph.outputs}
        if missing := [spec.name for spec in self.cross if (spec.name, spec.dtype) not in outputs]:
            raise IncompatibleModelError(f"the decoder takes {', '.join(missing[:8])}, which the encoder does not make")

    def close(self) -> None:
        """Let both graphs go; calls after this raise ClosedError."""
        super().close()
        self.encoder.close()

    def open_cache(self, slots: int = 1, capacity: int = 256, source_capacity: int = 1) -> Cache:
        """An empty cache of `slots` sequences of up to `capacity` positions, from sources of `source_capacity`.

        Every step reads as many source positions as there is room for; for longer ones both grow.
        """
        manifest, longest = self.manifest, self.manifest.max_length
        room = min(source_capacity, manifest.max_source_length)
        sources = Sources(self.cross, self.memory, slots, room)
        specs, window = (manifest.cache, manifest.states), manifest.keeps_window
        return Cache(specs[0], self.memory, slots, min(capacity, longest), longest, specs[1], sources, window)

    def check_source(self, ids: Sequence[int] | Ids) -> Ids:
        """(n,) int64. Raises InputError as `check_ids`, and LengthError past the longest source."""
        array, longest = checked_ids(ids, self.manifest.source_vocab_size), self.manifest.max_source_length
        if len(array) > longest:
            raise LengthError(
                f"expected a source of at most {longest} tokens, the model's longest; got {len(array)}: shorten it"
            )
        return array

    # -- running ------------------------------------------------------------------------------------------------
    def encode(self, cache: Cache, slot: int, source_ids: Sequence[int] | Ids) -> None:
        """Run the encoder on one source and put what it makes into an empty slot.

        Raises InputError for wrong ids or a slot that holds positions of another source, LengthError for a source
        that is too long. Whatever is raised, the cache holds what it did.
        """
        ids = self.check_source(source_ids)
        sources, row = _sources(cache), cache.row(slot)
        if held := cache.length(slot):
            raise InputError(
                f"slot {slot} holds {held} positions already, which its source before has changed: rewind it to 0, or "
                "acquire another"
            )
        made = self._encoded(ids)
        if len(ids) > sources.capacity:
            cache.lay_out_sources(len(ids))
        sources.place(row, made, len(ids))

    def _encoded(self, ids: Ids) -> list[Buffer]:
        """What the encoder makes of ids (source,) for the decoder: (1, ...) each."""
        session, roles = self.encoder._session, self.encoder.roles
        if session is None:
            raise ClosedError("the model was closed: load it again")
        binding = session.io_binding()
        feeds = {
            roles.input_ids: ids[None],
            roles.attention_mask: np.ones((1, len(ids)), np.int64),
            roles.token_type_ids: np.zeros((1, len(ids)), np.int64),
        }
        for name, array in feeds.items():
            if name is not None:
                binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        made = [self.memory.allocate(sized(spec, len(ids)), spec.dtype) for spec in self.cross]
        for spec, buffer in zip(self.cross, made):
            kind = ELEMENT_TYPES[spec.dtype]
            binding.bind_output(spec.name, self.device, 0, kind, buffer.shape, buffer.pointer)
        run_bound(session, binding, f"a source of {len(ids)} tokens", self.device)
        return made

    def prefill(self, cache: Cache, slot: int, ids: Sequence[int] | Ids, *, keep: int = 1) -> Logits:
        """As `Decoder.prefill`, of a slot that has a source."""
        _check_have_sources(cache, [slot])
        return super().prefill(cache, slot, ids, keep=keep)

    def _bound(self, cache: Cache, slots: Sequence[int]) -> BoundStep | DeviceStep:
        """As `Decoder._bound`, of slots that all have a source; they may be of different lengths."""
        _check_have_sources(cache, slots)
        return super()._bound(cache, slots)

    def _bind_cache(self, binding: Any, cache: Cache, row: int, rows: int) -> None:
        super()._bind_cache(binding, cache, row, rows)
        sources = _sources(cache)
        names = (self.roles.source_mask, *(spec.name for spec in self.cross))
        for name, spec, shape, pointer in zip(names, sources.specs, sources.shapes(rows), sources.rows.pointers(row)):
            if name is not None:
                binding.bind_input(name, self.device, 0, ELEMENT_TYPES[spec.dtype], shape, pointer)


def _sources(cache: Cache) -> Sources:
    if cache.closed:
        raise ClosedError("the cache was closed: open another one")
    if cache.sources is None:
        raise InputError("this cache has no sources: open it with the open_cache of this encoder-decoder")
    return cache.sources


def _check_have_sources(cache: Cache, slots: Sequence[int]) -> None:
    marks = _sources(cache).marks
    for slot in slots:
        if not marks[cache.row(slot)]:
            raise InputError(f"slot {slot} has no source: encode one into it first")
