"""What the machine can do at most: bytes read from memory and multiplications per second, measured now.

python benchmarks/roofline.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import time

import torch

READ = 1 << 30  # bytes: more than any cache of the processor
SIDE = 2048


def measure(threads: int, rounds: int = 5) -> dict[str, float]:
    """Return the best of some rounds: GB/s of a reduction, GFLOP/s of a matrix times a matrix, both float32.

    A reduction: the products with vectors of PyTorch's library reach two thirds of it.
    """
    torch.set_num_threads(threads)
    row, square = torch.ones(READ // 4), torch.ones(SIDE, SIDE)
    read = min(_seconds(row.amax) for _ in range(rounds))
    product = min(_seconds(lambda: square @ square) for _ in range(rounds))
    return {"read_gb_per_s": round(READ / read / 1e9, 1), "gemm_gflop_per_s": round(2 * SIDE**3 / product / 1e9, 1)}


def _seconds(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(parser.parse_args().threads)))
