"""A checkpoint as optimum-onnx exports it, fused by its optimizer at level 2, the highest that keeps the results.

    PYTHON benchmarks/systems/optimum_encoder.py CHECKPOINT OUT

It wants an environment of its own, whose interpreter PYTHON is.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(checkpoint: str, out: str) -> None:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of packages
    from optimum.onnxruntime import AutoOptimizationConfig, ORTModelForFeatureExtraction, ORTOptimizer

    model = ORTModelForFeatureExtraction.from_pretrained(checkpoint, export=True)
    ORTOptimizer.from_pretrained(model).optimize(AutoOptimizationConfig.O2(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
