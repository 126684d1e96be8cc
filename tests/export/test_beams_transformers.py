"""Beam search beside transformers' `generate(num_beams=...)`: the same tokens and scores from the same weights."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tfinfer  # noqa: E402
from tfinfer.export import export_model  # noqa: E402
from tfinfer.tokens.beams import Penalties, beam_search  # noqa: E402
from tfinfer.tokens.generate import Limits  # noqa: E402
from tfinfer.tokens.hypotheses import BeamParams  # noqa: E402
from tfinfer.tokens.sampling import SamplingParams  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

VOCAB, NEW = 60, 12
STOP = (21, 35)  # the model below says them now and then
SAME_LENGTH = [[5, 9, 2, 40], [1, 1, 3, 22], [50, 8, 33, 6], [12, 13, 14, 15]]
RAGGED = [[5], [9, 2, 40, 1, 1, 3, 22, 50, 8], [33, 6], [12, 13, 14, 15, 16]]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The model in torch, and as an opened folder."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
    # Tied to the embedding, the head of so small a model would repeat one token for ever.
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ln" not in name:  # random weights say little: without this the choices are nearly ties
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("beams") / "out"
    export_model(Logits(theirs), folder, max_length=48)
    with tfinfer.load(folder, threads=1) as ours:
        yield theirs, ours


def expected(model, prompts, stop, new, **options):
    """What transformers returns: ids up to the stop id, and scores, per prompt; all prompts at once."""
    inputs = torch.tensor(prompts)
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=new, pad_token_id=0,
        eos_token_id=list(stop) or None, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    count = options.get("num_return_sequences", 1)
    rows = [
        tuple(itertools.takewhile(lambda token: token not in stop, row))
        for row in out.sequences[:, inputs.shape[1] :].tolist()
    ]
    lengths = [steps[steps >= 0].numel() for steps in out.beam_indices]
    pairs = [(row[:length], score) for row, length, score in zip(rows, lengths, out.sequences_scores.tolist())]
    return [pairs[i : i + count] for i in range(0, len(pairs), count)]


def found(model, prompts, stop, new, *, sampling=None, **options):
    cache = model.decoder.open_cache(len(prompts) * options["num_beams"], 32)
    adjust = Penalties(sampling, prompts, VOCAB) if sampling else None
    limits = Limits(new, frozenset(stop))
    hypotheses = beam_search(model.decoder, cache, prompts, BeamParams(**options), limits, VOCAB, adjust=adjust)
    return [[(h.token_ids, h.score) for h in ours] for ours in hypotheses]


def assert_same(ours, theirs):
    assert [[ids for ids, _ in prompt] for prompt in ours] == [[ids for ids, _ in prompt] for prompt in theirs]
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs)):
        np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_the_same_as_transformers(pair, num_beams, length_penalty, early_stopping):
    options = {
        "num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping,
        "num_return_sequences": num_beams,
    }  # fmt: skip
    theirs = expected(pair[0], SAME_LENGTH, STOP, NEW, **options)
    assert_same(found(pair[1], SAME_LENGTH, STOP, NEW, **options), theirs)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("stop", [(), (21,), (21, 35, 22, 4, 9)])
def test_any_number_of_stop_ids(pair, stop, early_stopping):
    options = {"num_beams": 3, "early_stopping": early_stopping, "num_return_sequences": 2}
    assert_same(found(pair[1], SAME_LENGTH, stop, NEW, **options), expected(pair[0], SAME_LENGTH, stop, NEW, **options))


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_ragged_prompts_together_are_as_transformers_does_each_alone(pair, early_stopping):
    options = {"num_beams": 3, "early_stopping": early_stopping, "num_return_sequences": 3, "length_penalty": 0.7}
    alone = [expected(pair[0], [prompt], STOP, NEW, **options)[0] for prompt in RAGGED]
    assert_same(found(pair[1], RAGGED, STOP, NEW, **options), alone)


@pytest.mark.parametrize("new", [1, 2, 30])
def test_the_longest_and_the_shortest(pair, new):
    options = {"num_beams": 4, "num_return_sequences": 4, "early_stopping": "never"}
    assert_same(found(pair[1], SAME_LENGTH, STOP, new, **options), expected(pair[0], SAME_LENGTH, STOP, new, **options))


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_bias_and_repetition_penalty_act_where_transformers_processors_do(pair, penalty):
    options = {"num_beams": 3, "num_return_sequences": 3}
    bias = {22: -1.5, 21: 0.5, 50: -20.0, 59: 1.5}
    sampling = SamplingParams(repetition_penalty=penalty, logit_bias=bias)
    processed = {"repetition_penalty": penalty, "sequence_bias": {(token,): value for token, value in bias.items()}}
    theirs = expected(pair[0], SAME_LENGTH, STOP, NEW, **options, **processed)
    assert theirs != expected(pair[0], SAME_LENGTH, STOP, NEW, **options)
    assert_same(found(pair[1], SAME_LENGTH, STOP, NEW, sampling=sampling, **options), theirs)


def test_the_cases_are_not_all_alike(pair):
    """Length penalty and early stopping change what comes out here, so the comparisons above can fail."""
    base = {"num_beams": 4, "num_return_sequences": 4}
    variants = [
        {},
        {"length_penalty": 0.0},
        {"length_penalty": 2.0},
        {"length_penalty": -1.0},
        {"early_stopping": True},
        {"early_stopping": "never"},
    ]
    results = [str(expected(pair[0], SAME_LENGTH, STOP, NEW, **base, **variant)) for variant in variants]
    assert len(set(results)) == len(variants)
    stopped = [ids for prompt in expected(pair[0], SAME_LENGTH, STOP, NEW, **base) for ids, _ in prompt]
    assert any(len(ids) < NEW for ids in stopped)
