"""Random checkpoints of the shapes that the benchmarks compare, in Hugging Face's layout, made once and kept.

Every system converts the same folder, so all of them compute with the same weights. The tokenizer is of no use but to
the converters that insist on one: one token per id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

LONGEST = 8192
FACTOR = 1.25  # of random weights: with those as they are made all tokens would be the same

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("LlamaForCausalLM", {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "qwen3-0.6b": ("Qwen3ForCausalLM", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "gpt2": ("GPT2LMHeadModel", {"n_positions": LONGEST}),
    "t5-small": ("T5ForConditionalGeneration", {
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }),
    "toy": ("LlamaForCausalLM", {
        "vocab_size": 500, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def checkpoint(shape: str, root: Path) -> Path:
    """Return the folder of a shape's checkpoint below `root`, made if it is not there."""
    folder = root / shape / "checkpoint"
    if (folder / "done").exists():
        return folder
    class_name, sizes = SHAPES[shape]
    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    config = kind.config_class(**_positions(kind.config_class), **sizes)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(FACTOR)
    model.save_pretrained(folder)
    _write_tokenizer(folder, sizes.get("vocab_size", 50257))
    _write_old_names(folder / "config.json")
    (folder / "done").touch()
    return folder


def _positions(config_class: Any) -> dict[str, Any]:
    return {"max_position_embeddings": LONGEST} if "max_position_embeddings" in config_class().to_dict() else {}


def _write_tokenizer(folder: Path, size: int) -> None:
    words = {f"t{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t0"
    )
    wrapped.save_pretrained(folder)


def _write_old_names(file: Path) -> None:
    """Say the rotary base where readers of before transformers 5 look for it too."""
    config = json.loads(file.read_text())
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        config["rope_theta"] = theta
    config["torch_dtype"] = "float32"
    file.write_text(json.dumps(config, indent=1))
