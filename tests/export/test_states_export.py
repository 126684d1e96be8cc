"""Modules with states of fixed size: the folder computes what PyTorch does, in pieces, in batches and greedily."""

import pytest
import states
import torch
import transformers

import tfinfer
from tfinfer.errors import CaptureError
from tfinfer.export import export_model
from tfinfer.export.capture import capture


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
                out = module(ids)
                logits = out[0] if isinstance(out, tuple) else out
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
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


@pytest.mark.parametrize("name", states.RECURRENT)
def test_a_recurrent_layer(name, tmp_path):
    check(states.RECURRENT[name](), tmp_path / "out")


@pytest.mark.parametrize("name", states.LOOPS)
def test_a_loop_over_positions(name, tmp_path):
    check(states.LOOPS[name](), tmp_path / "out")


class Backwards(states.Looped):
    def mix(self, x):
        a, b = self.gates(x)
        h, ys = torch.zeros(x.shape[0], states.HIDDEN), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + b[:, x.shape[1] - 1 - t]
            ys.append(h)
        return torch.stack(ys, 1)


class Counts(states.Looped):
    def mix(self, x):
        h, ys = torch.zeros(x.shape[0], states.HIDDEN), []
        for t in range(x.shape[1]):
            h = h + x[:, t] / (t + 1)
            ys.append(h)
        return torch.stack(ys, 1)


class ReadsAll(states.Looped):
    def mix(self, x):
        h, ys = torch.zeros(x.shape[0], states.HIDDEN), []
        for t in range(x.shape[1]):
            h = (h + x[:, t]).tanh() + x.amax(1)
            ys.append(h)
        return torch.stack(ys, 1)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Backwards, "number of the position|read"),
        (Counts, "computes? with the number of the position"),
        (ReadsAll, "mixes|reads"),
    ],
)
def test_a_loop_that_is_no_recurrence_is_refused_with_the_reason(module, why):
    with pytest.raises(CaptureError, match=why):
        capture(module())


def test_mamba_as_transformers_writes_it(tmp_path):
    config = transformers.MambaConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
    model = transformers.MambaForCausalLM(config).eval()
    report = export_model(model, tmp_path / "out", max_length=60, attention=False)
    assert report.verdicts[0].passed, report.verdicts[0].lines()
    assert [spec.shape for spec in report.manifest.states] == [(32, 3), (32, 4)] * 2
