"""Encoders and encoder-decoders of transformers as sources: tiny random checkpoints and live models."""

import json
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tfinfer.errors import SourceError  # noqa: E402
from tfinfer.export.capture import Kind  # noqa: E402
from tfinfer.export.sources import load_source  # noqa: E402
from tfinfer.export.sources.source import from_module  # noqa: E402

pytestmark = pytest.mark.hf

IDS = torch.tensor([[3, 1, 4, 1, 5]])
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
PAIR = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
TYPES, MASK = {"token_type_ids": Kind.TYPES}, {"attention_mask": Kind.MASK}


def make(name, **changes):
    """A model of a class of transformers, whose name only the tests know."""
    kind = getattr(transformers, name)
    wide = SIZES if "Bert" in name or "Roberta" in name or "Llama" in name else PAIR
    sizes = T5 if "T5" in name else {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}
    sizes = sizes if "T5" in name or "GPT2" in name else wide
    torch.manual_seed(0)
    return kind(kind.config_class(**(sizes | changes))).eval()


def save(folder, name, **changes):
    model = make(name, **changes)
    model.save_pretrained(folder)
    return model


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def refused(folder, *parts):
    with pytest.raises(SourceError) as caught:
        load_source(str(folder))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def warned(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = load_source(str(folder))
    return source, " ".join(str(w.message) for w in caught if str(folder) in str(w.message))


# what a checkpoint says it is


@pytest.mark.parametrize(
    "name, changes, others, outputs",
    [
        ("BertModel", {}, MASK | TYPES, ["last_hidden_state", "pooler_output"]),
        ("BertForMaskedLM", {"output_hidden_states": True}, MASK | TYPES, ["logits"]),
        ("BertForSequenceClassification", {"num_labels": 3}, MASK | TYPES, ["logits"]),
        ("BertForQuestionAnswering", {}, MASK | TYPES, ["start_logits", "end_logits"]),
        ("RobertaModel", {"type_vocab_size": 1}, MASK, ["last_hidden_state", "pooler_output"]),
        ("T5EncoderModel", {}, MASK, ["last_hidden_state"]),
        ("GPT2Model", {}, MASK, ["last_hidden_state"]),  # its token types are words: zeros are not none
    ],
)
@pytest.mark.parametrize("live", [False, True])
def test_an_encoder_keeps_its_arguments_and_the_names_of_its_outputs(tmp_path, name, changes, others, outputs, live):
    model = save(tmp_path / "m", name, **changes)
    source = from_module(model) if live else load_source(str(tmp_path / "m"))
    form = source.as_encoder()
    assert source.says == "encoder"
    assert {a.name: a.kind for a in form.arguments} == {"input_ids": Kind.IDS} | others
    assert all(a.source for a in form.arguments)
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    given = {"input_ids": IDS, "attention_mask": mask} | {
        name: torch.zeros_like(IDS) for name in others if name in TYPES
    }
    with torch.no_grad():
        got, wanted = form.module(**given), model(input_ids=IDS, attention_mask=mask)
    assert list(got) == outputs
    for key in outputs:
        torch.testing.assert_close(got[key], wanted[key])
    assert (source.max_length, source.max_source_length, source.suppressed) == (None, None, ())


@pytest.mark.parametrize(
    "name, changes, start, forced, lengths",
    [
        ("T5ForConditionalGeneration", {"decoder_start_token_id": 0}, (0,), None, (None, None)),
        ("BartForConditionalGeneration", {}, (2,), 2, (32, 32)),
        ("MarianMTModel", {"pad_token_id": 19, "decoder_start_token_id": 19, "eos_token_id": 0}, (19,), 0, (32, 32)),
    ],
)
@pytest.mark.parametrize("live", [False, True])
def test_an_encoder_decoder_takes_both_sides(tmp_path, name, changes, start, forced, lengths, live):
    changes = changes | ({"forced_eos_token_id": 0} if forced == 0 else {})
    model = save(tmp_path / "m", name, **changes)
    source = from_module(model) if live else load_source(str(tmp_path / "m"))
    form = source.as_pair()
    assert source.says == "encoder-decoder"
    assert [(a.name, a.source) for a in form.arguments] == [("source_ids", True), ("input_ids", False)]
    with torch.no_grad():
        wanted = model(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
        torch.testing.assert_close(form.module(source_ids=IDS, input_ids=IDS[:, :3]), wanted)
    assert (source.decoder_start, source.forced_eos) == (start, forced)
    assert (source.max_length, source.max_source_length) == lengths
    assert source.eos_ids == (model.config.eos_token_id,)
    assert source.pad_id == model.config.pad_token_id


def test_the_generation_config_says_what_a_target_begins_with_and_never_holds(tmp_path):
    save(tmp_path / "m", "BartForConditionalGeneration")
    file = tmp_path / "m" / "generation_config.json"
    edit(
        file, forced_bos_token_id=7, suppress_tokens=[5, 99], bad_words_ids=[[6], [1, 2], [5]], forced_eos_token_id=...
    )
    source = load_source(str(tmp_path / "m"))
    assert (source.decoder_start, source.forced_eos, source.suppressed) == ((2, 7), None, (5, 6))
    edit(file, decoder_start_token_id=..., forced_bos_token_id=..., bos_token_id=4)
    edit(tmp_path / "m" / "config.json", decoder_start_token_id=None)
    assert load_source(str(tmp_path / "m")).decoder_start == (4,)


def test_a_pair_of_two_models_has_the_lengths_of_each(tmp_path):
    short, long = (transformers.BertConfig(**(SIZES | {"max_position_embeddings": n})) for n in (24, 48))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(short, long, decoder_start_token_id=1)
    source = from_module(transformers.EncoderDecoderModel(config).eval())
    assert (source.says, source.decoder_start) == ("encoder-decoder", (1,))
    assert (source.max_length, source.max_source_length) == (48, 24)


def test_a_decoder_is_what_it_was(tmp_path):
    save(tmp_path / "m", "GPT2LMHeadModel", n_positions=24, bos_token_id=3, eos_token_id=4)
    edit(tmp_path / "m" / "generation_config.json", suppress_tokens=[6], forced_eos_token_id=4)
    for architectures in (["GPT2LMHeadModel"], ..., [], ["NoSuchThing"], ["os"], ["BertModel"], [3], ["AutoModel"]):
        edit(tmp_path / "m" / "config.json", architectures=architectures)
        source = load_source(str(tmp_path / "m"))
        assert (source.says, source.max_length, source.module(IDS).shape) == ("decoder", 24, (1, 5, 20))
    assert (source.decoder_start, source.forced_eos, source.suppressed) == ((), None, (6,))
    assert from_module(make("GPT2LMHeadModel")).says == "decoder"


def test_an_encoder_decoder_without_architectures_is_found(tmp_path):
    save(tmp_path / "m", "BartForConditionalGeneration")
    edit(tmp_path / "m" / "config.json", architectures=...)
    assert load_source(str(tmp_path / "m")).says == "encoder-decoder"


@pytest.mark.parametrize("name", ["T5Model", "BartForSequenceClassification"])
def test_an_encoder_decoder_without_a_language_head_is_refused(tmp_path, name):
    model = save(tmp_path / "m", name)
    refused(tmp_path / "m", name, "logits of the next token", "architectures", "get_encoder()")
    assert from_module(model.get_encoder()).says == "encoder"


def test_a_model_of_no_ids_is_refused():
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(SourceError, match=r"ViTModel: expected a model of token ids .* takes pixel_values"):
        from_module(transformers.ViTModel(config))


# weights that are there and weights that are not


def test_heads_that_were_not_asked_for_are_left_out(tmp_path):
    model = save(tmp_path / "m", "BertForPreTraining")
    for name, outputs in ("BertModel", 2), ("BertForMaskedLM", 1):
        edit(tmp_path / "m" / "config.json", architectures=[name])
        got = load_source(str(tmp_path / "m")).module(IDS)
        assert len(got) == outputs
    torch.testing.assert_close(got["logits"], model(IDS).prediction_logits)


def test_an_output_whose_weights_are_not_there_is_left_out(tmp_path):
    model = save(tmp_path / "m", "BertForMaskedLM")
    edit(tmp_path / "m" / "config.json", architectures=["BertModel"])
    source, message = warned(tmp_path / "m")
    torch.testing.assert_close(source.module(IDS), {"last_hidden_state": model.bert(IDS).last_hidden_state})
    assert "left out pooler_output" in message


def test_missing_weights_of_every_output_are_refused(tmp_path):
    save(tmp_path / "m", "BertModel")
    edit(tmp_path / "m" / "config.json", architectures=["BertForSequenceClassification"])
    refused(tmp_path / "m", "2 missing: classifier.bias, classifier.weight")


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_layer_too_many_or_too_few_is_refused(tmp_path, prefix):
    save(tmp_path / "m", "BertModel")
    file = tmp_path / "m" / "model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    load_source(str(tmp_path / "m"))
    edit(tmp_path / "m" / "config.json", num_hidden_layers=1)
    refused(tmp_path / "m", "16 not in the module", "encoder.layer.1.")
    edit(tmp_path / "m" / "config.json", num_hidden_layers=3)
    refused(tmp_path / "m", "16 missing", "encoder.layer.2.")
    edit(tmp_path / "m" / "config.json", num_hidden_layers=2, vocab_size=21)
    refused(tmp_path / "m", "1 of another shape")


def test_an_encoders_length_is_what_its_tokenizer_says(tmp_path):
    save(tmp_path / "m", "BertModel")
    for length, wanted in (24, 24), (10**30, None), (64, None), (True, None):  # 64 is beyond its positions
        edit(tmp_path / "m" / "tokenizer_config.json", model_max_length=length)
        assert load_source(str(tmp_path / "m")).max_length == wanted
