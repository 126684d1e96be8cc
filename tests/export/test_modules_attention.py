"""Self-attention with sizes of its own, every similarity, both forms of the kernel, and cross-attention."""

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export.modules import (  # noqa: E402
    Block,
    MultiHeadAttention,
    ParameterFreeAttention,
    RotaryPositions,
    SelfAttention,
    TransformerConfig,
    attend,
    causal_mask,
    elu_feature_map,
    kernel_attention,
    linear_attention,
    scaled_dot_product_attention,
)

SIMILARITIES = ("dot", "scaled_dot", "general", "kernel")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def with_identity_projections(attention):
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(torch.eye(projection.weight.shape[0]))
    return attention


# the worked example: X = [[1, 2], [3, 4]], projections that change nothing, d_k = 2


def test_worked_example():
    """The article rounds the weights of row 1 to 0.014 and 0.986, and the output to [[2.97, 3.97], [3, 4]]."""
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    attention = with_identity_projections(SelfAttention(2, key_size=2, value_size=2).double())
    q, k = attention.q_proj(x), attention.k_proj(x)
    assert (q @ k.transpose(-2, -1)).tolist() == [[[5.0, 11.0], [11.0, 25.0]]]
    first, second = 1 / (1 + math.exp(6 / math.sqrt(2))), 1 / (1 + math.exp(14 / math.sqrt(2)))  # weights of column 1
    exact = torch.tensor([[3 - 2 * first, 4 - 2 * first], [3 - 2 * second, 4 - 2 * second]], dtype=torch.float64)
    torch.testing.assert_close(attention(x)[0], exact, rtol=0, atol=1e-15)

    assert [first, 1 - first] == pytest.approx([0.014, 0.986], abs=2e-4)
    distance = (exact - torch.tensor([[2.97, 3.97], [3.0, 4.0]], dtype=torch.float64)).abs().max().item()
    assert distance == pytest.approx(0.00167, abs=1e-5)  # what rounding to two places may do is 0.005


def test_worked_example_without_the_scale():
    """softmax of [5, 11] is a logistic of 6."""
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    first = 1 / (1 + math.exp(6))
    for attention in (
        with_identity_projections(SelfAttention(2, scale=1.0).double()),
        with_identity_projections(SelfAttention(2, similarity="dot").double()),
        ParameterFreeAttention(),
    ):
        assert attention(x)[0, 0].tolist() == pytest.approx([3 - 2 * first, 4 - 2 * first], abs=1e-12)


# one head with sizes of its own


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_self_attention_equals_pytorch(scale, causal, bias):
    attention = SelfAttention(6, key_size=4, value_size=5, bias=bias, causal=causal, scale=scale)
    assert {name: tuple(weight.shape) for name, weight in attention.state_dict().items() if "weight" in name} == {
        "q_proj.weight": (4, 6),
        "k_proj.weight": (4, 6),
        "v_proj.weight": (5, 6),
    }
    assert (attention.q_proj.bias is not None) == bias
    x = torch.randn(2, 7, 6)
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    assert expected.shape == (2, 7, 5)
    torch.testing.assert_close(attention(x), expected)


def test_self_attention_has_no_bias_unless_asked():
    assert not [name for name in SelfAttention(6).state_dict() if "bias" in name]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_self_attention_takes_a_mask(similarity):
    """Hidden keys are as good as absent, whatever makes the weights."""
    attention, x = SelfAttention(6, similarity=similarity), torch.randn(2, 7, 6)
    present = torch.arange(7) < 4
    hidden = attention(x, present.expand(2, 1, 7))
    torch.testing.assert_close(hidden[:, :4], attention(x[:, :4]))


def test_parameter_free_attention_is_its_formula():
    x = torch.randn(2, 5, 3)
    attention = ParameterFreeAttention()
    assert not attention.state_dict()
    scores = torch.einsum("bqd,bkd->bqk", x, x)
    expected = torch.einsum("bqk,bkd->bqd", scores.exp() / scores.exp().sum(-1, keepdim=True), x)
    torch.testing.assert_close(attention(x), expected)
    scaled = F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5)
    torch.testing.assert_close(ParameterFreeAttention(causal=True, scale=0.5)(x), scaled)
    torch.testing.assert_close(attention(x, torch.eye(5, dtype=torch.bool)), x)  # each sees itself alone


# similarities


