"""Sampling: every filter against a plain reference, frequencies, seeds, penalties, and each refused request."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfinfer.errors import InputError, NonFiniteLogitsError
from tfinfer.tokens.sampling import History, SamplingParams, choose, generators, top_logprobs

VOCAB = 50


def draw(logits, params, prompts=None, rngs=None):
    logits = np.asarray(logits, np.float32)
    history = History(prompts or [[]] * len(logits), logits.shape[1], params)
    return choose(logits, history, params, rngs or generators(params, len(logits)))


def random_logits(rows, seed=0, vocab=VOCAB):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 2).astype(np.float32)


def reachable(logits, params, draws=3000):
    """All ids that a row is ever drawn to."""
    return set(draw(np.tile(np.float32(logits), (draws, 1)), params, rngs=fresh(draws)).tolist())


def fresh(rows, seed=0):
    return [np.random.default_rng([seed, row]) for row in range(rows)]


def filtered(logits, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution as a textbook writes it: one row, python floats, one token after the other."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[: top_k or None]
    total = math.fsum(math.exp(logits[token]) for token in kept)
    result, mass = {}, 0.0
    for token in kept:
        if mass >= top_p:
            break
        result[token] = math.exp(logits[token]) / total
        mass += result[token]
    best = result[kept[0]]
    result = {token: p for token, p in result.items() if p >= min_p * best}
    total = math.fsum(result.values())
    return {token: p / total for token, p in result.items()}


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 7, "top_p": 0.9, "min_p": 0.05}, {"top_k": 999}],
    ids=str,
)
def test_frequencies_match_the_distribution(filters):
    """A draw that is off by one, or weights that are not renormalised, shift the frequencies."""
    logits, draws = random_logits(1)[0], 20_000
    expected = filtered([float(x) for x in logits], **filters)
    ids = draw(np.tile(logits, (draws, 1)), SamplingParams(temperature=1.0, **filters), rngs=fresh(draws))
    counts = np.bincount(ids, minlength=VOCAB)
    assert set(np.nonzero(counts)[0].tolist()) <= set(expected)
    chi_square = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in expected.items())
    freedom = max(1, len(expected) - 1)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_temperature_divides_the_logits():
    logits, draws = np.float32([0.0, 1.0]), 20_000
    ids = draw(np.tile(logits, (draws, 1)), SamplingParams(temperature=0.5), rngs=fresh(draws))
    assert ids.mean() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.01)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = random_logits(4)
    assert np.array_equal(draw(logits, SamplingParams(temperature=1e-300, seed=1)), logits.argmax(1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_a_row_draws_the_same_alone_and_in_a_batch(seed, top_k, top_p, min_p):
    """Other rows decide how many candidates are sorted; that may not move a row's draw."""
    logits = random_logits(4, seed)
    logits[1] = 0  # every token a candidate
    params = SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    together = draw(logits, params)
    alone = [int(draw(logits[row : row + 1], params)[0]) for row in range(4)]
    assert together.tolist() == alone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_only_tokens_of_the_reference_are_drawn(seed, top_k, top_p, min_p):
    logits = np.round(random_logits(1, seed, vocab=12)[0])  # rounded, so that there are ties
    allowed = set(filtered([float(x) for x in logits], top_k, top_p - 1e-12, min_p))
    allowed |= set(filtered([float(x) for x in logits], top_k, min(1.0, top_p + 1e-12), min_p))
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    assert reachable(logits, params, draws=200) <= allowed


def test_top_k_keeps_exactly_k_of_equal_logits_the_lowest_ids():
    """A filter by threshold keeps all that are equal to the k-th."""
    assert reachable(np.zeros(20), SamplingParams(temperature=1.0, top_k=3)) == {0, 1, 2}
    tied = np.float32([0, 2, 1, 2, 1, 1])
    assert reachable(tied, SamplingParams(temperature=1.0, top_k=4)) == {1, 3, 2, 4}


def test_top_p_keeps_the_token_that_reaches_it_and_no_more():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert reachable(logits, SamplingParams(temperature=1.0, top_p=0.79)) == {0, 1}
    assert reachable(logits, SamplingParams(temperature=1.0, top_p=0.81)) == {0, 1, 2}


def test_top_p_always_keeps_one():
    assert reachable(np.zeros(5), SamplingParams(temperature=1.0, top_p=1e-9)) == {0}


def test_min_p_is_relative_to_the_most_likely():
    logits = np.log([0.6, 0.3, 0.07, 0.03])
    assert reachable(logits, SamplingParams(temperature=1.0, min_p=0.1)) == {0, 1, 2}


