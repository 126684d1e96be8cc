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
    """Return a function that yields tokens.

    setting "default": with as many threads as it takes by itself. "int8 cache": keys and values of 8 bits, with scales
    that are made up: good for its speed alone.
    """
    import onnxruntime_genai as og

    device = given.get("device", "cpu")
    rounded = "-int8-cache" if given["setting"] == "int8 cache" else ""
    folder = Path(given["cache"]) / f"genai-{given['bits']}{'' if device == 'cpu' else f'-{device}'}{rounded}"
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
    if given["setting"] == "int8 cache":
        options += ["kv_cache_quant_scheme=int8_per_channel", f"kv_cache_scale_file={_scales(given, folder)}"]
    subprocess.run([*command, "--extra_options", *options], check=True)


def _scales(given: dict[str, Any], folder: Path) -> Path:
    """A file with the same scale for every feature of every layer."""
    config = json.loads((Path(given["checkpoint"]) / "config.json").read_text())
    layers, features = config["num_hidden_layers"], config["num_key_value_heads"] * config["head_dim"]
    file = folder.with_name(f"{folder.name}-scales.json")
    file.write_text(json.dumps({"scales": {name: [[0.05] * features] * layers for name in ("k_scales", "v_scales")}}))
    return file
