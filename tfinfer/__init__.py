"""Run exported transformers without torch: load a folder, generate from it. (`tf` is transformer, not TensorFlow.)"""

import logging
from typing import TYPE_CHECKING, Any

from tfinfer import errors
from tfinfer.errors import TfinferError
from tfinfer.version import __version__

if TYPE_CHECKING:
    from tfinfer.batcher import Batcher
    from tfinfer.completion import Chunk, Completion, Timings, Usage
    from tfinfer.conversation import Conversation
    from tfinfer.model import Model, load

__all__ = [
    "Batcher",
    "Chunk",
    "Completion",
    "Conversation",
    "Model",
    "TfinferError",
    "Timings",
    "Usage",
    "__version__",
    "errors",
    "load",
]

logging.getLogger("tfinfer").addHandler(logging.NullHandler())

_HOMES = {
    "load": "tfinfer.model",
    "Model": "tfinfer.model",
    "Conversation": "tfinfer.conversation",
    "Batcher": "tfinfer.batcher",
} | dict.fromkeys(("Chunk", "Completion", "Timings", "Usage"), "tfinfer.completion")


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import tfinfer` stays quick."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tfinfer' has no attribute {name!r}")
