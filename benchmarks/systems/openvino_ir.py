"""OpenVINO GenAI over what optimum-intel makes of the checkpoint. That wants an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .pulled import Put, pulled

# In 4 bits embedding and head have 8, as everybody's here: so it does by itself with a ratio of 1.
WEIGHTS = {
    32: ["--weight-format", "fp32"],
    8: ["--weight-format", "int8"],
    4: ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"],
}


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens.

    setting "default": as it opens by itself, which may compute in bfloat16 and keeps keys and values of 8 bits;
    without, in float32, with keys and values of float32, the threads given, for latency.
    """
    import numpy as np
    import openvino as ov
    import openvino_genai as og

    folder = Path(given["cache"]) / f"openvino-{given['bits']}"
    if not (folder / "openvino_model.xml").exists():
        _convert(given, folder)
    options = {
        "INFERENCE_NUM_THREADS": given["threads"], "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32",
    }  # fmt: skip
    scheduler = og.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # else a prompt is read once, in the round that does not count
    chosen = {} if given["setting"] == "default" else options
    pipeline = og.LLMPipeline(str(folder), "CPU", scheduler_config=scheduler, **chosen)

    def generate(ids: list[int], new: int) -> Iterator[int]:
        config = og.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, ignore_eos=True)
        array, mask = ov.Tensor(np.array([ids], np.int64)), ov.Tensor(np.ones((1, len(ids)), np.int64))
        inputs = og.TokenizedInputs(array, mask)
        yield from pulled(lambda put: pipeline.generate(inputs, config, streamer=_streamer(og, put)))

    return generate


def _convert(given: dict[str, Any], folder: Path) -> None:
    if given["bits"] not in WEIGHTS:
        raise ValueError(f"{', '.join(map(str, WEIGHTS))} bits only")
    program = Path(sys.executable).with_name("optimum-cli")
    command = [program, "export", "openvino", "--model", given["checkpoint"], "--task", "text-generation-with-past"]
    subprocess.run([*command, *WEIGHTS[given["bits"]], folder], check=True)


def _streamer(og: Any, put: Put) -> Any:
    class Streamer(og.StreamerBase):
        def write(self, token: Any) -> Any:
            for one in [token] if isinstance(token, int) else token:
                put(one)
            return og.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing is kept back."""

    return Streamer()
