"""Word vectors from files into the embedding of a module, and out of the exported graph again."""

import struct

import numpy as np
import pytest
import torch
from catalogue import CLOSE, check_run, computed, config, exported

from tfinfer.errors import InputError
from tfinfer.export.modules import AverageOfWords, Encoder, embed_words, load_word_vectors

pytest.importorskip("gensim")

VOCAB = {"<pad>": 0, "<unknown>": 1, "the": 2, "café": 3, "sat": 4, "down": 5}
WORDS = ["down", "the", "zebra", "café"]  # in an order of their own, one that the vocabulary does not have
ROWS = np.random.default_rng(0).normal(size=(len(WORDS), 16)).astype(np.float32)
PAIRS = list(zip(WORDS, ROWS, strict=True))
TEXT = "".join(f"{word} {' '.join(map(repr, row.tolist()))}\n" for word, row in PAIRS)
BINARY = b"".join(word.encode() + b" " + struct.pack("<16f", *row) + b"\n" for word, row in PAIRS)
FILES = {
    "word2vec_text": f"4 16\n{TEXT}".encode(),
    "word2vec_binary": b"4 16\n" + BINARY,
    "glove": TEXT.encode(),
}


def vectors_of(format, folder):
    path = folder / "vectors"
    path.write_bytes(FILES[format])
    vectors = load_word_vectors(path)
    assert vectors.words == WORDS
    return vectors


@pytest.mark.parametrize("format", FILES)
def test_word_vectors_into_an_average_of_words(format, tmp_path):
    """A text's vector is the mean of the file's rows of its words."""
    module = AverageOfWords(len(VOCAB), 16)
    assert embed_words(module, vectors_of(format, tmp_path), VOCAB) == 3
    texts = [["the", "café", "down"], ["down"], ["café", "café"]]
    with exported(module, tmp_path, kind="encoder", max_length=32) as model:
        found = model.encode([[VOCAB[word] for word in text] for text in texts], pooling="pooled")
    expected = [np.mean([ROWS[WORDS.index(word)] for word in text], axis=0) for text in texts]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_word_vectors_into_an_encoder(tmp_path):
    """The vectors reach the graph: what it gives is the module's result with them, not that without."""
    module = Encoder(config(vocab_size=len(VOCAB)))
    ids = np.array([[VOCAB[word] for word in ("the", "café", "sat", "down")]])
    before, unknown = computed(module, ids)["output"], module.embedding.weight[VOCAB["sat"]].clone()
    assert embed_words(module, vectors_of("word2vec_binary", tmp_path), VOCAB) == 3
    assert torch.equal(module.embedding.weight[VOCAB["sat"]], unknown)
    with exported(module, tmp_path, kind="encoder") as model:
        (found,) = check_run(module, model, input_ids=ids).values()
        assert np.abs(found - before).max() > 1e-2
        np.testing.assert_allclose(model.encode(ids[0].tolist(), pooling="mean"), found[0].mean(0), **CLOSE)


def test_word_vectors_of_another_width(tmp_path):
    module = AverageOfWords(len(VOCAB), 12)
    before = module.embedding.weight.clone()
    with pytest.raises(InputError, match="as wide as the embedding, 12, got 16"):
        embed_words(module, vectors_of("glove", tmp_path), VOCAB)
    assert torch.equal(module.embedding.weight, before)
