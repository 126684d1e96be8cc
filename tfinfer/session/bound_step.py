"""A step on the CPU: its inputs and its logits lie at places that are bound once.

Behind a step the processor's caches hold weights, so all code that runs between two steps comes from memory: an
addition by numpy, 1 microsecond otherwise, takes 20 to 50. So the few numbers of a step go through memoryviews, and
the masks, whose shape is another each time, are made several at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tfinfer.session.failures import run_bound
from tfinfer.session.ort import onnxruntime

if TYPE_CHECKING:
    from tfinfer.session.cache import Cache
    from tfinfer.session.decoder import Decoder

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

AHEAD = 32  # masks that are made at once


class BoundStep:
    """The inputs and outputs of a step over `rows` neighbouring rows, bound once and changed in place."""

    def __init__(self, decoder: Decoder, cache: Cache, first: int, rows: int) -> None:
        self.key = (id(decoder), cache.generation, first, rows)
        self.decoder, self.rows = decoder, rows
        self.lengths = cache.held[first : first + rows]  # views: the cache's own
        self.dropped = cache.gone[first : first + rows]
        self._ids, self._positions = np.zeros((rows, 1), np.int64), np.zeros((rows, 1), np.int64)
        self.ids, self.positions = self._ids[:, 0].data, self._positions[:, 0].data
        self.mask = np.ones(rows * cache.capacity, np.int64)
        self.masks: dict[int, Any] = {}  # by the positions that each is over, views of `mask`
        self.columns = np.arange(cache.capacity)
        self._logits = np.empty((rows, 1, decoder.manifest.num_logits), decoder.logits_dtype)
        self.logits = self._logits[:, 0]
        self.narrow = self.logits.dtype != np.float32
        self.binding = decoder._binding()
        self._bind(cache, first)

    def _bind(self, cache: Cache, first: int) -> None:
        decoder, roles = self.decoder, self.decoder.roles
        for name, array in ((roles.input_ids, self._ids), (roles.position_ids, self._positions)):
            if name is not None:
                self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        if decoder.keep_required:
            decoder._bind_keep(self.binding, 1)
        shape, place = self._logits.shape, self._logits.ctypes.data
        self.binding.bind_output(roles.logits, "cpu", 0, decoder.logits_dtype, shape, place)
        decoder._bind_cache(self.binding, cache, first, self.rows)

    def run(self, ids: Sequence[int] | Ids) -> Logits:
        """(rows, num_logits), valid until the next run. ids: (rows,)."""
        lengths, rows, total = self.lengths, self.rows, 0
        for row, token in enumerate(ids):
            self.ids[row] = token
            self.positions[row] = length = lengths[row]
            total = max(total, length - self.dropped[row] + 1)  # with its own, positions in the buffers
        if rows > 1:
            self._write_mask(total)
        if total not in self.masks:
            self._shape_masks(total)
        self.binding.bind_ortvalue_input(self.decoder.roles.attention_mask, self.masks[total])
        run_bound(self.decoder._opened(), self.binding, "the tokens given", "cpu")
        for row in range(rows):
            lengths[row] += 1
        return self.logits.astype(np.float32) if self.narrow else self.logits

    def _write_mask(self, total: int) -> None:
        held = np.array([length - gone for length, gone in zip(self.lengths, self.dropped)])
        mask = self.mask[: self.rows * total].reshape(self.rows, total)
        np.less_equal(self.columns[:total], held[:, None], out=mask)

    def _shape_masks(self, total: int) -> None:
        rows, last = self.rows, len(self.columns)
        views = [self.mask[: rows * n].reshape(rows, n) for n in range(total, min(total + AHEAD, last + 1))]
        self.masks = {view.shape[1]: onnxruntime().OrtValue.ortvalue_from_numpy(view) for view in views}
