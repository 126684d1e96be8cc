"""Biases of positions (ALiBi, T5's buckets), attention patterns, and norms that do or do not look at the batch."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export.modules import (  # noqa: E402
    AlibiBias,
    Decoder,
    Encoder,
    RelativeBias,
    Stack,
    TransformerConfig,
    alibi_slopes,
    build_norm,
    causal_mask,
    pattern_mask,
    relative_bucket,
    scaled_dot_product_attention,
)

PATTERNS = {
    "full": {},
    "sliding_window": {"window": 3},
    "block_local_global": {"block_size": 4, "num_global_tokens": 2},
    "segmented": {"segment_size": 4},
    "hierarchical": {"segment_size": 4},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def make_config(**changes):
    sizes = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
    return TransformerConfig(**(sizes | {"intermediate_size": 24, "max_length": 32} | changes))


# ALiBi


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(16)[:3].tolist() == pytest.approx([2**-0.5, 2**-1, 2**-1.5])
    assert alibi_slopes(1).tolist() == [2**-8]


@pytest.mark.hf
@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 20])
def test_alibi_is_blooms(num_heads):
    """BLOOM adds slope * key: a softmax takes it for -slope * (query - key), for they differ by a number per row."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 6, dtype=torch.long), num_heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(num_heads), theirs[:, 0, 1])
    q, k, v = (torch.randn(num_heads, 6, 4) for _ in range(3))
    ours = scaled_dot_product_attention(
        q, k, v, causal_mask(6), position_bias=AlibiBias(num_heads)(torch.zeros(1, 6, 1))
    )
    expected = scaled_dot_product_attention(q, k, v, causal_mask(6), position_bias=theirs)
    torch.testing.assert_close(ours, expected)


def test_alibi_falls_with_the_distance_to_both_sides():
    bias = AlibiBias(2)(torch.zeros(1, 4, 3))
    assert bias.shape == (2, 4, 4)
    for head, query, key in itertools.product(range(2), range(4), range(4)):
        assert bias[head, query, key].item() == -abs(query - key) * 2.0 ** (-4 * (head + 1))
    assert not AlibiBias(2).state_dict()


# T5's buckets


@pytest.mark.hf
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (6, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_t5(causal, num_buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    offset = torch.arange(-300, 301)
    theirs = t5.T5Attention._relative_position_bucket(offset, not causal, num_buckets, max_distance)
    assert torch.equal(relative_bucket(offset, num_buckets, max_distance, causal=causal), theirs)


def test_buckets_by_hand():
    """8 buckets, both sides: 4 each, of distance 0, 1, then 2 to 4 and from 5 on, half way to 16 in logarithms."""
    buckets = relative_bucket(torch.tensor([0, -1, -2, -5, -6, -100, 1, 2, 5, 6]), 8, 16, causal=False)
    assert buckets.tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7]
    assert relative_bucket(torch.tensor([0, 1, 9, -1, -3, -4, -8, -100]), 8, 16, causal=True).tolist() == [
        *[0, 0, 0],  # a causal query sees none of those behind it
        *[1, 3, 4, 6, 7],
    ]


def test_relative_bias_looks_its_buckets_up():
    layer = RelativeBias(3, causal=False, num_buckets=8, max_distance=16)
    bias = layer(torch.zeros(2, 5, 7))
    assert bias.shape == (3, 5, 5)
    for head, query, key in itertools.product(range(3), range(5), range(5)):
        bucket = relative_bucket(torch.tensor(key - query), 8, 16, causal=False)
        assert bias[head, query, key] == layer.embedding.weight[bucket, head]


@pytest.mark.parametrize("position", ["alibi", "relative"])
def test_one_bias_serves_all_layers(position):
    stack = Stack(make_config(position=position, num_layers=3), causal=True)
    biases = [m for m in stack.modules() if isinstance(m, AlibiBias | RelativeBias)]
    assert len(biases) == 1
    calls = []
    biases[0].register_forward_hook(lambda *_: calls.append(1))
    stack.run(torch.randn(2, 5, 16))
    assert len(calls) == 1


@pytest.mark.parametrize("position", ["alibi", "relative"])
@pytest.mark.parametrize("kind", [Encoder, Decoder])
def test_order_matters_with_a_bias(kind, position):
    """Swapping the first two tokens changes what the last one gets; without positions one layer would not see it."""
    ids, swapped = torch.tensor([[3, 7, 5]]), torch.tensor([[7, 3, 5]])
    model = kind(make_config(position=position, num_layers=1)).eval()
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4
    torch.manual_seed(1)
    bag = kind(make_config(position="none", num_layers=1)).eval()
    torch.testing.assert_close(bag(ids)[0, -1], bag(swapped)[0, -1])


# patterns


def seen(query, key, length, pattern, causal):
    """Say for one pair what the mask should, in the words of the papers."""
    if causal and key > query:
        return False
    if pattern == "sliding_window":
        return abs(query - key) < 3
    if pattern == "block_local_global":
        return query // 4 == key // 4 or key < 2 or query < 2
    if pattern == "segmented":
        return query // 4 == key // 4
    if pattern == "hierarchical":
        return query // 4 == key // 4 or key in range(3, length, 4)
    return True


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 4, 11])
def test_patterns_pair_by_pair(length, pattern, causal):
    mask = pattern_mask(length, pattern, causal=causal, **PATTERNS[pattern])
    assert mask.dtype == torch.bool
    expected = [[seen(q, k, length, pattern, causal) for k in range(length)] for q in range(length)]
    assert mask.tolist() == expected
    assert mask.diagonal().all()


