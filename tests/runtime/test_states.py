"""States of fixed size beside the growing cache: zeros at first, copied whole, and never taken back by a position."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tfinfer
from tfinfer.errors import ClosedError, IncompatibleModelError, InputError, LengthError
from tfinfer.manifest import CacheSpec, StateSpec, load_manifest
from tfinfer.proof.prove import verify_folder
from tfinfer.session.cache import Cache
from tfinfer.session.decoder import Decoder
from tfinfer.session.memory import HostMemory

FOLDER = Path(__file__).parent / "tiny_states"
SPECS = [CacheSpec("past.key", "present.key", 2, 4, "float32")]
STATES = [
    StateSpec("past_states.0", "present_states.0", (3, 2), "float32"),
    StateSpec("past_states.1", "present_states.1", (), "int64"),
]
STATE_BYTES = 3 * 2 * 4 + 8


@pytest.fixture(scope="module")
def model():
    """A layer of attention and one of linear attention (see tests/zoo/make_tiny_states.py)."""
    with tfinfer.load(FOLDER, threads=1) as loaded:
        yield loaded


@pytest.fixture
def cache():
    return Cache(SPECS, HostMemory(), 3, 10, longest=500, states=STATES)


def write(cache: Cache, slot: int, mark: int, length: int) -> None:
    """Let a slot hold `length` positions and states of a value of its own."""
    for buffer in cache.buffers:
        buffer.owner[cache.row(slot), :, :length] = mark
    for buffer in cache.states.buffers:
        buffer.owner[cache.row(slot)] = mark
    cache.lengths[cache.row(slot)] = length


def states(cache: Cache, slot: int) -> list[float]:
    """Every number in the states of a slot."""
    return [float(x) for buffer in cache.states.buffers for x in np.ravel(buffer.owner[cache.row(slot)])]


def filled(cache: Cache, slots: int = 3) -> list[int]:
    taken = [cache.acquire() for _ in range(slots)]
    for mark, slot in enumerate(taken, 1):
        write(cache, slot, mark, 2 * mark)
    return taken


# -- the cache ------------------------------------------------------------------------------------------------------
def test_a_slot_begins_with_zeros_whatever_its_row_held(cache):
    slot = cache.acquire()
    write(cache, slot, 5, 6)
    cache.release(slot)
    assert states(cache, cache.acquire()) == [0] * 7


def test_states_are_counted_and_growing_leaves_them_where_they_are(cache):
    without = Cache(SPECS, HostMemory(), 3, 10, longest=500)
    assert cache.nbytes - without.nbytes == 3 * STATE_BYTES
    slots = filled(cache)
    before = cache.states.pointers(1)
    cache.grow(300)
    assert cache.states.pointers(1) == before
    assert [states(cache, slot) for slot in slots] == [[mark] * 7 for mark in (1, 2, 3)]


def test_a_fork_has_the_states_and_then_its_own(cache):
    slot = cache.acquire()
    write(cache, slot, 5, 6)
    twin = cache.fork(slot)
    assert cache.moved == 6 * 2 * 4 * 4 + STATE_BYTES
    write(cache, slot, 1, 7)
    assert states(cache, twin) == [5] * 7
    assert cache.length(twin) == 6


def test_copied_positions_take_the_states_whole_and_must_be_all_there_are(cache):
    one, other, _ = filled(cache)
    write(cache, one, 9, 8)
    with pytest.raises(InputError, match="copy all, or prefill again"):
        cache.copy_positions(one, other, 2, 7)
    assert states(cache, other) == [2] * 7
    cache.copy_positions(one, other, 4, 8)
    assert states(cache, other) == [9] * 7


def test_states_move_with_their_slot(cache):
    one, other, third = filled(cache)
    assert cache.arrange([third, one, other]) == 0
    assert [states(cache, slot) for slot in (one, other, third)] == [[1] * 7, [2] * 7, [3] * 7]
    cache.release(one)  # row 1: third and other are no longer neighbours
    cache.arrange([third, other])
    assert [states(cache, slot) for slot in (other, third)] == [[2] * 7, [3] * 7]


def test_a_state_goes_back_to_the_beginning_or_not_at_all(cache):
    slot = filled(cache)[2]
    with pytest.raises(
        InputError, match=r"it can to 0: call keep\(slot\) where you may want to return to, or rewind it to 0"
    ):
        cache.rewind(slot, 3)
    assert (cache.length(slot), states(cache, slot)) == (6, [3] * 7)
    cache.rewind(slot, 6)
    assert (cache.length(slot), states(cache, slot)) == (6, [3] * 7)
    cache.rewind(slot, 0)
    assert (cache.length(slot), states(cache, slot)) == (0, [0] * 7)


def test_a_snapshot_is_gone_back_to(cache):
    slot = filled(cache)[1]
    snapshot = cache.snapshot(slot)
    write(cache, slot, 8, 9)
    cache.restore(slot, snapshot)
    assert (cache.length(slot), states(cache, slot)) == (4, [2] * 7)


def test_a_rewind_finds_what_was_kept_and_lets_go_of_what_lies_beyond(cache):
    slot = cache.acquire()
    for mark in (1, 2, 3):
        write(cache, slot, mark, 4 * mark)
        cache.keep(slot)
    write(cache, slot, 9, 20)
    cache.rewind(slot, 8)
    assert (cache.length(slot), states(cache, slot)) == (8, [2] * 7)
    write(cache, slot, 9, 16)
    with pytest.raises(InputError, match="cannot go back to 12; it can to 0, 4, 8"):
        cache.rewind(slot, 12)
    assert (cache.length(slot), states(cache, slot)) == (16, [9] * 7)
    cache.rewind(slot, 4)
    assert (cache.length(slot), states(cache, slot)) == (4, [1] * 7)


def test_what_was_kept_goes_with_the_slot_not_with_its_row(cache):
    one, other, third = filled(cache)
    cache.keep(one)
    write(cache, one, 7, 9)
    cache.arrange([third, one, other])
    cache.rewind(one, 2)
    assert [states(cache, slot) for slot in (one, other, third)] == [[1] * 7, [2] * 7, [3] * 7]
    cache.release(one)
    new = cache.acquire()
    write(cache, new, 8, 5)
    with pytest.raises(InputError, match="it can to 0:"):
        cache.rewind(new, 2)


def test_what_was_kept_is_gone_with_what_was_written_over(cache):
    """A slot that takes another's positions from the third on is no longer what it was at its sixth."""
    one, other = filled(cache)[:2]
    write(cache, other, 2, 3)
    cache.keep(other)
    write(cache, other, 2, 6)
    cache.keep(other)
    write(cache, one, 9, 8)
    cache.copy_positions(one, other, 3, 8)
    with pytest.raises(InputError, match="it can to 0, 3:"):
        cache.rewind(other, 6)
    cache.rewind(other, 3)
    assert states(cache, other) == [2] * 7


