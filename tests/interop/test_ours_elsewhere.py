"""Our folders in onnxruntime-genai's C++ runtime and in optimum: the same greedy tokens, the same vectors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))

import handwritten
import python_writer
from conftest import SIDE, greedy

from tfinfer.export import export_model
from tfinfer.export.sources import load_source

ROWS = np.random.default_rng(0).integers(3, 96, (2, 9)).tolist()
ZOO = Path(__file__).parent.parent / "zoo"


def genai_tokens(folder, rows, new):
    """Greedy tokens of onnxruntime-genai after rows of one length."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(rows[0]) + new, batch_size=len(rows), do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(np.array(rows, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(i).tolist()[len(row) :] for i, row in enumerate(rows)]


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_genai_gives_the_same_greedy_tokens(checkpoints, tmp_path, name, flavor):
    root, models = checkpoints
    export_model(load_source(str(root / name)), tmp_path / "out", flavor=flavor, max_length=64, also=["genai"])
    expected = greedy(models[name], ROWS, 32)
    found = genai_tokens(tmp_path / "out", ROWS, 32)
    ends = [row.index(2) if 2 in row else len(row) for row in expected]
    assert [row[:end] for row, end in zip(found, ends)] == [row[:end] for row, end in zip(expected, ends)]
    assert genai_tokens(tmp_path / "out", ROWS[:1], 32)[0][: ends[0]] == expected[0][: ends[0]]


@pytest.mark.parametrize("module", [handwritten.Rotary, handwritten.Alibi, handwritten.Tril])
def test_genai_runs_what_was_written_by_hand(tmp_path, module):
    torch.manual_seed(1)
    made = module().eval()
    export_model(made, tmp_path / "out", max_length=48, also=["genai"])
    ids = [int(i) for i in np.random.default_rng(2).integers(0, handwritten.VOCAB, 7)]
    found, expected = genai_tokens(tmp_path / "out", [ids], 24)[0], list(ids)
    with torch.no_grad():
        for _ in range(24):
            expected.append(int(made(torch.tensor([expected]))[0, -1].argmax()))
    assert found == expected[len(ids) :]


def test_genais_own_tokenizer_reads_ours(tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    folder = ZOO / "python_writer"
    source = load_source(
        f"{python_writer.__file__}:build", weights=folder / "model.safetensors", tokenizer=folder / "tokenizer.json"
    )
    export_model(source, tmp_path / "out", also=["genai"])
    tokenizer = og.Tokenizer(og.Model(str(tmp_path / "out")))
    text = "def main("
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.decode(np.array(expected, np.int32)) == text


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_optimum_gives_the_same_greedy_tokens(checkpoints, optimum, tmp_path, name):
    root, models = checkpoints
    export_model(load_source(str(root / name)), tmp_path / "out", max_length=64, also=["optimum"])
    found = optimum(SIDE, "causal", tmp_path / "out", "decoder.onnx", json.dumps(ROWS), 32)
    assert found == greedy(models[name], ROWS, 32)


def test_optimum_gives_the_same_vectors(checkpoints, optimum, tmp_path):
    root, models = checkpoints
    export_model(load_source(str(root / "bert")), tmp_path / "out", also=["optimum"])
    found = optimum(SIDE, "features", tmp_path / "out", "encoder.onnx", json.dumps(ROWS), 0)
    with torch.no_grad():
        expected = models["bert"](torch.tensor(ROWS)).last_hidden_state.numpy()
    np.testing.assert_allclose(np.array(found), expected, atol=1e-4)
