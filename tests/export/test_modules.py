"""The definitions against PyTorch's own modules, the papers' formulas, and the exporter's need of symbolic axes."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export import modules  # noqa: E402
from tfinfer.export.modules import (  # noqa: E402
    Block,
    Decoder,
    FeedForward,
    LearnedPositions,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositions,
    SinusoidalPositions,
    TransformerConfig,
    build_norm,
    causal_mask,
    scaled_dot_product_attention,
    sinusoidal_table,
)

POSITIONS = ("sinusoidal", "learned", "rotary", "none")
NORMS = ("layer_norm", "rms_norm")
NORM_POSITIONS = ("pre", "post")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu")


def make_config(**changes):
    sizes = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
    return TransformerConfig(**(sizes | {"intermediate_size": 24, "max_length": 32} | changes))


def make_decoder(**changes):
    torch.manual_seed(0)
    return Decoder(make_config(**changes)).eval()


def random_ids(batch, seq):
    return torch.randint(0, 19, (batch, seq), generator=torch.Generator().manual_seed(batch * 100 + seq))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors as small as these only wait for a second thread, many times as long as they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# attention


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", [None, "causal", "per head"])
def test_attention_equals_pytorch(mask, scale):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 6)
    if mask == "causal":
        mask = causal_mask(5)
    elif mask == "per head":
        mask = (torch.rand(2, 3, 5, 5) > 0.5) | torch.eye(5, dtype=torch.bool)
    ours = scaled_dot_product_attention(q, k, v, mask, scale)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))


def test_attention_of_more_keys_than_queries():
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_by_hand():
    """Scores of [[1, 2], [3, 4]] with itself are [[5, 11], [11, 25]]; the softmax of two scores is a logistic."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    second = [1 / (1 + math.exp(-gap / math.sqrt(2))) for gap in (11 - 5, 25 - 11)]  # what rows 1 and 2 give to row 2
    expected = torch.tensor([[1 + 2 * w, 2 + 2 * w] for w in second], dtype=torch.float64)
    torch.testing.assert_close(scaled_dot_product_attention(x, x, x), expected)
    assert second[0] == pytest.approx(0.98583, abs=1e-5)

    masked = scaled_dot_product_attention(x, x, x, causal_mask(2))
    torch.testing.assert_close(masked[0], x[0])  # the first row sees itself alone
    torch.testing.assert_close(masked[1], expected[1])


def test_causal_mask_by_hand():
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_multi_head_attention_equals_pytorch(causal, bias):
    theirs = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True).eval()
    ours = MultiHeadAttention(16, 4, bias=bias, causal=causal)
    with torch.no_grad():
        q, k, v = theirs.in_proj_weight.chunk(3)
        weights = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": theirs.out_proj.weight}
        if bias:
            theirs.in_proj_bias.normal_()
            theirs.out_proj.bias.normal_()
            q, k, v = theirs.in_proj_bias.chunk(3)
            weights |= {"q_proj.bias": q, "k_proj.bias": k, "v_proj.bias": v, "o_proj.bias": theirs.out_proj.bias}
        ours.load_state_dict(weights)  # strict: no other parameter is there

        x = torch.randn(2, 5, 16)
        present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])  # the second row ends in padding
        forbidden = ~causal_mask(5) if causal else None
        expected, _ = theirs(x, x, x, attn_mask=forbidden, key_padding_mask=~present, need_weights=False)
        torch.testing.assert_close(ours(x, present[:, None, None, :]), expected)
        expected, _ = theirs(x, x, x, attn_mask=forbidden, need_weights=False)
        torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_shared_key_heads_equal_repeated_ones(num_kv_heads):
    shared = MultiHeadAttention(16, 4, num_kv_heads=num_kv_heads, causal=True)
    full = MultiHeadAttention(16, 4, causal=True)
    weights = shared.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        heads = weights[name].unflatten(0, (num_kv_heads, 4))
        weights[name] = heads.repeat_interleave(4 // num_kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(shared(x), full(x))


def test_head_dim_of_its_own():
    attention = MultiHeadAttention(10, 3, num_kv_heads=1, head_dim=8)
    assert attention.q_proj.weight.shape == (24, 10)
    assert attention.k_proj.weight.shape == (8, 10)
    assert attention(torch.randn(2, 5, 10)).shape == (2, 5, 10)


# positions


def test_sinusoidal_table_is_the_papers():
    table = sinusoidal_table(50, 6)
    for position, i in itertools.product((0, 1, 7, 49), range(3)):
        angle = position / 10000 ** (2 * i / 6)
        assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoidal_positions_scale_the_embedding():
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(SinusoidalPositions(16, 8)(x), 4 * x + sinusoidal_table(5, 16))


def test_learned_positions_add_one_vector_each():
    positions, x = LearnedPositions(16, 8), torch.randn(2, 5, 16)
    torch.testing.assert_close(positions(x) - x, positions.embedding.weight[:5].expand(2, 5, 16), atol=1e-6, rtol=0)


def test_rotary_scores_depend_on_the_distance_alone():
    rotary = RotaryPositions(8, 64)
    q = rotary(torch.randn(8).expand(1, 1, 64, 8))  # one query, standing at every position
    k = rotary(torch.randn(8).expand(1, 1, 64, 8))
    scores = (q @ k.transpose(-2, -1))[0, 0]
    for distance in (-40, -1, 0, 3, 50):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-5, rtol=0)
    assert (scores[0, 1:] - scores[0, 0]).abs().max() > 0.1  # and on nothing less


