"""Turns a file of pre-trained word vectors into rows of an embedding; gensim reads, this checks and explains.

Formats: word2vec's text ("count width" on the first line, then "word number number ..." per line), its binary (the same
first line, then each word, a space and its float32 numbers), and GloVe's text (rows without a first line).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tfinfer.errors import InputError, MissingDependencyError, SourceError

from .checks import check_choice

VectorFormat = Literal["auto", "word2vec_text", "word2vec_binary", "glove"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class WordVectors:
    """Words and their vectors: row i of `vectors`, float32 (words, width), is that of `words[i]`."""

    words: list[str]
    vectors: Tensor

    @property
    def width(self) -> int:
        """How many numbers a vector has."""
        return self.vectors.shape[1]


def load_word_vectors(path: str | Path, *, format: VectorFormat = "auto") -> WordVectors:
    """Read word vectors of "word2vec" (Mikolov et al. 2013) or "GloVe" (Pennington et al. 2014).

    "auto" tells the formats apart by the first lines. Of a word that is there twice the first row counts. A file
    that is missing or not of its format raises `SourceError` with the line, what was expected and what came; without
    gensim it is `MissingDependencyError`.
    """
    check_choice("format", format, VectorFormat)
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"word vectors must be a file, got {str(path)!r}; check the path")
    if format == "auto":
        format = _detect(path)
    if format == "word2vec_binary":
        _check_binary(path, *_header(path))
    elif format == "word2vec_text":
        count, width = _header(path)
        _check_text(path, width, count, first_row=2)
    else:
        _check_text(path, _first_width(path), None, first_row=1)
    return _read(path, format)


def embed_words(module: nn.Module, vectors: WordVectors, vocab: Mapping[str, int]) -> int:
    """Copy the vectors of known words into an embedding and return how many words of `vocab` were found.

    `module` is an embedding or a definition with one as `embedding`; `vocab` maps a word to its row. Rows of words
    without a vector stay as they are. Another width than the embedding's, or a row that it does not have, raises
    `InputError` before anything is copied.
    """
    embedding = module if isinstance(module, nn.Embedding) else getattr(module, "embedding", None)
    if not isinstance(embedding, nn.Embedding):
        raise InputError(f"expected an nn.Embedding or a module with one as `embedding`, got {type(module).__name__}")
    if vectors.width != embedding.embedding_dim:
        raise InputError(
            f"vectors must be as wide as the embedding, {embedding.embedding_dim}, got {vectors.width}; "
            f"build the module with that size or load other vectors"
        )
    for word, row in vocab.items():
        if isinstance(row, bool) or row not in range(embedding.num_embeddings):
            raise InputError(
                f"a row must be from 0 to {embedding.num_embeddings - 1}, got {row!r} for {word!r}; "
                f"build the module with a larger vocab_size or mend the vocab"
            )
    source = {word: i for i, word in enumerate(vectors.words)}
    found = [word for word in vocab if word in source]
    with torch.no_grad():
        rows = torch.tensor([vocab[word] for word in found], dtype=torch.long, device=embedding.weight.device)
        taken = vectors.vectors[[source[word] for word in found]]
        embedding.weight[rows] = taken.to(embedding.weight)
    return len(found)


def _read(path: Path, format: VectorFormat) -> WordVectors:
    """Let gensim read a file whose rows were checked; what it still dislikes is told as it says it."""
    try:
        from gensim.models import KeyedVectors  # type: ignore[import-untyped,import-not-found]
    except ImportError as error:
        raise MissingDependencyError("word vectors are read with gensim: pip install 'tfinfer[vectors]'") from error
    options: dict[str, Any] = {"binary": format == "word2vec_binary", "no_header": format == "glove"}
    try:
        with warnings.catch_warnings(category=ResourceWarning, action="ignore"):  # gensim 4.4 leaves GloVe's file open
            keyed = KeyedVectors.load_word2vec_format(str(path.resolve()), **options)
    except (ValueError, EOFError, AssertionError) as error:
        raise SourceError(f"{path}: cannot be read as {format}: {error}; check that this is its format") from error
    words = list(keyed.key_to_index)
    vectors = np.array(keyed.vectors[: len(words)], dtype=np.float32)  # where a word came twice gensim has empty rows
    finite = np.isfinite(vectors).all(axis=1)  # (words,)
    if not finite.all():
        word = words[int(finite.argmin())]
        raise SourceError(f"{path}: expected finite numbers, got NaN or infinity for {word!r}; train or load it again")
    return WordVectors(words, torch.from_numpy(vectors))


def _detect(path: Path) -> VectorFormat:
    """Tell GloVe by its missing first line, and word2vec's binary by bytes that no text has."""
    with path.open("rb") as file:
        header, rows = file.readline().split(), file.read(4096)
    if len(header) != 2 or not all(part.isdigit() for part in header):
        return "glove"
    text = rows.decode("utf-8", errors="replace")
    if len(rows) == 4096:
        text = text[:-4]  # the last character may be cut
    control = any(character < " " and character not in "\t\r\n" for character in text)
    return "word2vec_binary" if control or "\ufffd" in text else "word2vec_text"


