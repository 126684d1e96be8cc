"""The catalogue's encoders, decoders and encoder-decoders: positions, norms, patterns for long sequences, presets."""

import numpy as np
import pytest
import torch
from catalogue import (
    CLOSE,
    LONGEST,
    check_cached,
    check_encoder,
    check_pair,
    check_run,
    computed,
    config,
    exported,
    ids_of,
    ragged,
)
from torch import nn

from tfinfer.export.modules import (
    BatchNorm,
    Decoder,
    Encoder,
    EncoderDecoder,
    HierarchicalEncoder,
    MaskedLanguageModel,
    bert_config,
    gpt_config,
)

SMALL = {"vocab_size": 23, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
# Each with the norm before and behind the sub-layers somewhere.
POSITIONS = {"sinusoidal": "post", "learned": "pre", "rotary": "post", "alibi": "pre", "relative": "post"}
RELATIVE = {"relative_buckets": 8, "relative_max_distance": 20}
PATTERNS = {
    "sliding_window": {"window": 4},
    "block_local_global": {"block_size": 5, "num_global_tokens": 2},
    "segmented": {"segment_size": 6},
    "hierarchical": {"segment_size": 6},
}


def placed(position, **changes):
    return config(position=position, norm_position=POSITIONS[position], **(RELATIVE | changes))


def uneven(module):
    """Norms as training leaves them: weights that differ, statistics that are not 0 and 1."""
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        if hasattr(part, "weight") and part.weight is not None and part.weight.dim() == 1:
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return module


# positions, and blocks with the norm before and behind
@pytest.mark.parametrize("position", POSITIONS)
def test_positions_of_an_encoder(position, tmp_path):
    module = uneven(Encoder(placed(position)))
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        assert model.manifest.encoder.hidden_states
        check_encoder(module, model)


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_of_a_decoder(position, tmp_path):
    module = uneven(Decoder(placed(position)))
    with exported(module, tmp_path, kind="decoder", max_length=LONGEST) as model:
        check_cached(module, model)


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi", "relative"])
def test_positions_of_an_encoder_decoder(position, tmp_path):
    """Distances and angles are those of each side, and none between them; `test_stacks` has learned positions."""
    module = uneven(EncoderDecoder(placed(position, pad_id=0)))
    with exported(module, tmp_path, start_ids=[2], max_length=LONGEST, max_source_length=40) as model:
        check_pair(module, model, 2)


def test_stacks_of_several_blocks(tmp_path):
    """One layer on one side and two on the other; both embeddings and the head have weights of their own."""
    module = EncoderDecoder(config(num_layers=1, num_decoder_layers=2, pad_id=0, tie_embeddings=False))
    with exported(module, tmp_path, start_ids=[2], attention=True) as model:
        assert len(model.manifest.cache) == 4
        check_pair(module, model, 2)
        source, target = [5, 9, 3, 1], [7, 8]
        weights = model.attention(source, target)
    assert {name: array.shape for name, array in weights.items()} == {
        "encoder": (1, 2, 4, 4),
        "decoder": (2, 2, 3, 3),
        "cross": (2, 2, 3, 4),
    }
    for array in weights.values():
        np.testing.assert_allclose(array.sum(-1), 1, atol=1e-5)


# norms
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm"])
def test_norms_of_an_encoder(norm, tmp_path):
    """Padding changes nothing, batch_norm's result neither: its statistics are those collected."""
    module = uneven(Encoder(config(norm=norm, activation="swiglu")))
    with exported(module, tmp_path, kind="encoder") as model:
        check_encoder(module, model)
        ids, mask = ragged([20, 3, 9])
        together = model.run({"input_ids": ids, "attention_mask": mask})
        for row, length in enumerate((20, 3, 9)):
            alone = model.run({"input_ids": ids[row : row + 1, :length]})
            for name, array in alone.items():
                np.testing.assert_allclose(together[name][row, :length], array[0], **CLOSE)


def test_batch_norm_in_training_mixes_ragged_rows_and_layer_norm_does_not():
    """The graph keeps batch_norm's evaluation; in training padding and the other rows move every row."""
    ids, mask = (torch.from_numpy(array) for array in ragged([20, 3]))
    differences = {}
    for norm in ("layer_norm", "batch_norm"):
        module = Encoder(config(norm=norm)).train()
        with torch.no_grad():
            differences[norm] = (module(ids, mask)[1, :3] - module(ids[1:, :3])[0]).abs().max().item()
    assert differences["layer_norm"] < 1e-5 < 1e-2 < differences["batch_norm"]


@pytest.mark.parametrize("norm", ["rms_norm", "batch_norm"])
def test_norms_of_a_decoder(norm, tmp_path):
    module = uneven(Decoder(config(norm=norm, activation="gelu_tanh")))
    with exported(module, tmp_path, kind="decoder") as model:
        check_cached(module, model)


# long sequences
@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_sequences_of_an_encoder(pattern, tmp_path):
    module = Encoder(config(attention_pattern=pattern, **PATTERNS[pattern]))
    with exported(module, tmp_path, kind="encoder") as model:
        check_encoder(module, model)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_sequences_of_a_decoder(pattern, tmp_path):
    module = Decoder(config(attention_pattern=pattern, **PATTERNS[pattern]))
    with exported(module, tmp_path, kind="decoder") as model:
        window = 4 if pattern == "sliding_window" else None
        assert {entry.window for entry in model.manifest.cache} == {window}
        check_cached(module, model, length=41)


def test_hierarchical_encoder_of_words_and_sentences(tmp_path):
    """Any number of documents, sentences and words; a sentence without words is none."""
    module = HierarchicalEncoder(config(max_length=48))
    specs = [f"{name}:int64[batch,sentences,words]" for name in ("input_ids", "attention_mask")]
    with exported(module, tmp_path, inputs=specs, max_length=48) as model:
        for batch, sentences, words in ((1, 1, 1), (3, 2, 17), (2, 9, 4)):
            ids, mask = ids_of(batch, sentences, words), np.ones((batch, sentences, words), np.int64)
            check_run(module, model, input_ids=ids, attention_mask=mask)
        mask[0, 7:], mask[:, :, 3:] = 0, 0
        found = check_run(module, model, input_ids=ids, attention_mask=mask)["output"]
        np.testing.assert_allclose(found[0], computed(module, ids[:1, :7, :3])["output"][0], **CLOSE)


# presets
def test_bert_preset(tmp_path):
    """Masked words, whether two texts belong together, and hidden states, by their names."""
    module = MaskedLanguageModel(bert_config(**SMALL, max_length=LONGEST))
    with exported(module, tmp_path, kind="encoder") as model:
        assert set(check_types(module, model)) == {"logits", "sentence_pair", "hidden_states"}
        assert model.manifest.encoder.hidden_states == "hidden_states"
        check_encoder(module, model)
        vectors = model.encode([[1, 2, 3], [4]], pooling="cls")
        expected = [computed(module, [ids])["hidden_states"][0, 0] for ids in ([1, 2, 3], [4])]
        np.testing.assert_allclose(vectors, expected, **CLOSE)


def check_types(module, model):
    """Two texts in each row, of lengths of their own, beside padding."""
    ids, mask = ragged([19, 4])
    types = (np.arange(19) >= np.array([[7], [2]])).astype(np.int64)
    found = model.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    for row, length in enumerate((19, 4)):
        given = {"input_ids": ids[row : row + 1, :length], "token_type_ids": types[row : row + 1, :length]}
        for name, expected in computed(module, **given).items():
            one = found[name][row]
            np.testing.assert_allclose(one[:length] if one.ndim == 2 else one, expected[0], **CLOSE)
    return found


def test_gpt_preset(tmp_path):
    module = Decoder(gpt_config(**SMALL, max_length=LONGEST))
    with exported(module, tmp_path) as model:
        assert model.manifest.kind == "decoder"
        check_cached(module, model)
        assert len(model.generate([1, 2, 3], max_tokens=30, stop_ids=[]).token_ids) == 30
