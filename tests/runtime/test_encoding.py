"""A real encoder's folder, loaded and encoded with, where torch was never installed."""

import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tfinfer
from tfinfer.encoding import EncodingModel, TruncationWarning
from tfinfer.errors import ClosedError, InputError, LengthError
from tfinfer.tokens.batching import BUDGETS

FOLDER = Path(__file__).parent / "tiny_encoder"
TEXTS = ["the cat sat on the mat", "dog", "a dog ran after the red cat and the cat ran", "was", "the cat", "b c d e f"]


@pytest.fixture(scope="module")
def encoder():
    with tfinfer.load(FOLDER, threads=1) as loaded:
        yield loaded


@pytest.fixture
def watched(encoder, monkeypatch):
    """The shapes and masks of all batches that go through the graph."""
    seen, inner = [], encoder.encoder._run

    def run(feeds, outputs):
        seen.append(feeds)
        return inner(feeds, outputs)

    monkeypatch.setattr(encoder.encoder, "_run", run)
    return seen


# -- vectors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "pooled"])
@pytest.mark.parametrize("normalize", [True, False])
def test_padding_never_changes_a_vector_and_the_order_is_that_of_the_texts(encoder, pooling, normalize):
    given = {"pooling": pooling, "normalize": normalize}
    alone = [encoder.encode(text, **given) for text in TEXTS]
    for batch_size in (1, 2, 5, 32):
        together = encoder.encode(TEXTS, batch_size=batch_size, **given)
        assert together.shape == (len(TEXTS), alone[0].shape[0])
        assert together.dtype == np.float32
        np.testing.assert_allclose(together, alone, atol=1e-5)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_tokens_keep_their_own_vectors_without_pooling(encoder):
    tokens = encoder.encode(TEXTS, pooling="none")
    assert [len(rows) for rows in tokens] == [len(encoder.tokenize(text)) for text in TEXTS]
    np.testing.assert_allclose([rows.mean(0) for rows in tokens], encoder.encode(TEXTS, pooling="mean"), atol=1e-5)
    alone = encoder.encode(TEXTS[0], pooling="none")
    np.testing.assert_allclose(alone, tokens[0], atol=1e-5)
    scaled = encoder.encode(TEXTS[0], pooling="none", normalize=True)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-6)


def test_a_text_is_its_ids_in_every_form(encoder):
    ids = encoder.tokenize("the cat")
    expected = encoder.encode("the cat")
    for form in (ids, tuple(ids), np.array(ids), np.array(ids, np.int32)):
        np.testing.assert_array_equal(encoder.encode(form), expected)
        np.testing.assert_array_equal(encoder.encode([form]), expected[None])
    several = encoder.encode([ids, "dog", np.array(ids)])
    np.testing.assert_allclose(several[[0, 2]], [expected, expected], atol=1e-5)
    for form in (np.array([ids, ids]), np.array(["the cat"] * 2), (text for text in ["the cat"] * 2)):
        assert encoder.encode(form).shape == (2, len(expected))


def test_no_texts_make_no_vectors(encoder):
    assert encoder.encode([]).shape == (0, encoder.encode("a").shape[0])
    assert encoder.encode([], pooling="none") == []
    assert list(encoder.encode_iter([])) == []


