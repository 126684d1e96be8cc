"""A conversation on disk: gone on with as if nothing had happened, or refused."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tfinfer
from tfinfer.adopt import adopt
from tfinfer.errors import SnapshotError, TfinferError
from tfinfer.integrity import fingerprint
from tfinfer.manifest import CacheSpec, StateSpec
from tfinfer.session.cache import Cache
from tfinfer.session.memory import HostMemory
from tfinfer.session.snapshots import DIGEST, LENGTH, MARK, read_snapshot, write_snapshot

HERE = Path(__file__).parent
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def saved(model, tmp_path):
    """A conversation of 9 ids, of which 8 are in the cache, and its file."""
    chat = model.conversation()
    chat.generate([1, 2, 3, 4, 5], max_tokens=4, stop_ids=[])
    chat.save(tmp_path / "chat")
    return chat, tmp_path / "chat"


def rewritten(path, **changes):
    """The file with another header, its sum put right: what only the checks of the header can refuse."""
    data = path.read_bytes()[:-DIGEST]
    at = len(MARK) + LENGTH
    size = int.from_bytes(data[len(MARK) : at], "little")
    head = json.dumps({**json.loads(data[at : at + size]), **changes}).encode()
    data = MARK + len(head).to_bytes(LENGTH, "little") + head + data[at + size :]
    path.write_bytes(data + hashlib.sha256(data).digest())


# -- round trips ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny", "tiny_states", "tiny_cache8", "tiny_foreign"])
def test_what_was_saved_goes_on_in_another_session(name, tmp_path):
    folder = Path(shutil.copytree(HERE / name, tmp_path / "folder"))
    if name == "tiny_foreign":
        adopt(folder)
    with tfinfer.load(folder, threads=1) as model, model.conversation() as chat:
        chat.generate([1 + i % 9 for i in range(20)], max_tokens=6, stop_ids=[])
        chat.save(tmp_path / "chat")
        ids, expected = chat.ids, chat.generate([3, 4], max_tokens=6, stop_ids=[])
    assert os.listdir(tmp_path) in (["chat", "folder"], ["folder", "chat"])
    with tfinfer.load(folder, threads=1) as model, model.conversation(tmp_path / "chat") as chat:
        assert chat.ids == ids
        got = chat.generate([3, 4], max_tokens=6, stop_ids=[])
        assert (got.token_ids, got.usage) == (expected.token_ids, expected.usage)
        assert got.usage.reused_tokens == len(ids) - 1
        chat.save(tmp_path / "chat")  # over the one before
        assert model.conversation(tmp_path / "chat").ids == chat.ids


specs = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from(["float32", "float16", "bfloat16", "int8"])),
    max_size=3,
)


@many
@given(specs, st.lists(st.lists(st.integers(1, 3), max_size=2), max_size=2), st.integers(0, 90), st.integers(0, 3))
def test_any_cache_comes_back_as_it_was(model, tmp_path, specs, states, length, unfed):
    assume(specs or states)
    manifest = dataclasses.replace(
        model.manifest,
        cache=tuple(CacheSpec(f"p{i}", f"q{i}", *spec) for i, spec in enumerate(specs)),
        states=tuple(StateSpec(f"s{i}", f"t{i}", tuple(shape), "float32") for i, shape in enumerate(states)),
    )

    def cache(slots, capacity):
        return Cache(manifest.cache, HostMemory(), slots, capacity, manifest.max_length, manifest.states)

    one, other, rng = cache(2, 96), cache(3, 1), np.random.default_rng(length)
    for buffer in (*one.buffers, *one.states.buffers):
        buffer.owner[...] = rng.integers(0, 99, buffer.owner.shape)
    one.acquire()
    slot = one.acquire()
    row = one.row(slot)
    one.lengths[row], one.ids[slot] = length, [1 + n % 7 for n in range(length)]
    for buffer in one.states.buffers:
        buffer.owner[row] = 5
    ids = one.ids[slot] + [9] * unfed
    write_snapshot(tmp_path / "chat", manifest, ids, one.contents(slot))
    read, contents = read_snapshot(tmp_path / "chat", manifest)
    assert read == ids
    if not length:
        assert contents.ids == ()
        return
    other.acquire()
    twin = other.put(contents)
    assert (other.length(twin), other.ids[twin]) == (length, one.ids[slot])
    for mine, its in zip(one.buffers, other.buffers):
        assert (mine.owner[row, :, :length] == its.owner[other.row(twin), :, :length]).all()
    for mine, its in zip(one.states.buffers, other.states.buffers):
        assert (mine.owner[row] == its.owner[other.row(twin)]).all()


def test_an_empty_conversation_is_one_too(model, tmp_path):
    model.conversation().save(tmp_path / "chat")
    chat = model.conversation(tmp_path / "chat")
    assert chat.ids == []
    chat.generate([5], max_tokens=1)


def test_a_fingerprint_is_of_graph_and_weights_and_not_of_the_text(model, copied):
    manifest = model.manifest
    assert fingerprint(manifest) == fingerprint(tfinfer.load(copied).manifest)
    for name in manifest.files:
        changed = {**manifest.files, name: dataclasses.replace(manifest.files[name], sha256="0" * 64)}
        same = fingerprint(dataclasses.replace(manifest, files=changed)) == fingerprint(manifest)
        assert same == (name not in ("decoder.onnx", "weights.bin")), name
    for change in ({"keeps_window": 8}, {"cache": manifest.cache[:1]}, {"cache_mode": "concatenated"}):
        assert fingerprint(dataclasses.replace(manifest, **change)) != fingerprint(manifest)


# -- refusals -------------------------------------------------------------------------------------------------------
def test_a_file_that_was_cut_anywhere_is_refused(model, saved):
    chat, path = saved
    data = path.read_bytes()
    for size in (*range(60), *range(60, len(data), 97), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(SnapshotError, match=r"cut|expected a conversation|cannot be read"):
            model.conversation(path)
    path.write_bytes(data + b"x")
    with pytest.raises(SnapshotError, match="cut or changed"):
        model.conversation(path)
    path.write_bytes(data)
    assert model.conversation(path).ids == chat.ids


@many
@given(st.floats(0, 0.999999), st.integers(1, 255))
def test_a_file_that_was_changed_anywhere_is_refused(model, saved, place, by):
    chat, path = saved
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= by
    (path.parent / "changed").write_bytes(data)
    with pytest.raises(SnapshotError):
        model.conversation(path.parent / "changed")
    assert model.conversation(path).ids == chat.ids


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "0" * 64, "reference": "another"}, r"is of 'another', whose graph, weights or cache are not those"),
        ({"ids": [1, 2, 3, 4, 5, 6, 7, 8, 99999]}, "ids from 0 to"),
        ({"ids": [1] * 97}, "at most 96 ids"),
        ({"ids": [1.0] * 9}, "ids from 0 to"),
        ({"ids": [True] * 9}, "ids from 0 to"),
        ({"ids": "123456789"}, "ids from 0 to"),
        ({"ids": [1, 2, 3]}, "lengths that do not fit: 3 ids, 8 positions"),
        ({"held": 10}, "lengths that do not fit"),
        ({"held": -1}, "lengths that do not fit"),
        ({"held": 8.0}, "lengths that do not fit"),
        ({"dropped": 1}, "lengths that do not fit"),
        ({"dropped": None}, "lengths that do not fit"),
        ({"held": 7}, "cut or changed"),
        ({"held": 0}, "cut or changed"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(model, saved, changes, said):
    chat, path = saved
    rewritten(path, **changes)
    with pytest.raises(SnapshotError, match=said):
        model.conversation(path)
    assert chat.generate([1], max_tokens=1).token_ids


@pytest.mark.parametrize("head", [b"", b"[]", b"{}", b"\xff", b"[" * 2000])
def test_a_header_that_is_none_is_refused(model, tmp_path, head):
    data = MARK + len(head).to_bytes(LENGTH, "little") + head
    (tmp_path / "chat").write_bytes(data + hashlib.sha256(data).digest())
    with pytest.raises(SnapshotError, match="header cannot be read"):
        model.conversation(tmp_path / "chat")


def test_a_header_of_impossible_length_is_not_read(model, tmp_path):
    with (tmp_path / "chat").open("wb") as file:
        file.write(MARK + (1 << 30).to_bytes(LENGTH, "little"))
        file.truncate(1 << 31)  # nothing of it is on the disk
    with pytest.raises(SnapshotError, match="its header alone"):
        model.conversation(tmp_path / "chat")


def test_dropped_positions_must_lie_behind_the_window(remembering, tmp_path):
    model, path = remembering("window"), tmp_path / "chat"
    chat = model.conversation()
    chat.generate([1, 2] * 100, max_tokens=2, stop_ids=[])
    dropped = int(chat._cache.dropped[0])
    assert dropped
    chat.save(path)
    assert model.conversation(path).generate([1], max_tokens=1, stop_ids=[]).usage.reused_tokens == 201
    for wrong in (198, 202, -1):
        rewritten(path, dropped=wrong)
        with pytest.raises(SnapshotError, match="lengths that do not fit"):
            model.conversation(path)


def test_a_conversation_of_another_folder_is_refused(model, saved):
    _, path = saved
    with tfinfer.load(HERE / "tiny_states") as other, pytest.raises(SnapshotError, match="not those of this folder"):
        other.conversation(path)


def test_what_is_no_file_is_refused(model, tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(SnapshotError, match="cannot be read"):
            model.conversation(path)
    assert issubclass(SnapshotError, (TfinferError, ValueError))


@pytest.mark.parametrize("place", ["none/chat", "file/chat", "."])
def test_a_place_that_cannot_be_written_is_named(model, tmp_path, place):
    (tmp_path / "file").write_text("here already")
    chat = model.conversation()
    chat.generate([1, 2], max_tokens=2)
    with pytest.raises(SnapshotError, match="cannot be written"):
        chat.save(tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


def test_a_save_that_breaks_leaves_the_file_that_was_there(model, saved, monkeypatch):
    chat, path = saved
    before, ids = path.read_bytes(), chat.ids
    chat.generate([1], max_tokens=2, stop_ids=[])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SnapshotError, match="No space left"):
            chat.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["chat"]
    assert model.conversation(path).ids == ids
    chat.save(path)
    assert model.conversation(path).ids == chat.ids
