"""`tfinfer generate --conversation`: a conversation from one run of the command to the next."""

import dataclasses
import json
from pathlib import Path

from click.testing import CliRunner, Result

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.manifest import load_manifest


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], prog_name="tfinfer")
    assert result.exit_code == code, result.output
    return result


def run_ok(*arguments: object) -> str:
    return run(*arguments).stdout


def run_bad(code: int, *arguments: object) -> str:
    """The error of a run that must fail: one line, no traceback."""
    error = run(*arguments, code=code).stderr
    assert "Traceback" not in error
    return error


def test_a_conversation_goes_on_from_its_file(tiny: Path, tmp_path: Path) -> None:
    file, stop = tmp_path / "chat", ("--max-tokens", "4", "--stop-ids", "")
    with tfinfer.load(tiny) as model, model.conversation() as chat:
        texts = [chat.generate(text, max_tokens=4, stop_ids=[]).text for text in ("the cat", " sat")]
        last = chat.generate(" on", max_tokens=2, stop_ids=[])
    assert run_ok("generate", tiny, "the cat", *stop, "--conversation", file) == texts[0] + "\n"
    result = run("generate", tiny, " sat", *stop, "--conversation", file, "--stats")
    assert result.stdout == texts[1] + "\n"
    assert "in (5 reused), 4 tokens out" in result.stderr
    found = json.loads(
        run_ok("generate", tiny, " on", *stop[2:], "--max-tokens", "2", "--conversation", file, "--json")
    )
    assert found["token_ids"] == list(last.token_ids)
    assert found["usage"] == dataclasses.asdict(last.usage)


def test_a_conversation_without_a_length_fills_what_is_left(tiny: Path, tmp_path: Path) -> None:
    longest, file = load_manifest(tiny).max_length, tmp_path / "chat"
    for _ in range(2):
        ids = ",".join(["1"] * (longest // 2 - 3))
        found = run_ok("generate", tiny, "--ids", ids, "--max-tokens", "1", "--stop-ids", "", "--conversation", file)
        assert found
    found = json.loads(run_ok("generate", tiny, "--ids", "1", "--stop-ids", "", "--conversation", file, "--json"))
    assert found["usage"]["completion_tokens"] == longest - 2 * (longest // 2 - 2) - 1


def test_a_conversation_that_cannot_go_on_is_a_usage_error_and_stays(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat"
    assert "whole conversation by itself" in run_bad(2, "generate", tiny, "a", "--chat", "--conversation", file)
    assert not file.exists()
    file.write_text("something else")
    assert "expected a conversation" in run_bad(2, "generate", tiny, "a", "--conversation", file)
    assert file.read_text() == "something else"
    beams = ("--num-beams", "2", "--conversation", tmp_path / "new")
    assert "expected num_beams=1" in run_bad(2, "generate", tiny, "a", *beams)
    assert not (tmp_path / "new").exists()
