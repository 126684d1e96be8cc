"""What earlier calls computed of a prompt is not computed again, and the tokens stay the same."""

import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from remembering import KINDS, LONGEST, Remembering, greedy

import tfinfer
from tfinfer.adopt import adopt
from tfinfer.errors import ClosedError, InputError
from tfinfer.session.pool import MOST, CachePool
from tfinfer.session.prefix import WORTH, common, matches, seat

HERE = Path(__file__).parent
ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["tiny", "tiny_states", "tiny_cache8", "tiny_foreign"])
def loaded(request, tmp_path_factory):
    """Positions; with states; of two widths; and a graph that concatenates, as another exporter writes it."""
    folder = HERE / request.param
    if request.param == "tiny_foreign":
        folder = Path(shutil.copytree(folder, tmp_path_factory.mktemp("adopted") / "foreign"))
        adopt(folder)
    with tfinfer.load(folder, threads=1) as model:
        yield model


def tokens(completions):
    return [c.token_ids for c in (completions if isinstance(completions, list) else [completions])]


def reused(completions):
    return [c.usage.reused_tokens for c in (completions if isinstance(completions, list) else [completions])]


# -- what prompts have in common ------------------------------------------------------------------------------------
@given(ids, ids, ids)
def test_common_is_the_length_of_the_longest_beginning_of_both(start, one, other):
    one, other = start + one, start + other
    expected = next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    assert common(one, other) == common(other, one) == expected


def test_the_longest_match_gets_its_slot_first_and_the_last_id_is_left_to_run():
    decoder = Remembering("positions", 9)
    cache = decoder.open_cache(3)
    for held in ([1, 2, 3, 4], [1, 2, 0], [1, 1]):
        slot = cache.acquire()
        decoder.prefill(cache, slot, held)
    cache.reset()
    assert matches(cache, [[1, 2, 0, 0], [1, 2, 3, 4], [4]]) == {0: (1, 3), 1: (0, 3)}


