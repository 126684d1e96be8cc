"""What weights of few bits cost: quantisers and block sizes against the float32 graph, on a text that none was given.

    python benchmarks/quantise.py SOURCE --weights FILE --tokenizer FILE --text held_out.txt [--calibration FILE]

SOURCE is what `tfinfer export` takes. For every folder: the mean KL divergence of its chances of the next token from
the float32 graph's, the share of first choices that are the same, how much the loss grows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.calibration import read_text
from tfinfer.export.sources import load_source

PIECES = 40  # of the text, evenly over it


def chances(folder: Path, pieces: list[Any]) -> Iterator[torch.Tensor]:
    """For each piece the logarithms of the chances of what follows every token, (seq, vocab)."""
    with tfinfer.load(folder) as model:
        decoder = model.decoder
        for piece in pieces:
            cache = decoder.open_cache(1, piece.size)
            logits = decoder.prefill(cache, cache.acquire(), piece[0], keep=piece.size)
            cache.close()
            yield torch.from_numpy(logits).log_softmax(-1)


def compared(folder: Path, reference: Path, pieces: list[Any]) -> dict[str, float]:
    kl, same, loss = [], [], []
    for piece, p, q in zip(pieces, chances(reference, pieces), chances(folder, pieces)):
        following = torch.from_numpy(piece[0, 1:])[:, None]
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
        same.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
        loss.append((p - q)[:-1].gather(-1, following).mean().item())
    return {"kl": float(np.mean(kl)), "same": float(np.mean(same)), "loss": float(np.mean(loss))}


def recipes(calibrations: Sequence[Path], symmetric: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options of exports: 4 bits in blocks of every size, with the head by channel, 8 bits both ways."""
    shared = {"symmetric": symmetric, "attention": False}
    gptq: list[dict[str, Any]] = [{"quantiser": "gptq", "calibration": text} for text in (None, *calibrations)]
    for size in (32, 64, 128):
        for way in ({"quantiser": "rtn"}, *gptq):
            yield f"int4 in blocks of {size:3}", {"dtype": "int4", "block_size": size, **shared, **way}
    yield "int8 in blocks of 128", {"dtype": "int8", **shared}
    if symmetric:
        for way in ({"quantiser": "rtn"}, *gptq):
            yield "int4, head by channel", {"dtype": "int4", "per_channel": True, **shared, **way}
            yield "int8 by channel", {"dtype": "int8", "per_channel": True, **shared, **way}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to measure on; not what was trained on")
    parser.add_argument("--calibration", type=Path, help="a text for gptq besides the model's own")
    parser.add_argument("--asymmetric", action="store_true")
    a = parser.parse_args()
    source = load_source(a.source, weights=a.weights, tokenizer=a.tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        wide = export_model(source, Path(place) / "wide", attention=False).manifest
        pieces = read_text(a.text, source.tokenizer, wide.max_length, wide.vocab_size).pieces
        chosen = [pieces[i] for i in np.unique(np.linspace(0, len(pieces) - 1, PIECES).astype(int))]
        for name, options in recipes([a.calibration] if a.calibration else [], not a.asymmetric):
            out, start = Path(place) / "small", time.perf_counter()
            made = export_model(source, out, overwrite=True, **options).manifest.weights
            assert made is not None
            found = compared(out, Path(place) / "wide", chosen)
            row = {"weights": name, "quantiser": made.quantiser, "on": made.calibration}
            rows.append(row | found | {"seconds": time.perf_counter() - start, "proof": made.agreement})
            print(
                f"{name:21}, {made.quantiser:4} on {made.calibration or '-':14} KL {found['kl']:.4f}, "
                f"same first choice {found['same']:.1%}, loss {found['loss']:+.4f}",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