def test_rotary_by_hand():
    """Dimension i turns with dimension i + 2, by pos / 100^(i / 2)."""
    x = torch.randn(4, dtype=torch.float64)
    turned = RotaryPositions(4, 16, theta=100.0).double()(x.expand(1, 1, 16, 4))[0, 0]
    for position, i in itertools.product((0, 1, 15), (0, 1)):
        angle = position / 100 ** (i / 2)
        pair = complex(x[i], x[i + 2]) * complex(math.cos(angle), math.sin(angle))
        assert turned[position, i].item() == pytest.approx(pair.real, abs=1e-6)
        assert turned[position, i + 2].item() == pytest.approx(pair.imag, abs=1e-6)


def test_rotary_keeps_lengths_and_the_first_position():
    x = torch.randn(2, 3, 9, 8)
    turned = RotaryPositions(8, 16)(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


def test_rotary_table_is_exact_at_late_positions():
    """In single precision the angle itself is off by thousandths long before position 100,000."""
    late = RotaryPositions(8, 100_001).cos[-1, :4]
    assert late.tolist() == pytest.approx([math.cos(100_000 / 10000 ** (i / 4)) for i in range(4)], abs=1e-6)


def test_rope_theta_reaches_every_block():
    for block in make_decoder(position="rotary", head_dim=8, rope_theta=500.0).blocks:
        torch.testing.assert_close(block.attention.rotary.cos, RotaryPositions(8, 32, theta=500.0).cos)


def test_tables_are_no_weights():
    assert not [name for name in make_decoder(position="rotary").state_dict() if "cos" in name or "sin" in name]
    assert not [name for name in make_decoder(position="sinusoidal").state_dict() if "table" in name]


def test_blocks_share_one_rotary_table():
    decoder = make_decoder(position="rotary")
    assert len({block.attention.rotary.cos.data_ptr() for block in decoder.blocks}) == 1


# feed-forward and norms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_its_formula(activation, bias):
    layer, x = FeedForward(8, 12, activation=activation, bias=bias), torch.randn(2, 3, 8)
    assert all((linear.bias is not None) == bias for linear in layer.children() if isinstance(linear, nn.Linear))
    wide = layer.up(x)
    if activation == "relu":
        wide = wide.clamp(min=0)
    elif activation == "gelu":
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    elif activation == "gelu_tanh":
        wide = wide * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        gate = layer.gate(x)
        wide = gate * torch.sigmoid(gate) * wide
    torch.testing.assert_close(layer(x), layer.down(wide))


@pytest.mark.parametrize("norm, theirs", [("layer_norm", nn.LayerNorm), ("rms_norm", nn.RMSNorm)])
def test_norms_equal_pytorch(norm, theirs):
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    ours, theirs = build_norm(norm, 8, eps=0.1), theirs(8, eps=0.1)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    torch.testing.assert_close(ours(x), theirs(x))


def test_rms_norm_by_hand():
    torch.testing.assert_close(RMSNorm(2, eps=0.0)(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / 12.5**0.5)


def test_rms_norm_of_large_half_precision():
    """1000 squared is beyond what fp16 holds."""
    out = RMSNorm(4).half()(torch.full((4,), 1000.0, dtype=torch.float16))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(4, dtype=torch.float16))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("norm_position", NORM_POSITIONS)
def test_norms_stand_where_the_config_says(norm_position, norm):
    block = Block(make_config(norm=norm, norm_position=norm_position), causal=True)
    attention, feed_forward = block.attention, block.feed_forward
    first, second = block.attention_norm, block.feed_forward_norm
    x = torch.randn(2, 5, 16)
    if norm_position == "pre":
        middle = x + attention(first(x))
        expected = middle + feed_forward(second(middle))
    else:
        middle = first(x + attention(x))
        expected = second(middle + feed_forward(middle))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("norm_position", NORM_POSITIONS)
def test_block_equals_pytorch(norm_position):
    """The textbook's block is `nn.TransformerEncoderLayer` under a causal mask."""
    theirs = nn.TransformerEncoderLayer(
        16, 4, 24, 0.0, activation="relu", batch_first=True, norm_first=norm_position == "pre"
    )
    ours = Block(make_config(activation="relu", norm_position=norm_position), causal=True)
    pairs = [
        (ours.attention.o_proj, theirs.self_attn.out_proj),
        (ours.feed_forward.up, theirs.linear1),
        (ours.feed_forward.down, theirs.linear2),
        (ours.attention_norm, theirs.norm1),
        (ours.feed_forward_norm, theirs.norm2),
    ]
    for our, their in pairs:
        our.load_state_dict(their.state_dict())
    with torch.no_grad():
        for part, weight in zip("qkv", theirs.self_attn.in_proj_weight.chunk(3), strict=True):
            projection = getattr(ours.attention, f"{part}_proj")
            projection.weight.copy_(weight)
            projection.bias.zero_()  # as PyTorch starts its own
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=~causal_mask(5)))


