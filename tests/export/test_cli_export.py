"""`tfinfer export` on modules written on the spot: its exit codes, what it prints, and that failures leave nothing."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import tfinfer
from tfinfer.cli.main import tfinfer as cli

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn

print("the user's own output")


class Tiny(nn.Module):
    def __init__(self, causal=True):
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.tokens, self.places = nn.Embedding(40, 16), nn.Embedding(24, 16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 40)

    def forward(self, ids):
        B, T = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(T, device=ids.device))
        q, k, v = (p.view(B, T, 2, 8).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(x + self.out(y.transpose(1, 2).reshape(B, T, 16)))


def build():
    return Tiny()


def build_open():
    return Tiny(causal=False)


def build_nothing():
    return 5


def build_and_fail():
    raise RuntimeError("the disk is full")
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only cost where everything is tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def run(source: object, out: Path, *given: object) -> Result:
    return CliRunner().invoke(cli, ["export", str(source), "-o", str(out), *map(str, given)], prog_name="tfinfer")


def test_a_factory_becomes_a_folder_that_generates(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(f"{model}:build", out, "--max-length", 24, "-v")
    assert result.exit_code == 0, result.output
    size, proof, *_, following = result.stdout.splitlines()
    assert "up to 24 tokens" in size
    assert "greedy tokens are PyTorch's" in proof
    assert following == f"next: tfinfer generate {out} --ids 1,2,3"
    assert "capture" in result.stderr.splitlines()
    assert "the user's own output" in result.stderr  # not among the results
    with tfinfer.load(out) as loaded:
        assert loaded.generate([1, 2, 3], max_tokens=4, stop_ids=[]).usage.completion_tokens == 4

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused = run(f"{model}:build", out)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    again = run(f"{model}:build", out, "--max-length", 16, "--overwrite", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["manifest"]["max_length"] == 16


@pytest.mark.parametrize(
    "factory, code, said",
    [
        ("absent", 2, "there is no absent"),
        ("build_nothing", 2, "torch.nn.Module"),
        ("build_and_fail", 2, "the disk is full"),
        ("build_open", 4, "causal"),
    ],
)
def test_a_failed_export_says_why_in_one_line_and_writes_nothing(
    model: Path, tmp_path: Path, factory: str, code: int, said: str
) -> None:
    result = run(f"{model}:{factory}", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in result.stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    "given, said",
    [
        (["--kind", "encoder-decoder"], "forward(source_ids, target_ids)"),
        (["--inputs", "pixels:float32"], "name:dtype[axis,...]"),
        (["--start-ids", "one"], "whole numbers"),
        (["--kind", "teapot"], "teapot"),
        (["--dtype", "fp8"], "fp8"),
        (["--flavor", "vanilla"], "vanilla"),
        (["--max-length", "1"], "max_length"),
        (["--weights", "absent.safetensors"], "absent.safetensors"),
        (["--tokenizer", "absent.json"], "absent.json"),
    ],
)
def test_options_that_cannot_be_served_are_exit_2(model: Path, tmp_path: Path, given: list[str], said: str) -> None:
    result = run(f"{model}:build", tmp_path / "out", *given)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["absent.py:build", "no.such.module:build", "absent"])
def test_a_source_that_is_not_there_is_exit_2(tmp_path: Path, source: str) -> None:
    assert run(source, tmp_path / "out").exit_code == 2


def test_a_place_that_holds_something_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = run(f"{model}:build", tmp_path / "out", "--overwrite")
    assert result.exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_json_errors_come_alone_on_stdout(model: Path, tmp_path: Path) -> None:
    result = run(f"{model}:build_and_fail", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["error"]["type"] == "SourceError"