def _header(path: Path) -> tuple[int, int]:
    """Return the count of words and the width that the first line of a word2vec file promises."""
    with path.open("rb") as file:
        line = file.readline(200)
    parts = line.split()
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise _bad_line(path, 1, "two whole numbers, how many words and how wide", _shorten(line))
    return int(parts[0]), int(parts[1])


def _first_width(path: Path) -> int:
    """Return the width of a GloVe file, that of its first row."""
    with path.open("rb") as file:
        line = file.readline()
    width = len(line.rstrip().split(b" ")) - 1
    if width < 1:
        raise _bad_line(path, 1, "a word and its numbers", _shorten(line) if line else "an empty file")
    return width


def _check_binary(path: Path, count: int, width: int) -> None:
    """Raise unless the file is long enough for what its first line promises: gensim would allocate it first."""
    least, size = count * (4 * width + 2), path.stat().st_size  # each word has a letter and a space
    if size < least:
        raise SourceError(
            f"{path}: expected at least {least} bytes for {count} words of {width} numbers, got {size}; "
            f"the file is cut or its first line is wrong: load it again"
        )


def _check_text(path: Path, width: int, count: int | None, *, first_row: int) -> None:
    """Raise unless every row is a word and `width` finite numbers, and there are `count` rows where it is known."""
    line_number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            if line_number < first_row:
                continue
            word, *numbers = line.rstrip().split(b" ")
            if len(numbers) != width:
                expected = f"a word without spaces and {width} numbers"
                raise _bad_line(path, line_number, expected, f"{len(numbers)} after the word: {_shorten(line)}")
            if not _is_text(word):
                raise _bad_line(path, line_number, "a word in UTF-8", _shorten(word))
            bad = next((number for number in numbers if not _is_float32(number)), None)
            if bad is not None:
                raise _bad_line(path, line_number, f"{width} finite numbers", f"{_shorten(bad)} for {word.decode()!r}")
    rows = line_number - first_row + 1
    if count is not None and rows != count:
        raise _bad_line(path, 1, f"the number of rows, {rows}", f"{count}; the file is cut or joined, load it again")


def _is_text(word: bytes) -> bool:
    try:
        return bool(word.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _is_float32(number: bytes) -> bool:
    try:
        return abs(float(number)) <= _LARGEST  # not so for NaN
    except ValueError:
        return False


def _shorten(line: bytes) -> str:
    text = line.rstrip().decode("utf-8", errors="backslashreplace")
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _bad_line(path: Path, number: int, expected: str, came: str) -> SourceError:
    return SourceError(f"{path}: line {number}: expected {expected}, got {came}; mend the line or give another format")
