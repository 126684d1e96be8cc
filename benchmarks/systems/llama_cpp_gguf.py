"""llama.cpp through llama-cpp-python's C interface: GGUF in F32, Q8_0 or Q4_0, greedy sampler in C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CACHES = {"f16": 1, "q8": 8}  # ggml_type


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens.

    setting: words of "flash" (attention), "f16" or "q8" (the cache; float32 else, as everybody here), "default".
    """
    import llama_cpp as c
    from gguf_file import write

    file = Path(given["cache"]) / f"llama-{given['bits']}.gguf"
    if not file.exists():
        write(Path(given["checkpoint"]), file, given["bits"])
    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp does not open the file")
    context = c.llama_init_from_model(model, _params(c, given))
    if not context:
        raise RuntimeError("llama.cpp makes no context")
    sampler = c.llama_sampler_init_greedy()

    def generate(ids: list[int], new: int) -> Iterator[int]:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        tokens = ids
        for _ in range(new):
            for at in range(0, len(tokens), 2048):
                piece = tokens[at : at + 2048]
                held = (c.llama_token * len(piece))(*piece)
                if c.llama_decode(context, c.llama_batch_get_one(held, len(piece))):
                    raise RuntimeError("llama.cpp does not decode")
            token = c.llama_sampler_sample(sampler, context, -1)
            tokens = [token]
            yield token

    return generate


def _params(c: Any, given: dict[str, Any]) -> Any:
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.no_perf = given["longest"], 2048, True
    words = given["setting"].split()
    if "default" not in words:
        params.n_ubatch, params.n_threads, params.n_threads_batch = 512, given["threads"], given["threads"]
        params.flash_attn_type = int("flash" in words)
        params.type_k = params.type_v = next((kind for word, kind in CACHES.items() if word in words), 0)
    return params