# -- any mix of calls -----------------------------------------------------------------------------------------------
calls = st.lists(
    st.tuples(st.lists(ids, min_size=1, max_size=3), st.integers(1, 9), st.sampled_from(["whole", "left", "alone"])),
    min_size=1, max_size=5,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@many
@given(calls=calls, start=st.integers(0, 170).map(lambda n: ([0, 1, 2, 1] * 50)[:n]))
def test_any_calls_one_after_the_other_give_what_each_gives_alone(remembering, kind, calls, start):
    model = remembering(kind)
    for prompts, count, way in calls:
        prompts = [start + prompt for prompt in prompts]
        if way == "left":
            stream = model.stream(prompts, max_tokens=count, stop_ids=[])
            next(stream)
            stream.close()
            continue
        before = model.decoder.ran
        found = model.generate(prompts, max_tokens=count, stop_ids=[], reuse_prefix=way == "whole")
        assert tokens(found) == [greedy(kind, prompt, count) for prompt in prompts]
        ran = sum(map(len, prompts)) + len(prompts) * (count - 1)
        assert model.decoder.ran - before == ran - sum(reused(found))
        assert way == "whole" or not any(reused(found))
    assert len(model._pool.caches) <= MOST
    assert not any(cache.live for cache in model._pool.caches)


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_that_follows_runs_only_what_is_new(remembering, kind):
    model = remembering(kind)
    prompt = [1, 2, 0, 1] * 30
    answer = model.generate(prompt, max_tokens=6, stop_ids=[])
    longer = [*prompt, *answer.token_ids, 2, 2]
    before = model.decoder.ran
    again = model.generate(longer, max_tokens=1, stop_ids=[])
    assert again.usage.reused_tokens == len(prompt) + 5  # the answer's last token was never run
    assert model.decoder.ran - before == 3
    assert again.token_ids == greedy(kind, longer, 1)


@pytest.mark.parametrize("kind", ["states", "both"])
def test_states_go_back_to_the_end_of_a_prompt(remembering, kind):
    model = remembering(kind)
    prompt = [1, 2, 0, 1, 1]
    model.generate(prompt, max_tokens=6, stop_ids=[])
    other = [*prompt, 0, 0, 0]
    found = model.generate(other, max_tokens=6, stop_ids=[])
    assert found.token_ids == greedy(kind, other, 6)
    assert found.usage.reused_tokens == 5
    assert model.generate(prompt, max_tokens=1).usage.reused_tokens == 0  # its last id must be run again


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_runs_what_its_prompts_share_once(remembering, kind):
    model = remembering(kind)
    shared = [1, 2, 0] * 7
    prompts = [[*shared, n, n] for n in range(4)]
    found = model.generate(prompts, max_tokens=5, stop_ids=[])
    assert tokens(found) == [greedy(kind, prompt, 5) for prompt in prompts]
    assert reused(found) == [0, 21, 21, 21]
    assert model.decoder.ran == 21 + 4 * (2 + 4)


def test_rows_are_put_in_order_while_they_hold_little(remembering):
    """Whole rows would be exchanged at the first step for the sake of one id."""
    model = remembering("positions")
    model.generate([[1] * 50, [2] * 50], max_tokens=2, stop_ids=[])
    cache, position = model._pool.caches[-1], 2 * 3 * 4 + 2
    cache.moved = 0
    prompts = [[2] + [0] * 60, [1] + [0] * 60]
    found = model.generate(prompts, max_tokens=3, stop_ids=[])
    assert model._pool.caches[-1] is cache
    assert (reused(found), cache.moved) == ([1, 1], 3 * position)
    assert tokens(found) == [greedy("positions", prompt, 3) for prompt in prompts]


def test_a_few_shared_ids_are_not_worth_a_run_of_their_own(remembering):
    model = remembering("positions")
    found = model.generate([[1, 2, 0], [1, 2, 1]], max_tokens=2, stop_ids=[])
    assert reused(found) == [0, 0]
    assert WORTH > 2


def test_a_batch_takes_what_one_slot_holds_for_all(remembering):
    model = remembering("positions")
    shared = [1, 2, 0] * 7
    model.generate([[*shared, 0], [3]], max_tokens=3, stop_ids=[])
    prompts = [[*shared, 2, 2], [*shared, 1]]
    found = model.generate(prompts, max_tokens=5, stop_ids=[])
    assert reused(found) == [21, 21]
    assert tokens(found) == [greedy("positions", prompt, 5) for prompt in prompts]


@pytest.mark.parametrize("kind", ["states", "both"])
def test_states_are_kept_where_a_batch_parts(remembering, kind):
    model = remembering(kind)
    shared = [1, 2, 0] * 7
    model.generate([[*shared, n, n] for n in range(4)], max_tokens=5, stop_ids=[])
    found = model.generate([*shared, 4, 4], max_tokens=5, stop_ids=[])
    assert (tokens(found), reused(found)) == ([greedy(kind, [*shared, 4, 4], 5)], [21])


def test_states_of_more_than_is_shared_are_not_copied(remembering):
    model = remembering("states")
    shared = [1, 2, 0] * 7
    first, _ = model.generate([shared, [3]], max_tokens=3, stop_ids=[])
    prompts = [[*shared, *first.token_ids, 2], [*shared, 1]]
    found = model.generate(prompts, max_tokens=5, stop_ids=[])
    assert reused(found) == [23, 0]
    assert tokens(found) == [greedy("states", prompt, 5) for prompt in prompts]


def test_a_window_that_moved_on_is_not_gone_back_behind(remembering):
    model = remembering("window")
    prompt = [1, 2, 0, 1] * 50
    model.generate(prompt, max_tokens=2, stop_ids=[])
    assert model._pool.caches[-1].dropped.any()
    assert reused(model.generate(prompt[:20], max_tokens=2, stop_ids=[])) == [0]
    model.generate(prompt, max_tokens=2, stop_ids=[])
    assert reused(model.generate([*prompt, 1], max_tokens=2, stop_ids=[])) == [200]


@pytest.mark.parametrize("kind", KINDS)
def test_beams_go_on_from_what_is_held(remembering, kind):
    model = remembering(kind)
    prompt = [1, 2, 0, 1, 1, 2]
    options = {"max_tokens": 7, "num_beams": 3, "num_return_sequences": 3, "stop_ids": [3]}
    alone = model.generate(prompt, **options, reuse_prefix=False)
    first = model.generate(prompt[:-2], **options)
    assert reused(first) == [0, 0, 0]
    found = model.generate(prompt, **options)
    held = 0 if model.decoder.states else 4  # a search keeps no states on its way
    assert (tokens(found), reused(found)) == (tokens(alone), [held] * 3)
    assert [c.score for c in found] == pytest.approx([c.score for c in alone])


# -- failures, threads, memory, privacy -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [0, 3, 4, 9, 12])
def test_a_call_that_fails_leaves_nothing_to_be_found(remembering, kind, fails):
    model = remembering(kind)
    prompt = [1, 2, 0, 1]
    model.generate(prompt, max_tokens=6, stop_ids=[])
    model.decoder.fails = model.decoder.ran + fails
    longer = [*prompt, *greedy(kind, prompt, 5), 2, 2, 1, 0]
    with pytest.raises(RuntimeError, match="broken"):
        model.generate([longer, [*longer, 1]], max_tokens=12, stop_ids=[])
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(longer, max_tokens=12, stop_ids=[])
    model.decoder.fails = None
    found = model.generate(longer, max_tokens=4, stop_ids=[])
    assert found.token_ids == greedy(kind, longer, 4)
    assert found.usage.reused_tokens == 0


def test_a_cancelled_call_leaves_what_it_ran(remembering):
    model, cancel = remembering("states"), threading.Event()
    stream = model.stream([1, 2, 0, 1], max_tokens=20, stop_ids=[], cancel=cancel)
    said = [next(stream).token_ids[0] for _ in range(3)]
    cancel.set()
    assert list(stream)[-1].finish_reason == "cancelled"
    prompt = [1, 2, 0, 1, *said, 2]
    found = model.generate(prompt, max_tokens=3, stop_ids=[])
    assert found.token_ids == greedy("states", prompt, 3)
    assert found.usage.reused_tokens == 7  # it was cancelled before its next choice, not before its last step


def test_what_one_call_would_not_leave_the_next_does_not_find(remembering):
    model = remembering("positions")
    model.generate([1, 2, 0, 1], max_tokens=3, reuse_prefix=False)
    assert not any(cache.left for cache in model._pool.caches)
    assert reused(model.generate([1, 2, 0, 1], max_tokens=3)) == [0]
    assert reused(model.generate([1, 2, 0, 1], max_tokens=3, reuse_prefix=False)) == [0]
    with pytest.raises(InputError, match="reuse_prefix"):
        model.generate([1], max_tokens=1, reuse_prefix="no")


def test_the_pool_lends_what_holds_most_and_keeps_no_more_than_it_may():
    decoder = Remembering("positions", 9)
    pool = CachePool(decoder.open_cache)
    caches = [pool.lend(1, 64) for _ in range(3)]
    for cache, held in zip(caches, ([1], [1, 2, 3], [1, 2])):
        decoder.prefill(cache, cache.acquire(), held)
        pool.give_back(cache)
    assert pool.caches == caches[1:]  # the one that was used longest ago went
    assert caches[0].closed
    assert pool.lend(1, 64, [[1, 2, 3, 4]]) is caches[1]
    assert pool.lend(1, 64, [[1, 2, 3, 4]]) is caches[2]
    assert pool.lend(1, 64, [[1, 2, 3, 4]]) not in caches


def test_a_cache_grows_for_what_it_holds_but_not_with_slots_that_nobody_needs():
    decoder = Remembering("positions", 9)
    pool = CachePool(decoder.open_cache)
    small, wide = pool.lend(1, 64), pool.lend(4, 64)
    for cache in (small, wide):
        decoder.prefill(cache, cache.acquire(), [1, 2, 3])
        pool.give_back(cache)
    assert pool.lend(1, 200, [[1, 2, 3, 4]]) is small
    assert small.capacity >= 200
    assert pool.lend(1, 200, [[1, 2, 3, 4]]) is not wide
    assert pool.lend(1, 64, [[1, 2, 3, 4]]) is wide


def test_a_closed_pool_takes_nothing_back():
    pool = CachePool(Remembering("positions", 9).open_cache)
    cache = pool.lend(1, 64)
    pool.close()
    pool.give_back(cache)
    assert cache.closed
    assert not pool.caches
    with pytest.raises(ClosedError, match="load it again"):
        pool.lend(1, 64)


def test_seats_of_a_cache_of_just_as_many_rows_push_nothing_out_that_is_needed():
    """A prompt without a match must not take the row that the next one matches."""
    decoder = Remembering("positions", 9)
    cache = decoder.open_cache(2)
    for held in ([1, 1, 1], [2, 2, 2]):
        decoder.prefill(cache, cache.acquire(), held)
    cache.reset()
    seats = seat(decoder, cache, [[0, 0], [1, 1, 1, 1]])
    assert (seats.held, seats.reused) == ([0, 3], [0, 3])


# -- real graphs ----------------------------------------------------------------------------------------------------
def test_numbers_are_the_same_within_float_noise(loaded):
    prompt = [1 + 7 * i % 20 for i in range(30)]
    options = {"max_tokens": 8, "stop_ids": [], "logprobs": 5}
    alone = loaded.generate(prompt, **options, reuse_prefix=False)
    loaded.generate(prompt[:17], max_tokens=1, stop_ids=[])
    again = loaded.generate(prompt, **options)
    assert again.usage.reused_tokens == 17
    assert again.token_ids == alone.token_ids
    for one, other in zip(again.logprobs, alone.logprobs):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        np.testing.assert_allclose([p for _, p in one.top], [p for _, p in other.top], atol=1e-4)


@many
@given(st.lists(st.tuples(st.lists(ids, min_size=1, max_size=3), st.integers(1, 5)), min_size=1, max_size=4))
def test_any_calls_give_the_tokens_that_they_give_alone(loaded, calls):
    for prompts, count in calls:
        prompts = [[9, 8, 7, 6] * 5 + prompt for prompt in prompts]
        found = loaded.generate(prompts, max_tokens=count, stop_ids=[])
        assert tokens(found) == tokens(loaded.generate(prompts, max_tokens=count, stop_ids=[], reuse_prefix=False))


def test_a_seed_gives_the_same_tokens_whatever_is_reused(loaded):
    options = {"max_tokens": 10, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.3, "stop_ids": []}
    prompt = [5, 6, 7, 8, 9, 10]
    alone = loaded.generate(prompt, **options, reuse_prefix=False)
    loaded.generate(prompt[:4], max_tokens=1)
    again = loaded.generate(prompt, **options)
    assert again.usage.reused_tokens == 4
    assert again.token_ids == alone.token_ids


def test_threads_that_share_a_beginning_get_what_each_gets_alone(loaded):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6] * (1 + i % 3) + [1 + i % 7] for i in range(24)]
    expected = [loaded.generate(p, max_tokens=6, reuse_prefix=False).token_ids for p in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda p: loaded.generate(p, max_tokens=6).token_ids, prompts)) == expected


def test_a_source_is_encoded_anew():
    with tfinfer.load(HERE / "tiny_seq2seq", threads=1) as model:
        first = model.generate("hello world", max_tokens=6)
        again = model.generate("hello world", max_tokens=6)
        assert (again.token_ids, again.usage.reused_tokens) == (first.token_ids, 0)
        assert not any(cache.left for cache in model._pool.caches)


def test_the_longest_length_is_not_passed_by_what_is_held(remembering):
    model = remembering("positions")
    prompt = [1] * (LONGEST - 2)
    model.generate(prompt, max_tokens=2, stop_ids=[])
    assert tokens(model.generate([*prompt, 0], max_tokens=1, stop_ids=[])) == [greedy("positions", [*prompt, 0], 1)]


def test_a_graph_that_appends_one_token_at_a_time_prefills_a_prompt_whole(remembering):
    """Appending what is new would be slower than running all at once."""
    model = remembering("positions")
    model.manifest = dataclasses.replace(model.manifest, appends_one=True)
    prompt = [1, 2, 0, 1]
    assert [reused(model.generate(prompt, max_tokens=3)) for _ in range(2)] == [[0], [0]]
