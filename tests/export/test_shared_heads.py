"""A tutorial's decoder, its heads sharing a projection under a scale of their own, is a decoder like any other."""

import pytest
import shared_heads
import torch

import tfinfer
from tfinfer.export import export_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    module = shared_heads.SharedDecoder().eval()
    return module, export_model(module, tmp_path_factory.mktemp("shared") / "out", max_length=64)


def test_its_attention_is_recognised(exported):
    _, report = exported
    assert [(a.operator, a.pattern, a.count) for a in report.manifest.attention] == [
        ("GroupQueryAttention", "causal", 2)
    ]
    assert [(entry.num_kv_heads, entry.head_dim) for entry in report.manifest.cache] == [(3, 16)] * 4  # keys and values


def test_it_generates_what_the_module_would(exported):
    module, report = exported
    ids = [3, 1, 4, 1, 5]
    with tfinfer.load(report.folder, threads=1) as model:
        found = model.generate(ids, max_tokens=20, stop_ids=[]).token_ids
    for token in found:
        with torch.no_grad():
            assert token == int(module(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
