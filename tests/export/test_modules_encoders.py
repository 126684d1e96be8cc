"""Encoders and encoder-decoders, against transformers' T5 among others; pooling, averaging, and hierarchies."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export.modules import (  # noqa: E402
    AttentionPooling,
    AverageOfWords,
    Decoder,
    Encoder,
    EncoderDecoder,
    HierarchicalEncoder,
    TransformerConfig,
    masked_mean,
)

SMALL = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24}
POSITIONS = ("sinusoidal", "learned", "rotary", "alibi", "relative", "none")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def make_config(**changes):
    return TransformerConfig(**(SMALL | {"max_length": 32} | changes))


def ids_of(*shape):
    return torch.randint(1, 19, shape)  # 0 is for padding


def export(module, *inputs):
    """Export with every axis symbolic; the inputs share none of their sizes."""
    shapes = tuple(None if x is None else dict.fromkeys(range(x.dim()), torch.export.Dim.DYNAMIC) for x in inputs)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=shapes).module()


# the encoder


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("position", POSITIONS)
def test_padding_changes_nothing(position, norm_position):
    """A padded row in a batch gives what it gives alone, and the id used for padding does not matter."""
    encoder = Encoder(make_config(position=position, norm_position=norm_position)).eval()
    ids, present = ids_of(2, 9), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    out = encoder(ids, present)
    torch.testing.assert_close(out[0], encoder(ids[:1])[0])
    torch.testing.assert_close(out[1, :5], encoder(ids[1:, :5])[0])
    other = ids.clone()
    other[1, 5:] = 0
    torch.testing.assert_close(encoder(other, present)[1, :5], out[1, :5], atol=0, rtol=0)


def test_every_token_sees_every_other():
    encoder, ids = Encoder(make_config(num_layers=1)).eval(), ids_of(1, 7)
    for changed in range(7):
        other = ids.clone()
        other[0, changed] = ids[0, changed] % 18 + 1
        assert ((encoder(other) - encoder(ids))[0].abs().amax(dim=-1) > 1e-6).all()


def test_token_types():
    encoder, ids = Encoder(make_config(num_token_types=3)).eval(), ids_of(2, 5)
    torch.testing.assert_close(encoder(ids), encoder(ids, None, torch.zeros_like(ids)))
    types = torch.tensor([[0, 0, 1, 2, 2]] * 2)
    assert (encoder(ids, token_type_ids=types) - encoder(ids)).abs().max() > 1e-3
    with torch.no_grad():  # the types' vectors may as well be part of the words'
        plain = Encoder(make_config()).eval()
        weights = {name: value for name, value in encoder.state_dict().items() if "token_types" not in name}
        plain.load_state_dict(weights)
        plain.embedding.weight += encoder.token_types.weight[1]
    torch.testing.assert_close(plain(ids), encoder(ids, token_type_ids=torch.ones_like(ids)))


@pytest.mark.hf
def test_encoder_equals_t5():
    """Relative positions, no scale, no bias and RMS norms at once; one table of the first layer serves them all."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5EncoderModel(t5_config(transformers)).eval()
    ours = Encoder(our_t5_config()).eval()
    copy_t5_stack(theirs.encoder, ours)
    ids, present = ids_of(2, 21), torch.arange(21) < torch.tensor([[21], [13]])
    expected = theirs(input_ids=ids, attention_mask=present.long()).last_hidden_state
    torch.testing.assert_close(ours(ids, present)[present], expected[present], atol=1e-5, rtol=1e-4)


def our_t5_config(**changes):
    return make_config(
        **{
            "position": "relative",
            "relative_buckets": 8,
            "relative_max_distance": 16,
            "similarity": "dot",
            "norm": "rms_norm",
            "norm_eps": 1e-6,
            "activation": "relu",
            "attention_bias": False,
            "ffn_bias": False,
            "head_dim": 6,
            "tie_embeddings": False,
        }
        | changes
    )


def t5_config(transformers):
    return transformers.T5Config(
        vocab_size=19,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=False,
    )


def copy_t5_stack(theirs, ours):
    ours.embedding.load_state_dict(theirs.embed_tokens.state_dict())
    first = theirs.block[0].layer[0].SelfAttention
    nn.init.normal_(first.relative_attention_bias.weight)
    ours.position_bias.embedding.load_state_dict(first.relative_attention_bias.state_dict())
    ours.norm.load_state_dict(theirs.final_layer_norm.state_dict())
    for their_block, block in zip(theirs.block, ours.blocks, strict=True):
        layers = list(their_block.layer)
        pairs = [(block.attention, layers[0].SelfAttention, block.attention_norm, layers[0].layer_norm)]
        if len(layers) == 3:
            cross, norm = layers[1].EncDecAttention, layers[1].layer_norm
            pairs.append((block.cross_attention, cross, block.cross_attention_norm, norm))
        for attention, their_attention, norm, their_norm in pairs:
            norm.load_state_dict(their_norm.state_dict())
            for part in "qkvo":
                getattr(attention, f"{part}_proj").load_state_dict(getattr(their_attention, part).state_dict())
        block.feed_forward_norm.load_state_dict(layers[-1].layer_norm.state_dict())
        block.feed_forward.up.load_state_dict(layers[-1].DenseReluDense.wi.state_dict())
        block.feed_forward.down.load_state_dict(layers[-1].DenseReluDense.wo.state_dict())


