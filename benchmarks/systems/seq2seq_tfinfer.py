"""tfinfer: the encoder-decoder exported once, then asked for whole translations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .tfinfer_folder import exported


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields the tokens of the best hypothesis, all at the end."""
    import tfinfer

    model = tfinfer.load(exported(given), threads=given["threads"])

    def generate(ids: list[int], new: int) -> Iterator[int]:
        found = model.generate(ids, max_tokens=new, stop_ids=[], num_beams=given["beams"])
        yield from found.token_ids

    return generate
