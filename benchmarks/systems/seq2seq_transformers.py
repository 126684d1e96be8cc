"""transformers' own `generate` of an encoder-decoder: PyTorch eager, or onnxruntime under it by optimum-onnx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields the tokens of the best hypothesis, all at the end."""
    import torch
    import transformers

    if given["bits"] != 32:
        raise ValueError("float32 only")
    torch.set_num_threads(given["threads"])
    if given["setting"] == "optimum":
        model = _optimum(given)
    else:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(given["checkpoint"], dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(ids: list[int], new: int) -> Iterator[int]:
        source = torch.tensor([ids])
        out = model.generate(
            input_ids=source, attention_mask=torch.ones_like(source), num_beams=given["beams"], do_sample=False,
            min_new_tokens=new, max_new_tokens=new,
        )  # fmt: skip
        yield from out[0, 1:].tolist()

    return generate


def _optimum(given: dict[str, Any]) -> Any:
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    folder = Path(given["cache"]) / "optimum-32"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given["threads"]
    if not folder.exists():
        ORTModelForSeq2SeqLM.from_pretrained(given["checkpoint"], export=True).save_pretrained(folder)
    return ORTModelForSeq2SeqLM.from_pretrained(folder, session_options=options, use_io_binding=True)
