"""Beam search without a graph: a decoder that reads its history from the cache, so that a wrong copy shows."""

import itertools
import math
import threading

import numpy as np
import pytest

from tfinfer.errors import InputError, NonFiniteLogitsError
from tfinfer.manifest import CacheSpec
from tfinfer.session.cache import Cache
from tfinfer.session.memory import HostMemory
from tfinfer.tokens.beams import BeamSlots, Penalties, beam_search
from tfinfer.tokens.generate import Limits
from tfinfer.tokens.hypotheses import BeamParams, largest, log_softmax
from tfinfer.tokens.sampling import SamplingParams

SPECS = [
    CacheSpec("past.key", "present.key", 2, 3, "float32"),
    CacheSpec("past.value", "present.value", 1, 2, "float16"),
]
POSITION = 2 * 3 * 4 + 1 * 2 * 2  # bytes of one position of one slot in both buffers


def logits_after(history, vocab, seed=0):
    """Logits that depend on every id so far."""
    return np.random.default_rng([seed, *history]).normal(0, 2, vocab).astype(np.float32)


class Reading:
    """Writes ids into the cache and computes from what stands there."""

    def __init__(self, vocab=6, seed=0, fail_after=None):
        self.vocab, self.seed, self.fail_after, self.steps = vocab, seed, fail_after, []

    def prefill(self, cache, slot, ids):
        cache.reserve(slot, len(ids))
        for token in ids:
            self.write(cache, cache.row(slot), token)
        return self.read(cache, cache.row(slot))[None]

    def step(self, cache, slots, ids):
        if self.fail_after is not None and len(self.steps) >= self.fail_after:
            raise RuntimeError("broken")
        assert ids.dtype == np.int64
        for slot in slots:
            cache.reserve(slot, 1)
        first = cache.arrange(slots)
        self.steps.append(len(slots))
        for place, token in enumerate(ids.tolist()):
            self.write(cache, first + place, token)
        return np.stack([self.read(cache, first + place) for place in range(len(slots))])

    def write(self, cache, row, token):
        for buffer in cache.buffers:
            buffer.owner[row, :, cache.lengths[row]] = token
        cache.lengths[row] += 1

    def read(self, cache, row):
        keys, values = (buffer.owner[row, :, : cache.lengths[row]] for buffer in cache.buffers)
        history = keys[0, :, 0].astype(int).tolist()
        for array in (keys, values):  # every head and every channel of both buffers
            assert (array == np.array(history)[None, :, None]).all()
        return logits_after(history, self.vocab, self.seed)


def open_cache(slots, capacity=16):
    return Cache(SPECS, HostMemory(), slots, capacity, longest=500)


def search(prompts, beams, *, decoder=None, cache=None, adjust=None, cancel=None, slots=None, limits=None, **params):
    decoder = decoder or Reading()
    cache = cache or open_cache(beams * len(prompts))
    limits = Limits(**{"max_tokens": 6, "stop_ids": frozenset({0}), **(limits or {})})
    found = beam_search(
        decoder, cache, prompts, BeamParams(beams, **params), limits, decoder.vocab,
        slots=slots, adjust=adjust, cancel=cancel,
    )  # fmt: skip
    assert not cache.live
    return found


def ids_of(hypotheses):
    return [h.token_ids for h in hypotheses]


# -- what is found --------------------------------------------------------------------------------------------------
def every_hypothesis(prompt, vocab, seed, max_tokens, stop, penalty):
    """All that could be said, with scores, best first."""
    found = []
    for length in range(1, max_tokens + 1):
        for ids in itertools.product(range(vocab), repeat=length):
            if stop in ids[:-1] or (ids[-1] != stop and length < max_tokens):
                continue
            total = sum(
                log_softmax(logits_after([*prompt, *ids[:i]], vocab, seed)[None])[0, token]
                for i, token in enumerate(ids)
            )
            found.append((float(total) / length**penalty, ids if ids[-1] != stop else ids[:-1]))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("seed", range(4))
