"""From a PyTorch module to a folder: capture, cache, passes, proof. Needs torch; the runtime never imports this.

The folder `export/` is installed as `tfinfer.export`; under any other name its modules would load twice.
"""

if __name__ != "tfinfer.export":
    raise ImportError(
        f"import this package as tfinfer.export, not as {__name__!r} (install it: pip install -e '.[export]')"
    )

from .exporter import ExportReport, export_model

__all__ = ["ExportReport", "export_model"]
