"""An exported folder, opened: what every kind of model shares. `load` gives the kind that the folder is."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy.typing as npt

from tfinfer.closing import Closing
from tfinfer.errors import ClosedError, CorruptModelError, InputError
from tfinfer.integrity import check_files
from tfinfer.manifest import Manifest, load_manifest
from tfinfer.session.threads import Threads
from tfinfer.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tfinfer.attention.maps import AttentionMap
    from tfinfer.attention.reading import AttentionReader
    from tfinfer.completion import Chunk
    from tfinfer.conversation import Conversation
    from tfinfer.tokens.chat import ChatTemplate

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Array = npt.NDArray[Any]
ADVICE = {
    "decoder": "it is a decoder: use generate or stream",
    "encoder": "it is an encoder: use encode or run",
    "encoder-decoder": "it is an encoder-decoder: use generate or stream",
}


def load(
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    check_hashes: bool = True,
    cuda_graph: bool | None = False,
) -> Model:
    """Open a folder that `tfinfer export` made, or that `tfinfer adopt` took over.

    Args:
        device: "cpu", "cuda" (an error unless CUDA really opens) or "auto" (`model.reason` says what it took).
        threads: of the computation; by default what the process may use (see `tfinfer doctor`).
        check_hashes: compare every file with its SHA-256 first.
        cuda_graph: record the steps of a decoder on CUDA and replay them: True (an error where it cannot be), None
            (where it can be; `model.decoder.not_recorded` says why not) or False. While a step is recorded no other
            thread of the process may use the device, except through this model.

    Raises ModelError for a folder that cannot be served, ProviderError for a device that does not open.
    """
    path = Path(folder)
    manifest = load_manifest(path)
    check_files(path, manifest, check_hashes)
    if manifest.kind == "encoder":
        if cuda_graph:
            raise InputError("cuda_graph is for the steps of a decoder, this folder is an encoder: leave it out")
        from tfinfer.encoding import EncodingModel

        return EncodingModel(manifest, path, device=device, threads=threads)
    from tfinfer.generating import GeneratingModel

    return GeneratingModel(manifest, path, device=device, threads=threads, cuda_graph=cuda_graph)


class Model(Closing):
    """What a folder's model can do. Make one with `tfinfer.load`; a method of another kind of model raises InputError.

    Safe for calls from several threads: the session is shared, every call has its own buffers and bindings. Not to be
    carried through a fork: load in each process.
    """

    device: str
    threads: Threads
    reason: str

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        self.tokenizer = Tokenizer.from_file(folder / manifest.text.tokenizer) if manifest.text.tokenizer else None
        self.chat_template = self._read_template(folder)
        self.generation_config = self._read_generation_config(folder)
        self._lock = threading.Lock()
        self._closed = False
        self._reader: AttentionReader | None = None

    def __repr__(self) -> str:
        return (
            f"<tfinfer {self.manifest.kind} {self.manifest.source.reference} on {self.device}, {self.manifest.dtype}>"
        )

    def _read_template(self, folder: Path) -> ChatTemplate | None:
        text = self.manifest.text
        if text.chat_template is None:
            return None
        from tfinfer.tokens.chat import ChatTemplate  # brings jinja2, a tenth of the start of a small model

        return ChatTemplate((folder / text.chat_template).read_text(encoding="utf-8"), text.special_tokens)

    def _read_generation_config(self, folder: Path) -> dict[str, Any]:
        name = self.manifest.text.generation_config
        if name is None:
            return {}
        try:
            return dict(json.loads((folder / name).read_text(encoding="utf-8")))
        except ValueError as error:
            raise CorruptModelError(f"{folder / name}: is not JSON: {error}") from error

    # -- life ---------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Let graphs and buffers go; later calls raise ClosedError."""
        with self._lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model was closed: load it again")

    # -- text ---------------------------------------------------------------------------------------------------
    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, by default with the special ones that its tokenizer adds."""
        return self._need_tokenizer("a text").encode(text, add_special_tokens=add_special_tokens)

    def render_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The text that the model's chat template makes of messages with `role` and `content`."""
        if self.chat_template is None:
            raise InputError("this folder has no chat template: give a text or ids instead of messages")
        return self.chat_template.render(list(messages), add_generation_prompt=add_generation_prompt)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"this folder has no tokenizer, so {what} cannot be used: give lists of ids")
        return self.tokenizer

    # -- looking inside -----------------------------------------------------------------------------------------
    def attention(self, text: Prompt, target: Prompt | None = None) -> Array | dict[str, Array]:
        """The weights of attention in a text, (layers, heads, query, key) float32; every row sums to 1.

        Of an encoder-decoder a dict of "encoder", "decoder" and "cross" for a source and its target, by default what
        it generates. Raises InputError where the folder has no such graph, or its layers have not the same heads.
        """
        found = {entry.name: entry.stacked() for entry in self.attention_maps(text, target)}
        return found["self"] if set(found) == {"self"} else found

    def attention_maps(self, text: Prompt, target: Prompt | None = None) -> list[AttentionMap]:
        """As `attention`, with the tokens that the weights stand between."""
        self._check_open()
        reader = self._attention_reader()
        if self.manifest.kind != "encoder-decoder":
            if target is not None:
                raise InputError(f"a target is for encoder-decoders: {ADVICE[self.manifest.kind]}")
            return reader.maps(reader.check(self._as_ids(text)))
        source = reader.check(self._as_ids(text), source=True)
        return reader.maps(reader.check(self._target_ids(source, target)), source)

    def _attention_reader(self) -> AttentionReader:
        from tfinfer.attention.reading import AttentionReader

        with self._lock:
            if self._reader is None:
                self._reader = AttentionReader(self.manifest, self.folder, self.tokenizer, self.threads.count)
            return self._reader

    def _as_ids(self, text: Prompt) -> Sequence[int]:
        return self.tokenize(text) if isinstance(text, str) else text

    def _target_ids(self, source: Array, target: Prompt | None) -> list[int]:
        """The target's beginning and what was given after it, or what the model generates."""
        start = list(self.manifest.token_ids.decoder_start)
        if target is None:
            room = max(1, min(64, self.manifest.max_length - len(start)))
            return [*start, *self.generate(source.tolist(), max_tokens=room).token_ids]
        ids = self.tokenize(target, add_special_tokens=False) if isinstance(target, str) else target
        return [*start, *ids]

    # -- what some kinds do -------------------------------------------------------------------------------------
    def _cannot(self, what: str) -> NoReturn:
        raise InputError(f"this folder cannot {what}: {ADVICE[self.manifest.kind]}")

    def generate(self, prompt: Any, **options: Any) -> Any:
        """See `GeneratingModel.generate`."""
        self._cannot("generate")

    def stream(self, prompt: Any, **options: Any) -> Iterator[Chunk]:
        """See `GeneratingModel.stream`."""
        self._cannot("generate")

    def conversation(self, path: str | os.PathLike[str] | None = None) -> Conversation:
        """See `GeneratingModel.conversation`."""
        self._cannot("hold a conversation")

    def encode(self, texts: Any, **options: Any) -> Any:
        """See `EncodingModel.encode`."""
        self._cannot("encode")

    def encode_iter(self, texts: Iterable[Any], **options: Any) -> Iterator[Array]:
        """See `EncodingModel.encode_iter`."""
        self._cannot("encode")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `EncodingModel.run`."""
        self._cannot("run a graph by itself")
