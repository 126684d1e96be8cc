"""Large pages for packed weights: which memory is the session's own, and that nothing else is touched."""

import mmap

import pytest

import tfinfer
from tfinfer.session.pages import LARGE, LEAST, enlarge, enlarge_meanwhile, grown, own_memory

MAPS = """\
00400000-00600000 r-xp 00000000 fe:00 12 /usr/bin/python
00a00000-00c00000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
7f0000400000-7f0000600000 rw-p 00000000 fe:00 12 /usr/lib/library.so
7f0000600000-7f0000800000 r--p 00000000 00:00 0
7f0000800000-7f0000a00000 rw-s 00000000 00:01 3 /dev/shm/shared
7ffe00000000-7ffe00200000 rw-p 00000000 00:00 0 [stack]
"""


def system(root, enabled="always [madvise] never", maps=MAPS):
    folder = root / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text(enabled)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/maps").write_text(maps)
    return root


def test_files_stacks_and_what_is_shared_or_read_only_are_not_the_sessions_own(tmp_path):
    assert own_memory(system(tmp_path)) == [(0xA00000, 0xC00000), (0x7F0000000000, 0x7F0000400000)]


def test_a_system_that_wants_no_large_pages_gets_none(tmp_path):
    assert own_memory(system(tmp_path, "always madvise [never]")) == []


def test_a_system_without_them_is_left_alone(tmp_path):
    assert own_memory(tmp_path) == []
    assert enlarge([], []) == 0


@pytest.mark.parametrize(
    ("before", "after", "new"),
    [
        ([], [(0, 8)], [(0, 8)]),
        ([(0, 8)], [(0, 8)], []),
        ([(0, 4)], [(0, 8)], [(4, 8)]),  # a heap that grew
        ([(2, 4), (5, 6)], [(0, 8)], [(0, 2), (4, 5), (6, 8)]),  # one range where there were several
        ([(0, 4), (6, 9)], [(2, 7)], [(4, 6)]),
        ([(0, 2), (20, 30)], [(4, 6), (10, 25)], [(4, 6), (10, 20)]),
        ([(0, 8)], [(2, 4)], []),  # given back in part
    ],
)
def test_what_came_is_told_from_what_was_there(before, after, new):
    assert list(grown(before, after)) == new


def test_memory_that_moves_while_it_is_written_keeps_what_is_in_it():
    before = own_memory()
    with mmap.mmap(-1, 8 * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(8 * LARGE)
        thread = enlarge_meanwhile(before, own_memory())
        for place in range(0, 8 * LARGE, 4096):
            memory[place] = place // 4096 % 256
        thread.join()
        assert memory[::4096] == bytes(place % 256 for place in range(8 * LARGE // 4096))


def test_memory_that_moves_keeps_what_is_in_it():
    before = own_memory()
    with mmap.mmap(-1, 8 * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(range(256)) * (8 * LARGE // 256)
        offered = enlarge(before, own_memory())
        assert offered >= 7 * LARGE or not before
        assert memory[:] == bytes(range(256)) * (8 * LARGE // 256)


def test_ranges_within_a_page_are_not_offered():
    assert enlarge([], [(LARGE + 1, 2 * LARGE - 1)]) == 0


@pytest.mark.parametrize("least", [0, LEAST])
def test_a_decoder_of_some_size_offers_what_opening_it_took(tiny, monkeypatch, least):
    asked = []
    monkeypatch.setattr("tfinfer.session.decoder.LEAST", least)
    monkeypatch.setattr("tfinfer.session.decoder.own_memory", lambda: [(0, len(asked) * LARGE)])
    monkeypatch.setattr("tfinfer.session.decoder.enlarge_meanwhile", lambda *ranges: asked.append(ranges))
    with tfinfer.load(tiny, threads=1) as model:
        assert asked == ([] if least else [([(0, 0)], [(0, 0)])])
        assert model.generate([1, 2], max_tokens=2, stop_ids=[]).token_ids