def test_patterns_by_hand():
    assert pattern_mask(4, "sliding_window", causal=True, window=2).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert pattern_mask(5, "hierarchical", causal=True, segment_size=2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 1],
    ]
    assert pattern_mask(5, "hierarchical", segment_size=2).int()[0].tolist() == [1, 1, 0, 1, 0]


def test_a_window_that_holds_everything_is_full():
    for causal in (True, False):
        everything = pattern_mask(9, causal=causal)
        assert torch.equal(pattern_mask(9, "sliding_window", causal=causal, window=9), everything)
        assert torch.equal(pattern_mask(9, "segmented", causal=causal, segment_size=9), everything)
        assert torch.equal(everything, causal_mask(9) if causal else torch.ones(9, 9, dtype=torch.bool))


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "full"])
@pytest.mark.parametrize("kind", [Encoder, Decoder])
def test_a_token_reaches_what_its_pattern_lets_it(kind, pattern):
    """One layer: changing a token changes exactly the positions that see it."""
    causal = kind is Decoder
    model = kind(make_config(num_layers=1, attention_pattern=pattern, **PATTERNS[pattern])).eval()
    ids = torch.randint(0, 19, (1, 11))
    mask = pattern_mask(11, pattern, causal=causal, **PATTERNS[pattern])
    for changed in (0, 3, 6, 10):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 19
        moved = (model(other) - model(ids))[0].abs().amax(dim=-1) > 1e-6
        assert torch.equal(moved, mask[:, changed])


def test_padding_is_hidden_beside_a_pattern():
    """In segments of 4, two of them: padding the second one leaves what a shorter input gives."""
    encoder = Encoder(make_config(attention_pattern="segmented", segment_size=4)).eval()
    ids = torch.randint(0, 19, (2, 8))
    present = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    out = encoder(ids, present)
    torch.testing.assert_close(out[0], encoder(ids[:1])[0])
    torch.testing.assert_close(out[1, :6], encoder(ids[1:, :6])[0])


# norms and the batch