def test_as_many_beams_as_there_are_sequences_find_the_best_of_all(seed, penalty):
    """With so many beams nothing is ever dropped, so the result is what a search through everything finds."""
    wanted = every_hypothesis([5, 2], 4, seed, 3, 0, penalty)
    decoder, limits = Reading(4, seed), {"max_tokens": 3}
    options = {"length_penalty": penalty, "early_stopping": "never", "num_return_sequences": 8}
    found = search([[5, 2]], 64, decoder=decoder, limits=limits, **options)[0]
    assert ids_of(found) == [ids for _, ids in wanted[:8]]
    np.testing.assert_allclose([h.score for h in found], [score for score, _ in wanted[:8]], rtol=1e-5)


def plain_search(prompt, decoder, limits, params):
    """The rules once more: no cache, no arrays, one beam after the other, from `_beam_search` of transformers."""
    width, penalty, running, ended = params.num_beams, params.length_penalty, [(0.0, ())], []
    for length in range(1, limits.max_tokens + 1):
        candidates = []
        for score, ids in running:
            logprobs = log_softmax(logits_after([*prompt, *ids], decoder.vocab, decoder.seed)[None])[0]
            candidates += [(score + float(logprobs[token]), (*ids, token)) for token in range(decoder.vocab)]
        candidates.sort(key=lambda pair: -pair[0])
        ends = [ids[-1] in limits.stop_ids or length == limits.max_tokens for _, ids in candidates]
        ended += [(s / length**penalty, ids) for (s, ids), end in zip(candidates[:width], ends) if end]
        ended = sorted(ended, key=lambda pair: -pair[0])[:width]
        running = [pair for pair, end in zip(candidates, ends) if not end][:width]
        if not running or (len(ended) == width and params.early_stopping is True):
            break
        far = limits.max_tokens if params.early_stopping == "never" and penalty > 0 else length
        if len(ended) == width and running[0][0] / far**penalty <= ended[-1][0]:
            break
    return [ids[:-1] if ids[-1] in limits.stop_ids else ids for _, ids in ended[: params.num_return_sequences]]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_prompts_searched_together_are_as_each_alone(beams, penalty, early_stopping):
    """Ragged prompts, three of which end at different times, against the rules written out plainly."""
    prompts = [[3], [1, 2, 3, 4, 5], [2, 2], [4, 1, 1]]
    params = BeamParams(beams, penalty, early_stopping, beams)
    for seed in range(5):
        decoder, limits = Reading(seed=seed), Limits(9, frozenset({0, 1}))
        found = beam_search(decoder, open_cache(4 * beams), prompts, params, limits, decoder.vocab)
        for prompt, hypotheses in zip(prompts, found):
            assert ids_of(hypotheses) == plain_search(prompt, decoder, limits, params)
            assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


def test_early_stopping_makes_a_difference():
    """Otherwise the comparison above would not see whether it is heard."""
    steps = {}
    for early_stopping in (True, False, "never"):
        decoder = Reading(seed=2)
        search([[3], [1, 2]], 3, decoder=decoder, limits={"max_tokens": 20}, early_stopping=early_stopping)
        steps[early_stopping] = len(decoder.steps)
    assert steps[True] < steps[False] < steps["never"]


def test_prompts_outgrow_the_cache_they_began_in():
    prompts = [[1 + i % 5 for i in range(60)], [2]]
    decoder, limits, params = Reading(seed=1), Limits(12), BeamParams(3)
    cache = open_cache(6)
    found = beam_search(decoder, cache, prompts, params, limits, decoder.vocab)
    assert cache.capacity > 64
    assert [ids_of(h) for h in found] == [plain_search(prompt, decoder, limits, params) for prompt in prompts]


def test_the_reason_says_how_a_hypothesis_ended():
    found = search([[3]], 5, num_return_sequences=5, limits={"max_tokens": 3}, early_stopping="never")[0]
    assert {h.finish_reason for h in found} == {"stop", "length"}
    for hypothesis in found:
        assert 0 not in hypothesis.token_ids
        assert (len(hypothesis.token_ids) == 3) == (hypothesis.finish_reason == "length")