# the decoder


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm_position", NORM_POSITIONS)
def test_a_token_changes_nothing_before_it(position, norm_position):
    decoder = make_decoder(position=position, norm_position=norm_position, num_kv_heads=2)
    ids = random_ids(2, 9)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 19
    before, after = decoder(ids), decoder(changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], atol=1e-6, rtol=0)
    assert ((after - before)[:, 4:].abs().amax(dim=-1) > 1e-6).all()  # it and what follows do change


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "rotary"])
def test_order_matters_where_there_are_positions(position):
    """One block without positions sees a bag: swapping the first two tokens is nothing to the third."""
    ids, swapped = torch.tensor([[3, 7, 5]]), torch.tensor([[7, 3, 5]])
    last = [make_decoder(position=position, num_layers=1)(x)[0, -1] for x in (ids, swapped)]
    assert (last[0] - last[1]).abs().max() > 1e-4
    bag = [make_decoder(position="none", num_layers=1)(x)[0, -1] for x in (ids, swapped)]
    torch.testing.assert_close(*bag)


def test_tied_head_shares_memory():
    tied, free = make_decoder(tie_embeddings=True), make_decoder(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert free.head.weight.data_ptr() != free.embedding.weight.data_ptr()
    size = free.embedding.weight.numel()
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == size


@pytest.mark.parametrize("norm_position", NORM_POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_only_pre_norm_closes_with_a_norm(norm, norm_position):
    decoder = make_decoder(norm=norm, norm_position=norm_position, norm_eps=0.25)
    norms = [m for m in decoder.modules() if isinstance(m, nn.LayerNorm | RMSNorm)]
    assert len(norms) == (5 if norm_position == "pre" else 4)
    assert {type(m) for m in norms} == {RMSNorm if norm == "rms_norm" else nn.LayerNorm}
    assert {m.eps for m in norms} == {0.25}


def test_bias_switches_are_separate():
    for attention_bias, ffn_bias in itertools.product((True, False), repeat=2):
        names = make_decoder(attention_bias=attention_bias, ffn_bias=ffn_bias).state_dict()
        assert any("_proj.bias" in name for name in names) == attention_bias
        assert any("feed_forward" in name and "norm" not in name and "bias" in name for name in names) == ffn_bias
        assert "head.bias" not in names


def test_dropout_acts_in_training_only():
    decoder, ids = make_decoder(dropout=0.5), random_ids(2, 5)
    torch.testing.assert_close(decoder(ids), decoder(ids), atol=0, rtol=0)
    decoder.train()
    assert (decoder(ids) - decoder(ids)).abs().max() > 1e-3


def test_dropout_is_where_the_paper_has_it():
    """On the embeddings with their positions, and on the output of each of two blocks' two sub-layers."""
    dropped = []
    decoder = make_decoder(dropout=0.5).train()
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: dropped.append((output == 0).float().mean()))
    decoder(random_ids(4, 32))
    assert torch.stack(dropped).tolist() == pytest.approx([0.5] * 5, abs=0.1)


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "rotary"])
def test_longest_length_is_reached_and_not_passed(position):
    decoder = make_decoder(position=position)
    assert decoder(random_ids(1, 32)).shape == (1, 32, 19)
    with pytest.raises((RuntimeError, IndexError)):
        decoder(random_ids(1, 33))


