"""Modules with states of fixed size: the folder computes what PyTorch does, in pieces, in batches and greedily."""

import pytest
import states
import torch

import tfinfer
from tfinfer.export import export_model


def check(module, folder, count=None):
    """Export, prove, 64 tokens as PyTorch, ragged rows together as each alone."""
    module.eval()
    report = export_model(module, folder, max_length=120, attention=False)
    assert report.verdicts[0].passed, report.verdicts[0].lines()
    with tfinfer.load(folder, threads=1) as model:
        assert model.manifest.states
        assert count is None or len(model.manifest.states) == count
        for prompt in ([3], [5, 1, 2, 8, 20, 4, 4]):
            ids = torch.tensor([prompt])
            for _ in range(64):
                ids = torch.cat([ids, module(ids)[:, -1:].argmax(-1)], 1)
            assert list(model.generate(prompt, max_tokens=64).token_ids) == ids[0, len(prompt) :].tolist()
        prompts = [[2], [9, 8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3]]
        alone = [model.generate(p, max_tokens=12).token_ids for p in prompts]
        assert [c.token_ids for c in model.generate(prompts, max_tokens=12)] == alone
        return model.manifest


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", states.SHIFTS)
def test_a_shift_by_a_few_positions(name, tmp_path):
    check(states.shift(states.SHIFTS[name])(), tmp_path / "out")


@pytest.mark.parametrize("name", states.CONVOLUTIONS)
def test_a_causal_convolution(name, tmp_path):
    check(states.CONVOLUTIONS[name](), tmp_path / "out")