def test_no_more_is_returned_than_there_is():
    """Three ids, one step: three hypotheses, however many are asked for."""
    found = search([[1]], 8, decoder=Reading(3), num_return_sequences=8, limits={"max_tokens": 1})[0]
    assert sorted(ids_of(found)) == [(), (1,), (2,)]


def test_a_prompt_that_is_done_leaves_the_step():
    decoder = Reading(seed=0)
    search([[3], [1, 2], [5]], 3, decoder=decoder, early_stopping=True, limits={"max_tokens": 30})
    assert decoder.steps[0] == 9
    assert decoder.steps[-1] < 9


# -- what is moved --------------------------------------------------------------------------------------------------
def holding(cache, slots, histories):
    """Let slots hold these ids."""
    for slot, history in zip(slots, histories):
        cache.rewind(slot, 0)
        for token in history:
            Reading().write(cache, cache.row(slot), token)


def held(cache, slot):
    return cache.buffers[0].owner[cache.row(slot), 0, : cache.length(slot), 0].astype(int).tolist()


@pytest.fixture
def four():
    """Four beams after a prompt of three ids and one step."""
    cache = open_cache(4)
    slots = BeamSlots(cache, cache.acquire())
    holding(cache, slots.slots, [[7, 8, 9]])
    slots.fork(4)
    forked = cache.moved
    assert forked == 3 * 3 * POSITION  # three forks, three positions
    order = slots.follow(np.array([0, 0, 0, 0]))
    assert cache.moved == forked  # they all hold the same
    for token, slot in enumerate(order):
        Reading().write(cache, cache.row(slot), token)
    cache.moved = 0
    return cache, slots, order


def test_beams_that_change_places_move_nothing(four):
    cache, slots, order = four
    assert slots.follow(np.array([2, 0, 3, 1])) == [order[2], order[0], order[3], order[1]]
    assert cache.moved == 0


def test_a_second_child_is_copied_from_where_it_parted(four):
    cache, slots, order = four
    followed = slots.follow(np.array([1, 1, 0, 3]))
    assert followed[0] == order[1]
    assert followed[1] == order[2]  # the one that died
    assert held(cache, followed[1]) == [7, 8, 9, 1]
    assert cache.moved == POSITION


def test_the_copy_goes_where_the_most_is_the_same_already(four):
    """Of the beams that died, the one that parted last takes the copy."""
    cache, slots, order = four
    order = slots.follow(np.array([0, 1, 2, 2]))  # 2 and 3 part here, the others one step before
    for token, slot in enumerate(order):
        Reading().write(cache, cache.row(slot), token)
    cache.moved = 0
    followed = slots.follow(np.array([2, 2, 1, 2]))  # 0 and 3 died
    assert [held(cache, slot) for slot in followed] == [[7, 8, 9, 2, 2]] * 2 + [[7, 8, 9, 1, 1]] + [[7, 8, 9, 2, 2]]
    assert cache.moved == (1 + 2) * POSITION
    assert followed[1] == order[3]


def test_a_slot_out_of_use_comes_back_with_all_it_missed(four):
    cache, slots, order = four
    for _ in range(2):  # two steps with one beam alone
        order = slots.follow(np.array([0]))
        Reading().write(cache, cache.row(order[0]), 5)
    followed = slots.follow(np.array([0, 0, 0]))
    assert [held(cache, slot) for slot in followed] == [[7, 8, 9, 0, 5, 5]] * 3


def test_a_long_search_moves_a_fraction_of_the_cache():
    decoder, cache = Reading(seed=3), open_cache(4)
    prompt = [1, 2, 3, 4, 5] * 8
    beam_search(decoder, cache, [prompt], BeamParams(4), Limits(20), decoder.vocab)
    whole = sum(steps * POSITION * (len(prompt) + i) for i, steps in enumerate(decoder.steps))
    assert 0 < cache.moved - 3 * len(prompt) * POSITION < whole / 20