def test_batch_norm_equals_pytorch():
    x = torch.randn(3, 5, 8)
    ours, theirs = build_norm("batch_norm", 8, eps=0.1), nn.BatchNorm1d(8, eps=0.1)
    torch.testing.assert_close(ours(x).flatten(0, 1), theirs(x.flatten(0, 1)))  # every position is a sample
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_batch_norm_in_evaluation_is_a_fixed_affine_map():
    norm = build_norm("batch_norm", 8)
    for _ in range(5):
        norm(torch.randn(4, 6, 8) * 3 + 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.eval()
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    x = torch.randn(2, 7, 8) * 10
    torch.testing.assert_close(norm(x), x * factor + (norm.bias - norm.running_mean * factor))
    torch.testing.assert_close(norm(x)[:1, :3], norm(x[:1, :3]))


def test_padding_moves_batch_norm_in_training_and_layer_norm_never():
    """Ragged rows of 5 and 2 tokens: the padding of the second row is part of what BatchNorm measures."""
    tokens = torch.randn(2, 5, 8)
    outputs = {}
    for norm, filler in itertools.product(("batch_norm", "layer_norm", "rms_norm"), (0.0, 4.0)):
        x = tokens.clone()
        x[1, 2:] = filler
        outputs[norm, filler] = build_norm(norm, 8).train()(x)[0]  # the full row, without any padding
    assert (outputs["batch_norm", 0.0] - outputs["batch_norm", 4.0]).abs().max() > 0.1
    for norm in ("layer_norm", "rms_norm"):
        torch.testing.assert_close(outputs[norm, 0.0], outputs[norm, 4.0], atol=0, rtol=0)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_decoder_with_batch_norm_is_causal_in_evaluation_alone(norm_position):
    model = Decoder(make_config(norm="batch_norm", norm_position=norm_position))
    ids = torch.randint(0, 19, (2, 9))
    model(ids)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 19
    assert (model(changed) - model(ids))[:, :4].abs().max() > 1e-4  # statistics mix positions
    model.eval()
    torch.testing.assert_close(model(changed)[:, :4], model(ids)[:, :4], atol=1e-6, rtol=0)


# what is refused

REFUSED = [
    (lambda: alibi_slopes(0), "num_heads must be a whole number"),
    (lambda: RelativeBias(0, causal=True), "num_heads must be a whole number"),
    (lambda: RelativeBias(2, causal=True, num_buckets=3), "num_buckets=3 and max_distance=128; T5 has 32 and 128"),
    (lambda: RelativeBias(2, causal=True, max_distance=16), "num_buckets=32 and max_distance=16"),
    (lambda: make_config(relative_buckets=True), "num_buckets must be a whole number"),
    (lambda: make_config(relative_max_distance=-1), "max_distance must be a whole number"),
    (lambda: make_config(relative_max_distance=16), "num_buckets=32 and max_distance=16"),
    (lambda: pattern_mask(4, "diagonal"), "attention_pattern must be one of full, sliding_window, block_local_global"),
    (lambda: pattern_mask(4, "sliding_window"), "window must be a whole number of at least 1, got None"),
    (lambda: pattern_mask(4, "block_local_global", block_size=2), "num_global_tokens must be a whole number"),
    (lambda: pattern_mask(4, "segmented", segment_size=0), "segment_size must be a whole number of at least 1, got 0"),
    (
        lambda: pattern_mask(4, "full", segment_size=2),
        "a setting of attention_pattern 'segmented' or 'hierarchical', got segment_size=2 with 'full'; leave",
    ),
    (lambda: make_config(attention_pattern="sliding_window"), "window must be a whole number"),
    (
        lambda: make_config(window=4),
        "window is a setting of attention_pattern 'sliding_window', got window=4 with 'full'",
    ),
    (lambda: make_config(attention_pattern="strided"), "attention_pattern must be one of"),
    (lambda: make_config(similarity="kernel", position="relative"), "position 'relative' is added to the scores"),
    (lambda: build_norm("batch", 8), "norm must be one of layer_norm, rms_norm, batch_norm, got 'batch'"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# export


@pytest.mark.parametrize("kind", [Encoder, Decoder])
@pytest.mark.parametrize(
    "changes",
    [
        {"position": "alibi"},
        {"position": "relative"},
        {"norm": "batch_norm"},
        {"similarity": "kernel", "kernel_form": "linear", "position": "sinusoidal"},
        {"similarity": "kernel", "value_dim": 3},
        {"similarity": "general", "num_kv_heads": 2, "position": "rotary"},
        *({"attention_pattern": pattern, **settings} for pattern, settings in PATTERNS.items()),
    ],
    ids=str,
)
def test_export_keeps_batch_and_sequence_symbolic(changes, kind):
    model = kind(make_config(num_layers=1, **changes)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        ids = torch.randint(0, 19, (2, 5))
        run = torch.export.export(model, (ids,), dynamic_shapes=({0: dynamic, 1: dynamic},)).module()
        for shape in ((1, 1), (3, 1), (1, 11), (3, 32)):
            ids = torch.randint(0, 19, shape)
            torch.testing.assert_close(run(ids), model(ids))
