"""Beam search through `generate` and the command line, on real folders where torch was never installed."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError
from tfinfer.tokens.generate import Batch, Limits
from tfinfer.tokens.hypotheses import BeamParams, Hypotheses, log_softmax
from tfinfer.tokens.sampling import SamplingParams

SEQ2SEQ = Path(__file__).parent / "tiny_seq2seq"
PROMPTS = ["the cat", "a", "def main():"]
END = 2


@pytest.fixture(scope="module")
def pair():
    with tfinfer.load(SEQ2SEQ, threads=1) as loaded:
        yield loaded


# -- what is found --------------------------------------------------------------------------------------------------
def every_sequence(pair, source: list[int], penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """All that one or two tokens could say, with scores, best first: prefilled anew for every one."""
    decoder, cache = pair.decoder, pair.decoder.open_cache(1, 40)

    def following(target: list[int]):
        slot = cache.acquire()
        decoder.encode(cache, slot, source)
        scores = log_softmax(decoder.prefill(cache, slot, target))[0]
        cache.release(slot)
        return scores.tolist()

    first = following([1])
    found = [(first[END], ())]
    for one in set(range(len(first))) - {END}:
        for two, score in enumerate(following([1, one])):
            found.append(((first[one] + score) / 2**penalty, (one,) if two == END else (one, two)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("text", ["hello world", "the quick brown fox"])
def test_as_many_beams_as_ids_find_the_best_of_all(pair, text, penalty):
    options = {"num_beams": 31, "length_penalty": penalty, "early_stopping": "never", "num_return_sequences": 6}
    found = pair.generate(text, max_tokens=2, **options)
    wanted = every_sequence(pair, pair.tokenize(text), penalty)[:6]
    assert [c.token_ids for c in found] == [ids for _, ids in wanted]
    np.testing.assert_allclose([c.score for c in found], [score for score, _ in wanted], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("penalty", [1.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_prompts_together_are_each_alone_best_first(model, penalty, early_stopping):
    options = {"num_beams": 4, "length_penalty": penalty, "early_stopping": early_stopping}
    options |= {"max_tokens": 10, "num_return_sequences": 3}
    together = model.generate(PROMPTS, **options)
    assert [[c.token_ids for c in found] for found in together] == [
        [c.token_ids for c in model.generate(prompt, **options)] for prompt in PROMPTS
    ]
    for found in together:
        scores = [c.score for c in found]
        assert scores == sorted(scores, reverse=True)
        assert len({c.token_ids for c in found}) == 3


def test_more_beams_find_what_is_more_likely_than_greedy(model):
    """The score of a sequence is its own log-probability by its length."""
    greedy = model.generate(PROMPTS[0], max_tokens=6, stop_ids=[], logprobs=1)
    best = model.generate(PROMPTS[0], max_tokens=6, stop_ids=[], num_beams=8)
    assert best.score > sum(entry.logprob for entry in greedy.logprobs) / 6
    again = dict.fromkeys(best.token_ids[:1], math.inf)
    first = model.generate(PROMPTS[0], max_tokens=1, stop_ids=[], logprobs=1, logit_bias=again).logprobs[0].logprob
    assert model.generate(PROMPTS[0], max_tokens=1, stop_ids=[], num_beams=8, logit_bias=again).score == pytest.approx(
        first, abs=1e-4
    )


def test_text_usage_and_timings_are_as_without_beams(model):
    completion = model.generate(PROMPTS[1], max_tokens=7, num_beams=3, stop_ids=[])
    assert completion.text == model.tokenizer.decode([*model.tokenize(PROMPTS[1]), *completion.token_ids]).removeprefix(
        PROMPTS[1]
    )
    assert completion.usage.prompt_tokens == len(model.tokenize(PROMPTS[1]))
    assert (completion.usage.completion_tokens, completion.finish_reason) == (7, "length")
    assert completion.timings.first_token_seconds > 0 == completion.timings.decode_seconds
    assert completion.logprobs is None
    assert completion.to_dict()["score"] == completion.score
    assert model.generate(PROMPTS[1], max_tokens=7).score is None


def test_one_and_several_prompts_and_sequences_nest_as_asked(model):
    one = model.generate("a", max_tokens=3, num_beams=2)
    assert [c.token_ids for c in model.generate(["a"], max_tokens=3, num_beams=2)] == [one.token_ids]
    two = model.generate("a", max_tokens=3, num_beams=2, num_return_sequences=2)
    assert two[0].token_ids == one.token_ids
    nested = model.generate(["a", "b"], max_tokens=3, num_beams=2, num_return_sequences=2)
    assert [len(found) for found in nested] == [2, 2]
    assert [c.token_ids for c in nested[0]] == [c.token_ids for c in two]


def test_a_bias_and_a_penalty_change_what_is_found(model):
    usual = model.generate("the cat", max_tokens=8, num_beams=3, stop_ids=[])
    banned = usual.token_ids[0]
    without = model.generate("the cat", max_tokens=8, num_beams=3, stop_ids=[], logit_bias={banned: -math.inf})
    assert banned not in without.token_ids
    options = {"max_tokens": 20, "num_beams": 3, "stop_ids": []}
    repeats = [
        len(set(model.generate("the cat", **options, repetition_penalty=penalty).token_ids)) for penalty in (0.5, 2.0)
    ]
    assert repeats[0] < repeats[1] == 20


def test_ids_that_are_forced_first_count_in_the_length(pair, tmp_path):
    """As transformers counts: one token more, for a target that begins with two ids."""
    for file in SEQ2SEQ.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((SEQ2SEQ / "tfinfer.json").read_text())
    data["token_ids"]["decoder_start"] = [1, 7]
    (tmp_path / "tfinfer.json").write_text(json.dumps(data))
    options = {"max_tokens": 5, "num_beams": 3, "stop_ids": []}
    with tfinfer.load(tmp_path, threads=1) as other:
        plain = other.generate("abc", **options, length_penalty=0.0)
        assert other.generate("abc", **options).score == pytest.approx(plain.score / 6)
    plain = pair.generate("abc", **options, length_penalty=0.0)
    assert pair.generate("abc", **options).score == pytest.approx(plain.score / 5)


# -- forced and counted, without a graph ----------------------------------------------------------------------------
def test_a_forced_last_id_costs_nothing_and_is_counted():
    """As transformers: every other id is forbidden, and this one has log-probability 0."""
    limits = Limits(2, frozenset({0}), forced_last=0)
    hypotheses = Hypotheses(BeamParams(2, length_penalty=1.0), limits, counted_before=1)
    hypotheses.advance(np.log(np.array([[0.1, 0.6, 0.3]], np.float32)))
    hypotheses.advance(np.log(np.array([[0.1, 0.8, 0.1]] * 2, np.float32)))
    best = hypotheses.best()[0]
    assert (best.token_ids, best.finish_reason) == ((1,), "length")
    assert best.score == pytest.approx(math.log(0.6) / 3)


class Saying:
    """Slots that hold nothing, and a decoder whose likeliest id is always 3."""

    def __init__(self):
        self.live = [5, 6]

    def acquire(self):
        raise AssertionError("slots were given")

    def release(self, slot):
        self.live.remove(slot)

    def prefill(self, cache, slot, ids):
        return np.array([[0, 0, 0, 9.0]], np.float32)

    def step(self, cache, slots, ids):
        return np.repeat(self.prefill(cache, 0, ids), len(slots), axis=0)


@pytest.mark.parametrize("forced, reason", [(1, "length"), (2, "length"), (None, "length")])
def test_a_batch_ends_with_the_forced_id_in_the_slots_it_was_given(forced, reason):
    limits, both = Limits(3, frozenset({2}), forced_last=forced), Saying()
    batch = Batch(both, both, [[0], [0]], SamplingParams(), limits, 4, slots=[5, 6])
    found = {0: [], 1: []}
    for token in batch.tokens():
        found[token.index].append((token.token_id, token.finish_reason))
    last = {1: 1, 2: None, None: 3}[forced]
    assert found[0] == found[1] == [(3, None), (3, None), (last, reason)]
    assert both.live == []


def test_slots_that_were_given_are_given_back_when_prefill_breaks():
    both = Saying()
    both.prefill = lambda *arguments: 1 // 0
    with pytest.raises(ZeroDivisionError):
        list(Batch(both, both, [[0], [0]], SamplingParams(), Limits(3), 4, slots=[5, 6]).tokens())
    assert both.live == []


# -- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, said",
    [
        ({"temperature": 0.5}, "temperature: not for a beam search"),
        ({"top_k": 5, "seed": 0}, "top_k, seed: not"),
        ({"top_p": 0.5}, "top_p"),
        ({"min_p": 0.5}, "min_p"),
        ({"stop": "x"}, "stop: not"),
        ({"logprobs": 2}, "logprobs: not"),
        ({"num_beams": 0}, "num_beams: expected a whole number of at least 1"),
        ({"num_beams": True}, "num_beams"),
        ({"num_beams": 1.5}, "num_beams"),
        ({"num_return_sequences": 4}, "from 1 to num_beams=3"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"early_stopping": "yes"}, "early_stopping"),
        ({"num_beams": 1, "early_stopping": True}, "early_stopping: for a beam search only: give num_beams"),
        ({"num_beams": 1, "length_penalty": 0.5, "early_stopping": "never"}, "length_penalty, early_stopping: for a"),
        ({"num_beams": 1, "num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_what_does_not_go_together_is_refused_and_the_next_call_works(model, options, said):
    before = model.generate("a", max_tokens=3, num_beams=3).token_ids
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=said):
            call("a", **{"max_tokens": 3, "num_beams": 3, **options})
    defaults = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None, "stop": None, "logprobs": 0}
    assert model.generate("a", max_tokens=3, num_beams=3, **defaults).token_ids == before
    alone = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 1}
    assert model.generate("a", max_tokens=3, **alone).score is None


def test_beams_are_not_streamed(model):
    with pytest.raises(InputError, match="use generate, or num_beams=1 to stream"):
        model.stream("a", max_tokens=3, num_beams=2)


def test_a_search_that_breaks_is_not_in_the_pool(model, monkeypatch):
    expected = model.generate("a", max_tokens=4, num_beams=3).token_ids

    def broken(cache, slots, ids):
        return np.full((len(slots), model.manifest.num_logits), np.nan, np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "step", broken)
        with pytest.raises(tfinfer.errors.NonFiniteLogitsError):
            model.generate("a", max_tokens=4, num_beams=3)
    assert not any(cache.closed for cache in model._pool.caches)
    assert model.generate("a", max_tokens=4, num_beams=3).token_ids == expected


# -- the command line -----------------------------------------------------------------------------------------------
def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(cli, ["generate", *map(str, arguments)], prog_name="tfinfer")
    assert result.exit_code == code, result.output
    return result


BEAMS = ("--num-beams", 4, "--length-penalty", 0.5, "--early-stopping", "never", "--max-tokens", 6)
SAME = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": "never", "max_tokens": 6}


def test_the_command_line_prints_every_sequence_on_its_line(pair):
    expected = pair.generate("hello world", **SAME, num_return_sequences=3)
    result = run(SEQ2SEQ, "hello world", *BEAMS, "--num-return-sequences", 3, "--stats")
    assert result.stdout == "".join(f"{c.text}\n" for c in expected)
    assert "6 tokens out (length); load" in result.stderr
    assert "beam search" in result.stderr
    assert "tokens/s" not in result.stderr
    assert run(SEQ2SEQ, "hello world", *BEAMS).stdout == f"{expected[0].text}\n"


def test_the_command_line_has_sequences_as_json(pair):
    expected = pair.generate("hello world", **SAME, num_return_sequences=2)
    found = json.loads(run(SEQ2SEQ, "hello world", *BEAMS, "--num-return-sequences", 2, "--json").stdout)
    assert [one["token_ids"] for one in found["sequences"]] == [list(c.token_ids) for c in expected]
    assert found["sequences"][0]["score"] == pytest.approx(expected[0].score)
    assert found["model"]["kind"] == "encoder-decoder"
    alone = json.loads(run(SEQ2SEQ, "hello world", *BEAMS, "--json").stdout)
    assert alone["token_ids"] == list(expected[0].token_ids)


def test_the_command_line_without_a_tokenizer_prints_ids(tmp_path, pair):
    for file in SEQ2SEQ.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((SEQ2SEQ / "tfinfer.json").read_text())
    data["text"] = {}
    (tmp_path / "tfinfer.json").write_text(json.dumps(data))
    expected = pair.generate([5, 6, 2], **SAME, num_return_sequences=2)
    shown = run(tmp_path, "--ids", "5,6,2", *BEAMS, "--num-return-sequences", 2).stdout
    assert shown == "".join(" ".join(map(str, c.token_ids)) + "\n" for c in expected)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--num-beams", 0], "num_beams"),
        (["--early-stopping", "yes"], "give num_beams above 1"),
        (["--num-beams", 2, "--early-stopping", "maybe"], "expected no, yes, never"),
        (["--num-beams", 2, "--temperature", 1], "temperature"),
        (["--num-beams", 2, "--num-return-sequences", 3], "num_return_sequences"),
    ],
)
def test_the_command_line_refuses_what_does_not_go_together(given, said):
    result = run(SEQ2SEQ, "a", *given, code=2)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_early_stopping_of_the_command_line_is_the_librarys(pair):
    options = {"num_beams": 4, "max_tokens": 20, "num_return_sequences": 4}
    seen = set()
    for name, value in (("no", False), ("yes", True), ("never", "never")):
        expected = pair.generate("the quick brown fox", **options, early_stopping=value)
        given = itertools.chain(*((f"--{key.replace('_', '-')}", number) for key, number in options.items()))
        found = json.loads(run(SEQ2SEQ, "the quick brown fox", *given, "--early-stopping", name, "--json").stdout)[
            "sequences"
        ]
        assert [one["token_ids"] for one in found] == [list(c.token_ids) for c in expected]
        seen.add(tuple(c.token_ids for c in expected))
    assert len(seen) == 3
