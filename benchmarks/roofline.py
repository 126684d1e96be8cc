"""What the machine can do at most: bytes read from memory and multiplications per second, measured now.

python benchmarks/roofline.py --threads 2
python benchmarks/roofline.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto, helper, numpy_helper

from tfinfer.session.ort import onnxruntime

READ = 1 << 30  # bytes: more than any cache of the processor
SIDE = 2048


def measure(threads: int, rounds: int = 5) -> dict[str, float]:
    """Return the best of some rounds: GB/s of a reduction, GFLOP/s of a matrix times a matrix, both float32.

    A reduction: the products with vectors of PyTorch's library reach two thirds of it. The product by PyTorch or by
    onnxruntime, whichever is faster: on an EPYC with AVX-512 PyTorch's library makes less than half of the other.
    """
    torch.set_num_threads(threads)
    row, square = torch.ones(READ // 4), torch.ones(SIDE, SIDE)
    read = min(_seconds(row.amax) for _ in range(rounds))
    products = (lambda: square @ square, _product_of_onnxruntime(square.numpy(), threads))
    product = min(_seconds(product) for product in products for _ in range(rounds))
    return {"read_gb_per_s": round(READ / read / 1e9, 1), "gemm_gflop_per_s": round(2 * SIDE**3 / product / 1e9, 1)}


def _product_of_onnxruntime(square: npt.NDArray[np.float32], threads: int) -> Callable[[], object]:
    """A square matrix times itself, its other side a weight, as a model's are."""
    sides = list(square.shape)
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name in "ac")
    node, weight = helper.make_node("MatMul", ["a", "b"], ["c"]), numpy_helper.from_array(square, "b")
    model = helper.make_model(
        helper.make_graph([node], "product", [given], [made], [weight]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    options = onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime().InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": square})


def measure_cuda(rounds: int = 20) -> dict[str, float]:
    """As `measure`, of the CUDA device that torch takes first: its reads, and its products in float16."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device: install torch with CUDA, or leave --device out")
    row = torch.ones(READ, device="cuda")  # 4 GiB: more than any cache of a device
    square = torch.ones(4 * SIDE, 4 * SIDE, device="cuda", dtype=torch.float16)
    read = min(_seconds_on_cuda(row.amax) for _ in range(rounds))
    product = min(_seconds_on_cuda(lambda: square @ square) for _ in range(rounds))
    flop = 2 * (4 * SIDE) ** 3
    return {"read_gb_per_s": round(4 * READ / read / 1e9, 1), "gemm_gflop_per_s": round(flop / product / 1e9, 1)}


def card() -> str:
    """The name of that device."""
    return str(torch.cuda.get_device_name(0))


def _seconds_on_cuda(call: Callable[[], object]) -> float:
    """By the device's own clock: the first call of a round may still be loading kernels, the best is what counts."""
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return float(started.elapsed_time(ended)) / 1e3


def _seconds(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    print(json.dumps(measure_cuda() if given.device == "cuda" else measure(given.threads)))