def test_keeping_without_states_costs_nothing_and_any_length_is_gone_back_to():
    cache = Cache(SPECS, HostMemory(), 1, 10, longest=500)
    slot = cache.acquire()
    cache.keep(slot)
    cache.lengths[cache.row(slot)] = 9
    cache.rewind(slot, 5)
    assert cache.length(slot) == 5


def test_a_cache_of_states_alone_is_a_cache_until_it_is_closed():
    cache = Cache([], HostMemory(), 2, 10, longest=500, states=STATES)
    slot = cache.acquire()
    assert cache.pointers(cache.row(slot)) == []
    assert not cache.closed
    cache.close()
    with pytest.raises(ClosedError, match="open another"):
        cache.pointers(0)


# -- a real graph ---------------------------------------------------------------------------------------------------
def test_the_folder_proves_itself(model):
    assert len(model.manifest.states) == 2
    assert model.manifest.cache
    verdict = verify_folder(model.decoder, FOLDER)
    assert verdict.passed, verdict.lines()


def test_a_prompt_may_come_in_any_pieces(model):
    ids, cache = list(range(1, 21)), model.decoder.open_cache(2, 64)
    expected = model.decoder.prefill(cache, cache.acquire(), ids, keep=20)
    slot = cache.acquire()
    got = [model.decoder.prefill(cache, slot, ids[a:b], keep=b - a) for a, b in itertools.pairwise((0, 1, 5, 6, 20))]
    np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-4)


def test_states_are_bound_in_place_and_no_step_copies_them(model):
    decoder, cache = model.decoder, model.decoder.open_cache(2, 64)
    slots = [cache.acquire(), cache.acquire()]
    for slot in slots:
        decoder.prefill(cache, slot, [1, 2, 3])
    decoder.step(cache, slots, [4, 5])
    bound, moved, before = cache.bound, cache.moved, states(cache, slots[0])
    for _ in range(10):
        decoder.step(cache, slots, [4, 5])
    assert cache.bound is bound
    assert cache.moved == moved
    assert states(cache, slots[0]) != before


