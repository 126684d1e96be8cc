"""Folders of the onnxruntime-genai model builder and of optimum, adopted: PyTorch's greedy tokens and vectors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from conftest import greedy

import tfinfer
from tfinfer.adopt import adopt

PROMPTS = [np.random.default_rng(seed).integers(3, 96, size).tolist() for seed, size in enumerate((3, 9, 1, 9))]


def built(root, out, precision):
    """A folder of the model builder, made offline."""
    pytest.importorskip("onnxruntime_genai")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", root / "llama", "-o", out]
    command += ["-p", precision, "-e", "cpu", "-c", out.parent / "cache"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def check_tokens(folder, model):
    """Ragged batches, single prompts and beams, as PyTorch alone."""
    expected = [greedy(model, [prompt], 40)[0] for prompt in PROMPTS]
    with tfinfer.load(folder) as served:
        together = served.generate(PROMPTS, max_tokens=40, stop_ids=[])
        assert [list(completion.token_ids) for completion in together] == expected
        assert list(served.generate(PROMPTS[1], max_tokens=40, stop_ids=[]).token_ids) == expected[1]
        best = served.generate(PROMPTS[1], max_tokens=12, num_beams=3, stop_ids=[]).token_ids
    ids = torch.tensor([PROMPTS[1]])
    beams = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert list(best) == beams[0, len(PROMPTS[1]) :].tolist()


def test_the_genai_model_builders_folder(checkpoints, tmp_path):
    root, models = checkpoints
    adopted = adopt(built(root, tmp_path / "built", "fp32"))
    assert adopted.manifest.cache_mode == "in place"
    assert adopted.manifest.proof.strict
    check_tokens(adopted.folder, models["llama"])


def test_the_genai_model_builders_four_bit_folder_runs_as_genai_runs_it(checkpoints, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    folder = adopt(built(checkpoints[0], tmp_path / "built", "int4")).folder
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=41, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(np.array([PROMPTS[1]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = generator.get_sequence(0).tolist()[9:]
    with tfinfer.load(folder) as served:
        found = list(served.generate(PROMPTS[1], max_tokens=32, stop_ids=[]).token_ids)
    assert len(expected) > 4
    assert found[: len(expected)] == expected  # genai ends at the end token


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_optimums_decoder(checkpoints, optimum, tmp_path, name):
    root, models = checkpoints
    command = ("-m", "optimum.exporters.onnx", "-m", root / name, "--task", "text-generation-with-past")
    optimum(*command, tmp_path / "out")
    adopted = adopt(tmp_path / "out")
    assert adopted.manifest.cache_mode == "concatenated"
    check_tokens(adopted.folder, models[name])


def test_optimums_encoder(checkpoints, optimum, tmp_path):
    root, models = checkpoints
    optimum("-m", "optimum.exporters.onnx", "-m", root / "bert", "--task", "feature-extraction", tmp_path / "out")
    adopt(tmp_path / "out")
    with tfinfer.load(tmp_path / "out") as served:
        found = served.encode(PROMPTS, pooling="none")
    with torch.no_grad():
        for prompt, vectors in zip(PROMPTS, found):
            expected = models["bert"](torch.tensor([prompt])).last_hidden_state[0].numpy()
            np.testing.assert_allclose(vectors, expected, atol=1e-4)
