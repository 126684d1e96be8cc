"""A decoder that computes from what stands in the cache, so that a wrong copy, length or state shows in its tokens."""

from dataclasses import replace

import numpy as np

from tfinfer.manifest import CacheSpec, StateSpec
from tfinfer.session.cache import Cache
from tfinfer.session.memory import HostMemory

SPECS = [
    CacheSpec("past.key", "present.key", 2, 3, "float32"),
    CacheSpec("past.value", "present.value", 1, 1, "float16"),
]
STATES = [StateSpec("past_states.0", "present_states.0", (), "int64")]
LONGEST, WINDOW, IDS = 400, 5, 5
KINDS = {"positions": (False, None), "states": (True, None), "window": (False, WINDOW), "both": (True, WINDOW)}


def hashed(ids):
    """What a state holds of all ids so far."""
    state = 0
    for token in ids:
        state = (31 * state + token + 1) % 1_000_003
    return state


def logits_after(ids, states, window, vocab):
    seen = ids if window is None else ids[-window:]
    seed = [len(ids), hashed(ids) if states else 0, *seen]
    logits = np.full(vocab, -50, np.float32)
    logits[:IDS] = np.random.default_rng(seed).normal(0, 2, IDS)
    return logits


def greedy(kind, ids, count, vocab=IDS):
    """The tokens that follow, computed from the ids alone."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_after(ids, *KINDS[kind], vocab).argmax()))
    return tuple(ids[len(ids) - count :])


class Remembering:
    """Has what generation needs of a decoder; `fails` says before which token it breaks, `ran` how many it has run."""

    def __init__(self, kind, vocab):
        self.states, self.window = KINDS[kind]
        self.vocab, self.ran, self.fails = vocab, 0, None

    def open_cache(self, slots=1, capacity=64):
        states = STATES if self.states else ()
        return Cache(SPECS, HostMemory(), slots, capacity, LONGEST, states, window=self.window)

    def described(self, manifest):
        """A manifest that says what this decoder's cache holds."""
        states = tuple(STATES) if self.states else ()
        return replace(manifest, cache=tuple(SPECS), states=states, keeps_window=self.window, max_length=LONGEST)

    def check_ids(self, ids):
        return np.asarray(ids, np.int64)

    def prefill(self, cache, slot, ids, keep=1):
        assert len(ids)
        for token in ids:
            cache.reserve(slot, 1)
            self._write(cache, cache.row(slot), token)
            cache.ids[slot].append(int(token))
        return self._read(cache, cache.row(slot))[None]

    def step(self, cache, slots, ids):
        for slot in slots:
            cache.reserve(slot, 1)
        first = cache.arrange(slots)
        for place, (slot, token) in enumerate(zip(slots, ids.tolist())):
            self._write(cache, first + place, token)
            cache.ids[slot].append(token)
        return np.stack([self._read(cache, first + place) for place in range(len(slots))])

    def _write(self, cache, row, token):
        if self.fails is not None and self.ran >= self.fails:
            raise RuntimeError("broken")
        self.ran += 1
        for buffer in cache.buffers:
            buffer.owner[row, :, cache.lengths[row] - cache.dropped[row]] = token
        for buffer in cache.states.buffers:
            buffer.owner[row] = (31 * buffer.owner[row] + token + 1) % 1_000_003
        cache.lengths[row] += 1

    def _read(self, cache, row):
        """Logits of what stands there: nothing is taken from `cache.ids`."""
        length, there = int(cache.lengths[row]), int(cache.lengths[row] - cache.dropped[row])
        seen = min(there, there if self.window is None else self.window)
        keys, values = (buffer.owner[row, :, there - seen : there] for buffer in cache.buffers)
        history = keys[0, :, 0].astype(int).tolist()
        for array in (keys, values):  # every head and every channel of both buffers
            assert (array == np.array(history)[None, :, None]).all()
        state = int(cache.states.buffers[0].owner[row]) if self.states else 0
        logits = np.full(self.vocab, -50, np.float32)
        logits[:IDS] = np.random.default_rng([length, state, *history]).normal(0, 2, IDS)
        return logits
