"""What the commands that are not for encoders say of one, and how `tfinfer inspect` shows every kind of folder."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tfinfer.cli.main import tfinfer as cli
from tfinfer.manifest import (
    CacheSpec,
    CrossSpec,
    DecoderRoles,
    EncoderRoles,
    MapSpec,
    PoolingSpec,
    StateSpec,
    load_manifest,
)

FOLDER = Path(__file__).parent / "tiny_encoder"


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


def test_generating_and_bench_say_what_an_encoder_does() -> None:
    assert "use encode or run" in run_bad(2, "generate", FOLDER, "a")
    assert "use encode or run" in run_bad(2, "generate", FOLDER, "--ids", "1,2")
    assert "bench measures decoders; this is an encoder" in run_bad(2, "bench", FOLDER)


def test_inspect_shows_an_encoder() -> None:
    shown = run_ok("inspect", FOLDER, "--check")
    for said in ("encoder, float32", "up to 64 tokens", "ids in", "hidden_states", "pooling", "as they were exported"):
        assert said in shown
    for absent in ("logits", "cache", "greedy", "states   ", "cross"):
        assert absent not in shown.replace("hidden_states", "")
    found = json.loads(run_ok("inspect", FOLDER, "--json"))
    assert set(found["cache"].values()) == {0}
    assert found["manifest"]["encoder"]["input_ids"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pooling": PoolingSpec("last", True)}, "last, normalized"),
        ({"pooling": None}, "mean, for the model names none"),
        ({"encoder": EncoderRoles("input_ids", pooled="pooled")}, "the module's own"),
        ({"encoder": EncoderRoles()}, "run gives every output"),
        ({"vocab_size": 0}, "takes no ids"),
    ],
)
def test_inspect_says_how_an_encoder_pools(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    manifest = dataclasses.replace(load_manifest(FOLDER), **changes)  # type: ignore[arg-type]
    (tmp_path / "tfinfer.json").write_text(manifest.to_json())
    assert said in run_ok("inspect", tmp_path)


def test_inspect_shows_an_encoder_decoder(tmp_path: Path) -> None:
    encoder = load_manifest(FOLDER)
    graph = encoder.graphs["encoder"]
    manifest = dataclasses.replace(
        encoder,
        kind="encoder-decoder",
        graphs={"encoder": graph, "decoder": graph, "attention": graph},
        roles=DecoderRoles("input_ids", "attention_mask", "logits"),
        cache=(CacheSpec("past", "present", 2, 8, "float32"),),
        states=(StateSpec("sum", "next_sum", (4, 5), "float32"),) * 2,
        cross=(
            CrossSpec("key", "float16", ("batch", 2, "source", 8)),
            CrossSpec("all", "float16", ("batch", "source")),
        ),
        num_logits=7,
        source_vocab_size=11,
        max_source_length=50,
        keeps_window=3,
        token_ids=dataclasses.replace(encoder.token_ids, decoder_start=(1,)),
        maps=(MapSpec("cross", ("a", "b")),),
    )
    (tmp_path / "tfinfer.json").write_text(manifest.to_json())
    shown = run_ok("inspect", tmp_path)
    for said in (
        "source up to 50 tokens, target up to 64 tokens",
        "11 ids of a source in",
        "7 logits out",
        "more than 3 positions back",
        "64 bytes per token",
        "2 states of (4, 5), float32",
        "160 bytes for each sequence",
        "2 tensors from the encoder, 34 bytes per source token",
        "cross: 2 layers",
    ):
        assert said in shown
    sizes = json.loads(run_ok("inspect", tmp_path, "--json"))["cache"]
    assert (sizes["bytes_per_token"], sizes["state_bytes"], sizes["bytes_per_source_token"]) == (64, 160, 34)