class Fixed:
    """A generator that always draws the same number."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_never_pick_a_forbidden_token(uniform):
    logits = [[-np.inf, 1.0, 2.0, -np.inf]]
    picked = draw(logits, SamplingParams(temperature=1.0), rngs=[Fixed(uniform)])
    assert picked[0] == (1 if uniform == 0 else 2)


def test_the_same_seed_repeats_and_another_does_not():
    logits = np.zeros((1, 1000), np.float32)
    runs = []
    for seed in (1, 1, 2):
        params = SamplingParams(temperature=1.0, seed=seed)
        rngs = generators(params, 1)
        runs.append([int(draw(logits, params, rngs=rngs)[0]) for _ in range(8)])
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 1


def test_without_a_seed_rows_differ():
    params = SamplingParams(temperature=1.0)
    assert len(set(draw(np.zeros((8, 100_000), np.float32), params).tolist())) > 1


def test_greedy_takes_the_first_of_equals_and_draws_nothing():
    assert draw([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]], SamplingParams(seed=0), rngs=[None, None]).tolist() == [1, 0]


def test_greedy_keeps_no_history():
    history = History([[1, 2]] * 2, VOCAB, SamplingParams())
    history.add(np.array([1, 2]))
    history.keep([1])
    assert history._prompt is None
    assert history._generated is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_are_left_as_they_are(temperature):
    """The caller's array is the session's output buffer."""
    logits = random_logits(2)
    before = logits.copy()
    draw(logits, SamplingParams(temperature, 3, 0.5, 0.1, 1.5, 1.0, 1.0, {3: 2.0}, 1), prompts=[[1], [2]])
    assert np.array_equal(logits, before)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    """Dividing a negative logit would make a repeated token likelier."""
    params = SamplingParams(repetition_penalty=2.0)
    assert draw([[3.0, 2.0, 0.0]], params, prompts=[[0]]).tolist() == [1]
    assert draw([[-1.0, -1.5, -9.0]], params, prompts=[[0]]).tolist() == [1]


def test_repetition_penalty_sees_prompt_and_generated_ids_once_each():
    params = SamplingParams(repetition_penalty=2.0)
    history = History([[0, 0, 0]], 3, params)
    history.add(np.array([0]))
    logits = np.array([[3.0, 1.4, 1.0]])
    history.penalise(logits, params)
    assert logits.tolist() == [[1.5, 1.4, 1.0]]


def test_presence_and_frequency_look_at_generated_ids_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    history = History([[2, 2]], 3, params)
    for token in (0, 1, 1):
        history.add(np.array([token]))
    logits = np.array([[1.0, 1.0, 1.0]])
    history.penalise(logits, params)
    assert logits.tolist() == [[0.25, 0.0, 1.0]]


def test_keeping_rows_takes_their_history_along():
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)
    history = History([[0], [1], [2]], 4, params)
    history.add(np.array([3, 3, 0]))
    history.keep([2, 0])
    logits = np.full((2, 4), 4.0)
    history.penalise(logits, params)
    assert logits.tolist() == [[1.0, 4.0, 2.0, 4.0], [2.0, 4.0, 4.0, 1.0]]


def test_logit_bias_forbids_and_forces():
    assert draw([[5.0, 1.0, 0.0]], SamplingParams(logit_bias={0: -math.inf})).tolist() == [1]
    forced = SamplingParams(temperature=1.0, logit_bias={2: math.inf}, seed=0)
    assert draw([[5.0, 1.0, 0.0]], forced).tolist() == [2]


def test_a_bias_that_forbids_everything_is_an_error():
    with pytest.raises(NonFiniteLogitsError, match="row 0"):
        draw([[5.0, 1.0]], SamplingParams(logit_bias={0: -math.inf, 1: -math.inf}))


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(1.0, 2, seed=0), SamplingParams(logit_bias={0: 1})]
)
@pytest.mark.parametrize("row", [[0.0, math.nan, 9.0], [-math.inf] * 3, [0.0, math.inf, 1.0]], ids=str)
def test_non_finite_logits_name_the_row(params, row):
    with pytest.raises(NonFiniteLogitsError, match="row 1"):
        draw([[1.0, 2.0, 3.0], row], params)


def test_half_of_the_logits_may_be_minus_infinity():
    assert draw([[-math.inf, 1.0, -math.inf]], SamplingParams(1.0, 3, 0.9, seed=1)).tolist() == [1]


BAD = [
    ("temperature", [math.nan, math.inf, -0.1, "1", None, True]),
    ("top_k", [-1, 1.5, True, "3"]),
    ("top_p", [0.0, 2, -1, math.nan, None]),
    ("min_p", [1.0, -0.1, math.nan]),
    ("repetition_penalty", [0.0, -1.0, math.inf, math.nan]),
    ("presence_penalty", [math.nan, math.inf, "x"]),
    ("frequency_penalty", [math.nan, -math.inf]),
    ("logit_bias", [{-1: 1.0}, {1: math.nan}, {"1": 1.0}, {True: 1.0}, {1: "x"}, [1]]),
    ("seed", [-1, 1.5, True]),
]


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD for value in values])
def test_a_parameter_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}.*expected .*got"):
        SamplingParams(**{name: value})


def test_numpy_numbers_are_parameters_too():
    SamplingParams(np.float32(0.5), np.int64(3), logit_bias={np.int64(1): np.float32(1)}, seed=np.int64(1))


def test_a_bias_beyond_the_vocabulary_is_refused():
    SamplingParams(logit_bias={49: 1.0}).check_vocab(50)
    with pytest.raises(InputError, match=r"logit_bias.*50.*\[50\]"):
        SamplingParams(logit_bias={50: 1.0, 1: 1.0}).check_vocab(50)


def test_logprobs_are_the_log_softmax_of_the_logits():
    logits = random_logits(3)
    ids = np.array([4, 5, 6])
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    for row, entry in enumerate(top_logprobs(logits, ids, 4)):
        assert entry.token_id == ids[row]
        assert entry.logprob == pytest.approx(exact[row, ids[row]])
        assert [token for token, _ in entry.top] == np.argsort(-exact[row], kind="stable")[:4].tolist()
        assert [value for _, value in entry.top] == pytest.approx(np.sort(exact[row])[::-1][:4])


def test_logprobs_of_none_or_all_tokens():
    logits = random_logits(1, vocab=5)
    assert top_logprobs(logits, np.array([2]), 0)[0].top == ()
    assert len(top_logprobs(logits, np.array([2]), 9)[0].top) == 5
    with pytest.raises(InputError, match="logprobs"):
        top_logprobs(logits, np.array([2]), -1)
