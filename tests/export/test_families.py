"""Hugging Face causal models of toy size, saved as checkpoints and exported by one path that knows none of them.

tests/families/thirty.py is the table of them; `make families` takes every other family too.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))

import one
import sweep
from click.testing import CliRunner
from thirty import FAMILIES, table

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.export import export_model
from tfinfer.export.sources import load_source
from tfinfer.proof.prove import verify_folder

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

LONGEST = one.PROMPT + one.TOKENS + 7


def ways(manifest):
    return [(a.operator, a.pattern, a.count) for a in manifest.attention]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_exports_verifies_and_generates_what_pytorch_does(family, tmp_path):
    changes, attention = FAMILIES[family]
    model = one.build(family, **changes)
    model.save_pretrained(tmp_path / "checkpoint")
    report = export_model(load_source(str(tmp_path / "checkpoint")), tmp_path / "out", max_length=LONGEST)
    assert ways(report.manifest) == attention
    assert report.manifest.token_ids.eos == (2,)
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**6
    assert one.generates(model, tmp_path / "out", LONGEST)
    with tfinfer.load(tmp_path / "out") as loaded:
        assert verify_folder(loaded.decoder, tmp_path / "out").passed


def test_a_family_from_the_command_line(tmp_path):
    model = one.build("smollm3")
    model.save_pretrained(tmp_path / "checkpoint")
    out = str(tmp_path / "out")
    for command in (["export", str(tmp_path / "checkpoint"), "-o", out, "--max-length", str(LONGEST)], ["verify", out]):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.output
    assert one.generates(model, tmp_path / "out", LONGEST)


# the sweep over all families


def test_other_tokens_are_told(tmp_path):
    model = one.build("gpt2")
    export_model(model, tmp_path / "out", max_length=LONGEST)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.neg_()
    assert not one.generates(model, tmp_path / "out", LONGEST)


def test_a_family_that_pytorch_does_not_run_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(one, "candidates", lambda config: iter([{"num_attention_heads": 5}]))
    found = one.run("llama", tmp_path)
    assert found["result"] == sweep.NOT_BUILT
    assert "5" in found["why"]
    results = [{"family": "a", "result": "pass", "why": ""}, {"family": "b", "result": "time", "why": "late"}]
    results.append({"family": "llama", **found})
    assert sweep.share(results) == (1, 2)
    assert (
        sweep.summary(results)
        == "3 families; PyTorch runs 2 of them at toy size; 1 pass (50.0%, at least 90% expected)"
    )


def test_reasons_are_grouped_without_names_and_sizes():
    def refused(name, why):
        return {"family": name, "result": "CaptureError", "why": why}

    results = [
        refused("a", "aten.x: expected 4 heads, in model.layers.0 at /a/b.py, line 3: x = y"),
        refused("b", "aten.x: expected 8 heads, in decoder.block.1 at /c/d.py, line 9: z = y"),
        refused("c", "aten.y: cut in pieces"),
    ]
    assert [line.split() for line in sweep.grouped(results)] == [
        ["2", "CaptureError:", "aten.x:", "expected", "N", "heads", "a,", "b"],
        ["1", "CaptureError:", "aten.y:", "cut", "in", "pieces", "c"],
    ]
    assert len(sweep.table(results)) == 2 + len(results)


def test_one_process_per_family_says_what_became_of_it():
    assert sweep.run_one("nothing-is-called-so", 120)["result"] == sweep.NOT_BUILT
    assert sweep.run_one("llama", 0.1)["result"] == "time"


def test_every_family_of_the_table_is_one_of_the_sweep():
    assert set(FAMILIES) <= set(sweep.families())
    assert len(FAMILIES) == 30
    assert [line.split()[1] for line in table()[2:]] == list(FAMILIES)
