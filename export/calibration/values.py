"""Inner values of a folder's float32 graph, as they come while it runs on text.

The graph is written once more beside itself, with the values as outputs, and run by the same session as ever: so that
caches, windows and states are what they are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tfinfer.errors import InputError
from tfinfer.manifest import Manifest
from tfinfer.proof.prove import open_session
from tfinfer.session.decoder import Decoder
from tfinfer.session.encoder import Encoder
from tfinfer.session.tuned import open_graph

from .samples import Ids

Array = npt.NDArray[Any]
Take = Callable[[str, Array], None]  # what is done with a value: its name, and what it is for one piece of text

AT_ONCE = 64  # values that are kept of a run
WATCHED = ".watched"


def watch(manifest: Manifest, folder: Path, names: Sequence[str], pieces: Sequence[Ids], take: Take) -> None:
    """Run the graph of a decoder or encoder on pieces of text and hand on what its values `names` are.

    manifest: the folder's, or a draft of it. pieces: (1, seq) each. take: called once for each piece and name with
    (1, seq, ...) or whatever else the value is; presents of a cache as (1, num_kv_heads, seq, head_dim), those of a
    window as much as it holds. Only so many values are in memory as AT_ONCE says; beyond that the texts run again.

    Raises InputError for an encoder-decoder, an encoder that takes no ids, and names that the graph does not have.
    """
    if len(manifest.graphs.keys() - {"attention"}) != 1:
        raise InputError(f"calibration is for decoders and encoders, not for an {manifest.kind}: export it in fp32")
    session = open_session(manifest, folder)
    try:
        if isinstance(session, Encoder):
            session.check_takes_texts()
        with _graph_with(manifest, folder, names) as file:
            session._session = None  # one set of weights at a time
            spec = replace(manifest.graphs["encoder" if isinstance(session, Encoder) else "decoder"], file=file)
            opened = open_graph(folder, spec, "cpu", None, None).session
            once = list(dict.fromkeys(names))
            for some in (once[at : at + AT_ONCE] for at in range(0, len(once), AT_ONCE)):
                for piece in pieces:
                    session._session = _Watched(opened, some, _cut(manifest, piece, take))
                    _run(session, piece)
    finally:
        session.close()


@contextmanager
def _graph_with(manifest: Manifest, folder: Path, names: Sequence[str]) -> Iterator[str]:
    """The name of a file in the folder: its graph with more outputs, which lasts as long as the block."""
    (graph,) = (spec for name, spec in manifest.graphs.items() if name != "attention")
    file = folder / f"{graph.file}{WATCHED}"
    model = ir.load(folder / graph.file)  # its weights stay where they lie
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    if missing := [name for name in names if name not in values]:
        raise InputError(f"the graph has no value {', '.join(missing[:8])}")
    outputs = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in dict.fromkeys(names) if name not in outputs)
    try:
        ir.save(model, file)
        yield file.name
    finally:
        file.unlink(missing_ok=True)


def _run(session: Decoder | Encoder, piece: Ids) -> None:
    if isinstance(session, Encoder):
        session.run({"input_ids": piece})
        return
    cache = session.open_cache(1, piece.size)
    try:
        # Every row, for those that nobody asks for do not reach the last layer's end.
        session.prefill(cache, cache.acquire(), piece[0], keep=piece.size if session.manifest.all_rows else 1)
    finally:
        cache.close()


def _cut(manifest: Manifest, piece: Ids, take: Take) -> Take:
    """What takes a cache's buffers without the room that they have for more."""
    presents = {entry.present for entry in manifest.cache}
    return lambda name, array: take(name, array[:, :, : piece.size] if name in presents else array)


class _Watched:
    """An onnxruntime session that hands on some values of each run; whoever runs it does not notice."""

    def __init__(self, session: Any, names: Sequence[str], take: Take) -> None:
        self._session, self._names, self._take = session, names, take

    def run(self, names: Sequence[str], feeds: dict[str, Array]) -> list[Array]:
        found: list[Array] = self._session.run([*names, *self._names], feeds)
        for name, array in zip(self._names, found[len(names) :]):
            self._take(name, array)
        return found[: len(names)]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        for name in self._names:
            binding.bind_output(name, "cpu")
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)
        for name, value in zip(self._names, binding.get_outputs()):  # bound first, so they come first
            self._take(name, np.asarray(value.numpy()))
