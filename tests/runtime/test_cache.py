"""The cache of slots: what each slot holds must survive whatever happens to the others."""

import numpy as np
import pytest

from tfinfer.errors import InputError, LengthError
from tfinfer.manifest import CacheSpec
from tfinfer.session.cache import BLOCK, Cache
from tfinfer.session.memory import HostMemory

SPECS = [
    CacheSpec("past.key", "present.key", 2, 4, "float32"),
    CacheSpec("past.value", "present.value", 2, 3, "float16"),
]


@pytest.fixture
def cache():
    return Cache(SPECS, HostMemory(), slots=3, capacity=10, longest=500)


def write(cache: Cache, slot: int, mark: float, length: int) -> None:
    """Let a slot hold `length` positions of a value of its own."""
    for buffer in cache.buffers:
        buffer.owner[cache.row(slot), :, :length] = mark
    cache.lengths[cache.row(slot)] = length


def holds(cache: Cache, slot: int, mark: float, length: int) -> bool:
    rows = [buffer.owner[cache.row(slot), :, :length] for buffer in cache.buffers]
    return cache.length(slot) == length and all((row == mark).all() for row in rows)


def test_capacity_is_whole_blocks_but_never_past_the_longest_length(cache):
    assert cache.capacity == BLOCK
    assert Cache(SPECS, HostMemory(), 1, 5, longest=20).capacity == 20


def test_nbytes_counts_every_buffer(cache):
    assert cache.nbytes == 3 * 2 * BLOCK * (4 * 4 + 3 * 2)


def test_growing_keeps_what_every_slot_holds(cache):
    slots = [cache.acquire() for _ in range(3)]
    for mark, slot in enumerate(slots, 1):
        write(cache, slot, mark, 7 * mark)
    cache.reserve(slots[2], 200)
    assert cache.capacity >= 221
    assert all(holds(cache, slot, mark, 7 * mark) for mark, slot in enumerate(slots, 1))


def test_growing_changes_the_generation_so_that_no_old_pointer_is_used(cache):
    before = cache.generation, cache.pointers(0)
    cache.grow(300)
    assert cache.generation != before[0]
    assert cache.pointers(0) != before[1]


def test_fork_holds_the_same_and_then_goes_its_own_way(cache):
    slot = cache.acquire()
    write(cache, slot, 5, 6)
    twin = cache.fork(slot)
    write(cache, slot, 1, 9)
    assert holds(cache, twin, 5, 6)
    assert holds(cache, slot, 1, 9)


def test_rewind_forgets_the_end_alone(cache):
    slot = cache.acquire()
    write(cache, slot, 5, 6)
    cache.rewind(slot, 2)
    assert holds(cache, slot, 5, 2)
    with pytest.raises(InputError, match="cannot rewind"):
        cache.rewind(slot, 3)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_hole_left_by_a_released_slot_is_closed_before_a_step(cache, gone):
    slots = [cache.acquire() for _ in range(3)]
    for mark, slot in enumerate(slots, 1):
        write(cache, slot, mark, mark)
    cache.release(slots[gone])
    rest = [slot for slot in slots if slot != slots[gone]]
    first = cache.arrange(rest)
    assert [cache.row(slot) for slot in rest] == [first, first + 1]
    assert all(holds(cache, slot, slots.index(slot) + 1, slots.index(slot) + 1) for slot in rest)


def test_slots_asked_for_in_another_order_change_places(cache):
    slots = [cache.acquire() for _ in range(3)]
    for mark, slot in enumerate(slots, 1):
        write(cache, slot, mark, mark)
    order = [slots[2], slots[0], slots[1]]
    assert cache.arrange(order) == 0
    assert [cache.row(slot) for slot in order] == [0, 1, 2]
    assert all(holds(cache, slot, mark, mark) for mark, slot in enumerate(slots, 1))


def test_an_exchange_of_rows_copies_no_more_than_they_hold(cache):
    slots = [cache.acquire() for _ in range(2)]
    write(cache, slots[0], 1, 3)
    write(cache, slots[1], 2, 5)
    cache.arrange(slots[::-1])
    assert cache.moved == 3 * 5 * 2 * (4 * 4 + 3 * 2)
    assert all(holds(cache, slot, mark, length) for slot, mark, length in zip(slots, (1, 2), (3, 5)))


def test_nothing_moves_where_the_order_is_right_already(cache):
    slots = [cache.acquire() for _ in range(3)]
    assert cache.arrange(slots[1:]) == 1


def test_a_released_slot_is_refused_and_a_new_one_is_empty(cache):
    slot = cache.acquire()
    write(cache, slot, 5, 6)
    cache.release(slot)
    with pytest.raises(InputError, match="not in use"):
        cache.length(slot)
    assert cache.length(cache.acquire()) == 0


def test_more_slots_than_there_are_is_an_error_that_says_what_to_do(cache):
    for _ in range(3):
        cache.acquire()
    with pytest.raises(InputError, match="all 3 slots are in use"):
        cache.acquire()


def test_the_longest_length_cannot_be_passed(cache):
    slot = cache.acquire()
    write(cache, slot, 1, 60)
    with pytest.raises(LengthError, match="longest length, 500"):
        cache.reserve(slot, 441)
    assert holds(cache, slot, 1, 60)
    with pytest.raises(LengthError):
        cache.grow(501)


def test_pointers_are_those_of_the_rows(cache):
    for buffer, pointer in zip(cache.buffers, cache.pointers(2)):
        assert pointer == buffer.owner[2].ctypes.data


def test_lengths_of_two_rows_change_places_with_them(cache):
    one, other = cache.acquire(), cache.acquire()
    write(cache, one, 1, 3)
    write(cache, other, 2, 8)
    cache.arrange([other, one])
    assert cache.lengths.tolist()[:2] == [8, 3]
    assert np.array_equal([cache.length(one), cache.length(other)], [3, 8])
