"""transformers with its own cache. setting "compile": torch.compile of the step over a static cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

DTYPES = {32: "float32", 16: "float16"}


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens; the head sees the last row alone."""
    import torch
    import transformers

    if given["bits"] not in DTYPES:
        raise ValueError("float32 and float16 only")
    torch.set_num_threads(given["threads"])
    device, dtype = given.get("device", "cpu"), getattr(torch, DTYPES[given["bits"]])
    model = transformers.AutoModelForCausalLM.from_pretrained(given["checkpoint"], dtype=dtype).eval().to(device)
    compiled = given["setting"] == "compile"
    mode = "reduce-overhead" if device == "cuda" else "default"  # the former records CUDA graphs
    step = torch.compile(model.forward, dynamic=False, mode=mode) if compiled else model.forward

    @torch.inference_mode()
    def generate(ids: list[int], new: int) -> Iterator[int]:
        size = given["longest"]
        cache = transformers.StaticCache(config=model.config, max_cache_len=size) if compiled else None
        tokens, at = torch.tensor([ids], device=device), 0
        for number in range(new):
            places = torch.arange(at, at + tokens.shape[1], device=device)
            extra = {"cache_position": places, "position_ids": places[None]} if compiled else {}
            forward = step if number else model.forward
            out = forward(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
            at, cache = at + tokens.shape[1], out.past_key_values
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)  # a copy: a recorded step writes over its results
            yield tokens.item()

    return generate
