"""The catalogue's kinds of attention: each exported, and run by the session over sizes that were never traced."""

import math

import numpy as np
import pytest
import torch
from catalogue import (
    CLOSE,
    HIDDEN,
    LONGEST,
    Gathering,
    NextWord,
    check_cached,
    check_encoder,
    check_pair,
    check_run,
    computed,
    config,
    exported,
    ids_of,
)
from torch import nn

from tfinfer.export.modules import (
    Block,
    Decoder,
    EncoderDecoder,
    MultiHeadAttention,
    ParameterFreeAttention,
    SelfAttention,
)


# self-attention with sizes of its own
def test_self_attention_with_sizes_of_its_own(tmp_path):
    """Queries, values and what comes in of three sizes; with and without biases; with and without the scale."""
    module = Gathering(
        {
            "sizes": SelfAttention(HIDDEN, key_size=8, value_size=12, bias=False),
            "bias_no_scale": SelfAttention(HIDDEN, key_size=5, value_size=7, bias=True, scale=1.0),
            "heads": MultiHeadAttention(HIDDEN, 2, head_dim=6, value_dim=10, bias=False),
            "heads_no_scale": MultiHeadAttention(HIDDEN, 2, scale=1.0),
        }
    )
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        shapes = {output.name: output.shape for output in model.manifest.graphs["encoder"].outputs}
        assert shapes["sizes"] == ("batch", "seq", 12)
        assert shapes["bias_no_scale"] == ("batch", "seq", 7)
        check_encoder(module, model)


def test_masked_self_attention_with_sizes_of_its_own_has_a_cache(tmp_path):
    """One head, keys and values of different sizes: they are cached as they are. Without parameters both are one."""
    attentions = [
        SelfAttention(HIDDEN, key_size=8, value_size=12, causal=True),
        SelfAttention(HIDDEN, key_size=5, bias=True, scale=1.0, causal=True),
        ParameterFreeAttention(causal=True, scale=0.25),
    ]
    module = NextWord(attentions, (12, HIDDEN, HIDDEN))
    with exported(module, tmp_path, kind="decoder") as model:
        sizes = sorted((entry.num_kv_heads, entry.head_dim) for entry in model.manifest.cache)
        assert sizes == sorted((1, size) for size in (8, 12, 5, HIDDEN, HIDDEN))
        check_cached(module, model)


# the worked example: X = [[1, 2], [3, 4]], projections that change nothing, d_k = 2
ROWS = np.array([[1.0, 2.0], [3.0, 4.0]])


def with_identity_projections():
    attention = SelfAttention(2, key_size=2, value_size=2)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        nn.init.eye_(projection.weight)
    return attention


class WorkedExample(nn.Module):
    """x (B, S, 2) -> the scores, the scores by root 2, and what is gathered."""

    def __init__(self):
        super().__init__()
        self.attention = with_identity_projections()

    def forward(self, x):
        scores = self.attention.q_proj(x) @ self.attention.k_proj(x).transpose(1, 2)
        return {"scores": scores, "scaled": scores / math.sqrt(2), "gathered": self.attention(x)}


def exact():
    """Weights and output in float64: a softmax of two numbers is a logistic of their difference, 6 and 14 by root 2."""
    first = 1 / (1 + np.exp(np.array([6, 14]) / np.sqrt(2)))
    weights = np.stack([first, 1 - first], axis=1)
    return weights, weights @ ROWS


def test_worked_example(tmp_path):
    """The article rounds the output to [[2.97, 3.97], [3, 4]], which is off by at most 0.0017."""
    module, (_, output) = WorkedExample(), exact()
    with exported(module, tmp_path, inputs=["x:float32[batch,seq,2]"]) as model:
        found = model.run({"x": ROWS[None]})
        assert found["scores"].tolist() == [[[5, 11], [11, 25]]]
        np.testing.assert_allclose(found["scaled"][0], np.array([[5, 11], [11, 25]]) / np.sqrt(2), atol=1e-6, rtol=0)
        np.testing.assert_allclose(found["gathered"][0], output, atol=1e-6, rtol=0)
        np.testing.assert_allclose(output, [[2.971668, 3.971668], [2.999900, 3.999900]], atol=1e-6, rtol=0)
        distance = np.abs(found["gathered"][0] - [[2.97, 3.97], [3, 4]]).max()
        assert distance == pytest.approx(0.00167, abs=1e-5)  # what rounding to two places may do is 0.005
        for batch, seq in ((1, 1), (3, 7)):
            check_run(module, model, x=np.random.default_rng(seq).normal(size=(batch, seq, 2)).astype(np.float32))


