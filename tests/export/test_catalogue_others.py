"""The rest of the catalogue: images, words from characters, averages of words, rows of padding alone."""

import elmo
import numpy as np
import onnx
import pytest
import torch
import vision
from catalogue import CLOSE, HIDDEN, LONGEST, VOCAB, check_encoder, check_run, computed, config, exported, ids_of
from torch import nn
from torch.nn import functional as F

from tfinfer.export.modules import AverageOfWords, Encoder


def operators(folder):
    """Every operator of a graph, those of its branches and functions among them."""

    def within(nodes):
        for node in nodes:
            yield node.op_type
            for attribute in node.attribute:
                yield from within(attribute.g.node)

    model = onnx.load(folder / "encoder.onnx", load_external_data=False)
    return {op for nodes in (model.graph.node, *(f.node for f in model.functions)) for op in within(nodes)}


# residual units with channel attention
@pytest.mark.parametrize("option", ["A", "C"])
def test_residual_units_of_any_image_size(option, tmp_path):
    """Every shortcut there is: the unit's input as it is, padded with zeros, and projected."""
    module, rng = vision.Classifier(option, width=8).eval(), np.random.default_rng(0)
    with exported(module, tmp_path, inputs=["pixels:float32[batch,3,height,width]"]) as model:
        for batch, height, width in ((1, 33, 50), (5, 64, 31), (2, 120, 75)):
            check_run(module, model, pixels=rng.normal(size=(batch, 3, height, width)).astype(np.float32))


# ELMo
def test_elmo_of_any_number_of_words(tmp_path):
    module = elmo.Elmo(width=16, hidden=24).eval()
    with exported(module, tmp_path, inputs=["characters:int64[batch,words,16]"]) as model:
        names = operators(model.folder)
        assert "LSTM" in names
        assert not names & {"Loop", "Scan"}
        for batch, words in ((1, 1), (4, 7), (2, 31)):
            found = check_run(module, model, characters=ids_of(batch, words, elmo.CHARS, vocab=262))
            assert found["layers"].shape == (3, batch, words, 32)


# averages of words
@pytest.mark.parametrize("hidden_size", [None, 10])
def test_average_of_words(hidden_size, tmp_path):
    module = AverageOfWords(VOCAB, 12, hidden_size=hidden_size)
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        check_encoder(module, model)
        texts = [[3, 5, 5, 9], [7]]
        vectors = model.encode(texts, pooling="pooled")
    expected = np.stack([module.embedding.weight.detach().numpy()[ids].mean(0) for ids in texts])
    if hidden_size:
        expected = module.projection(torch.from_numpy(expected)).detach().numpy()
    np.testing.assert_allclose(vectors, expected, **CLOSE)


# rows that are nothing but padding
class ByTorch(nn.Module):
    """torch's own encoder over ids, and attention under a boolean mask, whose rows without a key torch makes zeros."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, 2, 24, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids, src_key_padding_mask=None):
        x = self.embedding(input_ids)
        encoded = self.encoder(x, src_key_padding_mask=src_key_padding_mask)
        shown = None if src_key_padding_mask is None else ~src_key_padding_mask[:, None, :]
        return {"encoded": encoded, "attended": F.scaled_dot_product_attention(x, x, x, attn_mask=shown)}


IDS, MASK = ids_of(3, 9), np.array([[1] * 9, [0] * 9, [1] * 4 + [0] * 5])


def through_the_graph(model):
    found = model.run({"input_ids": IDS, "attention_mask": MASK})
    assert all(np.isfinite(array).all() for array in found.values())
    return found


def test_a_row_of_padding_alone_through_an_encoder(tmp_path):
    """The definition's softmax over no key is not defined; the rows beside it are what they are without it."""
    module = Encoder(config())
    with exported(module, tmp_path, kind="encoder") as model:
        (found,) = through_the_graph(model).values()
    expected = computed(module, IDS, MASK)["output"]
    assert np.isnan(expected[1]).all()
    for row, length in ((0, 9), (2, 4)):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], **CLOSE)


def test_a_row_of_padding_alone_through_torchs_encoder(tmp_path, monkeypatch):
    module = ByTorch()
    with exported(module, tmp_path, kind="encoder", max_length=LONGEST) as model:
        found = through_the_graph(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it leaves padding out, whose rows are zeros then
    try:
        expected = computed(module, IDS, MASK == 0)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert np.isfinite(array).all()
        np.testing.assert_allclose(found[name], array, **CLOSE, err_msg=name)
    assert not found["attended"][1].any()