# the encoder-decoder


@pytest.mark.hf
def test_encoder_decoder_equals_t5():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration(t5_config(transformers)).eval()
    ours = EncoderDecoder(our_t5_config(num_decoder_layers=3, pad_id=0)).eval()
    copy_t5_stack(theirs.encoder, ours.encoder)
    copy_t5_stack(theirs.decoder, ours.decoder)
    ours.decoder.head.load_state_dict(theirs.lm_head.state_dict())
    source, target = ids_of(2, 11), ids_of(2, 7)
    source[1, 6:] = 0
    expected = theirs(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours(source, target), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("position", POSITIONS)
def test_forward_is_encode_then_decode(position, norm_position):
    config = make_config(position=position, norm_position=norm_position, num_decoder_layers=3, pad_id=0)
    model = EncoderDecoder(config).eval()
    assert (len(model.encoder.blocks), len(model.decoder.blocks)) == (2, 3)
    source, target = ids_of(2, 9), ids_of(2, 5)
    source[1, 6:] = 0
    memory = model.encode(source)
    logits = model.decode(target, memory, source != 0)
    assert (memory.shape, logits.shape) == ((2, 9, 16), (2, 5, 19))
    torch.testing.assert_close(model(source, target), logits)
    alone = model(source[1:, :6], target[1:])  # what padding hides is as good as absent
    torch.testing.assert_close(logits[1], alone[0])
    shorter = model.decode(target[:, :3], memory, source != 0)  # the target's future changes nothing
    torch.testing.assert_close(logits[:, :3], shorter)
    assert (model.decode(target, memory) - logits)[1].abs().max() > 1e-4  # nor is the mask without effect


def test_without_a_padding_id_every_id_is_read():
    model, source, target = EncoderDecoder(make_config()).eval(), ids_of(1, 6), ids_of(1, 4)
    assert model.source_mask(source) is None
    source[0, 4:] = 0
    assert (model(source, target) - model(source[:, :4], target)).abs().max() > 1e-4


def test_layers_of_the_decoder_are_those_of_the_encoder_unless_told():
    assert len(EncoderDecoder(make_config()).decoder.blocks) == 2


def test_tied_is_one_matrix():
    tied, free = EncoderDecoder(make_config()), EncoderDecoder(make_config(tie_embeddings=False))
    assert tied.encoder.embedding.weight is tied.decoder.embedding.weight is tied.decoder.head.weight
    assert len({id(m.weight) for m in (free.encoder.embedding, free.decoder.embedding, free.decoder.head)}) == 3
    assert tied.embedding is tied.encoder.embedding


def test_an_encoder_decoder_learns_to_copy():
    model = EncoderDecoder(make_config(num_layers=1, pad_id=0)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        source = ids_of(16, 4)
        target = torch.cat((torch.zeros(16, 1, dtype=torch.long), source), dim=1)
        loss = F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("similarity, kernel_form", [("general", "quadratic"), ("kernel", "linear")])
def test_similarities_work_on_both_sides(similarity, kernel_form):
    model = EncoderDecoder(make_config(similarity=similarity, kernel_form=kernel_form, pad_id=0)).eval()
    source, target = ids_of(2, 9), ids_of(2, 5)
    source[1, 6:] = 0
    torch.testing.assert_close(model(source, target)[1], model(source[1:, :6], target[1:])[0])


# pooling


def test_masked_mean_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0]] * 3])
    assert masked_mean(x, torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [[2.0, 4.0], [0.0, 0.0]]
    torch.testing.assert_close(masked_mean(x), x.mean(dim=1))


@pytest.mark.parametrize("hidden_size", [None, 5])
def test_average_of_words(hidden_size):
    model, ids = AverageOfWords(19, 8, hidden_size=hidden_size), ids_of(2, 6)
    present = torch.arange(6) < torch.tensor([[6], [2]])
    means = torch.stack([model.embedding.weight[ids[0]].mean(0), model.embedding.weight[ids[1, :2]].mean(0)])
    expected = means if hidden_size is None else F.linear(means, model.projection.weight, model.projection.bias)
    torch.testing.assert_close(model(ids, present.long()), expected)
    torch.testing.assert_close(model(ids[:, [3, 1, 0, 2, 5, 4]]), model(ids))  # a bag knows no order
    assert model(ids).shape == (2, hidden_size or 8)


def test_attention_pooling_is_its_formula():
    pooling, x = AttentionPooling(4), torch.randn(2, 5, 4)
    for row in range(2):
        u = torch.tanh(x[row] @ pooling.proj.weight.T + pooling.proj.bias)
        score = u @ pooling.context.weight[0]
        expected = sum(weight * vector for weight, vector in zip(score.exp() / score.exp().sum(), x[row], strict=True))
        torch.testing.assert_close(pooling(x)[row], expected)
    present = torch.tensor([[1] * 5, [1] * 2 + [0] * 3])
    torch.testing.assert_close(pooling(x, present)[1], pooling(x[1:, :2])[0])


# hierarchies


def test_hierarchical_encoder_is_words_then_sentences():
    model, ids = HierarchicalEncoder(make_config()).eval(), ids_of(2, 3, 5)
    vectors = torch.stack([model.word_pooling(model.words(ids[:, n])) for n in range(3)], dim=1)
    hidden_states = model.sentences.run(model.sentences.place(vectors))
    torch.testing.assert_close(model(ids), model.sentence_pooling(hidden_states))
    assert model(ids).shape == (2, 16)


def test_hierarchical_padding_changes_nothing():
    """Of 3 sentences of 5 words: short sentences, and a document with a sentence less."""
    model, ids = HierarchicalEncoder(make_config()).eval(), ids_of(2, 3, 5)
    present = torch.ones(2, 3, 5, dtype=torch.long)
    present[1, 2] = 0
    present[1, :, 3:] = 0
    out = model(ids, present)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], model(ids[:1])[0])
    torch.testing.assert_close(out[1], model(ids[1:, :2, :3])[0])