def test_position_bias_is_added_to_the_scaled_scores():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    bias, mask = torch.randn(3, 5, 5), causal_mask(5)
    additive = bias.masked_fill(~mask, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=additive.expand(2, 3, 5, 5))
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, position_bias=bias), expected)


@pytest.mark.parametrize("similarity, scale", [("dot", 1.0), ("scaled_dot", 0.5), ("general", 1.0)])
def test_the_scale_of_each_similarity(similarity, scale):
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(attend(q, k, v, similarity=similarity), expected)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(attend(q, k, v, similarity=similarity, scale=0.25), expected)


def test_general_similarity_is_q_w_k():
    """Term by term, as Luong writes it: every score is q^T W k without a scale."""
    attention, x = SelfAttention(3, key_size=2, similarity="general"), torch.randn(1, 4, 3)
    assert attention.general.shape == (2, 2)
    q, k, v = attention.q_proj(x)[0], attention.k_proj(x)[0], attention.v_proj(x)[0]
    scores = torch.zeros(4, 4)
    for i, j, a, b in itertools.product(range(4), range(4), range(2), range(2)):
        scores[i, j] += (q[i, a] * attention.general[a, b] * k[j, b]).detach()
    torch.testing.assert_close(attention(x)[0], scores.softmax(dim=-1) @ v)


def test_general_with_the_identity_is_the_dot_product():
    general, dot = MultiHeadAttention(8, 2, similarity="general"), MultiHeadAttention(8, 2, similarity="dot")
    dot.load_state_dict({name: value for name, value in general.state_dict().items() if name != "general"})
    x = torch.randn(2, 5, 8)
    assert (general(x) - dot(x)).abs().max() > 1e-3
    with torch.no_grad():
        general.general.copy_(torch.eye(4))
    torch.testing.assert_close(general(x), dot(x))


def test_feature_map_is_above_zero():
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert elu_feature_map(x).tolist() == pytest.approx([math.exp(-2), 1.0, 4.0])


