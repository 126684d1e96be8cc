"""The presets BERT and GPT against transformers' own, with all their weights copied."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export.modules import Decoder, MaskedLanguageModel, bert_config, gpt_config  # noqa: E402

SMALL = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def ids_of(*shape):
    return torch.randint(1, 19, shape)  # 0 is for padding


@pytest.mark.hf
def test_masked_language_model_equals_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    theirs = transformers.BertForPreTraining(config).eval()
    for parameter in theirs.parameters():  # as they start, biases are 0 and norms 1
        nn.init.normal_(parameter, std=0.3)
    ours = MaskedLanguageModel(bert_config(**SMALL, max_length=32)).eval()
    copy_bert(theirs, ours)
    ids, types = ids_of(2, 9), torch.tensor([[0] * 4 + [1] * 5] * 2)
    present = torch.arange(9) < torch.tensor([[9], [6]])
    expected = theirs(input_ids=ids, attention_mask=present.long(), token_type_ids=types, output_hidden_states=True)
    out = ours(ids, present.long(), types)
    assert set(out) == {"logits", "sentence_pair", "hidden_states"}
    hidden_states = expected.hidden_states[-1]
    torch.testing.assert_close(out["hidden_states"][present], hidden_states[present], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out["logits"][present], expected.prediction_logits[present], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out["sentence_pair"], expected.seq_relationship_logits, atol=1e-5, rtol=1e-4)


def copy_bert(theirs, ours):
    embeddings, heads = theirs.bert.embeddings, theirs.cls
    pairs = [
        (ours.encoder.embedding, embeddings.word_embeddings),
        (ours.encoder.positions.embedding, embeddings.position_embeddings),
        (ours.encoder.token_types, embeddings.token_type_embeddings),
        (ours.encoder.embedding_norm, embeddings.LayerNorm),
        (ours.transform, heads.predictions.transform.dense),
        (ours.transform_norm, heads.predictions.transform.LayerNorm),
        (ours.head, heads.predictions.decoder),
        (ours.pooler, theirs.bert.pooler.dense),
        (ours.sentence_pair, heads.seq_relationship),
    ]
    for block, layer in zip(ours.encoder.blocks, theirs.bert.encoder.layer, strict=True):
        attention = layer.attention
        pairs += [
            (block.attention.q_proj, attention.self.query),
            (block.attention.k_proj, attention.self.key),
            (block.attention.v_proj, attention.self.value),
            (block.attention.o_proj, attention.output.dense),
            (block.attention_norm, attention.output.LayerNorm),
            (block.feed_forward.up, layer.intermediate.dense),
            (block.feed_forward.down, layer.output.dense),
            (block.feed_forward_norm, layer.output.LayerNorm),
        ]
    for our, their in pairs:
        our.load_state_dict(their.state_dict())


@pytest.mark.hf
def test_decoder_equals_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=32)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Decoder(gpt_config(**SMALL, max_length=32)).eval()
    ours.embedding.load_state_dict(theirs.transformer.wte.state_dict())
    ours.positions.embedding.load_state_dict(theirs.transformer.wpe.state_dict())
    ours.norm.load_state_dict(theirs.transformer.ln_f.state_dict())
    for block, layer in zip(ours.blocks, theirs.transformer.h, strict=True):
        block.attention_norm.load_state_dict(layer.ln_1.state_dict())
        block.feed_forward_norm.load_state_dict(layer.ln_2.state_dict())
        weights, biases = layer.attn.c_attn.weight.T.chunk(3), layer.attn.c_attn.bias.chunk(3)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            getattr(block.attention, f"{part}_proj").load_state_dict({"weight": weight, "bias": bias})
        for linear, theirs_linear in [
            (block.attention.o_proj, layer.attn.c_proj),
            (block.feed_forward.up, layer.mlp.c_fc),
            (block.feed_forward.down, layer.mlp.c_proj),
        ]:
            linear.load_state_dict({"weight": theirs_linear.weight.T, "bias": theirs_linear.bias})
    ids = ids_of(2, 9)
    torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "make, model, published",
    [(bert_config, MaskedLanguageModel, 110_106_428), (gpt_config, Decoder, 124_439_808)],
)
def test_presets_have_as_many_parameters_as_published(make, model, published):
    """BERT base for pre-training and GPT-2 small, as `num_parameters` of the released checkpoints counts them."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in model(make()).parameters()) == published


def test_presets_take_changes():
    assert bert_config(num_layers=3).num_layers == 3
    assert gpt_config(vocab_size=7).vocab_size == 7
    with pytest.raises(TypeError, match="n_heads"):
        gpt_config(n_heads=4)
    with pytest.raises(InputError, match="num_heads=5"):
        bert_config(num_heads=5)


def test_a_masked_language_model_needs_tied_embeddings():
    with pytest.raises(InputError, match="got tie_embeddings=False; set it to True"):
        MaskedLanguageModel(bert_config(**SMALL, tie_embeddings=False))


def test_export_of_a_masked_language_model():
    model = MaskedLanguageModel(bert_config(**SMALL, max_length=32)).eval()
    shapes = tuple(dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for _ in range(3))
    inputs = ids_of(2, 5), torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        run = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
    for batch, seq in ((1, 1), (3, 11), (1, 32)):
        ids, types = ids_of(batch, seq), torch.randint(0, 2, (batch, seq))
        present = (torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1))).long()
        torch.testing.assert_close(run(ids, present, types), model(ids, present, types))
