"""OpenVINO GenAI over the GGUF file that llama.cpp reads; two threads, for latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .pulled import Put, pulled


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens."""
    import numpy as np
    import openvino as ov
    import openvino_genai as og
    from gguf_file import write

    file = Path(given["cache"]) / f"llama-{given['bits']}.gguf"
    if not file.exists():
        write(Path(given["checkpoint"]), file, given["bits"])
    options = {"INFERENCE_NUM_THREADS": given["threads"], "PERFORMANCE_HINT": "LATENCY"}
    if given["bits"] == 32:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    pipeline = og.LLMPipeline(str(file), "CPU", **options)

    def generate(ids: list[int], new: int) -> Iterator[int]:
        config = og.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, ignore_eos=True)
        array, mask = ov.Tensor(np.array([ids], np.int64)), ov.Tensor(np.ones((1, len(ids)), np.int64))
        inputs = og.TokenizedInputs(array, mask)
        yield from pulled(lambda put: pipeline.generate(inputs, config, streamer=_streamer(og, put)))

    return generate


def _streamer(og: Any, put: Put) -> Any:
    class Streamer(og.StreamerBase):
        def write(self, token: Any) -> Any:
            for one in [token] if isinstance(token, int) else token:
                put(one)
            return og.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing is kept back."""

    return Streamer()
