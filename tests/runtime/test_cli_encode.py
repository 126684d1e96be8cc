"""`tfinfer encode` on a small folder: what it reads and prints, what it writes, and that errors are one line."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import tfinfer
from tfinfer.cli import encode
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError

FOLDER = Path(__file__).parent / "tiny_encoder"
TEXTS = ["the cat sat on the mat", "dog", "the red dog"]
LONG = " ".join(["cat"] * 100)


def run(*arguments: object, **extra: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="tfinfer", **extra)


def run_ok(*arguments: object, **extra: object) -> str:
    result = run(*arguments, **extra)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_bad(code: int, *arguments: object, **extra: object) -> str:
    """Run what must fail with `code` and one line on stderr, nothing on stdout; returns the line."""
    result = run(*arguments, **extra)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def vectors(stdout: str) -> np.ndarray:
    """The vectors that were printed, whose numbers must count up."""
    entries = [json.loads(line) for line in stdout.splitlines()]
    assert [entry["index"] for entry in entries] == list(range(len(entries)))
    return np.array([entry["vector"] for entry in entries])


@pytest.fixture(scope="module")
def model():
    with tfinfer.load(FOLDER, threads=1) as loaded:
        yield loaded


@pytest.fixture
def ids_only(tmp_path: Path) -> Path:
    """The folder without its tokenizer."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "ids"))
    data = json.loads((folder / "tfinfer.json").read_text())
    name = data["text"].pop("tokenizer")
    del data["files"][name]
    (folder / name).unlink()
    (folder / "tfinfer.json").write_text(json.dumps(data))
    return folder


# -- what goes in -------------------------------------------------------------------------------------------------
def test_encode_prints_a_line_for_each_text(model) -> None:
    given = ["--threads", 1, "--pooling", "cls", "--normalize"]
    expected = model.encode(TEXTS, pooling="cls", normalize=True)
    np.testing.assert_allclose(vectors(run_ok("encode", FOLDER, *TEXTS, *given)), expected, atol=1e-6)
    np.testing.assert_allclose(
        vectors(run_ok("encode", FOLDER, *given, *TEXTS, "--batch-size", 1)), expected, atol=1e-5
    )


@pytest.mark.parametrize("dash", [[], ["-"]])
def test_texts_pairs_and_ids_come_as_lines_of_json(model, dash: list[str]) -> None:
    lines = [
        '"the cat é"',
        '{"text": "dog", "name": "more than is needed"}',
        '{"text": "the cat", "pair": "a dog"}',
        '{"ids": [2, 5, 3]}',
        '{"text": "dog", "pair": null}',
    ]
    expected = model.encode(["the cat é", "dog", ("the cat", "a dog"), [2, 5, 3], "dog"])
    for ends in ("\n", "\r\n"):
        found = run_ok("encode", FOLDER, *dash, input=ends.join(lines))
        np.testing.assert_allclose(vectors(found), expected, atol=1e-5)
    assert run_ok("encode", FOLDER, *dash, input="") == ""


