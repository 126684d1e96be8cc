"""The loop without a graph: a decoder of a few lines with scripted logits."""

import threading

import numpy as np
import pytest

from tfinfer.errors import InputError, LengthError
from tfinfer.tokens.generate import Batch, Limits, check_lengths
from tfinfer.tokens.sampling import SamplingParams

VOCAB = 10


class Slots:
    """Counts which slots live."""

    def __init__(self):
        self.live, self.made = set(), 0

    def acquire(self):
        self.made += 1
        self.live.add(self.made)
        return self.made

    def release(self, slot):
        self.live.remove(slot)


class Counting:
    """Says the next number: after 3 comes 4; fails when told to."""

    def __init__(self, fail_after=None):
        self.steps, self.fail_after = [], fail_after

    def open_cache(self, slots, capacity):
        return Slots()

    def prefill(self, cache, slot, ids):
        return self.after(ids[-1:])

    def step(self, cache, slots, ids):
        if self.fail_after is not None and len(self.steps) >= self.fail_after:
            raise RuntimeError("broken")
        self.steps.append((list(slots), ids.tolist()))
        return self.after(ids)

    @staticmethod
    def after(ids):
        logits = np.zeros((len(ids), VOCAB), np.float32)
        logits[np.arange(len(ids)), (np.asarray(ids) + 1) % VOCAB] = 5
        return logits


def run(prompts, decoder=None, params=None, cancel=None, cache=None, **limits):
    decoder = decoder or Counting()
    cache = cache or decoder.open_cache(len(prompts), 0)
    return Batch(
        decoder, cache, prompts, params or SamplingParams(), Limits(**{"max_tokens": 4, **limits}), VOCAB, cancel
    ), cache


def by_prompt(tokens):
    found = {}
    for token in tokens:
        found.setdefault(token.index, []).append(token)
    return found


def test_one_prompt_ends_at_max_tokens():
    batch, cache = run([[1, 2]])
    tokens = list(batch.tokens())
    assert [t.token_id for t in tokens] == [3, 4, 5, 6]
    assert [t.finish_reason for t in tokens] == [None, None, None, "length"]
    assert not cache.live


def test_the_last_token_is_not_run_through_the_model_for_nothing():
    decoder = Counting()
    list(run([[1]], decoder)[0].tokens())
    assert len(decoder.steps) == 3


def test_a_stop_id_ends_its_prompt_and_is_not_part_of_it():
    tokens = list(run([[1]], stop_ids=frozenset({4}))[0].tokens())
    assert [(t.token_id, t.finish_reason) for t in tokens] == [(2, None), (3, None), (None, "stop")]


def test_a_prompt_that_ends_leaves_and_the_others_go_on():
    decoder = Counting()
    batch, cache = run([[1], [6], [3]], decoder, stop_ids=frozenset({8}))
    found = by_prompt(batch.tokens())
    assert [t.token_id for t in found[0]] == [2, 3, 4, 5]
    assert [t.token_id for t in found[1]] == [7, None]
    assert [t.token_id for t in found[2]] == [4, 5, 6, 7]
    assert decoder.steps[1:] == [([1, 3], [3, 5]), ([1, 3], [4, 6])]
    assert not cache.live


def test_a_prompt_can_be_ended_from_outside():
    batch, _ = run([[1], [5]])
    found = {0: [], 1: []}
    for token in batch.tokens():
        found[token.index].append(token.token_id)
        if token.token_id == 3:
            batch.finish(0)
    assert found == {0: [2, 3], 1: [6, 7, 8, 9]}


def test_cancelling_ends_every_prompt_with_its_reason():
    cancel = threading.Event()
    batch, cache = run([[1], [5]], cancel=cancel)
    seen = []
    for token in batch.tokens():
        seen.append(token)
        cancel.set()
    assert [t.finish_reason for t in seen[-2:]] == ["cancelled", "cancelled"]
    assert not cache.live


def test_leaving_the_loop_frees_the_slots():
    batch, cache = run([[1], [2]])
    tokens = batch.tokens()
    next(tokens)
    assert len(cache.live) == 2
    tokens.close()
    assert not cache.live


def test_an_error_in_the_decoder_frees_the_slots():
    batch, cache = run([[1], [2]], Counting(fail_after=1))
    with pytest.raises(RuntimeError, match="broken"):
        list(batch.tokens())
    assert not cache.live


def test_logprobs_come_with_every_token_and_hold_the_chosen_one():
    tokens = list(run([[1]], logprobs=3)[0].tokens())
    for token in tokens:
        assert token.logprobs.token_id == token.token_id
        assert token.logprobs.top[0] == (token.token_id, token.logprobs.logprob)
        assert len(token.logprobs.top) == 3


def test_the_same_seed_gives_the_same_tokens_alone_or_in_a_batch():
    params = SamplingParams(temperature=3.0, seed=11)
    together = by_prompt(run([[1], [2, 3], [9]], params=params, max_tokens=20)[0].tokens())
    for index, prompt in enumerate([[1], [2, 3], [9]]):
        alone = list(run([prompt], params=params, max_tokens=20)[0].tokens())
        assert [t.token_id for t in alone] == [t.token_id for t in together[index]]


def test_penalties_follow_each_prompt_when_another_leaves():
    """A history that is not cut with the rows would punish the wrong prompt."""
    params = SamplingParams(presence_penalty=10.0)
    prompts = [[6], [1]]
    together = by_prompt(run(prompts, params=params, max_tokens=9, stop_ids=frozenset({8}))[0].tokens())
    alone = list(run([[1]], params=params, max_tokens=9, stop_ids=frozenset({8}))[0].tokens())
    assert [t.token_id for t in together[1]] == [t.token_id for t in alone]


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2.5}, {"max_tokens": True}, {"logprobs": -1}]
)
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Limits(**{"max_tokens": 4, **wrong})


def test_lengths_are_checked_before_anything_runs():
    assert check_lengths([[1] * 6, [1]], 4, 10) == 10
    with pytest.raises(LengthError, match="at most 4"):
        check_lengths([[1] * 6], 5, 10)
    with pytest.raises(LengthError, match="11 tokens is longer"):
        check_lengths([[1] * 11], 1, 10)