def test_a_pair_has_token_types(encoder, watched):
    pair = encoder.encode([("the cat", "a dog"), "the cat"])
    feeds = watched[-1]
    ids, types = feeds["input_ids"], feeds["token_type_ids"]
    assert (types[0] == np.arange(ids.shape[1]) // len(encoder.tokenize("the cat"))).all()
    assert not types[1].any()
    assert not np.allclose(pair[0], encoder.encode(ids[0]))  # the same ids without types
    np.testing.assert_allclose(pair[0], encoder.encode([("the cat", "a dog")])[0], atol=1e-5)


def test_batches_keep_rows_and_tokens_and_one_length_has_a_mask_of_ones(encoder, watched, monkeypatch):
    encoder.encode(TEXTS, batch_size=2)
    assert [len(feeds["input_ids"]) for feeds in watched] == [2, 2, 2]
    assert any((feeds["attention_mask"] == 0).any() for feeds in watched)
    watched.clear()
    encoder.encode(["the cat", "the dog", "red dog"])
    assert len(watched) == 1
    assert (watched[0]["attention_mask"] == 1).all()
    watched.clear()
    monkeypatch.setitem(BUDGETS, "cpu", 16)
    encoder.encode(TEXTS)
    assert all(feeds["input_ids"].size <= 16 or len(feeds["input_ids"]) == 1 for feeds in watched)


def test_progress_counts_texts(encoder, capsys):
    seen = []
    encoder.encode(TEXTS, batch_size=4, show_progress=lambda *counts: seen.append(counts))
    assert seen == [(4, 6), (6, 6)]
    assert capsys.readouterr() == ("", "")
    encoder.encode(TEXTS, batch_size=4, show_progress=True)
    assert capsys.readouterr().err == "\r4 of 6 texts\r6 of 6 texts\n"


# -- lengths ------------------------------------------------------------------------------------------------------
LONG = " ".join(["cat"] * 100)


def test_a_text_that_is_too_long_is_refused_or_cut(encoder):
    longest = encoder.manifest.max_length
    with pytest.raises(LengthError, match=rf"text 1: 102 tokens .* {longest}.*truncate=True \(--truncate\)"):
        encoder.encode(["dog", LONG])
    ids = encoder.tokenize(LONG)
    fits = ids[: longest - 1] + ids[-1:]
    with pytest.warns(TruncationWarning, match="2 of 3 texts"):
        found = encoder.encode(["dog", LONG, ids], truncate=True)
    np.testing.assert_allclose(found[1:], [encoder.encode(fits)] * 2, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(fits, truncate=True), found[1], atol=1e-5)  # nothing to warn of


@pytest.mark.parametrize("first, second", [(3, 100), (100, 3), (100, 90), (31, 100), (30, 31), (64, 1)])
def test_the_longer_one_of_a_pair_is_cut_as_tokenizers_do(encoder, watched, first, second):
    import tokenizers

    reference = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    reference.enable_truncation(encoder.manifest.max_length, strategy="longest_first")
    pair = (" ".join(["cat"] * first), " ".join(["dog"] * second))
    with pytest.warns(TruncationWarning) if first + second > 61 else contextlib.nullcontext():
        encoder.encode([pair], truncate=True)
    expected = reference.encode(*pair)
    assert watched[-1]["input_ids"][0].tolist() == expected.ids
    assert watched[-1]["token_type_ids"][0].tolist() == expected.type_ids


# -- streams ------------------------------------------------------------------------------------------------------
def test_a_stream_is_encode_in_pieces(encoder):
    texts = [TEXTS[i % len(TEXTS)] for i in range(25)]
    for given in ({"batch_size": 4, "window": 10}, {"batch_size": 3}, {"batch_size": 100}, {"window": 1}):
        pieces = list(encoder.encode_iter(iter(texts), **given))
        assert all(len(piece) <= given.get("batch_size", 32) for piece in pieces)
        np.testing.assert_allclose(np.concatenate(pieces), encoder.encode(texts), atol=1e-5)
    tokens = [rows for piece in encoder.encode_iter(texts, batch_size=4, pooling="none") for rows in piece]
    assert [rows.shape for rows in tokens] == [rows.shape for rows in encoder.encode(texts, pooling="none")]


def test_a_stream_is_read_a_window_at_a_time(encoder):
    read = 0

    def endless():
        nonlocal read
        for text in itertools.cycle(TEXTS):
            read += 1
            yield text

    stream = encoder.encode_iter(endless(), batch_size=4, window=8)
    assert read == 0
    for number, piece in enumerate(itertools.islice(stream, 50)):
        assert piece.shape[0] == 4
        assert read == 8 * (number // 2 + 1)


def test_an_error_in_a_stream_leaves_what_came_before(encoder):
    stream = encoder.encode_iter([*TEXTS[:4], "cat", 5], batch_size=2, window=2)
    first = [next(stream), next(stream)]
    with pytest.raises(InputError, match="text 5: expected a text"):
        next(stream)
    np.testing.assert_allclose(np.concatenate(first), encoder.encode(TEXTS[:4]), atol=1e-5)
    with pytest.raises(LengthError, match="text 3"):
        list(encoder.encode_iter(["a", "b", "c", LONG], window=1))


def test_a_stream_warns_once_at_its_end(encoder):
    with pytest.warns(TruncationWarning, match="3 of 4 texts") as caught:
        assert len(list(encoder.encode_iter([LONG, "a", LONG, LONG], window=1, truncate=True))) == 4
    assert len(caught) == 1
    assert caught[0].filename == __file__


# -- wrong calls --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "texts, given, error, said",
    [
        ([[]], {}, InputError, "text 0: expected at least one token"),
        (np.array([], np.int64), {}, InputError, "at least one token"),
        (["a", [1, -2]], {}, InputError, "text 1: ids must be .* got -2"),
        ([5, 99999], {}, InputError, "got 99999"),
        ([1.5], {}, InputError, "whole numbers"),
        ([True], {}, InputError, "whole numbers"),
        ([2**70, 1], {}, InputError, "whole numbers|no id"),
        (np.array([2**63 + 1], np.uint64), {}, InputError, "no id"),
        ([["a", "b"]], {}, InputError, "tuple of two texts"),
        ([("a", "b", "c")], {}, InputError, "tuple of two texts"),
        ([None], {}, InputError, "got NoneType"),
        ([[[1]]], {}, InputError, "shape"),
        ([[1, [2]]], {}, InputError, "expected a text"),
        (("a", "b"), {}, InputError, r"give \[\(first, second\)\]"),
        (b"a", {}, InputError, "got bytes"),
        ([b"a"], {}, InputError, "got bytes"),
        ({"a": 1}, {}, InputError, "got dict"),
        (5, {}, InputError, "got int"),
        ("\ud800", {}, InputError, "cannot encode"),
        (LONG, {}, LengthError, "102 tokens"),
        ("a", {"batch_size": 0}, InputError, "batch_size"),
        ("a", {"batch_size": True}, InputError, "batch_size"),
        ("a", {"pooling": "max"}, InputError, "pooling"),
        ("a", {"normalize": "yes"}, InputError, "normalize"),
        ("a", {"show_progress": 3}, InputError, "show_progress"),
    ],
)
def test_a_wrong_call_is_refused_and_the_next_good_one_works(encoder, texts, given, error, said):
    before = encoder.encode(TEXTS)
    with pytest.raises(error, match=said):
        encoder.encode(texts, **given)
    np.testing.assert_array_equal(encoder.encode(TEXTS), before)


@pytest.mark.parametrize("texts, given", [("a text", {}), (5, {}), (["a"], {"window": 0}), (["a"], {"pooling": "max"})])
def test_a_wrong_stream_is_refused_at_once(encoder, texts, given):
    with pytest.raises(InputError):
        encoder.encode_iter(texts, **given)


def test_an_encoder_does_not_generate_and_says_what_it_does(encoder):
    for call in (encoder.generate, encoder.stream):
        with pytest.raises(InputError, match="use encode or run"):
            call("a", max_tokens=1)


def test_a_closed_model_says_so():
    with tfinfer.load(FOLDER, threads=1) as model:
        stream = model.encode_iter(itertools.repeat("a"), batch_size=1, window=1)
        assert next(stream).shape[0] == 1
        assert isinstance(model, EncodingModel)
    for call in (lambda: model.encode("a"), lambda: model.run({}), lambda: model.encode_iter([]), lambda: next(stream)):
        with pytest.raises(ClosedError, match="load it again"):
            call()


def test_many_threads_get_what_each_would_get_alone(encoder):
    calls = [[TEXTS[(i + j) % len(TEXTS)] for j in range(1 + i % 5)] for i in range(40)]
    expected = [encoder.encode(texts) for texts in calls]
    barrier = threading.Barrier(4)

    def encode(texts):
        if len(texts) == 1:
            barrier.wait(10)
        return encoder.encode(texts)

    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(encode, calls), expected):
            np.testing.assert_array_equal(found, wanted)
