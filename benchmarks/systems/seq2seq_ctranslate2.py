"""CTranslate2's Translator: its own converter from the checkpoint; float32, int8 (it has no 4 bits on the CPU)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .ctranslate2_model import converted


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields the tokens of the best hypothesis, all at the end."""
    import ctranslate2

    folder, compute_type = converted(given)
    translator = ctranslate2.Translator(
        folder, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=given["threads"]
    )

    def generate(ids: list[int], new: int) -> Iterator[int]:
        found = translator.translate_batch(
            [[f"t{i}" for i in ids]], beam_size=given["beams"], min_decoding_length=new, max_decoding_length=new,
            end_token=[],
        )  # fmt: skip
        yield from (int(token.removeprefix("t")) for token in found[0].hypotheses[0])

    return generate
