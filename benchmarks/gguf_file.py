"""A checkpoint in Hugging Face's layout as a GGUF file, for llama.cpp: F32, Q8_0 or Q4_0.

    python benchmarks/gguf_file.py CHECKPOINT FILE --bits 4

Names of tensors and fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Norms stay float32; with 4 bits
the embedding, which is the head too, has 8, as tfinfer's has.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

TYPES = {32: gguf.GGMLQuantizationType.F32, 8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}
FILE_TYPES = {32: gguf.LlamaFileType.ALL_F32, 8: gguf.LlamaFileType.MOSTLY_Q8_0, 4: gguf.LlamaFileType.MOSTLY_Q4_0}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3", "GPT2LMHeadModel": "gpt2"}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight", "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}  # fmt: skip


def write(checkpoint: Path, file: Path, bits: int) -> None:
    """Write the weights of `checkpoint` with `bits` of 32, 8 or 4."""
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(str(file), architecture)
    _write_sizes(writer, config)
    writer.add_file_type(FILE_TYPES[bits])
    _write_tokens(writer, config["vocab_size"])
    tensors = load_file(checkpoint / "model.safetensors")
    for name, array in tensors.items():
        _write_tensor(writer, _name(name), _laid_out(name, array, config), bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    writer.add_context_length(config.get("max_position_embeddings") or config["n_positions"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.get("num_hidden_layers") or config["n_layer"])
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    if "rms_norm_eps" in config:
        size = config.get("head_dim") or hidden // heads
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_rope_dimension_count(size)
        writer.add_key_length(size)
        writer.add_value_length(size)
    else:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _write_tokens(writer: Any, size: int) -> None:
    """A vocabulary that names ids, since the readers insist on one."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _name(name: str) -> str:
    if name in OTHERS:
        return OTHERS[name]
    layer, inner, side = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
    return f"blk.{layer}.{LAYER[inner]}.{side}"


def _laid_out(name: str, array: Any, config: dict[str, Any]) -> Any:
    """Matrices as (out, in); queries and keys of llama with the halves of a head interleaved, as its rotation wants."""
    if "transformer.h." in name and array.ndim == 2:  # GPT-2's Conv1D
        return np.ascontiguousarray(array.T)
    found = re.search(r"self_attn\.([qk])_proj\.weight", name)
    if config["architectures"][0] == "LlamaForCausalLM" and found:
        heads = config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
    return array


def _write_tensor(writer: Any, name: str, array: Any, bits: int) -> None:
    array = array.astype(np.float32)
    if bits == 32 or array.ndim < 2 or name.startswith("position"):
        writer.add_tensor(name, array)
        return
    kind = TYPES[8 if name.startswith(("token_embd", "output.")) else bits]
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", type=int, choices=TYPES, default=32)
    given = parser.parse_args()
    write(given.checkpoint, given.file, given.bits)
