"""Tiny checkpoints of transformers, and optimum's environment, which is another than ours."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

SIDE = Path(__file__).parent / "optimum_side.py"
OPTIMUM = os.environ.get("TFINFER_OPTIMUM_PYTHON", "")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.interop)
            for category in ("FutureWarning", "DeprecationWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))


def words(folder):
    """A tokenizer of single letters beside a checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": 3 + i for i in range(93)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with three random checkpoints, by name, and the models themselves."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shared = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
    models = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, **shared,
            )
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **shared)),
        "bert": BertModel(
            BertConfig(
                vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=64,
            )
        ),
    }  # fmt: skip
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        model.eval().save_pretrained(root / name)
        words(root / name)
    return root, models


@pytest.fixture
def optimum():
    """Runs a program of optimum's environment; skips where there is none."""
    if not OPTIMUM or not Path(OPTIMUM).exists():
        pytest.skip("TFINFER_OPTIMUM_PYTHON names no python with optimum-onnx: make test-interop")

    def run(*arguments):
        environment = {"HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
        done = subprocess.run(
            [str(Path(OPTIMUM).absolute()), *map(str, arguments)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return json.loads(found[0].removeprefix("RESULT ")) if found else None

    return run


def greedy(model, rows, new):
    """PyTorch's greedy tokens after rows of one length."""
    ids = torch.tensor(rows)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[:, ids.shape[1] :].tolist()
