"""Every error that tfinfer raises on purpose, in one tree.

TfinferError
├── InputError              a request that cannot be served: ids, sampling parameters, options     (ValueError)
│   └── LengthError         a prompt or generation longer than the model's longest length
├── ModelError              a model folder that cannot be served
│   ├── ManifestError       the manifest is missing, malformed or contradicts itself               (ValueError)
│   ├── CorruptModelError   a file is missing, truncated or not the one that was exported
│   ├── IncompatibleModelError   made by or for other versions than the installed ones
│   └── UnsafeModelError    the folder reaches outside itself
├── ProviderError           the device that was asked for does not open                            (RuntimeError)
│   └── CudaGraphError      steps cannot be recorded as CUDA graphs
├── MissingDependencyError  an optional package is not installed                                   (ImportError)
├── SnapshotError           a saved conversation that cannot be written, read or gone on with     (ValueError)
├── ClosedError             the model or cache was closed                                          (RuntimeError)
├── NonFiniteLogitsError    the model computed NaN or only -inf                                    (ArithmeticError)
└── ExportError             a module that does not become a folder
    ├── SourceError         the module, its weights or its tokenizer cannot be read                (ValueError)
    ├── TargetError         the folder to write exists or cannot be written                        (OSError)
    ├── CaptureError        the module cannot be followed: not causal, or not cacheable
    └── ProofError          the graph does not compute what the module computes

`exit_code` is what the command line returns: 1 internal, 2 usage, 3 bad model folder, 4 a check failed.
"""


class TfinferError(Exception):
    """Root of the tree; the message says what was expected, what came and what to do."""

    exit_code = 1


class InputError(TfinferError, ValueError):
    """A request that cannot be served as it is."""

    exit_code = 2


class LengthError(InputError):
    """A prompt, or a prompt and its generation, longer than the model's longest length."""


class ModelError(TfinferError):
    """A model folder that cannot be served."""

    exit_code = 3


class ManifestError(ModelError, ValueError):
    """The manifest is missing, malformed or contradicts itself."""


class CorruptModelError(ModelError):
    """A file of the folder is missing, truncated or changed."""


class IncompatibleModelError(ModelError):
    """The folder was made by, or needs, other versions than those installed."""


class UnsafeModelError(ModelError):
    """The folder tries to reach outside itself."""


class ProviderError(TfinferError, RuntimeError):
    """The device that was asked for does not open."""

    exit_code = 2


class CudaGraphError(ProviderError):
    """The device cannot record the steps of this folder as CUDA graphs, which was asked for."""


class MissingDependencyError(TfinferError, ImportError):
    """An optional package is not installed; the message names the command that mends it."""

    exit_code = 2


class SnapshotError(TfinferError, ValueError):
    """A saved conversation that cannot be written, cannot be read, or is of another model."""

    exit_code = 2


class ClosedError(TfinferError, RuntimeError):
    """The model or cache was closed before the call."""

    exit_code = 2


class NonFiniteLogitsError(TfinferError, ArithmeticError):
    """The model computed NaN, or nothing that can be chosen."""


class ExportError(TfinferError):
    """A module that does not become a folder."""

    exit_code = 2


class SourceError(ExportError, ValueError):
    """The module, its weights or its tokenizer cannot be read."""


class TargetError(ExportError, OSError):
    """The folder to write exists already or cannot be written."""


class CaptureError(ExportError):
    """The module cannot be followed: it is not causal, or mixes positions in a way no cache continues."""

    exit_code = 4


class ProofError(ExportError):
    """The exported graph does not compute what the module computes."""

    exit_code = 4
