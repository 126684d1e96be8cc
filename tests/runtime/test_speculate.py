"""Speculation without a graph: a decoder of a few lines, and one whose distributions are known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tfinfer.tokens.draft import ModelDraft, Own, Shared
from tfinfer.tokens.generate import Batch, Limits
from tfinfer.tokens.lookup import Lookup
from tfinfer.tokens.sampling import History, SamplingParams, distribution
from tfinfer.tokens.speculate import Speculating

VOCAB = 6


class Texts:
    """A cache that holds the ids themselves, so that everything can be told from what a slot holds."""

    def __init__(self):
        self.held, self.made, self.closed = {}, 0, False

    def acquire(self):
        self.made += 1
        self.held[self.made] = []
        return self.made

    def release(self, slot):
        del self.held[slot]

    def length(self, slot):
        return len(self.held[slot])

    def rewind(self, slot, length):
        assert length <= len(self.held[slot])
        del self.held[slot][length:]

    def snapshot(self, slot):
        return list(self.held[slot])

    def restore(self, slot, snapshot):
        self.held[slot] = list(snapshot)

    def close(self):
        self.closed = True


class WithStates(Texts):
    """The same, of a model whose states cannot be taken back."""

    def rewind(self, slot, length):
        raise AssertionError("states cannot be rewound")


class Random:
    """Logits that are a fixed, random function of the last two ids; counts passes."""

    def __init__(self, seed=0, spread=1.5, like=None, noise=0.0, cache=Texts):
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, spread, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
        if like is not None:
            self.table = like.table + noise * self.table
        self.cache, self.passes, self.caches = cache, 0, []

    def open_cache(self, slots, capacity):
        self.caches.append(self.cache())
        return self.caches[-1]

    def prefill(self, cache, slot, ids, *, keep=1):
        self.passes += 1
        held = cache.held[slot]
        rows = []
        for token in ids:
            held.append(int(token))
            rows.append(self.table[held[-2] if len(held) > 1 else 0, held[-1]])
        return np.stack(rows[-keep:])

    def step(self, cache, slots, ids):
        self.passes += 1
        return np.concatenate([self.prefill(cache, slot, [i]) for slot, i in zip(slots, ids.tolist())])


class Eager:
    """A pace that always drafts the next of some lengths."""

    def __init__(self, lengths):
        self.lengths, self.outcomes = itertools.cycle(lengths), []

    def length(self, kind, most):
        return min(most, next(self.lengths))

    def judged(self, kind, right, made=True):
        self.outcomes.append(right)

    def passed(self, tokens, seconds):
        pass

    def repaired(self, seconds):
        pass

    drafted = passed


def speculate(decoder, drafters, max_tokens, lengths=(1, 2, 4, 0, 3), **extra):
    made = Speculating(decoder, drafters, max_tokens, **extra)
    for row in made.rows:
        row.pace = Eager(lengths)
    return made


def tokens_of(decoder, prompts, params, max_tokens=60, **limits):
    """The tokens of every prompt, the finish reasons, and the cache."""
    cache = Texts() if isinstance(decoder, Random) else decoder.decoder.cache()
    chooses = {"choose": decoder.choose} if isinstance(decoder, Speculating) else {}
    batch = Batch(decoder, cache, prompts, params, Limits(max_tokens, **limits), VOCAB, **chooses)
    found = [[] for _ in prompts]
    for token in batch.tokens():
        found[token.index].append((token.token_id, token.finish_reason, token.logprobs))
    assert not cache.held
    return found


PARAMS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.9, seed=3),
    "cut": SamplingParams(temperature=1.2, top_k=4, top_p=0.9, min_p=0.05, seed=5),
    "penalised": SamplingParams(
        temperature=1.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=7
    ),
    "penalised greedy": SamplingParams(frequency_penalty=0.3, logit_bias={2: 1.0, 4: -float("inf")}),
}


def drafter_of(kind, decoder, prompt, params):
    if kind == "lookup":
        return Lookup(prompt)
    small = Random(9, like=decoder, noise=0.3)
    return ModelDraft(small, prompt, params, Shared(params.seed), VOCAB, capacity=99, max_length=99)


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("name", PARAMS)
def test_the_tokens_are_those_of_the_plain_loop(kind, name):
    params, prompt, decoder = PARAMS[name], [1, 2, 3, 1, 2], Random()
    plain = tokens_of(decoder, [prompt], params, logprobs=2)
    steps, decoder.passes = decoder.passes, 0
    speculating = speculate(decoder, [drafter_of(kind, decoder, prompt, params)], 60)
    assert tokens_of(speculating, [prompt], params, logprobs=2) == plain
    proposed, accepted = speculating.counts(0)
    assert proposed >= accepted > 0
    assert proposed > accepted or name == "greedy"  # which ends in a circle
    if kind == "draft":
        assert decoder.passes < steps


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_states_go_back_to_a_snapshot_and_take_the_right_tokens_once_more(kind):
    prompt, decoder, params = [1, 2, 3, 1, 2], Random(cache=WithStates), PARAMS["sampled"]
    plain = tokens_of(Random(), [prompt], params)
    drafter = Lookup(prompt)
    if kind == "draft":
        small = Random(9, like=decoder, noise=0.3, cache=WithStates)
        drafter = ModelDraft(small, prompt, params, Shared(3), VOCAB, capacity=99, max_length=99, has_states=True)
    speculating = speculate(decoder, [drafter], 60, lengths=(3,), has_states=True)
    assert tokens_of(speculating, [prompt], params) == plain
    proposed, accepted = speculating.counts(0)
    assert proposed > accepted > 0


def test_a_draft_with_states_guesses_what_it_would_without():
    decoder, prompt, params, counts = Random(), [1, 2, 3, 1, 2], PARAMS["sampled"], []
    for cache in (Texts, WithStates):
        small, states = Random(9, like=decoder, noise=0.6, cache=cache), cache is WithStates
        drafter = ModelDraft(small, prompt, params, Shared(3), VOCAB, capacity=99, max_length=99, has_states=states)
        speculating = speculate(decoder, [drafter], 60)
        tokens_of(speculating, [prompt], params)
        counts.append(speculating.counts(0))
    assert counts[0] == counts[1]
    assert counts[0][0] > counts[0][1] + 5


def test_a_stop_id_within_a_draft_ends_it_and_the_slot_is_given_back():
    decoder, prompt = Random(), [1, 2, 3, 1, 2]
    free = [token for token, *_ in tokens_of(decoder, [prompt], SamplingParams())[0]]
    stop = frozenset({free[7]})
    plain = tokens_of(decoder, [prompt], SamplingParams(), stop_ids=stop)
    assert plain[0][-1][1] == "stop"
    speculating = speculate(decoder, [Lookup(prompt)], 60, lengths=(8,))
    assert tokens_of(speculating, [prompt], SamplingParams(), stop_ids=stop) == plain


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_nothing_is_drafted_past_the_last_token(most):
    """The decoder never holds more than prompt and generated tokens, so that no room is needed for drafts."""
    decoder, prompt, longest = Random(), [1, 2, 3, 1, 2, 3, 1, 2], []
    prefill = decoder.prefill

    def watched(cache, slot, ids, *, keep=1):
        logits = prefill(cache, slot, ids, keep=keep)
        longest.append(cache.length(slot))
        return logits

    decoder.prefill = watched
    plain = tokens_of(decoder, [prompt], SamplingParams(), most)
    speculating = speculate(decoder, [Lookup(prompt)], most, lengths=(16,))
    assert tokens_of(speculating, [prompt], SamplingParams(), most) == plain
    assert max(longest) <= len(prompt) + most - 1


def test_a_forced_last_token_is_forced():
    decoder, prompt = Random(), [1, 2, 3, 1, 2]
    plain = tokens_of(decoder, [prompt], SamplingParams(), 9, forced_last=5)
    speculating = speculate(decoder, [Lookup(prompt)], 9)
    assert tokens_of(speculating, [prompt], SamplingParams(), 9, forced_last=5) == plain
    assert plain[0][-1][:2] == (5, "length")


def test_several_prompts_go_together_until_one_is_left():
    decoder, prompts, params = Random(3), [[1, 2, 3, 1, 2], [4, 5], [0, 1, 0, 1]], PARAMS["sampled"]
    stop = {"stop_ids": frozenset({4})}
    plain = tokens_of(decoder, prompts, params, **stop)
    speculating = speculate(decoder, [Lookup(prompt) for prompt in prompts], 60)
    assert tokens_of(speculating, prompts, params, **stop) == plain
    lengths = [len(row) for row in plain]
    assert sorted(lengths)[-1] > sorted(lengths)[-2] + 8
    counts = [speculating.counts(row)[0] for row in range(3)]
    assert [count > 0 for count in counts] == [length == max(lengths) for length in lengths]


def test_a_failure_frees_the_slot_and_a_draft_its_cache():
    decoder, prompt = Random(), [1, 2, 3, 1, 2]
    small, cache = Random(9, like=decoder), Texts()
    drafter = ModelDraft(small, prompt, SamplingParams(), Shared(None), VOCAB, capacity=99, max_length=99)
    speculating = speculate(decoder, [drafter], 60, lengths=(4,))
    tokens = Batch(speculating, cache, [prompt], SamplingParams(), Limits(60), VOCAB).tokens()
    for _ in range(5):
        next(tokens)
    assert small.caches
    tokens.close()
    speculating.close()
    assert not cache.held
    assert small.caches[0].closed


def test_a_draft_model_that_is_out_of_room_drafts_no_more():
    decoder, prompt = Random(), [1, 2, 3, 1, 2]
    small = Random(9, like=decoder, noise=0.2)
    drafter = ModelDraft(small, prompt, SamplingParams(), Shared(None), VOCAB, capacity=20, max_length=20)
    plain = tokens_of(decoder, [prompt], SamplingParams())
    speculating = speculate(decoder, [drafter], 60, lengths=(8,))
    assert tokens_of(speculating, [prompt], SamplingParams()) == plain
    assert 0 < speculating.counts(0)[0] <= 15
    assert drafter.kind() is None


# -- distributions --------------------------------------------------------------------------------------------------
def passes_chi_square(found, expected):
    """Whether counts may be of these chances: the sum is below what one in a thousand passes (Wilson, Hilferty)."""
    held = expected > 0
    wanted = expected[held] * found.sum()
    if found[~held].any():
        return False
    total, freedom = ((found[held] - wanted) ** 2 / wanted).sum(), max(1, np.count_nonzero(held) - 1)
    rare = 2 / (9 * freedom)
    return total < freedom * (1 - rare + 3.09 * np.sqrt(rare)) ** 3


def drafters(kind, small, prompt, params, seed):
    if kind == "lookup":
        return Lookup(prompt)
    draws = Shared(params.seed) if kind == "draft with seed" else Own(seed)
    return ModelDraft(small, prompt, params, draws, VOCAB, capacity=9999, max_length=9999)


KINDS = pytest.mark.parametrize("kind", ["lookup", "draft", "draft with seed"])


@KINDS
@pytest.mark.parametrize("cuts", [{}, {"top_k": 4, "top_p": 0.9, "min_p": 0.05}])
def test_what_follows_two_tokens_is_distributed_as_without_speculation(kind, cuts):
    decoder, prompt, most = Random(spread=0.8), [1, 2], 5000
    small, params = Random(4, like=decoder, noise=0.8), SamplingParams(temperature=0.9, seed=2, **cuts)
    speculating = speculate(decoder, [drafters(kind, small, prompt, params, 3)], most, lengths=(2, 3, 0, 1))
    text = [*prompt, *(token for token, *_ in tokens_of(speculating, [prompt], params, most)[0])]
    proposed, accepted = speculating.counts(0)
    assert 0.1 * proposed < accepted < 0.9 * proposed
    found = np.zeros((VOCAB, VOCAB, VOCAB))
    np.add.at(found, (text[:-2], text[1:-1], text[2:]), 1)
    wrong = 0
    for one, other in itertools.product(range(VOCAB), repeat=2):
        if found[one, other].sum() < 150:
            continue
        chances = [
            distribution(table[one, other][None], History([[]], VOCAB, params), params)[0]
            for table in (decoder.table, small.table)
        ]
        assert passes_chi_square(found[one, other], chances[0])
        wrong += not passes_chi_square(found[one, other], chances[1])
    assert wrong > 5  # so the test can fail: it does for the distributions of the model that drafts


def chances_of_pairs(decoder, params, prompt):
    """(VOCAB, VOCAB): how likely the second and third generated token are, by going through all texts."""
    found = np.zeros((VOCAB, VOCAB))

    def go(ids, weight):
        history = History([prompt], VOCAB, params)
        for token in ids:
            history.add(np.array([token]))
        text = [*prompt, *ids]
        chances = weight * distribution(decoder.table[text[-2], text[-1]][None], history, params)[0]
        if len(ids) == 2:
            found[ids[1]] += chances
            return
        for token in np.flatnonzero(chances):
            go([*ids, int(token)], chances[token])

    go([], 1.0)
    return found


@KINDS
def test_penalties_and_bias_are_those_of_each_place(kind):
    """Of many short texts, for what is penalised depends on all that stands before."""
    decoder, prompt, found = Random(spread=0.8), [5, 5, 3, 5, 5], np.zeros((VOCAB, VOCAB))
    small, counts = Random(4, like=decoder, noise=0.8), np.zeros(2)
    asked = {"temperature": 1.1, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    for seed in range(1500):
        params = SamplingParams(**asked, logit_bias={0: 1.0, 3: 1.5}, seed=seed)
        speculating = speculate(decoder, [drafters(kind, small, prompt, params, [1, seed])], 4, lengths=(2,))
        ids = [token for token, *_ in tokens_of(speculating, [prompt], params, 4)[0]]
        found[ids[1], ids[2]] += 1
        counts += speculating.counts(0)
    assert 0.05 < counts[1] / counts[0] < 0.95
    assert passes_chi_square(found.ravel(), chances_of_pairs(decoder, params, prompt).ravel())
    assert not passes_chi_square(found.ravel(), chances_of_pairs(small, params, prompt).ravel())
    without = replace(params, presence_penalty=0.0, frequency_penalty=0.0)
    assert not passes_chi_square(found.ravel(), chances_of_pairs(decoder, without, prompt).ravel())


def test_drawing_by_itself_a_draft_is_right_more_often_than_with_the_loops_numbers():
    """As often as min(p, q) weighs, which no other way passes."""
    decoder, prompt, params = Random(spread=0.8), [1, 2], SamplingParams(temperature=1.0, seed=1)
    small, rates = Random(4, like=decoder, noise=0.5), {}
    for draws in (Own(3), Shared(1)):
        drafter = ModelDraft(small, prompt, params, draws, VOCAB, capacity=4000, max_length=4000)
        speculating = speculate(decoder, [drafter], 3000, lengths=(1,))
        tokens_of(speculating, [prompt], params, 3000)
        proposed, accepted = speculating.counts(0)
        rates[type(draws)] = accepted / proposed
    assert rates[Own] > rates[Shared] + 0.03


# -- what it saves, by a clock that the decoders turn ----------------------------------------------------------------
class Timed(Random):
    """Passes take time on a clock of their own: a step `cost`, each further token of a pass a part of it."""

    def __init__(self, clock, cost, each=0.1, **options):
        super().__init__(**options)
        self.clock, self.cost, self.each = clock, cost, each

    def prefill(self, cache, slot, ids, *, keep=1):
        self.clock[0] += self.cost * (1 + self.each * (len(ids) - 1))
        return super().prefill(cache, slot, ids, keep=keep)


def seconds(clock, decoder, params, drafter=None, most=400):
    """How long the tokens take behind a prompt, on the clock."""
    if drafter is not None:
        decoder = Speculating(decoder, [drafter], most, clock=lambda: clock[0])
    before = clock[0]
    tokens_of(decoder, [[1, 2]], params, most)
    return clock[0] - before


def test_text_that_repeats_itself_takes_half_the_time_and_random_text_no_longer():
    clock = [0.0]
    decoder = Timed(clock, 1.0)
    plain = seconds(clock, decoder, SamplingParams())
    assert plain / seconds(clock, decoder, SamplingParams(), Lookup([1, 2])) > 2  # greedy ends in a circle
    random = SamplingParams(temperature=50.0, seed=1)
    plain = seconds(clock, decoder, random)
    assert plain / seconds(clock, decoder, random, Lookup([1, 2])) > 0.95


def test_a_pass_that_costs_as_much_as_its_steps_is_given_up():
    clock = [0.0]
    decoder = Timed(clock, 1.0, each=1.2)
    plain = seconds(clock, decoder, SamplingParams())
    assert plain / seconds(clock, decoder, SamplingParams(), Lookup([1, 2])) > 0.95


@pytest.mark.parametrize(("cost", "noise", "least"), [(0.1, 0.1, 1.8), (0.1, 9.0, 0.95), (1.0, 0.0, 0.95)])
def test_a_draft_that_pays_is_used_and_one_that_does_not_is_left(cost, noise, least):
    clock, params = [0.0], SamplingParams(temperature=1.0, seed=4)
    decoder = Timed(clock, 1.0)
    small = Timed(clock, cost, seed=9, like=decoder, noise=noise)
    drafter = ModelDraft(small, [1, 2], params, Shared(4), VOCAB, capacity=999, max_length=999)
    assert seconds(clock, decoder, params) / seconds(clock, decoder, params, drafter) > least
