"""What released slots leave behind: it is there with its ids, or it is not found, whatever became of its row."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from remembering import KINDS, Remembering, hashed

import tfinfer
from tfinfer.adopt import adopt
from tfinfer.errors import InputError

HERE = Path(__file__).parent
VOCAB = 9
WAYS = ("acquire", "append", "fork", "copy", "release", "revive", "rewind", "keep", "arrange", "grow")
steps = st.lists(
    st.tuples(
        st.sampled_from(WAYS),
        st.integers(0, 9), st.integers(0, 9), st.integers(1, 40),
    ),
    max_size=40,
)  # fmt: skip


def check(decoder, cache):
    """Every slot that is live or left holds just what its ids say."""
    rows = [cache._row.get(slot, cache._left.get(slot)) for slot in (*cache.live, *cache.left)]
    assert sorted([*rows, *cache._free]) == list(range(cache.slots))
    assert cache.ids.keys() == {*cache.live, *cache.left}
    for slot, row in zip((*cache.live, *cache.left), rows):
        ids, gone = cache.ids[slot], int(cache.dropped[row])
        assert len(ids) == cache.lengths[row]
        for buffer in cache.buffers:
            assert (buffer.owner[row, :, : len(ids) - gone] == np.array(ids[gone:])[None, :, None]).all()
        for buffer in cache.states.buffers:
            assert buffer.owner[row] == hashed(ids)


def do(decoder, cache, what, one, other, count):
    live, left = cache.live, cache.left
    if what == "acquire" and len(live) < cache.slots:
        cache.acquire()
    elif what == "revive" and left:
        slot = left[one % len(left)]
        length = cache.reachable(slot, count)
        assert length <= count
        assert cache.revive(slot, length) == slot
        assert cache.length(slot) == length
    elif not live:
        return
    elif what == "append":
        decoder.prefill(cache, live[one % len(live)], [(one + 7 * i) % 5 for i in range(count)])
    elif what == "fork" and len(live) < cache.slots:
        cache.fork(live[one % len(live)])
    elif what == "copy" and len(live) > 1:
        source, target = live[one % len(live)], live[other % len(live)]
        end = min(count, cache.length(source))
        if source != target and cache.can_copy(source, end):
            cache.copy_positions(source, target, 0, end)
    elif what == "release":
        cache.release(live[one % len(live)])
    elif what == "rewind":
        slot = live[one % len(live)]
        cache.rewind(slot, cache.reachable(slot, count))
    elif what == "keep":
        cache.keep(live[one % len(live)])
    elif what == "arrange":
        cache.arrange([live[(one + i) % len(live)] for i in range(1 + other % len(live))])
    elif what == "grow":
        cache.grow(cache.capacity + 1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(steps)
def test_whatever_is_done_what_is_held_is_what_the_ids_say(kind, steps):
    decoder = Remembering(kind, VOCAB)
    cache = decoder.open_cache(3, 16)
    for step in steps:
        if cache.capacity < 300:
            do(decoder, cache, *step)
            check(decoder, cache)
    cache.close()
    assert (cache.live, cache.left, cache.ids) == ([], [], {})


@pytest.fixture(params=["in place", "concatenated"])
def filled(request, tmp_path):
    """A decoder, and a cache of two slots in which [1, 2, 3] was released."""
    folder = HERE / "tiny"
    if request.param == "concatenated":
        folder = Path(shutil.copytree(HERE / "tiny_foreign", tmp_path / "foreign"))
        adopt(folder)
    with tfinfer.load(folder, threads=1) as model:
        yield model.decoder, *released(model.decoder)


def released(decoder):
    cache = decoder.open_cache(2, 16)
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2, 3])
    cache.release(slot)
    return cache, slot


def test_a_released_slot_is_revived_once(filled):
    _, cache, slot = filled
    assert (cache.left, cache.live) == ([slot], [])
    with pytest.raises(InputError, match="not in use"):
        cache.length(slot)
    for length in (4, -1):
        with pytest.raises(InputError, match=f"slot {slot} cannot be revived with {length} positions"):
            cache.revive(slot, length)
    cache.revive(slot, 2)
    assert (cache.ids[slot], cache.length(slot), cache.left) == ([1, 2], 2, [])
    with pytest.raises(InputError, match="cannot be revived"):
        cache.revive(slot, 2)


def test_what_was_left_gives_way_to_those_who_need_its_place(filled):
    decoder, cache, _ = filled
    slots = [cache.acquire(), cache.acquire()]
    assert cache.left == []
    with pytest.raises(InputError, match="all 2 slots are in use"):
        cache.acquire()
    for one in slots:
        decoder.prefill(cache, one, [4])
        cache.release(one)
    assert cache.left == slots
    cache.acquire()
    assert len(cache.left) == 1


def test_nothing_is_left_where_that_is_wanted(filled):
    decoder, cache, _ = filled
    cache.forget_left()
    assert (cache.left, cache.ids) == ([], {})
    cache.leaves = False
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2])
    cache.release(slot)
    assert (cache.left, cache.ids) == ([], {})
    cache.leaves = True
    cache.release(cache.acquire())  # an empty one is nothing to come back to
    assert cache.left == []


def test_a_prefill_that_breaks_leaves_the_ids_that_were_held(filled, monkeypatch):
    decoder, cache, slot = filled
    cache.revive(slot, 3)
    monkeypatch.setattr("tfinfer.session.decoder.PREFILL_CHUNK", 2)
    append, calls = decoder._append, []

    def breaking(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return append(*arguments)

    monkeypatch.setattr(decoder, "_append", breaking)
    with pytest.raises(RuntimeError, match="broken"):
        decoder.prefill(cache, slot, [4, 5, 6, 7, 8])
    assert (cache.ids[slot], cache.length(slot)) == ([1, 2, 3], 3)


def test_no_more_than_a_few_kept_states_outlive_a_release():
    decoder = Remembering("states", VOCAB)
    cache = decoder.open_cache(1, 16)
    slot = cache.acquire()
    for _ in range(9):
        decoder.prefill(cache, slot, [1])
        cache.keep(slot)
    assert cache.reachable(slot, 2) == 2
    cache.release(slot)
    assert [cache.reachable(slot, n) for n in (2, 5, 6, 7, 9)] == [0, 0, 6, 7, 9]