def test_hierarchical_gradients_stay_finite_beside_empty_sentences():
    model, ids = HierarchicalEncoder(make_config()), ids_of(1, 3, 5)
    present = torch.ones(1, 3, 5, dtype=torch.long)
    present[0, 1:] = 0
    model(ids, present).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_order_of_sentences_matters():
    model, ids = HierarchicalEncoder(make_config()).eval(), ids_of(1, 3, 5)
    assert (model(ids) - model(ids[:, [1, 0, 2]])).abs().max() > 1e-4


# what is refused

REFUSED = [
    (
        lambda: Encoder(make_config())(ids_of(1, 3), None, ids_of(1, 3)),
        "knows no token types, got token_type_ids; leave",
    ),
    (lambda: Encoder(make_config())(ids_of(1, 3), torch.ones(3)), r"is \(batch, seq\) with 1 .* got 1 axes"),
    (lambda: Encoder(make_config())(ids_of(1, 3), torch.ones(1, 1, 3, 3)), "got 4 axes; give one number per token"),
    (lambda: Decoder(make_config())(ids_of(1, 3), torch.ones(1, 2, 16)), "cross_attention=False; give both or neither"),
    (lambda: Decoder(make_config(), cross_attention=True)(ids_of(1, 3)), "cross_attention=True; give both or neither"),
    (lambda: make_config(num_decoder_layers=0), "num_decoder_layers must be a whole number"),
    (lambda: make_config(num_token_types=-1), "num_token_types must be a whole number"),
    (lambda: make_config(embedding_norm=1), "embedding_norm must be True or False"),
    *(
        (lambda pad=pad: make_config(pad_id=pad), f"pad_id must be a token id from 0 to 18, got {pad}; give the id")
        for pad in (19, -1, True, 2.5)
    ),
    (lambda: AverageOfWords(0, 8), "vocab_size must be a whole number"),
    (lambda: AverageOfWords(19, 0), "embedding_size must be a whole number"),
    (lambda: AverageOfWords(19, 8, hidden_size=0), "hidden_size must be a whole number"),
    (lambda: AttentionPooling(0), "hidden_size must be a whole number"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# export


@pytest.mark.parametrize("position", POSITIONS)
def test_export_of_an_encoder_with_its_mask(position):
    encoder = Encoder(make_config(num_layers=1, position=position, num_token_types=2)).eval()
    run = export(encoder, ids_of(2, 5), torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long))
    for batch, seq in ((1, 1), (3, 11), (1, 32)):
        ids, types = ids_of(batch, seq), torch.randint(0, 2, (batch, seq))
        present = (torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1))).long()
        torch.testing.assert_close(run(ids, present, types), encoder(ids, present, types))


def test_export_of_both_halves_of_an_encoder_decoder():
    model = EncoderDecoder(make_config(num_layers=1, pad_id=0, position="relative")).eval()
    whole = export(model, ids_of(2, 7), ids_of(2, 5))
    for batch, source, target in itertools.product((1, 3), (1, 9), (1, 6)):
        ids = ids_of(batch, source), ids_of(batch, target)
        torch.testing.assert_close(whole(*ids), model(*ids))


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: AverageOfWords(19, 8, hidden_size=4), (2, 5)),
        (lambda: HierarchicalEncoder(make_config(num_layers=1)), (2, 3, 5)),
    ],
)
def test_export_of_what_makes_one_vector(make, shape):
    model = make().eval()
    run = export(model, ids_of(*shape), torch.ones(shape, dtype=torch.long))
    for other in itertools.product((1, 3), *((1, 7) for _ in shape[1:])):
        ids, present = ids_of(*other), torch.ones(other, dtype=torch.long)
        present[-1, ..., 1:] = 0
        present[-1, 1:] = 0  # with sentences, all but the first are empty
        torch.testing.assert_close(run(ids, present), model(ids, present))