def test_kernel_attention_by_hand():
    """phi(q) = [2, 1]; phi(k) = [1, 3] and [2, 1]: the products 5 and 5 weigh both values alike; then 5 and 0."""
    q = torch.tensor([[[[1.0, 0.0]]]])
    k = torch.tensor([[[[0.0, 2.0], [1.0, 0.0]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    assert kernel_attention(q, k, v).item() == pytest.approx(6.0)
    assert linear_attention(q.expand(1, 1, 2, 2), k, v).flatten().tolist() == pytest.approx([6.0, 6.0])
    assert kernel_attention(q, k, v, torch.tensor([True, False])).item() == pytest.approx(4.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_both_forms_of_the_kernel_are_equal(padded, causal):
    """In double precision they differ by rounding alone."""
    q, k = torch.randn(2, 3, 9, 4, dtype=torch.float64), torch.randn(2, 3, 9, 4, dtype=torch.float64)
    v = torch.randn(2, 3, 9, 5, dtype=torch.float64)
    mask = None
    if padded:
        mask = (torch.arange(9) < torch.tensor([[9], [6]]))[:, None, None, :]
    both = [attend(q, k, v, mask, similarity="kernel", kernel_form=f, causal=causal) for f in ("quadratic", "linear")]
    assert both[0].shape == (2, 3, 9, 5)
    torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_both_forms_of_a_module_are_equal(causal):
    options = {"num_kv_heads": 2, "head_dim": 6, "value_dim": 3, "causal": causal, "similarity": "kernel"}
    quadratic = MultiHeadAttention(8, 4, **options)
    linear = MultiHeadAttention(8, 4, kernel_form="linear", **options)
    linear.load_state_dict(quadratic.state_dict())
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(linear(x), quadratic(x))
    single = [SelfAttention(8, similarity="kernel", causal=causal, kernel_form=f) for f in ("quadratic", "linear")]
    single[1].load_state_dict(single[0].state_dict())
    torch.testing.assert_close(single[0](x), single[1](x))


def test_running_sums_are_a_state_of_fixed_size():
    """Step by step with nothing kept but two sums: the recurrence of Katharopoulos et al., equations 18 to 20."""
    q, k, v = torch.randn(1, 1, 7, 4), torch.randn(1, 1, 7, 4), torch.randn(1, 1, 7, 3)
    s, z, outputs = torch.zeros(4, 3), torch.zeros(4), []
    for t in range(7):
        s = s + torch.outer(elu_feature_map(k[0, 0, t]), v[0, 0, t])
        z = z + elu_feature_map(k[0, 0, t])
        phi_q = elu_feature_map(q[0, 0, t])
        outputs.append(phi_q @ s / (phi_q @ z))
    torch.testing.assert_close(linear_attention(q, k, v, causal=True)[0, 0], torch.stack(outputs))


# several heads


def test_values_of_their_own_size():
    attention = MultiHeadAttention(10, 3, num_kv_heads=1, head_dim=8, value_dim=5)
    shapes = {name: tuple(weight.shape) for name, weight in attention.state_dict().items() if "weight" in name}
    assert shapes == {
        "q_proj.weight": (24, 10),
        "k_proj.weight": (8, 10),
        "v_proj.weight": (5, 10),
        "o_proj.weight": (10, 15),
    }
    x = torch.randn(2, 7, 10)
    q = attention.q_proj(x).unflatten(-1, (3, 8)).transpose(1, 2)
    k, v = attention.k_proj(x)[:, None].expand(2, 3, 7, 8), attention.v_proj(x)[:, None].expand(2, 3, 7, 5)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.o_proj(heads))


@pytest.mark.parametrize("num_heads", [1, 3, 7, 12])
def test_any_number_of_heads_equals_pytorch(num_heads):
    size = 4 * num_heads
    theirs, ours = nn.MultiheadAttention(size, num_heads, batch_first=True), MultiHeadAttention(size, num_heads)
    copy_projections(theirs, ours)
    x = torch.randn(2, 5, size)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def copy_projections(theirs, ours):
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        if theirs.in_proj_weight is None:
            weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
        else:
            weights = theirs.in_proj_weight.chunk(3)
        for part, weight, bias in zip("qkv", weights, theirs.in_proj_bias.chunk(3), strict=True):
            getattr(ours, f"{part}_proj").weight.copy_(weight)
            getattr(ours, f"{part}_proj").bias.copy_(bias)
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())


@pytest.mark.parametrize("memory_size", [None, 6])
def test_cross_attention_equals_pytorch(memory_size):
    size = memory_size or 8
    theirs = nn.MultiheadAttention(8, 2, kdim=size, vdim=size, batch_first=True)
    ours = MultiHeadAttention(8, 2, memory_size=memory_size)
    copy_projections(theirs, ours)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 7, size)
    present = torch.arange(7) < torch.tensor([[7], [3]])
    expected, _ = theirs(x, memory, memory, key_padding_mask=~present, need_weights=False)
    torch.testing.assert_close(ours(x, present[:, None, None, :], memory), expected)


def test_cross_attention_by_kernel_in_both_forms():
    quadratic = MultiHeadAttention(8, 2, similarity="kernel")
    linear = MultiHeadAttention(8, 2, similarity="kernel", kernel_form="linear")
    linear.load_state_dict(quadratic.state_dict())
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    torch.testing.assert_close(linear(x, memory=memory), quadratic(x, memory=memory))


# what is refused


def make_config(**changes):
    sizes = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
    return TransformerConfig(**(sizes | {"intermediate_size": 24, "max_length": 32} | changes))


REFUSED = [
    (lambda: SelfAttention(6, key_size=0), "key_size must be a whole number"),
    (lambda: SelfAttention(6, value_size=2.5), "value_size must be a whole number"),
    (lambda: SelfAttention(0), "hidden_size must be a whole number"),
    (lambda: SelfAttention(6, similarity="cosine"), "similarity must be one of dot, scaled_dot, general, kernel, got"),
    (lambda: SelfAttention(6, similarity="kernel", kernel_form="cubic"), "kernel_form must be one of quadratic"),
    (lambda: SelfAttention(6, similarity="kernel", scale=1.0), "kernel' has none, got scale=1.0; leave it out"),
    (lambda: SelfAttention(6, kernel_form="linear"), "'linear' needs similarity 'kernel' .* got 'scaled_dot'; use"),
    (lambda: SelfAttention(6, scale=0.0), "scale must be a finite number above 0, got 0.0"),
    (lambda: ParameterFreeAttention(scale=math.inf), "scale must be a finite number above 0"),
    (lambda: MultiHeadAttention(8, 2, value_dim=0), "value_dim must be a whole number"),
    (lambda: MultiHeadAttention(8, 2, memory_size=-1), "memory_size must be a whole number"),
    (lambda: MultiHeadAttention(8, 2, similarity="kernel", scale=0.5), "leave it out"),
    (lambda: MultiHeadAttention(8, 2, memory_size=6)(torch.randn(1, 3, 8)), r"memory of size 6 and none .* \(batch, k"),
    (
        lambda: MultiHeadAttention(8, 2, causal=True)(torch.randn(1, 3, 8), memory=torch.randn(1, 4, 8)),
        "got a memory for an attention that is causal or rotary; build it with causal=False",
    ),
    (
        lambda: MultiHeadAttention(8, 2, rotary=RotaryPositions(4, 8))(
            torch.randn(1, 3, 8), None, torch.randn(1, 4, 8)
        ),
        "got a memory for an attention that is causal or rotary; build it",
    ),
    (
        lambda: MultiHeadAttention(8, 2, similarity="kernel")(torch.randn(1, 3, 8), position_bias=torch.zeros(2, 3, 3)),
        "added to the scores of a softmax and similarity 'kernel' has none",
    ),
    (
        lambda: MultiHeadAttention(8, 2, similarity="kernel", kernel_form="linear")(
            torch.randn(1, 3, 8), causal_mask(3)
        ),
        r"one mask for all queries, \(batch, 1, 1, keys\), got one of shape \(3, 3\)",
    ),
    (lambda: make_config(similarity="cosine"), "similarity must be one of"),
    (lambda: make_config(attention_scale=-1.0), "scale must be a finite number above 0"),
    (lambda: make_config(value_dim=0), "value_dim must be a whole number"),
    (lambda: make_config(kernel_form="linear"), "needs similarity 'kernel'"),
    (
        lambda: make_config(similarity="kernel", kernel_form="linear", attention_pattern="sliding_window", window=4),
        "one sum over all earlier positions .* got attention_pattern 'sliding_window'; use",
    ),
    (
        lambda: make_config(similarity="kernel", position="alibi"),
        "position 'alibi' is added to the scores of a softmax",
    ),
    (
        lambda: Block(make_config(), causal=False)(torch.randn(1, 3, 16), memory=torch.randn(1, 4, 16)),
        "got memory=a tensor and cross_attention=False; give both or neither",
    ),
    (
        lambda: Block(make_config(), causal=True, cross_attention=True)(torch.randn(1, 3, 16)),
        "got memory=none and cross_attention=True; give both or neither",
    ),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# the blocks


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_decoder_block_equals_pytorch(norm_position):
    """The paper's decoder layer is `nn.TransformerDecoderLayer` under a causal mask."""
    theirs = nn.TransformerDecoderLayer(
        16, 4, 24, 0.0, activation="relu", batch_first=True, norm_first=norm_position == "pre"
    )
    config = make_config(activation="relu", norm_position=norm_position)
    ours = Block(config, causal=True, cross_attention=True)
    copy_projections(theirs.self_attn, ours.attention)
    copy_projections(theirs.multihead_attn, ours.cross_attention)
    for our, their in [
        (ours.attention_norm, theirs.norm1),
        (ours.cross_attention_norm, theirs.norm2),
        (ours.feed_forward_norm, theirs.norm3),
        (ours.feed_forward.up, theirs.linear1),
        (ours.feed_forward.down, theirs.linear2),
    ]:
        our.load_state_dict(their.state_dict())
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    present = torch.arange(7) < torch.tensor([[7], [3]])
    expected = theirs(x, memory, tgt_mask=~causal_mask(5), memory_key_padding_mask=~present)
    torch.testing.assert_close(ours(x, memory=memory, memory_mask=present[:, None, None, :]), expected)


def test_encoder_block_equals_pytorch():
    theirs = nn.TransformerEncoderLayer(16, 4, 24, 0.0, activation="gelu", batch_first=True)
    ours = Block(make_config(norm_position="post"), causal=False)
    copy_projections(theirs.self_attn, ours.attention)
    for our, their in [
        (ours.attention_norm, theirs.norm1),
        (ours.feed_forward_norm, theirs.norm2),
        (ours.feed_forward.up, theirs.linear1),
        (ours.feed_forward.down, theirs.linear2),
    ]:
        our.load_state_dict(their.state_dict())
    x, present = torch.randn(2, 5, 16), torch.arange(5) < torch.tensor([[5], [3]])
    expected = theirs(x, src_key_padding_mask=~present)
    torch.testing.assert_close(ours(x, present[:, None, None, :]), expected)
