"""Which class runs the graph or graphs of a folder that generates: as its manifest says."""

from __future__ import annotations

from pathlib import Path

from tfinfer.manifest import Manifest
from tfinfer.session.concat import ConcatDecoder
from tfinfer.session.decoder import Decoder
from tfinfer.session.encoder_decoder import EncoderDecoder
from tfinfer.session.settings import OnCpu


def open_decoder(
    manifest: Manifest,
    folder: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    how: OnCpu | None = None,
    cuda_graph: bool | None = False,
) -> Decoder:
    """Open what generates. Raises as `tfinfer.load`."""
    kind = EncoderDecoder if manifest.kind == "encoder-decoder" else Decoder
    if manifest.cache_mode == "concatenated":
        kind = ConcatDecoder
    return kind(manifest, folder, device=device, threads=threads, how=how, cuda_graph=cuda_graph)