def test_copied_positions_are_those_alone():
    cache = open_cache(2)
    one, other = cache.acquire(), cache.acquire()
    holding(cache, [one, other], [[1, 2, 3, 4], [5, 6]])
    cache.copy_positions(one, other, 1, 3)
    assert held(cache, other) == [5, 2, 3]
    assert held(cache, one) == [1, 2, 3, 4]
    assert cache.moved == 2 * POSITION


@pytest.mark.parametrize("start, end", [(0, 5), (3, 4), (2, 1), (-1, 2)])
def test_positions_that_are_not_there_are_not_copied(start, end):
    cache = open_cache(2)
    one, other = cache.acquire(), cache.acquire()
    holding(cache, [one, other], [[1, 2, 3, 4], [5, 6]])
    with pytest.raises(InputError, match=r"which holds 4.*which holds 2"):
        cache.copy_positions(one, other, start, end)
    assert held(cache, other) == [5, 6]


# -- what is given --------------------------------------------------------------------------------------------------
def test_slots_that_hold_something_are_continued_and_given_back():
    decoder, cache = Reading(), open_cache(4)
    slots = [cache.acquire(), cache.acquire()]
    holding(cache, slots, [[4, 5], [1]])
    found = search([[3], [2, 2]], 2, decoder=decoder, cache=cache, slots=slots)
    assert found == search([[4, 5, 3], [1, 2, 2]], 2)


def test_a_bias_and_a_penalty_act_on_log_probabilities():
    """Against the sum over the tokens that came out, worked out by hand."""
    params = SamplingParams(repetition_penalty=1.3, logit_bias={2: -0.5, 3: -math.inf}, frequency_penalty=0.1)
    prompts = [[1, 2], [5]]
    found = search(prompts, 3, adjust=Penalties(params, prompts, 6), num_return_sequences=3, early_stopping="never")
    assert found != search(prompts, 3, num_return_sequences=3, early_stopping="never")
    for prompt, hypotheses in zip(prompts, found):
        for hypothesis in hypotheses:
            ids = hypothesis.token_ids + ((0,) if hypothesis.finish_reason == "stop" else ())
            assert 3 not in ids
            total = 0.0
            for i, token in enumerate(ids):
                score = float(log_softmax(logits_after([*prompt, *ids[:i]], 6)[None])[0, token]) - 0.5 * (token == 2)
                score *= 1.3 if token in [*prompt, *ids[:i]] else 1
                total += score - 0.1 * ids[:i].count(token)
            assert hypothesis.score == pytest.approx(total / len(ids), rel=1e-5)


def test_a_forced_token_leaves_no_other():
    found = search([[1]], 2, adjust=Penalties(SamplingParams(logit_bias={4: math.inf}), [[1]], 6))[0]
    assert ids_of(found) == [(4,) * 6]
    assert found[0].score > -10


@pytest.mark.parametrize("bias, first", [({}, 3), ({4: 1e300}, 4), ({3: -1e300}, 1)])
def test_a_bias_past_float32_is_as_good_as_infinite(bias, first):
    prompts, limits = [[2]], {"max_tokens": 1, "stop_ids": frozenset()}
    found = search(prompts, 1, limits=limits, adjust=Penalties(SamplingParams(logit_bias=bias), prompts, 6))[0]
    assert ids_of(found) == [(first,)]
    assert math.isfinite(found[0].score)


def test_beams_that_may_not_go_on_end_the_search_with_what_there_is():
    """A constraint that allows 3, then the stop id or 4, and nothing after that."""

    def constrain(scores, beams):
        for row, beam in zip(scores, beams):
            allowed = {(): [3], (3,): [0, 4], (3, 4): []}[beam.token_ids]
            row[np.setdiff1d(np.arange(6), allowed)] = -math.inf
        return scores

    decoder = Reading()
    found = search([[1]], 3, decoder=decoder, adjust=constrain, num_return_sequences=3, limits={"max_tokens": 50})[0]
    assert [(h.token_ids, h.finish_reason) for h in found] == [((3,), "stop")]
    assert len(decoder.steps) == 2


