"""onnxruntime-genai: its own model builder, its own loop in C++."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PRECISIONS = {32: "fp32", 16: "fp16", 8: "int8", 4: "int4"}


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens. setting "default": with as many threads as it takes by itself."""
    import onnxruntime_genai as og

    device = given.get("device", "cpu")
    folder = Path(given["cache"]) / f"genai-{given['bits']}{'' if device == 'cpu' else f'-{device}'}"
    if not (folder / "genai_config.json").exists():
        _build(given, folder)
    settings = json.loads((folder / "genai_config.json").read_text())
    options = settings["model"]["decoder"]["session_options"]
    options.pop("intra_op_num_threads", None)
    if given["setting"] != "default":
        options["intra_op_num_threads"] = given["threads"]
    (folder / "genai_config.json").write_text(json.dumps(settings, indent=1))
    model = og.Model(str(folder))

    def generate(ids: list[int], new: int) -> Iterator[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens([ids])
        for _ in range(new):
            generator.generate_next_token()
            yield generator.get_next_tokens()[0]

    return generate


def _build(given: dict[str, Any], folder: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", given["checkpoint"], "-o", str(folder)]
    command += ["-p", PRECISIONS[given["bits"]], "-e", given.get("device", "cpu"), "-c", str(folder) + "-work"]
    options = ["hf_token=false"]
    if given["bits"] == 4:
        options += ["int4_accuracy_level=4", "int4_block_size=32"]
    subprocess.run([*command, "--extra_options", *options], check=True)
