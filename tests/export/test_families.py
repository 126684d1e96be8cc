"""Hugging Face causal models of toy size, saved as checkpoints and exported by one path that knows none of them."""

import pytest
import torch

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.sources import load_source
from tfinfer.proof.prove import verify_folder

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 7,
}  # fmt: skip
GQA = "GroupQueryAttention"
FAMILIES = {
    "llama": [(GQA, "causal", 2)],
    "qwen3": [(GQA, "causal", 2)],
    "gpt2": [(GQA, "causal", 2)],
    "mistral": [(GQA, "causal, window 7", 2)],
    "bloom": [(GQA, "causal, a bias per key", 2)],
    "gemma2": [(GQA, "causal, window 7, soft cap 50", 1), (GQA, "causal, soft cap 50", 1)],
    "phi3": [(GQA, "causal, window 7", 2)],
    "gpt_neox": [(GQA, "causal", 2)],
    "falcon": [(GQA, "causal", 2)],
    "opt": [(GQA, "causal", 2)],
}


def checkpoint(family, folder):
    """A tiny random model of a family as a folder; larger than usual weights, so that no mistake hides in noise."""
    known = transformers.AutoConfig.for_model(family).to_dict()
    config = transformers.AutoConfig.for_model(family, **{k: v for k, v in SIZES.items() if k in known})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_exports_verifies_and_generates_what_pytorch_does(family, tmp_path):
    model = checkpoint(family, tmp_path / "checkpoint")
    report = export_model(load_source(str(tmp_path / "checkpoint")), tmp_path / "out", max_length=120)
    assert [(a.operator, a.pattern, a.count) for a in report.manifest.attention] == FAMILIES[family]
    assert report.manifest.token_ids.eos == (2,)
    ids = torch.randint(3, 97, (1, 9))
    wanted = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    with tfinfer.load(tmp_path / "out") as loaded:
        assert verify_folder(loaded.decoder, tmp_path / "out").passed
        assert list(loaded.generate(ids[0].tolist(), max_tokens=64, stop_ids=[]).token_ids) == wanted
