"""Files of word vectors in three formats, what is wrong with some, and their way into the definitions."""

import struct
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tfinfer.errors import InputError, MissingDependencyError, SourceError  # noqa: E402
from tfinfer.export.modules import (  # noqa: E402
    AverageOfWords,
    Decoder,
    Encoder,
    EncoderDecoder,
    HierarchicalEncoder,
    MaskedLanguageModel,
    TransformerConfig,
    WordVectors,
    embed_words,
    load_word_vectors,
)

WORDS = ["the", "café", "42"]
ROWS = [[1.0, -2.5, 0.25], [0.5, 3.0, -1e-3], [7.0, 8.0, 9.0]]
TEXT = "the 1.0 -2.5 0.25\ncafé 0.5 3.0 -1e-3\n42 7 8 9\n"


def binary(words=WORDS, rows=ROWS, header=None, newline=b"\n"):
    lines = (
        word.encode() + b" " + struct.pack(f"<{len(row)}f", *row) + newline
        for word, row in zip(words, rows, strict=True)
    )
    return (header or f"{len(rows)} {len(rows[0])}\n").encode() + b"".join(lines)


FILES = {
    "word2vec_text": f"3 3\n{TEXT}".encode(),
    "word2vec_binary": binary(),
    "glove": TEXT.encode(),
}


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="vectors.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


@pytest.fixture
def gensim():
    return pytest.importorskip("gensim")


# reading


@pytest.mark.usefixtures("gensim")
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("format", FILES)
def test_all_formats_say_the_same(write, format, told):
    vectors = load_word_vectors(write(FILES[format]), format=format if told else "auto")
    assert vectors.words == WORDS
    assert vectors.vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.vectors, torch.tensor(ROWS), atol=0, rtol=0)
    assert vectors.width == 3


@pytest.mark.usefixtures("gensim")
def test_binary_without_newlines_between_words(write):
    """The authors' tool writes a newline after each vector, others do not."""
    vectors = load_word_vectors(str(write(binary(newline=b""))))
    assert vectors.words == WORDS
    assert vectors.vectors.tolist() == torch.tensor(ROWS).tolist()


