"""A step on a device: its inputs and its logits lie there, at places that never change.

All small inputs go over in one copy. With a recording every shape is that of the whole buffers, so that nothing but
values differs from one step to the next; the mask says how long each row is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tfinfer.session.memory import ELEMENT_TYPES, Buffer
from tfinfer.session.recorded import Recording, options
from tfinfer.session.select import Selection

if TYPE_CHECKING:
    from tfinfer.session.cache import Cache
    from tfinfer.session.decoder import Decoder

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

CHECKED = 4  # first runs with a number; onnxruntime records in the third at the latest, so the last is a replay
PLAIN_STEPS = 8  # before one is recorded, which takes as long as a few: rows that end soon are not worth it
CLOSE = 1e-2  # how far logits of a recording may be from those of a plain step, as a share of the largest
SIZE = 8  # bytes of an int64


class DeviceStep:
    """The inputs and outputs of a step over `rows` neighbouring rows, bound once and changed in place."""

    def __init__(self, decoder: Decoder, cache: Cache, first: int, rows: int) -> None:
        self.key = (id(decoder), cache.generation, first, rows)
        self.decoder, self.memory, self.roles = decoder, decoder.memory, decoder.roles
        self.lengths = cache.lengths[first : first + rows]  # views: the cache's own
        self.dropped = cache.dropped[first : first + rows] if cache.window is not None else None
        self.rows, self.capacity = rows, cache.capacity
        self.staged = np.zeros(rows * (2 + self.capacity), np.int64)  # ids, positions, mask, on the host
        self.ids, self.positions = self.staged[:rows, None], self.staged[rows : 2 * rows, None]
        self.columns = np.arange(self.capacity)
        self.inputs = self.memory.allocate((self.staged.size,), "int64")
        self.source = Buffer(self.staged.ctypes.data, self.staged.shape, "int64", self.staged.nbytes, self.staged)
        dtype = str(decoder.logits_dtype)
        self.logits = self.memory.allocate((rows, 1, decoder.manifest.num_logits), dtype)
        self.selections: dict[int, Selection] = {}
        self.recorder = _Recorder(decoder.recording) if decoder.recording is not None else None
        self.binding = decoder._binding()
        self.total = 0
        self._bind(cache, first)

    def _bind(self, cache: Cache, first: int) -> None:
        for name, place in ((self.roles.input_ids, 0), (self.roles.position_ids, self.rows)):
            if name is not None:
                self._bind_input(name, (self.rows, 1), place)
        if self.decoder.keep_required:
            self.decoder._bind_keep(self.binding, 1)
        kind = ELEMENT_TYPES[self.logits.dtype]
        self.binding.bind_output(
            self.roles.logits, self.decoder.device, 0, kind, self.logits.shape, self.logits.pointer
        )
        self.decoder._bind_cache(self.binding, cache, first, self.rows)

    def _bind_input(self, name: str, shape: tuple[int, int], place: int) -> None:
        kind, pointer = ELEMENT_TYPES["int64"], self.inputs.pointer + place * SIZE
        self.binding.bind_input(name, self.decoder.device, 0, kind, shape, pointer)

    def run(self, ids: Sequence[int] | Ids) -> Logits:
        """(rows, num_logits)."""
        with self.decoder.turn:
            self._compute(ids)
            return self._all_logits()

    def run_best(self, ids: Sequence[int] | Ids, count: int) -> tuple[Logits, Ids | None]:
        """The `count` largest logits of each row and their ids; where that cannot be told, all of them and None."""
        selecting = self.decoder.selecting
        with self.decoder.turn:
            self._compute(ids)
            found = None
            if selecting is not None and selecting.takes(count):
                if count not in self.selections:
                    self.selections[count] = selecting.bind(self.logits, count)
                found = self.selections[count].run()
            return (self._all_logits(), None) if found is None else found

    def _all_logits(self) -> Logits:
        return self.memory.read(self.logits)[:, 0].astype(np.float32, copy=False)

    def _compute(self, ids: Sequence[int] | Ids) -> None:
        held = self.lengths if self.dropped is None else self.lengths - self.dropped  # positions in the buffers
        total = self.capacity if self.recorder is not None else int(held.max()) + 1
        self.ids[:, 0], self.positions[:, 0] = ids, self.lengths
        mask = self.staged[2 * self.rows :][: self.rows * total].reshape(self.rows, total)
        np.less_equal(self.columns[:total], held[:, None], out=mask)
        self.memory.copy(self.inputs, 0, self.source, 0, (2 + total) * self.rows * SIZE)
        if total != self.total:
            self._bind_input(self.roles.attention_mask, (self.rows, total), 2 * self.rows)
            self.total = total
        self._run()
        self.lengths += 1

    def _run(self) -> None:
        run = self.decoder._run
        if self.recorder is None:
            run(self.binding)
            return
        self.recorder.run(lambda how: run(self.binding, how), self._all_logits)


class _Recorder:
    """Decides for one step which of its runs are plain, and compares the first others with plain ones."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.runs = recording, 0
        self.options: Any = None
        self.thread = threading.get_ident()

    def run(self, run: Any, read: Any) -> None:
        """run: given RunOptions. read: a copy of the logits it made."""
        recording, here = self.recording, threading.get_ident()
        if here != self.thread:  # onnxruntime keeps a recording for the thread that made it
            self.thread, self.runs, self.options = here, 0, None
        self.runs += 1
        if recording.off or self.runs <= PLAIN_STEPS:
            run(recording.plain)
            return
        if self.options is None:
            number = recording.new()
            self.options = options(number)
            weakref.finalize(self, recording.release, number).atexit = False
        run(self.options)
        if self.runs <= PLAIN_STEPS + CHECKED:
            self._compare(run, read)

    def _compare(self, run: Any, read: Any) -> None:
        """A step repeated writes the same keys and values to the same place, so it can be run twice."""
        found = read()
        run(self.recording.plain)
        expected = read()
        largest = float(np.abs(expected).max())
        if np.isfinite(largest) and not np.allclose(found, expected, rtol=0, atol=CLOSE * largest):
            worst = float(np.abs(found - expected).max())
            self.recording.refuse(f"a recorded step gave logits that differ from a plain one's by {worst:.3g}")
