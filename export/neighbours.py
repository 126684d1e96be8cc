"""Files with which other runtimes run our folder: onnxruntime-genai's `genai_config.json`, optimum's `config.json`.

Both want to know a kind of model by name. The graph is all that they run of it, so every folder says the same one, and
the sizes are those of its cache: what is written describes the graph's inputs and outputs, not the module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfinfer.errors import InputError
from tfinfer.manifest import CacheSpec, Manifest

GENAI, OPTIMUM = "genai", "optimum"
NEIGHBOURS = (GENAI, OPTIMUM)
GENAI_TYPE = "decoder"  # onnxruntime-genai's word for whatever has ids, a mask and a cache
# In transformers' configurations: one whose fields name the heads of the cache and their size, and one of encoders.
OPTIMUM_DECODER, OPTIMUM_ENCODER = "llama", "bert"
HIDDEN = "last_hidden_state"  # the one output that optimum takes of an encoder
GROWS = "GroupQueryAttention"  # gives a present longer than its past where the two are not one buffer


def check_names(also: Sequence[str]) -> tuple[str, ...]:
    """Raises InputError for a neighbour that is not known."""
    if unknown := [name for name in also if name not in NEIGHBOURS]:
        raise InputError(f"unknown neighbour {unknown[0]!r}: expected one of {', '.join(NEIGHBOURS)}")
    return tuple(dict.fromkeys(also))


def write(also: Sequence[str], manifest: Manifest, folder: Path) -> None:
    """Write what these neighbours need into a folder. Raises InputError where one cannot run it, and says why."""
    makers = {GENAI: _genai, OPTIMUM: _optimum}
    for name in also:
        for file, content in makers[name](manifest).items():
            (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if also and manifest.text.tokenizer is not None:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **manifest.text.special_tokens}
        config["model_max_length"] = manifest.max_length
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _geometry(manifest: Manifest, name: str) -> tuple[int, CacheSpec]:
    """How many layers the cache has and what each is like. Raises InputError where they are not all alike."""
    if manifest.kind != "decoder" or manifest.roles is None:
        raise InputError(f"--also {name}: expected a decoder, this is an {manifest.kind}")
    if manifest.states:
        raise InputError(f"--also {name}: this module keeps states beside its cache, which {name} does not hand on")
    layers = len(manifest.cache) // 2
    wanted = [f"past_key_values.{i}.{side}" for i in range(layers) for side in ("key", "value")]
    shapes = {(entry.num_kv_heads, entry.head_dim) for entry in manifest.cache}
    if sorted(wanted) != sorted(entry.past for entry in manifest.cache) or len(shapes) != 1:
        found = ", ".join(f"{heads} x {size}" for heads, size in sorted(shapes))
        raise InputError(
            f"--also {name}: expected a key and a value of one shape for every layer, the cache of this module has "
            f"{len(manifest.cache)} entries of {found}"
        )
    return layers, manifest.cache[0]


def _genai(manifest: Manifest) -> dict[str, Any]:
    """genai_config.json: the cache is shared, for our graphs write it in place."""
    layers, entry = _geometry(manifest, GENAI)
    roles, ids = manifest.roles, manifest.token_ids
    assert roles is not None
    pad = ids.pad if ids.pad is not None else next(iter(ids.eos), 0)
    inputs = {"input_ids": roles.input_ids, "attention_mask": roles.attention_mask}
    if roles.position_ids is not None:
        inputs["position_ids"] = roles.position_ids
    inputs |= {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    outputs = {
        "logits": roles.logits, "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
    }  # fmt: skip
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": manifest.graphs["decoder"].file,
        "head_size": entry.head_dim,
        "hidden_size": entry.num_kv_heads * entry.head_dim,
        "num_attention_heads": entry.num_kv_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": entry.num_kv_heads,
        "inputs": inputs,
        "outputs": outputs,
    }
    model: dict[str, Any] = {"type": GENAI_TYPE, "context_length": manifest.max_length}
    model |= {"vocab_size": manifest.num_logits, "pad_token_id": pad, "eos_token_id": list(ids.eos)}
    model |= {} if ids.bos is None else {"bos_token_id": ids.bos}
    search = {"do_sample": False, "max_length": manifest.max_length, "num_beams": 1, "past_present_share_buffer": True}
    return {"genai_config.json": {"model": model | {"decoder": decoder}, "search": search}}


def _optimum(manifest: Manifest) -> dict[str, Any]:
    """config.json, for ORTModelForCausalLM or ORTModelForFeatureExtraction with `file_name=`."""
    if manifest.kind == "encoder":
        return {"config.json": _encoder_config(manifest)}
    layers, entry = _geometry(manifest, OPTIMUM)
    if others := sorted({a.operator for a in manifest.attention} - {GROWS}):
        raise InputError(
            f"--also optimum: optimum wants a cache that grows, and {', '.join(others)} writes into one of a fixed "
            "size: only modules whose attention all becomes GroupQueryAttention (--flavor ort) run there"
        )
    ids = manifest.token_ids
    config = {
        "model_type": OPTIMUM_DECODER,
        "head_dim": entry.head_dim,
        "hidden_size": entry.num_kv_heads * entry.head_dim,
        "max_position_embeddings": manifest.max_length,
        "num_attention_heads": entry.num_kv_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": entry.num_kv_heads,
        "vocab_size": manifest.num_logits,
        "bos_token_id": ids.bos,
        "eos_token_id": list(ids.eos) or None,
        "pad_token_id": ids.pad,
        "use_cache": True,
    }
    return {"config.json": config}


def _encoder_config(manifest: Manifest) -> dict[str, Any]:
    roles, outputs = manifest.encoder, {tensor.name: tensor for tensor in manifest.graphs["encoder"].outputs}
    if roles is None or roles.input_ids is None or roles.hidden_states != HIDDEN:
        raise InputError(
            f"--also optimum: optimum takes ids and an output {HIDDEN}; this graph gives {', '.join(outputs)}: let the "
            f'module return {{"{HIDDEN}": ...}}'
        )
    return {
        "model_type": OPTIMUM_ENCODER,
        "hidden_size": outputs[HIDDEN].shape[-1],
        "max_position_embeddings": manifest.max_length,
        "num_attention_heads": 1,
        "vocab_size": manifest.vocab_size,
        "pad_token_id": manifest.token_ids.pad or 0,
    }
