"""The loop that prompts join and leave: exact tokens however they come, one piece at a time, whom a failure hits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from remembering import KINDS, Remembering, greedy

from tfinfer.errors import InputError, NonFiniteLogitsError, TfinferError
from tfinfer.session.prefix import seat_beside
from tfinfer.tokens.continuous import Continuous, Row
from tfinfer.tokens.generate import Limits, Token
from tfinfer.tokens.sampling import SamplingParams

VOCAB, SLOTS = 9, 3
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=9)
arrivals = st.lists(st.tuples(st.integers(0, 3), prompts, st.integers(1, 5)), min_size=1, max_size=9)


def empty(cache, prompt):
    """A slot that holds nothing."""
    return cache.acquire()


def loop_of(decoder, seat=empty, piece=2, slots=SLOTS):
    return Continuous(decoder, decoder.open_cache(slots), VOCAB, piece, seat)


def row(prompt, index=0, params=None, **limits):
    return Row(index, prompt, params or SamplingParams(), Limits(**{"max_tokens": 3, **limits}))


def drain(loop):
    """All outcomes by row."""
    found = {}
    while not loop.idle:
        for one, outcome in loop.advance():
            found.setdefault(one, []).append(outcome)
    return found


def ids_of(outcomes):
    return tuple(token.token_id for token in outcomes)


@pytest.mark.parametrize("seat", [empty, seat_beside])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(arrivals)
def test_tokens_are_those_of_each_prompt_alone_whoever_comes_and_goes(kind, seat, given_):
    loop, found, waited = loop_of(Remembering(kind, VOCAB), seat), {}, list(given_)
    rows = []
    while waited or not loop.idle:
        while waited and waited[0][0] <= len(found):
            _, prompt, count = waited.pop(0)
            rows.append(row(prompt, max_tokens=count))
            loop.add(rows[-1])
        if loop.idle and waited:  # nobody is left to wait for
            waited[0] = (0, *waited[0][1:])
            continue
        for one, token in loop.advance():
            found.setdefault(one, []).append(token)
    for one in rows:
        assert ids_of(found[one]) == greedy(kind, one.prompt, one.limits.max_tokens)
        assert found[one][-1].finish_reason == "length"
    assert not loop.cache.live


class Noting(Remembering):
    """Writes down what is run."""

    def __init__(self, kind="positions"):
        super().__init__(kind, VOCAB)
        self.calls = []

    def prefill(self, cache, slot, ids, keep=1):
        self.calls.append(("piece", len(ids)))
        return super().prefill(cache, slot, ids, keep)

    def step(self, cache, slots, ids):
        self.calls.append(("step", len(slots)))
        return super().step(cache, slots, ids)


def test_between_two_steps_of_the_others_there_is_one_piece_of_a_prompt_that_joins():
    decoder = Noting()
    loop = loop_of(decoder)
    loop.add(row([1], max_tokens=9))
    list(loop.advance())
    decoder.calls.clear()
    loop.add(row([0, 1, 2, 0, 1]))
    for _ in range(3):
        list(loop.advance())
    assert decoder.calls == [("piece", 2), ("step", 1), ("piece", 2), ("step", 1), ("piece", 1), ("step", 2)]


def test_who_finds_no_slot_waits_and_comes_in_order():
    loop = loop_of(Remembering("positions", VOCAB), slots=1)
    rows = [row([i]) for i in range(3)]
    for one in rows:
        loop.add(one)
    assert list(drain(loop)) == rows


def test_a_beginning_that_a_live_slot_holds_is_not_run_again():
    decoder, shared = Noting(), [1, 2] * 20
    loop = loop_of(decoder, seat_beside, piece=64)
    first, second = row([*shared, 0], max_tokens=20), row([*shared, 2, 2])
    loop.add(first)
    list(loop.advance())
    decoder.calls.clear()
    loop.add(second)
    list(loop.advance())
    assert (decoder.calls[0], second.reused) == (("piece", 2), 40)
    assert ids_of(drain(loop)[second])[-1] == greedy("positions", second.prompt, 3)[-1]


def test_a_prompt_that_a_live_slot_holds_whole_still_runs_its_last_id():
    loop, prompt = loop_of(Remembering("positions", VOCAB), seat_beside, piece=64), [1, 2] * 20
    rows = [row(prompt, max_tokens=20), row(prompt)]
    loop.add(rows[0])
    list(loop.advance())
    loop.add(rows[1])
    assert ids_of(drain(loop)[rows[1]]) == greedy("positions", prompt, 3)
    assert rows[1].reused == len(prompt) - 1


def test_states_are_taken_up_where_an_earlier_prompt_ended_and_not_out_of_a_live_slot():
    loop, prompt = loop_of(Remembering("states", VOCAB), seat_beside, piece=64), [1, 2] * 20
    first, beside, later = row(prompt, max_tokens=20), row([*prompt, 0]), row([*prompt, 2])
    loop.add(first)
    list(loop.advance())
    loop.add(beside)
    found = drain(loop)
    loop.add(later)
    found |= drain(loop)
    for one in (beside, later):
        assert ids_of(found[one]) == greedy("states", one.prompt, 3)
    assert (beside.reused, later.reused) == (0, len(prompt))


def test_rows_stay_where_they_are_when_one_leaves_and_another_takes_its_place():
    loop = loop_of(Remembering("positions", VOCAB))
    rows = [row([1], max_tokens=4), row([2], max_tokens=9), row([0], max_tokens=8), row([1, 1], max_tokens=9)]
    for one in rows:
        loop.add(one)
    drain(loop)
    assert rows[3].slot > rows[2].slot  # who came last stands first
    assert loop.cache.moved == 0


def test_a_prompt_can_be_ended_anywhere_and_twice():
    loop = loop_of(Remembering("positions", VOCAB), slots=1)
    running, waiting = row([1], max_tokens=50), row([2], max_tokens=50)
    loop.add(running)
    loop.add(waiting)
    list(loop.advance())
    for one in (running, waiting, waiting):
        loop.finish(one)
    assert loop.idle
    assert not loop.cache.live


def test_stop_ids_and_the_forced_last_end_a_prompt_as_in_a_call():
    first, second = greedy("positions", [1], 2)
    assert first != second
    loop = loop_of(Remembering("positions", VOCAB))
    stopped, forced = row([1], stop_ids=frozenset({second})), row([1], max_tokens=2, forced_last=7)
    both = row([1], max_tokens=2, forced_last=7, stop_ids=frozenset({7}))
    for one in (stopped, forced, both):
        loop.add(one)
    found = drain(loop)
    assert [(t.token_id, t.finish_reason) for t in found[stopped]] == [(first, None), (None, "stop")]
    assert [(t.token_id, t.finish_reason) for t in found[forced]] == [(first, None), (7, "length")]
    assert [(t.token_id, t.finish_reason) for t in found[both]] == [(first, None), (None, "length")]


def test_each_row_has_its_own_parameters_and_draws():
    def run(*params):
        loop = loop_of(Remembering("positions", VOCAB))
        rows = [row([1, 2], params=p, max_tokens=12, logprobs=1) for p in params]
        for one in rows:
            loop.add(one)
        found = drain(loop)
        return [ids_of(found[one]) for one in rows]

    drawn, penalised = SamplingParams(temperature=2.0, seed=3), SamplingParams(frequency_penalty=4.0)
    alone = [run(p)[0] for p in (drawn, penalised, SamplingParams())]
    assert run(drawn, penalised, SamplingParams()) == alone
    assert len(set(alone)) == 3


class Broken(Remembering):
    """Prefills of a 4 fail, and after a 3 nothing is finite."""

    def __init__(self):
        super().__init__("positions", VOCAB)

    def prefill(self, cache, slot, ids, keep=1):
        if 4 in ids:
            raise InputError("a 4")
        return self._bad(super().prefill(cache, slot, ids, keep), ids[-1:])

    def step(self, cache, slots, ids):
        return self._bad(super().step(cache, slots, ids), ids)

    @staticmethod
    def _bad(logits, ids):
        logits[np.asarray(ids) == 3] = np.nan
        return logits


def test_what_fails_for_one_prompt_is_told_to_that_one():
    loop = loop_of(Broken())
    good, refused, odd = row([1], max_tokens=2), row([0, 4]), row([3])
    for one in (good, refused, odd):
        loop.add(one)
    found = drain(loop)
    assert isinstance(found[refused][-1], InputError)
    assert isinstance(found[odd][-1], NonFiniteLogitsError)
    assert ids_of(found[good]) == greedy("positions", [1], 2)
    assert not loop.cache.live


def test_one_row_of_a_step_without_finite_logits_does_not_stop_the_others():
    decoder = Remembering("positions", VOCAB)
    loop = loop_of(decoder)
    rows = [row([1], max_tokens=4), row([2], max_tokens=4)]
    for one in rows:
        loop.add(one)
    for _ in range(2):
        list(loop.advance())
    step = decoder.step
    decoder.step = lambda cache, slots, ids: step(cache, slots, ids) * np.array([[np.nan], [1]], np.float32)
    outcomes = dict(loop.advance())
    assert isinstance(outcomes[rows[0]], TfinferError)
    assert isinstance(outcomes[rows[1]], Token)


def test_a_step_that_fails_is_raised():
    decoder = Remembering("positions", VOCAB)
    loop = loop_of(decoder)
    loop.add(row([1]))
    decoder.fails = 1
    with pytest.raises(RuntimeError, match="broken"):
        list(loop.advance())