def test_worked_example_through_the_weights_of_attention(tmp_path):
    """The same from ids whose vectors are the rows; row 1 attends 0.0142 and 0.9858, which the article rounds well."""
    module, (weights, output) = Gathering({"gathered": with_identity_projections()}, hidden=2, vocab=2), exact()
    with torch.no_grad():
        module.embedding.weight.copy_(torch.from_numpy(ROWS))
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST, attention=True) as model:
        found = model.attention([0, 1])
        assert found.shape == (1, 1, 2, 2)
        np.testing.assert_allclose(found[0, 0], weights, atol=1e-6, rtol=0)
        np.testing.assert_allclose(weights[0], [0.014166, 0.985834], atol=1e-6, rtol=0)
        assert np.abs(found[0, 0, 0] - [0.014, 0.986]).max() == pytest.approx(0.000166, abs=1e-6)
        ids = np.array([[0, 1]])
        np.testing.assert_allclose(model.run({"input_ids": ids})["gathered"][0], output, atol=1e-6, rtol=0)


# attention without parameters
def test_parameter_free_attention(tmp_path):
    module = Gathering({"plain": ParameterFreeAttention(), "scaled": ParameterFreeAttention(scale=0.25)})
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        check_encoder(module, model)


# similarities
SIMILARITIES = {
    "dot": {"similarity": "dot"},
    "scaled_dot": {"similarity": "scaled_dot"},
    "general": {"similarity": "general"},
    "kernel_quadratic": {"similarity": "kernel"},
    "kernel_linear": {"similarity": "kernel", "kernel_form": "linear"},
}


def test_similarities_of_an_encoder(tmp_path):
    module = Gathering({name: MultiHeadAttention(HIDDEN, 2, **options) for name, options in SIMILARITIES.items()})
    for attention in module.attentions.values():
        attention.load_state_dict(module.attentions["dot"].state_dict(), strict=False)
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        check_encoder(module, model)
        found = model.run({"input_ids": ids_of(2, 19)})
    np.testing.assert_allclose(found["kernel_linear"], found["kernel_quadratic"], **CLOSE)
    assert np.abs(found["dot"] - found["scaled_dot"]).max() > 1e-3


def test_similarities_of_a_decoder(tmp_path):
    """What keeps keys and values, and beside it what keeps sums."""
    attentions = [MultiHeadAttention(HIDDEN, 2, causal=True, **options) for options in SIMILARITIES.values()]
    module = NextWord(attentions, [HIDDEN] * len(attentions))
    with exported(module, tmp_path, kind="decoder") as model:
        assert [len(model.manifest.cache), len(model.manifest.states)] == [8, 2]
        check_cached(module, model)


@pytest.mark.parametrize("name", ["general", "kernel_linear"])
def test_similarities_of_an_encoder_decoder(name, tmp_path):
    module = EncoderDecoder(config(pad_id=0, **SIMILARITIES[name]))
    with exported(module, tmp_path, start_ids=[2]) as model:
        check_pair(module, model, 2)


def test_the_linear_form_of_the_kernel_equals_the_quadratic_with_a_state_of_fixed_size(tmp_path):
    """Both graphs over 300 positions with the same weights; one cache grows with them, the other does not."""
    changes = {"similarity": "kernel", "position": "sinusoidal", "max_length": 320}
    quadratic = Decoder(config(**changes))
    linear = Decoder(config(kernel_form="linear", **changes))
    linear.load_state_dict(quadratic.state_dict())
    ids, found, sizes = ids_of(300), {}, {}
    for name, module in (("quadratic", quadratic), ("linear", linear)):
        with exported(module, tmp_path / name, kind="decoder") as model:
            decoder, states = model.decoder, model.manifest.states
            assert [bool(model.manifest.cache), bool(states)] == [name == "quadratic", name == "linear"]
            cache = decoder.open_cache(1, 1)
            slot = cache.acquire()
            rows = [decoder.prefill(cache, slot, ids[:1], keep=1)]
            sizes[name] = [cache.nbytes]
            rows += [decoder.prefill(cache, slot, ids[1:250], keep=249)]
            rows += [decoder.step(cache, [slot], [token]).copy() for token in ids[250:]]
            sizes[name].append(cache.nbytes)
            found[name] = np.concatenate(rows)
            if states:
                assert cache.nbytes == 4 * sum(math.prod(state.shape) for state in states)
            cache.close()
    assert sizes["quadratic"][1] > sizes["quadratic"][0]
    assert sizes["linear"][1] == sizes["linear"][0]
    np.testing.assert_allclose(found["linear"], found["quadratic"], **CLOSE)
    np.testing.assert_allclose(found["linear"], computed(quadratic, ids[None])["output"][0], **CLOSE)