@pytest.mark.parametrize(
    "line, said",
    [
        (b"text", "no JSON"),
        (b"", "no JSON"),
        (b'"\xff"', "no JSON"),
        (b"[" * 100000, "no JSON"),
        (b"5", "'5'"),
        (b"[1, 2]", "[1, 2]"),
        (b"{}", "{}"),
        (b'{"text": 5}', "expected"),
        (b'{"text": "a", "pair": 5}', "expected"),
        (b'{"ids": [1, true]}', "expected"),
        (b'{"ids": [1.5]}', "expected"),
        (b'{"text": "a", "ids": [1]}', "both"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: bytes, said: str) -> None:
    message = run_bad(2, "encode", FOLDER, input=b'"a"\n' + line + b'\n"b"\n')
    assert "stdin, line 2: expected" in message
    assert said in message


def test_what_came_before_a_bad_line_is_printed(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfinfer.encoding.WINDOW", 1)
    result = run("encode", FOLDER, "--batch-size", 2, input='"a"\n"b"\n"c"\n5\n')
    assert result.exit_code == 2
    np.testing.assert_allclose(vectors(result.stdout), model.encode(["a", "b"]), atol=1e-5)


def test_ids_serve_where_there_is_no_tokenizer(ids_only: Path, model) -> None:
    found = run_ok("encode", ids_only, "--ids", "2,5,3", "--ids", "2,7,8,3")
    np.testing.assert_allclose(vectors(found), model.encode([[2, 5, 3], [2, 7, 8, 3]]), atol=1e-5)
    assert "no tokenizer" in run_bad(2, "encode", ids_only, "a")


@pytest.mark.parametrize(
    "given, said",
    [
        (["a", "--ids", "1"], "either"),
        (["a", "-"], "stdin"),
        (["--ids", "1,x"], "1,x"),
        (["--ids", ""], "at least one token"),
        (["--ids", "99999"], "99999"),
        (["a", "--pooling", "max"], "pooling"),
        (["a", "--batch-size", "0"], "batch_size"),
        (["a", "--device", "teapot"], "teapot"),
        (["a", LONG], "text 1: 102 tokens are more than the model's longest length, 64"),
        (["a", "-o", "a.npz"], ".npy"),
        (["a", "-o", "none/a.npy"], "folder that exists"),
        (["a", "-o", "a.npy", "--pooling", "none"], "leave -o out"),
    ],
)
def test_encode_refuses_what_cannot_be_served(given: list[str], said: str) -> None:
    assert said in run_bad(2, "encode", FOLDER, *given)


def test_a_decoder_does_not_encode(tiny: Path) -> None:
    assert "use generate or stream" in run_bad(2, "encode", tiny, "a")


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(encode.click.UsageError, match="lines of JSON"):
        encode._source((), ())


def test_cutting_is_said() -> None:
    result = run("encode", FOLDER, "a", LONG, "--truncate")
    assert result.exit_code == 0
    assert vectors(result.stdout).shape[0] == 2
    assert result.stderr == "warning: 1 of 2 texts were longer than 64 tokens and were cut\n"


# -- what comes out -----------------------------------------------------------------------------------------------
def test_vectors_of_tokens_are_printed_too(model) -> None:
    lines = run_ok("encode", FOLDER, *TEXTS, "--pooling", "none").splitlines()
    for line, expected in zip(lines, model.encode(TEXTS, pooling="none"), strict=True):
        np.testing.assert_allclose(json.loads(line)["vectors"], expected, atol=1e-5)


def test_json_is_one_object(model, tmp_path: Path) -> None:
    found = json.loads(run_ok("encode", FOLDER, *TEXTS, "--normalize", "--json", "--threads", 1))
    expected = model.encode(TEXTS, normalize=True)
    np.testing.assert_allclose([entry["vector"] for entry in found["results"]], expected, atol=1e-5)
    assert (found["pooling"], found["normalize"], found["model"]["threads"]["count"]) == ("mean", True, 1)
    output = tmp_path / "v.npy"
    found = json.loads(run_ok("encode", FOLDER, *TEXTS, "--json", "-o", output))
    assert (found["output"], found["rows"], found["hidden"]) == (str(output), 3, expected.shape[1])
    error = json.loads(run("encode", FOLDER, LONG, "--json").stdout)["error"]
    assert error["type"] == "LengthError"


@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_one_array_is_written(model, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfinfer.encoding.WINDOW", 2)
    texts = [TEXTS[i % 3] for i in range(count)]
    output = tmp_path / "v.npy"
    output.write_bytes(b"what was there before")
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    result = run("encode", FOLDER, "-o", output, "--batch-size", 2, input=lines)
    assert (result.exit_code, result.stdout) == (0, "")
    found = np.load(output)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)
    assert result.stderr == f"{output}: {count} x {found.shape[1]} float32, pooling mean\n"
    assert os.listdir(tmp_path) == ["v.npy"]


def test_an_array_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfinfer.encoding.WINDOW", 1)
    output = tmp_path / "v.npy"
    arguments = ("encode", FOLDER, "-o", output, "--batch-size", 1)
    assert "line 3" in run_bad(2, *arguments, input='"a"\n"b"\n5\n')
    assert os.listdir(tmp_path) == []
    output.write_bytes(b"before")
    assert "line 2" in run_bad(2, *arguments, input='"a"\n5\n')
    assert output.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["v.npy"]


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in run_bad(2, "encode", FOLDER, "a", "-o", tmp_path / "v.npy")
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="can be written"):
        encode.NpyWriter(tmp_path / "none" / "v.npy", 3).__enter__()