def test_the_rows_that_are_adjusted_say_whose_they_are():
    calls = []

    def look(scores, beams):
        calls.append(beams)
        assert len(scores) == len(beams)
        return scores

    search([[3], [1, 2]], 3, adjust=look, early_stopping=True, limits={"max_tokens": 30})
    assert [(beam.prompt, beam.token_ids) for beam in calls[0]] == [(0, ()), (1, ())]
    for before, beams in itertools.pairwise(calls):
        for beam in beams:
            parent = before[beam.parent]
            assert (parent.prompt, parent.token_ids) == (beam.prompt, beam.token_ids[:-1])


def test_cancel_returns_what_there_is():
    event = threading.Event()

    def cancel_at_the_third(scores, beams):
        if len(beams[0].token_ids) == 2:
            event.set()
        return scores

    found = search([[3], [1, 2]], 2, adjust=cancel_at_the_third, cancel=event, num_return_sequences=2)
    assert {h.finish_reason for hypotheses in found for h in hypotheses} >= {"cancelled"}
    assert all(len(h.token_ids) == 3 for hypotheses in found for h in hypotheses if h.finish_reason == "cancelled")
    before_any = search([[3]], 2, cancel=event)
    assert [(h.token_ids, h.score, h.finish_reason) for h in before_any[0]] == [((), 0.0, "cancelled")]


# -- what goes wrong ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room, fail_after", [(6, 2), (4, None), (1, None)])
def test_an_error_on_the_way_frees_the_slots(room, fail_after):
    cache = open_cache(room)
    with pytest.raises((RuntimeError, InputError), match=r"broken|slots are in use"):
        beam_search(Reading(fail_after=fail_after), cache, [[3], [1, 2]], BeamParams(3), Limits(6), 6)
    assert not cache.live


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    class Broken(Reading):
        def read(self, cache, row):
            return np.full(6, value, np.float32)

    with pytest.raises(NonFiniteLogitsError, match="overflow in the model"):
        search([[1]], 2, decoder=Broken())


def test_scores_that_are_spoilt_by_what_adjusts_them_are_refused():
    with pytest.raises(NonFiniteLogitsError, match="adjusts"):
        search([[1]], 2, adjust=lambda scores, beams: scores * math.nan)
    with pytest.raises(NonFiniteLogitsError, match="forbids every token"):
        search([[1]], 2, adjust=lambda scores, beams: np.full_like(scores, -math.inf))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"num_beams": 0}, "num_beams: expected a whole number of at least 1; got 0"),
        ({"num_beams": True}, "num_beams"),
        ({"num_beams": 2.0}, "num_beams"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": 1e3}, "from -5 to 5; got 1000"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"early_stopping": None}, "early_stopping"),
        ({"num_return_sequences": 3}, "ask for fewer sequences or for more beams; got 3"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        BeamParams(**{"num_beams": 2, **wrong})


def test_arguments_that_do_not_fit_together_are_refused():
    with pytest.raises(InputError, match="logprobs=0, got 2"):
        search([[1]], 2, limits={"logprobs": 2})
    with pytest.raises(InputError, match="one slot for each of 2 prompts"):
        search([[1], [2]], 2, slots=[])
    with pytest.raises(InputError, match="all 6 ids are stop ids"):
        search([[1]], 2, limits={"stop_ids": frozenset(range(6))})


# -- the largest ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 5, 64, 1000, 4097])
@pytest.mark.parametrize("most", [1, 4, 70])
def test_the_largest_are_those_of_a_stable_sort(size, most):
    rng = np.random.default_rng(size)
    for scores in (rng.normal(size=size), rng.integers(0, 9, size), np.zeros(size)):
        scores = scores.astype(np.float32)
        assert largest(scores, most).tolist() == np.argsort(-scores, kind="stable")[:most].tolist()


def test_what_is_forbidden_is_never_among_the_largest():
    scores = np.full(1000, -np.inf, np.float32)
    scores[[400, 7]] = -5, -9
    assert largest(scores, 4).tolist() == [400, 7]
