"""One encoder's graph: arrays in, arrays out, whole sequences at once. Knows neither text nor pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import ClosedError, IncompatibleModelError, InputError
from tfinfer.manifest import EncoderRoles, Manifest
from tfinfer.session.decoder import check_runtime, without_cuda
from tfinfer.session.failures import translated
from tfinfer.session.feeds import complete
from tfinfer.session.settings import OnCpu
from tfinfer.session.tuned import open_graph

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

# What onnxruntime calls the types that a manifest may name.
_ORT_TYPES = {
    "float32": "float",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int64": "int64",
    "int32": "int32",
    "bool": "bool",
}


class Encoder:
    """The graph "encoder" of a folder, opened on one device. Several threads may use it at once."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        how: OnCpu | None = None,
    ) -> None:
        """Open it. how: threads and switches on the CPU; by default what the folder's tuning or `threads` says."""
        check_runtime(manifest)
        self.roles = manifest.encoder or EncoderRoles()
        self.manifest, self.graph = manifest, manifest.graphs["encoder"]
        self.vocab_size = manifest.source_vocab_size or manifest.vocab_size
        self.max_length = manifest.max_source_length or manifest.max_length
        device, why_not = without_cuda(manifest, device)
        opened = open_graph(folder, self.graph, device, threads, how)
        self.device, self.threads, self.reason = opened.device, opened.threads, why_not or opened.reason
        self.settings = opened.settings
        self._session: Any = opened.session
        self._check_signature()

    def _check_signature(self) -> None:
        """The graph has the inputs and outputs that the manifest says, and among them those that its roles name."""
        session, graph, roles = self._session, self.graph, self.roles
        spare = session.get_overridable_initializers()
        for side, found, wanted in (
            ("inputs", [*session.get_inputs(), *spare], graph.inputs),
            ("outputs", session.get_outputs(), graph.outputs),
        ):
            types = {(value.name, value.type) for value in found}
            odd = types ^ {(tensor.name, f"tensor({_ORT_TYPES.get(tensor.dtype)})") for tensor in wanted}
            if odd:
                names = ", ".join(sorted({name for name, _ in odd})[:8])
                raise IncompatibleModelError(f"the graph and the manifest disagree on the {side} {names}")
        shapes = {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}
        for name in (roles.input_ids, roles.attention_mask, roles.token_type_ids):
            if name is not None and len(shapes.get(name, ())) != 2:
                raise IncompatibleModelError(f"expected {name} to be (batch, seq), the manifest says otherwise")
        for name, rank in ((roles.hidden_states, 3), (roles.pooled, 2)):
            if name is not None and (len(shapes.get(name, ())) != rank or not isinstance(shapes[name][-1], int)):
                raise IncompatibleModelError(f"expected {rank} axes of {name}, the last a number; it has other ones")

    def close(self) -> None:
        """Let the graph go; calls after this raise ClosedError."""
        self._session = None

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The named outputs, by default all, of inputs that are checked and completed: see `feeds.complete`."""
        if self._session is None:
            raise ClosedError("the model was closed: load it again")
        return self._run(complete(inputs, self.graph, self.roles, self.vocab_size, self.max_length), outputs)

    def encode(self, ids: Ids, mask: Ids | None = None, types: Ids | None = None, *, output: str) -> Array:
        """One output for ids (batch, seq) int64, taken as they are.

        mask: (batch, seq) int64, 1 where there is a token; None is all ones. types: token types; None is all zeros.
        What of these the graph does not take is left out. Raises InputError for a graph that takes something else.
        """
        self.check_takes_texts()
        roles = self.roles
        mask = np.ones_like(ids) if mask is None else mask
        types = np.zeros_like(ids) if types is None else types
        given = {roles.input_ids: ids, roles.attention_mask: mask, roles.token_type_ids: types}
        found = self._run({name: array for name, array in given.items() if name is not None}, [output])[output]
        width = next(tensor.shape for tensor in self.graph.outputs if tensor.name == output)[-1]
        if found.shape != (wanted := (*ids.shape[: found.ndim - 1], width)):
            raise IncompatibleModelError(f"{output}: expected {wanted} for ids {ids.shape}, got {found.shape}")
        return found

    def check_takes_texts(self) -> None:
        """Raises InputError for a graph that takes no ids, or something beside them."""
        roles = self.roles
        parts = (roles.input_ids, roles.attention_mask, roles.token_type_ids)
        others = [tensor.name for tensor in self.graph.inputs if tensor.name not in parts]
        if roles.input_ids is None or others:
            raise InputError(f"this encoder takes {', '.join(others) or 'no ids'}, so it cannot encode texts: use run")

    def _run(self, feeds: dict[str, Array], outputs: Sequence[str] | None) -> dict[str, Array]:
        session = self._session
        if session is None:
            raise ClosedError("the model was closed: load it again")
        types = {tensor.name: tensor.dtype for tensor in self.graph.outputs}
        names = list(types if outputs is None else outputs)
        if narrow := [name for name in names if types[name] == "bfloat16"]:
            raise InputError(f"{', '.join(narrow)}: numpy has no bfloat16: export with another --dtype")
        try:
            return dict(zip(names, session.run(names, feeds)))
        except Exception as cause:  # onnxruntime's classes have no common root
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            if (error := translated(cause, shapes, self.device)) is None:
                raise
            raise error from cause
