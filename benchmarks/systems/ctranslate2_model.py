"""CTranslate2: its own converter from the checkpoint; float32, int8 (it has no 4 bits on the CPU)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .pulled import pulled

TYPES = {32: "float32", 8: "int8"}


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens."""
    import ctranslate2

    folder, compute_type = converted(given)
    generator = ctranslate2.Generator(
        folder, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=given["threads"]
    )

    def generate(ids: list[int], new: int) -> Iterator[int]:
        yield from pulled(
            lambda put: generator.generate_batch(
                [[f"t{i}" for i in ids]], max_length=new, min_length=new, sampling_topk=1, beam_size=1,
                include_prompt_in_result=False, end_token=[], callback=lambda step: bool(put(step.token_id)),
            )
        )  # fmt: skip

    return generate


def converted(given: dict[str, Any]) -> tuple[str, str]:
    """The folder of the checkpoint converted, and the type to compute in."""
    import ctranslate2

    if given["bits"] not in TYPES:
        raise ValueError("float32 and int8 only")
    folder = Path(given["cache"]) / f"ctranslate2-{given['bits']}"
    if not (folder / "model.bin").exists():
        converter = ctranslate2.converters.TransformersConverter(given["checkpoint"])
        converter.convert(str(folder), quantization=TYPES[given["bits"]])
    return str(folder), TYPES[given["bits"]]
