"""optimum-onnx: its own export, transformers' loop around onnxruntime. It wants an environment of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens: the model's forward with its cache, without `generate` around it."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    if given["bits"] != 32:
        raise ValueError("float32 only")
    torch.set_num_threads(given["threads"])
    folder = Path(given["cache"]) / "optimum-32"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given["threads"]
    if not folder.exists():
        ORTModelForCausalLM.from_pretrained(given["checkpoint"], export=True).save_pretrained(folder)
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=True)

    @torch.inference_mode()
    def generate(ids: list[int], new: int) -> Iterator[int]:
        tokens, cache, at = torch.tensor([ids]), None, 0
        for _ in range(new):
            at += tokens.shape[1]
            mask = torch.ones((1, at), dtype=torch.int64)
            places = torch.arange(at - tokens.shape[1], at)[None]
            out = model(tokens, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            yield tokens.item()

    return generate
