"""The buffers that hold what the encoder made: each source in its row, in any layout, wherever its slot goes."""

import numpy as np
import pytest

from tfinfer.errors import InputError
from tfinfer.manifest import CacheSpec, CrossSpec
from tfinfer.session.cache import Cache
from tfinfer.session.cross import Sources
from tfinfer.session.memory import HostMemory

CROSS = [
    CrossSpec("middle", "float32", ("batch", 2, "source", 3)),
    CrossSpec("last", "bool", ("batch", 1, 1, "source")),
    CrossSpec("first", "int64", ("batch", "source", 5)),
]


def made(length: int, mark: int):
    """What an encoder might make: every number says where it stands in its source."""
    memory, buffers, arrays = HostMemory(), [], []
    for spec in CROSS:
        shape = [{"batch": 1, "source": length}.get(size, size) for size in spec.shape]
        array = np.zeros(shape, spec.dtype) + (mark + np.arange(np.prod(shape))).reshape(shape).astype(spec.dtype)
        buffers.append(memory.allocate(tuple(shape), spec.dtype))
        buffers[-1].owner[:] = array
        arrays.append(array)
    return buffers, arrays


def check(sources: Sources, row: int, arrays, length: int) -> None:
    mask, *placed = (buffer.owner[row] for buffer in sources.rows.buffers)
    assert mask.tolist() == [1] * length + [0] * (sources.capacity - length)
    for spec, found, array in zip(CROSS, placed, arrays):
        found = np.moveaxis(found, spec.shape.index("source") - 1, 0)
        np.testing.assert_array_equal(found[:length], np.moveaxis(array[0], spec.shape.index("source") - 1, 0))
        assert not found[length:].any()


def test_a_source_is_placed_wherever_its_axis_stands_and_zeros_follow():
    sources = Sources(CROSS, HostMemory(), 3, 7)
    for row, length in enumerate((4, 7, 1)):
        sources.place(row, made(6, 50)[0], 6)  # what was there before must not show
        buffers, arrays = made(length, row)
        sources.place(row, buffers, length)
        check(sources, row, arrays, length)
    assert sources.shapes(2) == [(2, 7), (2, 2, 7, 3), (2, 1, 1, 7), (2, 7, 5)]


def test_growing_keeps_every_source_and_shrinking_waits_until_none_is_there():
    sources = Sources(CROSS, HostMemory(), 2, 3)
    arrays = []
    for row, length in enumerate((3, 2)):
        buffers, array = made(length, 9 * row)
        sources.place(row, buffers, length)
        arrays.append(array)
    assert sources.lay_out(8)
    for row, length in enumerate((3, 2)):
        check(sources, row, arrays[row], length)
    assert not sources.lay_out(8)
    with pytest.raises(InputError, match="in use"):
        sources.lay_out(5)
    sources.forget(0)
    sources.forget(1)
    assert sources.lay_out(5)
    assert sources.capacity == 5


def test_sources_go_where_their_slots_go():
    memory = HostMemory()
    spec = CacheSpec("past", "present", 1, 2, "float32")
    cache = Cache([spec], memory, 3, 8, longest=64, sources=Sources(CROSS, memory, 3, 4))
    slots, arrays = [cache.acquire() for _ in range(3)], []
    for number, slot in enumerate(slots):
        buffers, array = made(number + 2, number)
        cache.sources.place(cache.row(slot), buffers, number + 2)
        arrays.append(array)
    cache.arrange([slots[2], slots[0], slots[1]])
    for number, slot in enumerate(slots):
        check(cache.sources, cache.row(slot), arrays[number], number + 2)
    cache.release(slots[0])
    cache.arrange([slots[2], slots[1]])
    twin = cache.fork(slots[1])
    for slot, number in ((slots[1], 1), (slots[2], 2), (twin, 1)):
        check(cache.sources, cache.row(slot), arrays[number], number + 2)


def test_a_twin_has_its_source_already():
    """Beams of one prompt are copied over each other all the time; their sources are the same."""
    cache = Cache([], HostMemory(), 2, 8, longest=64, sources=Sources(CROSS, HostMemory(), 2, 4))
    slot = cache.acquire()
    cache.sources.place(cache.row(slot), made(3, 1)[0], 3)
    twin, size = cache.fork(slot), cache.sources.nbytes // 2
    assert cache.moved == size
    cache.copy_positions(slot, twin, 0, 0)
    assert cache.moved == size
    cache.release(twin)
    assert cache.fork(slot) != twin
    assert cache.moved == 2 * size
