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
    that are made up: good for its speed alone. "4-bit head": as its builder makes 4 bits by itself; without, the last
    product has 8 bits, as everybody's here.
    """
    import onnxruntime_genai as og

    folder = _folder(given)
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


def _folder(given: dict[str, Any]) -> Path:
    """Where the model is kept. Raises ValueError for a 4-bit head where the rest has not 4 bits."""
    device = given.get("device", "cpu")
    if given["setting"] == "4-bit head" and given["bits"] != 4:
        raise ValueError("a 4-bit head goes with 4 bits only")
    name = f"genai-{given['bits']}{'' if device == 'cpu' else f'-{device}'}"
    if given["bits"] < _head_bits(given):
        name += "-head8"
    return Path(given["cache"]) / f"{name}{'-int8-cache' if given['setting'] == 'int8 cache' else ''}"


def _build(given: dict[str, Any], folder: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", given["checkpoint"], "-o", str(folder)]
    command += ["-p", PRECISIONS[given["bits"]], "-e", given.get("device", "cpu"), "-c", str(folder) + "-work"]
    options = ["hf_token=false"]
    if given["bits"] == 4:
        options += ["int4_accuracy_level=4", "int4_block_size=32"]
        if _head_bits(given) == 8:  # its default method with the head alone wider names a tied embedding wrongly
            options.append("algo_config=rtn_last")
    if given["setting"] == "int8 cache":
        options += ["kv_cache_quant_scheme=int8_per_channel", f"kv_cache_scale_file={_scales(given, folder)}"]
    subprocess.run([*command, "--extra_options", *options], check=True)
    if given["bits"] == 4:
        _check_head(folder, _head_bits(given))


def _head_bits(given: dict[str, Any]) -> int:
    return 4 if given["setting"] == "4-bit head" else max(given["bits"], 8)


def _check_head(folder: Path, expected: int) -> None:
    """Raises RuntimeError where the builder made another head: options that it does not know it ignores."""
    import onnx

    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    head = next(node for node in nodes if node.op_type == "MatMulNBits" and "lm_head" in node.name)
    bits = next(a.i for a in head.attribute if a.name == "bits")
    if bits != expected:
        (folder / "genai_config.json").unlink()  # so that it is built anew
        raise RuntimeError(f"the builder made a head of {bits} bits, not of {expected}")


def _scales(given: dict[str, Any], folder: Path) -> Path:
    """A file with the same scale for every feature of every layer."""
    config = json.loads((Path(given["checkpoint"]) / "config.json").read_text())
    layers, features = config["num_hidden_layers"], config["num_key_value_heads"] * config["head_dim"]
    file = folder.with_name(f"{folder.name}-scales.json")
    file.write_text(json.dumps({"scales": {name: [[0.05] * features] * layers for name in ("k_scales", "v_scales")}}))
    return file
