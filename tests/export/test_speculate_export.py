"""Speculation on the shipped example and on a window, exported: the tokens of the plain loop, in fewer passes."""

from pathlib import Path

import pytest
import torch

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.modules import Decoder, TransformerConfig
from tfinfer.export.sources import load_source
from tfinfer.tokens.pace import Pace

ZOO = Path(__file__).parents[1] / "zoo"
PROMPTS = [
    "import os\nimport sys\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y",
    "x = ",
]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Drafts of four, whatever they cost."""
    monkeypatch.setattr(Pace, "length", lambda self, kind, most: min(4, most))


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    out = tmp_path_factory.mktemp("writer") / "out"
    weights, tokenizer = ZOO / "python_writer" / "model.safetensors", ZOO / "python_writer" / "tokenizer.json"
    export_model(load_source(f"{ZOO / 'python_writer.py'}:build", weights=weights, tokenizer=tokenizer), out)
    with tfinfer.load(out, threads=1) as model:
        yield model


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_the_shipped_example_writes_the_same(writer, way, options, monkeypatch):
    steps, step = [], writer.decoder.step
    monkeypatch.setattr(writer.decoder, "step", lambda *given: steps.append(1) or step(*given))
    speculation = {"lookup": True} if way == "lookup" else {"draft": writer}
    for prompt in PROMPTS:
        plain = writer.generate(prompt, max_tokens=96, **options)
        steps.clear()
        found = writer.generate(prompt, max_tokens=96, **options, **speculation)
        assert found.token_ids == plain.token_ids
        assert found.text == plain.text
        usage = found.usage
        assert usage.proposed_tokens >= usage.accepted_tokens
        if way == "lookup":
            assert len(steps) < usage.completion_tokens - 1
        else:
            assert usage.accepted_tokens > 0.9 * usage.proposed_tokens > 0


def test_a_window_goes_on_behind_what_was_taken_back(tmp_path):
    """Positions are moved out of the buffers again and again, while drafts are taken back."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32,
        position="rotary", attention_pattern="sliding_window", window=16, max_length=800,
    )  # fmt: skip
    report = export_model(Decoder(config).eval(), tmp_path / "out", max_length=800, attention=False)
    assert report.manifest.keeps_window == 16
    with tfinfer.load(tmp_path / "out", threads=1) as model:
        plain = model.generate([1, 2, 3], max_tokens=600, temperature=0.7, seed=1)
        found = model.generate([1, 2, 3], max_tokens=600, temperature=0.7, seed=1, lookup=True)
    assert found.token_ids == plain.token_ids
    assert found.usage.proposed_tokens > found.usage.accepted_tokens > 0