def test_a_fork_goes_on_as_its_parent_would(model):
    decoder, cache = model.decoder, model.decoder.open_cache(3, 64)
    other, slot = cache.acquire(), cache.acquire()
    decoder.prefill(cache, other, [9])
    decoder.prefill(cache, slot, [1, 2, 3, 4])
    twin = cache.fork(slot)
    expected = decoder.step(cache, [slot], [7])[0].copy()
    decoder.step(cache, [other, slot], [3, 3])
    np.testing.assert_allclose(decoder.step(cache, [twin], [7])[0], expected, atol=1e-5)


def test_a_slot_goes_on_from_where_it_was_kept_as_if_nothing_had_followed(model):
    decoder, cache = model.decoder, model.decoder.open_cache(2, 64)
    slot, whole = cache.acquire(), cache.acquire()
    decoder.prefill(cache, slot, [1, 2, 3])
    cache.keep(slot)
    for _ in range(5):
        decoder.step(cache, [slot], [7])
    cache.rewind(slot, 3)
    expected = decoder.prefill(cache, whole, [1, 2, 3, 4, 5], keep=2)
    np.testing.assert_allclose(decoder.prefill(cache, slot, [4, 5], keep=2), expected, atol=1e-4)


def test_a_prefill_that_breaks_in_the_middle_is_undone(model, monkeypatch):
    monkeypatch.setattr("tfinfer.session.decoder.PREFILL_CHUNK", 4)
    decoder, cache = model.decoder, model.decoder.open_cache(2, 64)
    slot, whole = cache.acquire(), cache.acquire()
    decoder.prefill(cache, slot, [1, 2, 3])
    append, calls = decoder._append, []

    def breaking(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_append", breaking)
        with pytest.raises(RuntimeError, match="broken"):
            decoder.prefill(cache, slot, [4, 5, 6, 7, 8, 9])
    assert cache.length(slot) == 3
    expected = decoder.prefill(cache, whole, [1, 2, 3, 8])
    np.testing.assert_allclose(decoder.prefill(cache, slot, [8]), expected, atol=1e-4)


def test_a_request_that_is_refused_leaves_the_states(model):
    decoder, cache = model.decoder, model.decoder.open_cache(2, 64)
    slot, whole = cache.acquire(), cache.acquire()
    decoder.prefill(cache, slot, [1, 2])
    for wrong, error in (([], InputError), ([99], InputError), ([1] * 79, LengthError)):
        with pytest.raises(error):
            decoder.prefill(cache, slot, wrong)
    with pytest.raises(InputError, match="call keep"):
        cache.rewind(slot, 1)
    expected = decoder.prefill(cache, whole, [1, 2, 3])
    np.testing.assert_allclose(decoder.prefill(cache, slot, [3]), expected, atol=1e-4)


def test_a_batch_is_each_prompt_alone_and_a_pool_keeps_nothing(model):
    prompts = [[3], [5, 6, 7, 8, 9, 10], [20, 1]]
    for options in ({}, {"num_beams": 3}):
        alone = [model.generate(p, max_tokens=12, **options).token_ids for p in prompts]
        together = model.generate(prompts, max_tokens=12, **options)
        assert [c.token_ids for c in together] == alone
        assert len(set(alone)) == 3
        assert [c.token_ids for c in model.generate(prompts, max_tokens=12, **options)] == alone


def test_threads_get_what_each_would_get_alone(model):
    prompts = [[1 + i % 20, 2 + i % 3] * (1 + i % 4) for i in range(16)]
    expected = [model.generate(p, max_tokens=8).token_ids for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: model.generate(p, max_tokens=8).token_ids, prompts)) == expected


def test_a_graph_without_the_states_of_the_manifest_is_refused(tmp_path):
    data = json.loads((FOLDER / "tfinfer.json").read_text())
    data["states"][0]["past"] = "past_states.7"
    (tmp_path / "tfinfer.json").write_text(json.dumps(data))
    with pytest.raises(IncompatibleModelError, match=r"disagree on past_states"):
        Decoder(load_manifest(tmp_path), FOLDER)
