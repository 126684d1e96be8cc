"""A cache of which some entries are 8 bits wide (tests/zoo/make_tiny_cache.py), where torch was never installed."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import ManifestError
from tfinfer.integrity import fields
from tfinfer.manifest import load_manifest
from tfinfer.measure.traffic import _messages, traffic
from tfinfer.proof.prove import verify_folder
from tfinfer.session.decoder import Decoder
from tfinfer.tokens.pace import Pace

FOLDER = Path(__file__).parent / "tiny_cache8"
PER_TOKEN = 2 * 2 * 16 + 2 * 2 * 10 * 4  # bytes: a key and a value of int8, and of float32
PROMPTS = [[3], [5, 6, 7, 5, 6, 7, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] * 6]


@pytest.fixture(scope="module")
def small():
    with tfinfer.load(FOLDER, threads=1) as loaded:
        yield loaded


def logits_of(decoder, cache, slot, ids):
    return np.stack([decoder.step(cache, [slot], [token])[0].copy() for token in ids])


# -- what it holds ------------------------------------------------------------------------------------------------
def test_buffers_are_as_wide_as_their_entries_and_counted_so(small):
    cache = small.decoder.open_cache(2, 64)
    assert [buffer.owner.dtype for buffer in cache.buffers] == [np.int8, np.int8, np.float32, np.float32]
    assert cache.nbytes == 2 * 64 * PER_TOKEN
    slot = cache.acquire()
    small.decoder.prefill(cache, slot, [1, 2, 3])
    row = cache.row(slot)
    for buffer in cache.buffers:
        assert buffer.owner[row, :, :3].any(axis=(0, 2)).all()
        assert not buffer.owner[row, :, 3:].any()
        assert not buffer.owner[1 - row].any()
    assert sum(map(np.size, cache.contents(slot).positions)) == 3 * PER_TOKEN  # bytes


def test_inspect_and_bench_count_its_real_bytes():
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(FOLDER), "--json"]).output)["cache"]
    assert (found["bytes_per_token"], found["bytes_at_max_length"]) == (PER_TOKEN, 160 * PER_TOKEN)
    told = " ".join(CliRunner().invoke(cli, ["inspect", str(FOLDER)]).output.split())
    assert "2 buffers of 2 heads x 16, int8" in told
    assert "ranges from its own text, 2 buffers as wide as before; 99" in told
    manifest = load_manifest(FOLDER)
    short, long = (traffic(manifest, FOLDER, batch=3, length=length) for length in (10, 30))
    assert long.cache - short.cache == 3 * 20 * PER_TOKEN


# -- what it computes ---------------------------------------------------------------------------------------------
def test_a_cached_loop_is_a_whole_prefill_for_every_token(small):
    """A prompt attends to what is rounded, too: otherwise the two would part."""
    ids = list(PROMPTS[1])
    cache = small.decoder.open_cache(1, 8)
    for token in small.generate(ids, max_tokens=80, reuse_prefix=False).token_ids:
        slot = cache.acquire()
        assert int(small.decoder.prefill(cache, slot, ids)[-1].argmax()) == token
        cache.release(slot)
        ids.append(token)


def test_rows_of_different_lengths_are_each_alone(small):
    options = {"max_tokens": 40, "reuse_prefix": False}
    alone = [small.generate(prompt, **options).token_ids for prompt in PROMPTS]
    assert [c.token_ids for c in small.generate(PROMPTS, **options)] == alone


def test_forks_rewinds_and_rows_that_change_places_keep_every_byte(small):
    decoder = small.decoder
    cache = decoder.open_cache(3, 16)
    first, other = cache.acquire(), cache.acquire()
    decoder.prefill(cache, first, PROMPTS[1])
    decoder.prefill(cache, other, PROMPTS[2])  # which grows
    expected = logits_of(decoder, cache, first, [4, 5, 6])
    cache.rewind(first, len(PROMPTS[1]))
    twin = cache.fork(first)
    cache.arrange([other, twin, first])
    for slot in (twin, first):
        assert np.array_equal(logits_of(decoder, cache, slot, [4, 5, 6]), expected)
    assert cache.length(other) == len(PROMPTS[2])


def test_beams_score_what_they_say(small):
    best = small.generate(PROMPTS[1], max_tokens=12, num_beams=4)
    cache = small.decoder.open_cache(1, 64)
    logits = small.decoder.prefill(cache, cache.acquire(), [*PROMPTS[1], *best.token_ids[:-1]], keep=12)
    wide = logits.astype(np.float64)
    told = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    summed = sum(told[at, token] for at, token in enumerate(best.token_ids))
    assert best.score == pytest.approx(summed / 12, abs=1e-4)


@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_speculation_says_the_same(small, way, monkeypatch):
    lengths = itertools.cycle((4, 1, 0, 8))  # drafts are made whatever they cost
    monkeypatch.setattr(Pace, "length", lambda self, kind, most: min(most, next(lengths)))
    speculation = {"lookup": True} if way == "lookup" else {"draft": small}
    plain = small.generate(PROMPTS[1], max_tokens=60, reuse_prefix=False)
    found = small.generate(PROMPTS[1], max_tokens=60, reuse_prefix=False, **speculation)
    assert found.token_ids == plain.token_ids
    assert found.usage.proposed_tokens > 0


def test_a_conversation_on_disk_is_as_small_as_the_cache(small, tmp_path):
    sizes = []
    with small.conversation() as chat:
        for new in ([1, 2, 3], [4] * 40):
            chat.generate(new, max_tokens=1)
            chat.save(tmp_path / "chat")
            sizes.append((tmp_path / "chat").stat().st_size)
        ids, expected = chat.ids, chat.generate([5], max_tokens=9).token_ids
    assert 41 * PER_TOKEN <= sizes[1] - sizes[0] <= 41 * (PER_TOKEN + 4)  # ids in the header among it
    with small.conversation(tmp_path / "chat") as again:
        assert again.ids == ids
        assert again.generate([5], max_tokens=9).token_ids == expected


# -- what is wrong ------------------------------------------------------------------------------------------------
def scaled(folder, factor):
    """Multiply every scale of the cache in a folder's graph."""
    path = folder / "decoder.onnx"
    data = bytearray(path.read_bytes())
    touched = 0
    for tensor in _messages(memoryview(data), "model", "tensor"):
        found = {number: value for number, value in fields(tensor) if not isinstance(value, int)}
        if bytes(found.get(8, b"")).endswith(b".scale"):
            np.frombuffer(found[9], np.float32)[:] *= np.float32(factor)
            touched += 1
    path.write_bytes(data)
    return touched


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.2, True), (0.1, False), (10.0, False)])
def test_verify_finds_scales_that_are_wrong(tmp_path, factor, passes):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "folder"))
    assert scaled(folder, factor) == 2
    decoder = Decoder(load_manifest(folder), folder)  # without asking for hashes, which would find it before
    try:
        verdict = verify_folder(decoder, folder)
    finally:
        decoder.close()
    assert verdict.dtype == "int8 cache"
    assert verdict.passed is passes


def test_verify_tells_what_it_costs():
    told = CliRunner().invoke(cli, ["verify", str(FOLDER)])
    assert told.exit_code == 0, told.output
    assert "of first choices agree" in told.output
    assert "int8 cache" in told.output


def test_a_manifest_that_tells_of_a_small_cache_has_one():
    manifest = load_manifest(FOLDER)
    wide = tuple(dataclasses.replace(entry, dtype="float32") for entry in manifest.cache)
    with pytest.raises(ManifestError, match="small_cache without a cache entry of int8"):
        dataclasses.replace(manifest, cache=wide)
