"""The shipped encoder-decoder reads dates that it never saw, through its exported graphs, where torch cannot be had."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tfinfer.export import export_model
from tfinfer.export.sources import load_source

ZOO = Path(__file__).parents[1] / "zoo"
SCRIPT = """
import json, sys
for name in ("torch", "onnx", "transformers"): sys.modules[name] = None
import tfinfer
pairs = [line.rstrip("\\n").split("\\t") for line in open(sys.argv[2], encoding="utf-8")]
with tfinfer.load(sys.argv[1], threads=1) as model:
    right = beams = 0
    for start in range(0, len(pairs), 50):
        texts, wanted = zip(*pairs[start:start + 50])
        right += sum(c.text == w for c, w in zip(model.generate(list(texts), max_tokens=12), wanted))
    for text, wanted in pairs[:20]:
        beams += model.generate(text, max_tokens=12, num_beams=4).text == wanted
print(json.dumps({"dates": len(pairs), "right": right, "beams": beams}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("dates") / "out"
    weights, tokenizer = ZOO / "date_reader" / "model.safetensors", ZOO / "date_reader"
    export_model(load_source(f"{ZOO / 'date_reader.py'}:build", weights=weights, tokenizer=tokenizer), out)
    return out


def test_it_has_at_most_a_million_parameters(folder):
    training = json.loads((ZOO / "date_reader" / "training.json").read_text(encoding="utf-8"))
    assert training["parameters"] <= 1_000_000
    assert (folder / "weights.bin").stat().st_size <= 4 * 1_000_000 + 100_000


def test_at_least_99_of_100_unseen_dates_are_read_without_torch(folder):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(ZOO / "date_reader" / "held_out.tsv")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["dates"] == 1000
    assert found["right"] >= 990
    assert found["beams"] >= 19