def test_untrained_logits_are_near_unit_scale():
    """With PyTorch's own start of an embedding, a tied head begins at a loss many times that of guessing."""
    for position in POSITIONS:
        decoder = make_decoder(position=position, hidden_size=64, vocab_size=101)
        assert 0.3 < decoder(random_ids(4, 32)).std().item() < 3


def test_a_decoder_learns():
    """Every parameter gets a gradient, and a repeated pattern is learned in a few steps."""
    decoder = make_decoder(position="rotary", activation="swiglu", norm="rms_norm", num_kv_heads=2).train()
    ids = torch.tensor([[3, 7, 5, 11] * 4])
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(decoder(ids[:, :-1])[0], ids[0, 1:])
        gradients = torch.autograd.grad(loss, list(decoder.parameters()))  # raises where one has none
        with torch.no_grad():
            for parameter, gradient in zip(decoder.parameters(), gradients, strict=True):
                parameter -= 0.2 * gradient
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


# the config


def test_defaults_of_the_heads():
    config = make_config()
    assert (config.num_kv_heads, config.head_dim) == (4, 4)
    assert make_config(num_kv_heads=1).num_kv_heads == 1
    assert make_config(hidden_size=10, head_dim=6).head_dim == 6


def test_config_is_frozen_and_round_trips():
    config = make_config(num_kv_heads=2, position="rotary")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 8
    assert TransformerConfig(**dataclasses.asdict(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))
    wider = dataclasses.replace(config, hidden_size=32, head_dim=None)
    assert wider.head_dim == 8


SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
SIZES += ("head_dim", "intermediate_size", "max_length")
CONFIG_ERRORS = [
    *(({name: value}, rf"{name} must be a whole number .*got {value}") for name in SIZES for value in (0, -4, 2.5)),
    ({"num_layers": True}, "num_layers must be a whole number .*got True"),
    ({"vocab_size": "19"}, "vocab_size must be a whole number .*got '19'"),
    ({"num_heads": 6, "head_dim": 4, "num_kv_heads": 4}, "num_heads=6 and num_kv_heads=4; set .* one of 1, 2, 3, 6"),
    ({"num_kv_heads": 8}, "num_heads=4 and num_kv_heads=8"),
    ({"hidden_size": 18}, "hidden_size=18 and num_heads=4; change one of them or give head_dim"),
    ({"position": "rotary", "head_dim": 5}, "head_dim must be even .*got 5; use 4 or 6"),
    ({"position": "rotary", "head_dim": 1}, "head_dim must be even .*got 1; use 2"),
    ({"position": "sinusoidal", "hidden_size": 15, "num_heads": 3}, "hidden_size must be even .*got 15"),
    ({"activation": "gleu"}, "activation must be one of relu, gelu, gelu_tanh, swiglu, got 'gleu'"),
    ({"norm": "group_norm"}, "norm must be one of layer_norm, rms_norm, batch_norm, got 'group_norm'"),
    ({"norm_position": "middle"}, "norm_position must be one of pre, post, got 'middle'"),
    ({"position": None}, "position must be one of sinusoidal, learned, rotary, alibi, relative, none, got None"),
    *(({"norm_eps": value}, "norm_eps must be a finite number above 0") for value in (0, -1e-5, math.nan, math.inf)),
    *(({"rope_theta": value}, "rope_theta must be a finite number above 0") for value in (0.0, math.inf, "1e4")),
    *(({"dropout": value}, "dropout must be at least 0 and below 1") for value in (1, 1.5, -0.1, math.nan, None)),
    *(({name: "no"}, f"{name} must be True or False") for name in ("attention_bias", "ffn_bias", "tie_embeddings")),
]