# heads
HEADS = {"1": (1, 1), "3": (3, 3), "8": (8, 8), "8_over_2": (8, 2), "3_over_1": (3, 1)}  # all the others have 2


def test_any_number_of_heads_of_an_encoder(tmp_path):
    chosen = {name: HEADS[name] for name in ("1", "3", "8_over_2")}
    module = Gathering({name: MultiHeadAttention(24, n, num_kv_heads=k) for name, (n, k) in chosen.items()}, hidden=24)
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        check_encoder(module, model)


def test_any_number_of_heads_of_a_decoder(tmp_path):
    """Heads of 24, 8 and 3 numbers; what groups of them share is cached once."""
    attentions = [MultiHeadAttention(24, n, num_kv_heads=k, causal=True) for n, k in HEADS.values()]
    module = NextWord(attentions, [24] * len(attentions), hidden=24)
    with exported(module, tmp_path, kind="decoder") as model:
        cached = sorted((entry.num_kv_heads, entry.head_dim) for entry in model.manifest.cache)
        assert cached == sorted((k, 24 // n) for n, k in HEADS.values() for _ in range(2))
        check_cached(module, model)


# masked, cross, and both in a block
def test_masked_self_attention_of_an_encoder(tmp_path):
    """The mask of the order and that of the padding together."""
    module = Gathering({"one": SelfAttention(HIDDEN, causal=True), "two": MultiHeadAttention(HIDDEN, 2, causal=True)})
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        check_encoder(module, model)
        ids = ids_of(1, 12)
        whole, part = (model.run({"input_ids": ids[:, :n]}) for n in (12, 5))
    for name in ("one", "two"):
        np.testing.assert_allclose(whole[name][:, :5], part[name], **CLOSE)


class Cross(nn.Module):
    """Cross-attention alone, whose memory has a size of its own; a block with it is in every encoder-decoder."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(HIDDEN, 2, memory_size=10)

    def forward(self, x, memory, mask):
        return self.attention(x, mask[:, None, None, :], memory)


def test_cross_attention_of_any_two_lengths(tmp_path):
    module, rng = Cross(), np.random.default_rng(0)
    specs = ["x:float32[batch,seq,16]", "memory:float32[batch,keys,10]", "mask:bool[batch,keys]"]
    with exported(module, tmp_path, inputs=specs) as model:
        for batch, seq, keys in ((1, 1, 1), (3, 5, 29), (2, 40, 3)):
            x, memory = (rng.normal(size=shape).astype(np.float32) for shape in ((batch, seq, 16), (batch, keys, 10)))
            mask = np.arange(keys) < rng.integers(1, keys + 1, (batch, 1))
            check_run(module, model, x=x, memory=memory, mask=mask)


class Blocks(nn.Module):
    """An encoder's block after the other, each with its norm elsewhere."""

    def __init__(self):
        super().__init__()
        self.pre, self.post = (Block(config(norm_position=where), causal=False) for where in ("pre", "post"))

    def forward(self, x):
        y = self.pre(x)
        return {"pre": y, "post": self.post(y)}


def test_blocks_of_an_encoder_alone(tmp_path):
    module, rng = Blocks(), np.random.default_rng(0)
    with exported(module, tmp_path, inputs=["x:float32[batch,seq,16]"]) as model:
        for batch, seq in ((1, 1), (4, 37)):
            check_run(module, model, x=rng.normal(size=(batch, seq, 16)).astype(np.float32))
