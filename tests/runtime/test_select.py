"""The best logits are found where they lie, as numpy finds them; where few cannot tell, all of them are asked for."""

import gc
import weakref

import numpy as np
import pytest

from tfinfer.session.memory import Buffer
from tfinfer.session.select import MOST, SPARE, Selecting, _parts
from tfinfer.session.threads import Threads
from tfinfer.tokens.sampling import History, SamplingParams, best_needed, choose, choose_among, generators

ONE = Threads(1, "1: a test")


def buffer_of(logits):
    """(rows, num_logits) where a step would leave it."""
    array = np.ascontiguousarray(logits[:, None])
    return Buffer(array.ctypes.data, array.shape, str(array.dtype), array.nbytes, array)


def best_of(logits, count):
    return Selecting(logits.shape[1], str(logits.dtype), "cpu", ONE).bind(buffer_of(logits), count).run()


@pytest.mark.parametrize("num_logits", [297, 4096, 4099, 50257, 128 * 1002])
@pytest.mark.parametrize("count", [1, 40, MOST])
def test_the_best_are_those_of_numpy(num_logits, count):
    logits = np.random.default_rng(num_logits).normal(size=(3, num_logits)).astype(np.float32)
    values, ids = best_of(logits, count)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


def test_a_selection_reads_what_the_buffer_holds_when_it_runs():
    logits = np.zeros((1, 5000), np.float32)
    buffer = buffer_of(logits)
    selection = Selecting(5000, "float32", "cpu", ONE).bind(buffer, 2)
    for first, second in ((7, 4999), (4998, 0)):
        buffer.owner[:] = 0
        buffer.owner[0, 0, [first, second]] = [2, 1]
        values, ids = selection.run()
        assert (values.tolist(), ids.tolist()) == ([[2, 1]], [[first, second]])


def test_equal_ones_come_by_their_ids_from_every_part():
    logits = np.zeros((1, 50000), np.float32)
    logits[0, [49999, 123, 20000]] = 3
    assert best_of(logits, 3)[1].tolist() == [[123, 20000, 49999]]


def test_a_number_that_is_none_in_one_row_is_enough_to_tell_nothing():
    """Wherever it stands: it has no place among the best."""
    logits = np.random.default_rng(0).normal(size=(2, 5000)).astype(np.float32)
    assert best_of(logits, 1) is not None
    logits[1, 4321] = np.nan
    assert best_of(logits, 1) is None


def test_what_is_bound_lives_as_long_as_the_selection():
    logits = np.zeros((1, 5000), np.float32)
    logits[0, 77], alive = 1, weakref.ref(logits)
    selection = Selecting(5000, "float32", "cpu", ONE).bind(buffer_of(logits), 1)
    del logits
    gc.collect()
    assert alive() is not None
    assert selection.run()[1].tolist() == [[77]]


@pytest.mark.parametrize("spoil", [np.nan, 0.0, -np.inf], ids=["NaN", "more equal ones than are looked at", "-inf"])
def test_what_few_cannot_tell_is_not_told(spoil):
    logits = np.full((2, 5000), spoil, np.float32)
    logits[:, : SPARE + 1] = 1.0
    logits[0, : SPARE + 1] = np.arange(SPARE + 1)
    assert best_of(logits, 1) is None


def test_logits_of_half_width_are_read_too():
    logits = np.random.default_rng(0).permutation(2000).reshape(1, 2000).astype(np.float16)
    assert best_of(logits, 3)[1].tolist() == np.argsort(-logits, axis=1)[:, :3].tolist()


@pytest.mark.parametrize(
    "num_logits, parts", [(128256, 128), (151936, 128), (50257, 29), (4099, 1), (297, 1), (10, 1), (4000, 10), (514, 2)]
)
def test_parts_are_equal_and_wide_enough(num_logits, parts):
    assert _parts(num_logits) == parts
    assert num_logits % parts == 0
    assert parts == 1 or num_logits // parts >= MOST + SPARE


def test_only_counts_that_fit_are_taken():
    selecting = Selecting(100, "float32", "cpu", ONE)
    assert [selecting.takes(count) for count in (0, 1, 92, 93)] == [False, True, True, False]
    selecting = Selecting(5000, "float32", "cpu", ONE)
    assert [selecting.takes(count) for count in (MOST, MOST + 1)] == [True, False]


@pytest.mark.parametrize(
    "options, needed",
    [
        ({}, 1),
        ({"temperature": 0.7}, 0),
        ({"temperature": 0.7, "top_p": 0.9}, 0),
        ({"temperature": 0.7, "top_k": 40}, 40),
        ({"temperature": 0.0, "top_k": 40}, 1),
        ({"repetition_penalty": 1.1}, 0),
        ({"logit_bias": {3: 1.0}}, 0),
        ({"logprobs": 2}, 0),
    ],
)
def test_how_many_a_choice_needs(options, needed):
    logprobs = options.pop("logprobs", 0)
    assert best_needed(SamplingParams(**options), logprobs) == needed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.3, "top_k": 1, "seed": 1},
        {"temperature": 0.8, "top_k": 30, "seed": 2},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.6, "min_p": 0.05, "seed": 3},
    ],
)
def test_a_choice_among_the_best_is_the_choice(options):
    """Also where logits tie, as those of half precision often do."""
    rng, params = np.random.default_rng(5), SamplingParams(**options)
    for _ in range(50):
        logits = np.round(rng.normal(size=(4, 4096)).astype(np.float32) * 2, 1)
        count = best_needed(params)
        expected = choose(logits, History((), 0, params), params, generators(params, 4))
        order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        values = np.take_along_axis(logits, order, axis=1)
        np.testing.assert_array_equal(choose_among(values, order, params, generators(params, 4)), expected)