@pytest.mark.parametrize("changes, message", CONFIG_ERRORS, ids=[str(changes) for changes, _ in CONFIG_ERRORS])
def test_wrong_configs_raise_at_construction(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        make_config(**changes)
    assert isinstance(caught.value, ValueError)


def test_odd_head_dim_is_fine_without_rotary():
    assert make_decoder(head_dim=5)(random_ids(2, 5)).shape == (2, 5, 19)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiHeadAttention(10, 4),
        lambda: MultiHeadAttention(12, 4, num_kv_heads=3),
        lambda: FeedForward(8, 12, activation="silu"),
        lambda: FeedForward(8, 0),
        lambda: build_norm("group_norm", 8),
        lambda: RotaryPositions(5, 8),
        lambda: RotaryPositions(4, 8, theta=0.0),
        lambda: RotaryPositions(4, 0),
        lambda: SinusoidalPositions(5, 8),
        lambda: sinusoidal_table(-1, 4),
    ],
)
def test_parts_built_alone_check_too(make):
    with pytest.raises(InputError):
        make()


def test_unknown_settings_raise():
    with pytest.raises(TypeError, match="n_heads"):
        make_config(n_heads=4)


def test_public_names():
    """Everything listed exists, and nothing public but the files themselves is left out."""
    files = {path.stem for path in Path(modules.__file__).parent.glob("[!_]*.py")}
    public = {name for name in vars(modules) if not name.startswith("_")} - files
    assert public == set(modules.__all__)


# export


def export_with_symbolic_axes(module):
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(module, (random_ids(2, 5),), dynamic_shapes=({0: dynamic, 1: dynamic},))


def assert_symbolic_and_equal(decoder):
    program = export_with_symbolic_axes(decoder)
    ids = next(node for node in program.graph.nodes if node.name == "input_ids").meta["val"]
    batch, seq = ids.shape
    assert isinstance(batch, torch.SymInt)
    assert isinstance(seq, torch.SymInt)
    assert str(batch) != str(seq)
    run = program.module()
    with torch.no_grad():
        for shape in ((1, 1), (1, 11), (3, 1), (3, 32)):  # none of them traced
            torch.testing.assert_close(run(random_ids(*shape)), decoder(random_ids(*shape)))


@pytest.mark.parametrize("norm_position", NORM_POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("position", POSITIONS)
def test_export_keeps_batch_and_sequence_symbolic(position, norm, norm_position):
    """One block each; key heads and the tie of the head differ along the way."""
    assert_symbolic_and_equal(
        make_decoder(
            position=position,
            norm=norm,
            norm_position=norm_position,
            num_layers=1,
            num_kv_heads=2 if norm == "rms_norm" else 4,
            tie_embeddings=norm_position == "pre",
        )
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_of_every_activation(activation):
    assert_symbolic_and_equal(make_decoder(activation=activation, num_layers=1, dropout=0.1))


def test_export_of_several_blocks_with_shared_positions():
    assert_symbolic_and_equal(make_decoder(position="rotary", num_layers=3, num_kv_heads=1, attention_bias=False))


def test_export_knows_the_longest_length():
    """A table that is cut to the length bounds the sequence axis; without positions nothing does."""
    longest = {}
    for position in ("rotary", "none"):
        ranges = export_with_symbolic_axes(make_decoder(position=position, num_layers=1)).range_constraints
        longest[position] = min(bounds.upper for bounds in ranges.values())
    assert longest["rotary"] == 32
    assert longest["none"] > 10**6
