"""An encoder-decoder where torch was never installed: sources in slots, encoded once, and generation from them."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import ClosedError, IncompatibleModelError, InputError, LengthError, ManifestError
from tfinfer.manifest import load_manifest
from tfinfer.proof.prove import verify_folder
from tfinfer.session.cache import Cache
from tfinfer.session.decoder import Decoder
from tfinfer.session.encoder_decoder import EncoderDecoder
from tfinfer.session.memory import HostMemory

FOLDER = Path(__file__).parent / "tiny_seq2seq"
TEXTS = ["abc", "hello world", "the quick brown fox", "z"]


@pytest.fixture(scope="module")
def model():
    """A random nn.Transformer over characters (see tests/zoo/make_tiny_seq2seq.py)."""
    with tfinfer.load(FOLDER, threads=1) as loaded:
        yield loaded


@pytest.fixture
def edited(tmp_path):
    """Opens a copy of the folder whose manifest says something else."""

    def edit(part: str | None = None, **changes):
        folder = Path(shutil.copytree(FOLDER, tmp_path / f"model{len(list(tmp_path.iterdir()))}"))
        data = json.loads((folder / "tfinfer.json").read_text())
        (data[part] if part else data).update(changes)
        (folder / "tfinfer.json").write_text(json.dumps(data))
        return folder

    return edit


# -- the session ----------------------------------------------------------------------------------------------------
class Counting(HostMemory):
    """Counts what is copied and made."""

    def __init__(self):
        self.calls = 0

    def allocate(self, shape, dtype):
        self.calls += 1
        return super().allocate(shape, dtype)

    def copy(self, *arguments):
        self.calls += 1
        super().copy(*arguments)

    def copy_2d(self, *arguments):
        self.calls += 1
        super().copy_2d(*arguments)


def test_the_folder_proves_itself(model):
    verdict = verify_folder(model.decoder, FOLDER)
    assert verdict.passed, verdict.lines()
    assert verdict.greedy.identical == verdict.greedy.compared > 20


def opened(decoder: EncoderDecoder, sources, room: int = 1):
    cache = decoder.open_cache(len(sources), 40, room)
    slots = [cache.acquire() for _ in sources]
    for slot, source in zip(slots, sources):
        decoder.encode(cache, slot, source)
        decoder.prefill(cache, slot, [1])
    return cache, slots


def test_rows_of_different_sources_are_each_alone(model):
    sources = [[5, 6, 7, 2], [8, 2], list(range(4, 30))]
    cache, slots = opened(model.decoder, sources)
    steps = [model.decoder.step(cache, slots, [9, 10, 11]).copy() for _ in range(5)]
    assert cache.sources.capacity == 26
    for row, source in enumerate(sources):
        alone, (slot,) = opened(model.decoder, [source], len(source))
        for step in steps:
            np.testing.assert_allclose(model.decoder.step(alone, [slot], [9 + row])[0], step[row], atol=1e-3, rtol=1e-4)


def test_no_step_encodes_or_copies_anything(model, monkeypatch):
    decoder = EncoderDecoder(model.manifest, FOLDER, threads=1)
    decoder.memory = memory = Counting()
    cache, slots = opened(decoder, [[5, 6, 2], [7, 2], [8, 2]], 3)
    decoder.step(cache, slots, [4, 5, 6])
    pointers, calls, bound = cache.sources.rows.pointers(0), memory.calls, cache.bound
    monkeypatch.setattr(decoder, "_encoded", lambda ids: pytest.fail("encoded again"))
    for _ in range(10):
        decoder.step(cache, slots, [4, 5, 6])
    assert cache.bound is bound
    assert cache.sources.rows.pointers(0) == pointers
    assert (memory.calls, cache.moved) == (calls, 0)


def test_a_slot_without_a_source_is_refused_and_goes_on_when_it_has_one(model):
    decoder = model.decoder
    cache, (first,) = opened(decoder, [[5, 2]])
    expected = decoder.step(cache, [first], [9]).copy()
    cache.release(first)
    slot = cache.acquire()  # the same row: what is bound to it is another slot's source
    for call in (lambda: decoder.prefill(cache, slot, [1]), lambda: decoder.step(cache, [slot], [1])):
        with pytest.raises(InputError, match="no source: encode one"):
            call()
    decoder.encode(cache, slot, [5, 2])
    decoder.prefill(cache, slot, [1])
    np.testing.assert_array_equal(decoder.step(cache, [slot], [9]), expected)


def test_another_source_needs_an_empty_slot(model):
    decoder = model.decoder
    cache, (slot,) = opened(decoder, [[5, 2]])
    with pytest.raises(InputError, match="rewind it to 0"):
        decoder.encode(cache, slot, [6, 2])
    cache.rewind(slot, 0)
    decoder.encode(cache, slot, [6, 2])
    other, (alone,) = opened(decoder, [[6, 2]])
    got = decoder.prefill(cache, slot, [1])
    decoder_alone = decoder.step(other, [alone], [9])
    np.testing.assert_allclose(decoder.step(cache, [slot], [9]), decoder_alone, atol=1e-5)
    assert got.shape == (1, 31)


def test_a_fork_has_the_source_of_its_parent(model):
    decoder = model.decoder
    cache = decoder.open_cache(3, 40, 8)
    other, slot = cache.acquire(), cache.acquire()
    for into, source in ((other, [8, 2]), (slot, [5, 6, 7, 2])):
        decoder.encode(cache, into, source)
        decoder.prefill(cache, into, [1])
    twin = cache.fork(slot)
    expected = decoder.step(cache, [slot], [9])[0].copy()
    got = decoder.step(cache, [other, twin], [9, 9])  # not neighbours: rows have to move
    np.testing.assert_allclose(got[1], expected, atol=1e-3)


def test_a_cache_of_a_decoder_has_no_sources(model):
    cache = Cache(model.manifest.cache, HostMemory(), 1, 10, longest=40)
    with pytest.raises(InputError, match="no sources: open it with"):
        model.decoder.encode(cache, cache.acquire(), [5, 2])
    cache.close()
    with pytest.raises(ClosedError):
        model.decoder.step(cache, [0], [1])


@pytest.mark.parametrize(
    "source, error, said",
    [
        ([], InputError, "at least one id"),
        ([31], InputError, "from 0 to 30"),
        ([-1], InputError, "got -1"),
        ([1.5], InputError, "whole numbers"),
        ([5] * 33, LengthError, "at most 32 tokens, the model's longest; got 33"),
    ],
)
def test_a_wrong_source_is_refused_and_the_next_good_one_works(model, source, error, said):
    cache = model.decoder.open_cache(1, 40)
    slot = cache.acquire()
    with pytest.raises(error, match=said):
        model.decoder.encode(cache, slot, source)
    model.decoder.encode(cache, slot, [5] * 32)
    before = model.generate([5, 6, 2], max_tokens=4).token_ids
    for several in (source, [[5, 2], source]):
        with pytest.raises(error, match=said):
            model.generate(several, max_tokens=4)
    assert model.generate([5, 6, 2], max_tokens=4).token_ids == before


def test_graphs_that_do_not_fit_together_are_refused(edited):
    data = json.loads((FOLDER / "tfinfer.json").read_text())
    data["cross"][0]["dtype"] = "float16"
    with pytest.raises(IncompatibleModelError, match=r"cross\.0, which the encoder does not make"):
        tfinfer.load(edited(cross=data["cross"]))
    with pytest.raises(IncompatibleModelError, match=r"disagree on cross\.0"):
        Decoder(load_manifest(edited(cross=data["cross"][1:])), FOLDER)
    with pytest.raises(ManifestError, match="decoder_start to be from 0 to 30, got 31"):
        tfinfer.load(edited("token_ids", decoder_start=[1, 31]))


# -- generation -----------------------------------------------------------------------------------------------------
def test_generation_is_the_full_pass_again_and_again(model):
    """The loop against prefilling the whole target anew for every token."""
    decoder = model.decoder
    for text in TEXTS:
        target, cache = [1], decoder.open_cache(1, 40)
        for token in (*model.generate(text, max_tokens=12, stop_ids=[]).token_ids,):
            slot = cache.acquire()
            decoder.encode(cache, slot, model.tokenize(text))
            assert int(decoder.prefill(cache, slot, target)[-1].argmax()) == token
            cache.release(slot)
            target.append(token)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"temperature": 1.2, "seed": 3}], ids=str)
def test_texts_of_different_lengths_are_each_alone(model, options):
    together = model.generate(TEXTS, max_tokens=16, **options)
    alone = [model.generate(text, max_tokens=16, **options) for text in TEXTS]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]
    assert len({c.token_ids for c in together}) == 4


def test_a_source_is_counted_and_the_target_begins_unseen(model):
    completion = model.generate("hello world", max_tokens=5)
    assert model.tokenize("hello world")[-1] == 2  # with the special id that ends a source
    assert completion.usage.prompt_tokens == 12
    assert len(completion.token_ids) == completion.usage.completion_tokens == 5
    assert completion.text == model.tokenizer.decode(completion.token_ids)
    assert model.generate(model.tokenize("hello world"), max_tokens=5).token_ids == completion.token_ids
    assert model.generate("the quick brown fox", max_tokens=5).finish_reason == "stop"


def test_a_stream_is_the_completion_in_pieces(model):
    whole = model.generate(TEXTS, max_tokens=20)
    chunks = list(model.stream(TEXTS, max_tokens=20))
    for index, completion in enumerate(whole):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in mine) == completion.text
        assert tuple(i for chunk in mine for i in chunk.token_ids) == completion.token_ids
        assert mine[-1].usage == completion.usage


def test_a_target_may_begin_with_several_ids(model, edited):
    """The second one as if it had been generated: forced first ids."""
    token = model.generate("hello world", max_tokens=1).token_ids[0]
    rest = model.generate("hello world", max_tokens=9).token_ids[1:]
    with tfinfer.load(edited("token_ids", decoder_start=[1, token])) as other:
        assert other.generate("hello world", max_tokens=8).token_ids == rest
        with pytest.raises(LengthError, match=r"a beginning of the target of 2 tokens and max_tokens=39 .* at most 38"):
            other.generate("hello world", max_tokens=39)
        assert len(other.generate("hello world", max_tokens=38, stop_ids=[]).token_ids) == 38


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_the_text_of_a_target_is_decoded_on_its_own(edited, options):
    """Not as going on from its first ids, or a decoder that strips the first space would keep it."""
    with tfinfer.load(edited("token_ids", decoder_start=[5]), threads=1) as other:
        strip = tokenizers.decoders.Strip(" ", 1, 0)
        other.tokenizer._inner.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Fuse(), strip])
        completion = other.generate("abc", max_tokens=3, logit_bias={4: np.inf}, **options)
    assert completion.token_ids == (4, 4, 4)
    assert completion.text == "  "


def test_the_last_place_is_taken_by_the_id_that_is_forced(model, edited):
    whole = model.generate("hello world", max_tokens=9)
    with tfinfer.load(edited("token_ids", forced_eos=2)) as other:
        for beams in (1, 3):
            ended = other.generate("hello world", max_tokens=9, num_beams=beams)
            assert len(ended.token_ids) == 8
            assert ended.finish_reason == "length"
            kept = other.generate("hello world", max_tokens=9, num_beams=beams, stop_ids=[])
            assert kept.token_ids == (*ended.token_ids, 2)
        assert other.generate("hello world", max_tokens=9).token_ids == whole.token_ids[:8]
        fox = other.generate("the quick brown fox", max_tokens=9)
        assert (fox.token_ids, fox.finish_reason) == ((), "stop")


def test_suppressed_ids_are_never_chosen(model, edited):
    """As a bias of -inf does; an id that the model does not have is suppressed without a word."""
    for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "seed": 1}):
        usual = model.generate("hello world", max_tokens=12, **options).token_ids
        banned = sorted(set(usual))[:2]
        wanted = model.generate("hello world", max_tokens=12, logit_bias=dict.fromkeys(banned, -np.inf), **options)
        with tfinfer.load(edited("token_ids", suppressed=[*banned, 99])) as other:
            got = other.generate("hello world", max_tokens=12, logit_bias={banned[0]: 50.0}, **options)
        assert got.token_ids == wanted.token_ids
        assert not {*got.token_ids} & {*banned}


def test_a_cache_that_comes_back_is_laid_out_for_the_next_source(model):
    model.generate("a", max_tokens=2)
    model.generate("the quick brown fox", max_tokens=2)
    assert model._pool.caches[-1].sources.capacity == 20
    model.generate("ab", max_tokens=2)
    assert model._pool.caches[-1].sources.capacity == 3
    assert not model._pool.caches[-1].sources.marks.any()


def test_leaving_a_stream_and_cancelling_give_the_slots_back(model):
    expected = model.generate(TEXTS, max_tokens=8)
    stream = model.stream(TEXTS, max_tokens=8)
    next(stream)
    stream.close()
    cancel = threading.Event()
    cancel.set()
    for beams in (1, 2):
        assert model.generate("abc", max_tokens=4, cancel=cancel, num_beams=beams).finish_reason == "cancelled"
    assert all(cache.live == [] for cache in model._pool.caches)
    assert [c.token_ids for c in model.generate(TEXTS, max_tokens=8)] == [c.token_ids for c in expected]


def test_a_call_that_fails_in_the_encoder_spoils_nothing(model, monkeypatch):
    expected = model.generate("abc", max_tokens=4).token_ids

    def broken(ids):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "_encoded", broken)
        for options in ({}, {"num_beams": 2}):
            with pytest.raises(RuntimeError, match="broken"):
                model.generate("abc", max_tokens=4, **options)
    assert not any(cache.closed for cache in model._pool.caches)
    assert model.generate("abc", max_tokens=4).token_ids == expected


def test_threads_get_what_each_would_get_alone(model):
    sources = [[4 + (i * k) % 26 for k in range(1, 3 + i % 9)] for i in range(24)]
    expected = [model.generate(s, max_tokens=8, num_beams=1 + i % 2).token_ids for i, s in enumerate(sources)]
    with ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda i: model.generate(sources[i], max_tokens=8, num_beams=1 + i % 2).token_ids, range(24))
        )
    assert found == expected


def test_it_is_no_encoder(model):
    for call in (lambda: model.encode("abc"), lambda: model.run({})):
        with pytest.raises(InputError, match="it is an encoder-decoder: use generate or stream"):
            call()


def test_a_closed_model_says_so():
    with tfinfer.load(FOLDER, threads=1) as loaded:
        cache, (slot,) = opened(loaded.decoder, [[5, 2]])
    for call in (lambda: loaded.generate("a", max_tokens=1), lambda: loaded.decoder.step(cache, [slot], [1])):
        with pytest.raises(ClosedError, match="load it again"):
            call()
    cache.rewind(slot, 0)
    with pytest.raises(ClosedError, match="load it again"):
        loaded.decoder.encode(cache, slot, [5, 2])


def test_the_command_line_takes_a_source(model):
    result = CliRunner().invoke(cli, ["generate", str(FOLDER), "hello world", "--stats"], prog_name="tfinfer")
    assert result.exit_code == 0, result.output
    expected = model.generate("hello world", max_tokens=39)  # 40 positions, and the target begins with one
    assert result.stdout == expected.text + "\n"
    assert result.stderr.startswith(f"12 tokens in, {expected.usage.completion_tokens} tokens out")