@pytest.mark.usefixtures("gensim")
@pytest.mark.parametrize("binary_format", [True, False])
def test_what_gensim_writes_is_read(tmp_path, binary_format):
    from gensim.models import KeyedVectors

    theirs = KeyedVectors(50)
    torch.manual_seed(0)
    matrix, words = torch.randn(300, 50), [f"wörd{i}" for i in range(300)]
    theirs.add_vectors(words, matrix.numpy())
    theirs.save_word2vec_format(str(tmp_path / "v"), binary=binary_format)
    vectors = load_word_vectors(tmp_path / "v")
    assert vectors.words == words
    torch.testing.assert_close(vectors.vectors, matrix, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("gensim")
def test_the_first_of_two_rows_counts(write):
    vectors = load_word_vectors(write("a 1 2\nb 3 4\na 5 6\n"))
    assert vectors.words == ["a", "b"]
    assert vectors.vectors.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.usefixtures("gensim")
def test_windows_line_ends(write):
    assert load_word_vectors(write("2 2\r\na 1 2\r\nb 3 4\r\n")).vectors.tolist() == [[1.0, 2.0], [3.0, 4.0]]


# what is wrong with a file

WRONG = [
    ("glove", "", "line 1: expected a word and its numbers, got an empty file"),
    ("auto", "", "line 1: expected a word and its numbers, got an empty file"),
    ("glove", "alone\n", "line 1: expected a word and its numbers, got 'alone'"),
    (
        "glove",
        "a 1 2\nb 1\n",
        "line 2: expected a word without spaces and 2 numbers, got 1 after the word: 'b 1'; mend",
    ),
    ("glove", "a 1 2\nb 1 2 3\n", "line 2: expected a word without spaces and 2 numbers, got 3 after the word"),
    ("glove", "a 1 2\n\nb 1 2\n", "line 2: expected a word without spaces and 2 numbers, got 0 after the word: ''"),
    ("glove", "a 1 2\nb 1 x2\n", "line 2: expected 2 finite numbers, got 'x2' for 'b'"),
    ("glove", "a 1 nan\n", "line 1: expected 2 finite numbers, got 'nan' for 'a'"),
    ("glove", "a 1 inf\n", "line 1: expected 2 finite numbers, got 'inf' for 'a'"),
    ("glove", b"a 1 2\n\xff 1 2\n", r"line 2: expected a word in UTF-8, got '\\\\xff'"),
    ("glove", " 1 2\n", "line 1: expected a word in UTF-8, got ''"),
    ("auto", "2 2\na 1 2\nb 1\n", "line 3: expected a word without spaces and 2 numbers, got 1 after the word"),
    ("auto", "3 2\na 1 2\nb 1 2\n", "line 1: expected the number of rows, 2, got 3; the file is cut or joined"),
    ("auto", "1 2\na 1 2\nb 1 2\n", "line 1: expected the number of rows, 2, got 1"),
    ("word2vec_text", "a 1 2\n", "line 1: expected two whole numbers, how many words and how wide, got 'a 1 2'"),
    ("word2vec_text", "0 2\n", "line 1: expected two whole numbers"),
    ("word2vec_text", "", "line 1: expected two whole numbers, how many words and how wide, got ''; mend"),
    ("word2vec_binary", "-1 2\n", "line 1: expected two whole numbers"),
    ("auto", binary()[:-16], "expected at least 42 bytes for 3 words of 3 numbers, got 40; the file is cut or"),
    ("word2vec_binary", binary(header="99999999999 300\n"), "expected at least .* the file is cut or its first line"),
    ("glove", "a 1 1e39\n", "line 1: expected 2 finite numbers, got '1e39' for 'a'"),  # beyond float32
    ("auto", binary(rows=[[1.0, 2.0], [float("nan"), 1.0], [0.0, 0.0]]), "got NaN or infinity for 'café'"),
    ("auto", binary(words=["x" * 60, "y", "z"])[:-4], "cannot be read as word2vec_binary: unexpected end of input"),
]


@pytest.mark.usefixtures("gensim")
@pytest.mark.parametrize("format, content, message", WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_files_say_where(write, format, content, message):
    with pytest.raises(SourceError, match=message) as caught:
        load_word_vectors(write(content), format=format)
    assert "vectors.txt" in str(caught.value)


def test_a_long_line_is_shortened(write):
    with pytest.raises(SourceError, match=r"line 2: .*: 'b 1 1 .*\.\.\.'; mend") as caught:
        load_word_vectors(write("a 1 2\nb" + " 1" * 1000 + "\n"))
    assert len(str(caught.value)) < 400


def test_a_missing_file_and_an_unknown_format(tmp_path, write):
    with pytest.raises(SourceError, match=r"word vectors must be a file, got .*nowhere"):
        load_word_vectors(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="must be a file"):
        load_word_vectors(tmp_path)
    with pytest.raises(
        InputError, match="format must be one of auto, word2vec_text, word2vec_binary, glove, got 'csv'"
    ):
        load_word_vectors(write(TEXT), format="csv")


def test_gensim_missing_names_the_extra(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tfinfer\[vectors\]'"):
        load_word_vectors(write(TEXT))


# into an embedding


@pytest.fixture
def vectors():
    return WordVectors(["the", "café", "unused"], torch.arange(12.0).reshape(3, 4))


VOCAB = {"<pad>": 0, "café": 3, "the": 1, "unknown": 2}


def check_embedded(embedding, before, vectors):
    after = embedding.weight.detach()
    torch.testing.assert_close(after[1], vectors.vectors[0])
    torch.testing.assert_close(after[3], vectors.vectors[1])
    kept = [0, 2, 4]
    torch.testing.assert_close(after[kept], before[kept], atol=0, rtol=0)


def make_config(**changes):
    sizes = {"vocab_size": 5, "hidden_size": 4, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
    return TransformerConfig(**(sizes | {"max_length": 8} | changes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Embedding(5, 4),
        lambda: AverageOfWords(5, 4),
        lambda: Encoder(make_config(num_token_types=2)),
        lambda: Decoder(make_config()),
        lambda: EncoderDecoder(make_config()),
        lambda: HierarchicalEncoder(make_config()),
        lambda: MaskedLanguageModel(make_config()),
    ],
)
def test_known_words_get_their_vectors(make, vectors):
    module = make()
    others = {name: value.clone() for name, value in module.state_dict().items()}
    embedding = module if isinstance(module, nn.Embedding) else module.embedding
    before = embedding.weight.detach().clone()
    assert embed_words(module, vectors, VOCAB) == 2
    check_embedded(embedding, before, vectors)
    for name, value in module.state_dict().items():
        if value.data_ptr() != embedding.weight.data_ptr():  # nothing but the words' vectors, and a tied head, moved
            torch.testing.assert_close(value, others[name], atol=0, rtol=0)
    assert embedding.weight.requires_grad


def test_a_tied_head_follows(vectors):
    decoder = Decoder(make_config())
    embed_words(decoder, vectors, VOCAB)
    torch.testing.assert_close(decoder.head.weight[3], vectors.vectors[1])


def test_vectors_take_the_type_of_the_embedding(vectors):
    embedding = nn.Embedding(5, 4, dtype=torch.float16)
    assert embed_words(embedding, vectors, VOCAB) == 2
    assert embedding.weight.dtype == torch.float16
    assert embedding.weight[3].tolist() == [4.0, 5.0, 6.0, 7.0]


def test_no_word_in_common(vectors):
    embedding = nn.Embedding(5, 4)
    before = embedding.weight.detach().clone()
    assert embed_words(embedding, vectors, {"other": 0}) == embed_words(embedding, vectors, {}) == 0
    torch.testing.assert_close(embedding.weight.detach(), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    "make, vocab, message",
    [
        (lambda: nn.Embedding(5, 6), VOCAB, "as wide as the embedding, 6, got 4; build the module with that size"),
        (lambda: nn.Embedding(3, 4), VOCAB, "a row must be from 0 to 2, got 3 for 'café'; build"),
        (lambda: nn.Embedding(5, 4), {"the": -1}, "a row must be from 0 to 4, got -1 for 'the'"),
        (lambda: nn.Embedding(5, 4), {"the": True}, "a row must be from 0 to 4, got True"),
        (lambda: nn.Embedding(5, 4), {"the": "1"}, "a row must be from 0 to 4, got '1'"),
        (lambda: nn.Linear(5, 4), VOCAB, "expected an nn.Embedding or a module with one as `embedding`, got Linear"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_copied(make, vocab, message, vectors):
    module = make()
    before = module.weight.detach().clone()
    with pytest.raises(InputError, match=message):
        embed_words(module, vectors, vocab)
    torch.testing.assert_close(module.weight.detach(), before, atol=0, rtol=0)


@pytest.mark.usefixtures("gensim")
def test_from_a_file_to_a_sentence(write):
    """The mean of two words' vectors, read from a file."""
    model = AverageOfWords(4, 3)
    assert embed_words(model, load_word_vectors(write(FILES["glove"])), {"the": 1, "42": 2}) == 2
    torch.testing.assert_close(model(torch.tensor([[1, 2]])), torch.tensor([[4.0, 2.75, 4.625]]))
