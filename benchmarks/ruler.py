"""A hand-made Llama-shaped ONNX graph with random weights: what ONNX Runtime can do on this machine, no exporter in it.

    python benchmarks/ruler.py --shape smollm2-135m --bits 32

Per layer: packed QKV, GroupQueryAttention with rotary inside over one buffer, packed gate and up, skip and norm in one
node; with norms of queries and keys these go through one norm together. The head sees the last row, ArgMax is in the
graph. In 8 and 4 bits weights lie in blocks of 128, those of the head, which has 8, in blocks that fill its rows.
`benchmarks/decode.py` runs it beside the product.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

MS = {"domain": "com.microsoft"}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool = False


SHAPES = {
    "smollm2-135m": Shape(49152, 576, 1536, 30, 9, 3, 64),
    "qwen3-0.6b": Shape(151936, 1024, 3072, 28, 16, 8, 128, qk_norm=True),
    "toy": Shape(512, 64, 128, 2, 4, 2, 16),
}


class Graph:
    """Nodes and initializers as they are added; `bits` of the weights of products."""

    def __init__(self, bits: int = 32) -> None:
        self.bits = bits
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.rng = np.random.default_rng(0)

    def const(self, name: str, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def matmul(self, name: str, x: str, k: int, n: int, least_bits: int = 4, block_size: int = 128) -> str:
        bits = max(self.bits, least_bits)
        if bits == 32:
            weight = self.rng.standard_normal((k, n), dtype=np.float32) * 0.02
            return self.node("MatMul", [x, self.const(name + ".w", weight)], [name])
        blocks = -(-k // block_size)
        data = self.rng.integers(0, 256, (n, blocks, block_size * bits // 8), dtype=np.uint8)
        scales = np.full((n, blocks), 0.07 / 2**bits, np.float32)  # numbers of about 0.02
        operands = [x, self.const(name + ".w", data), self.const(name + ".scales", scales)]
        sizes = {"K": k, "N": n, "bits": bits, "block_size": block_size, "accuracy_level": 4}
        return self.node("MatMulNBits", operands, [name], **sizes, **MS)


def add_qk_norm(g: Graph, s: Shape, p: str, qkv: str) -> list[str]:
    """Queries, keys and values apart, every head of the first two normalised."""
    heads, width = s.heads + s.kv_heads, s.head_dim
    g.node("Split", [qkv, "qk_v"], [p + "qk", p + "v"], axis=-1)
    by_head = g.node("Reshape", [p + "qk", "by_head"], [p + "qk.heads"])
    normed = g.node(
        "SimplifiedLayerNormalization", [by_head, "head_gain"], [p + "qk.norm"], axis=-1, epsilon=1e-6, stash_type=1
    )
    joined = g.node("Reshape", [normed, "joined"], [p + "qk.joined"])
    g.node("Split", [joined, "q_k"], [p + "q", p + "k"], axis=-1)
    if "by_head" not in {initializer.name for initializer in g.initializers}:
        g.const("by_head", np.array([0, 0, heads, width]))
        g.const("joined", np.array([0, 0, heads * width]))
        g.const("qk_v", np.array([heads * width, s.kv_heads * width]))
        g.const("q_k", np.array([s.heads * width, s.kv_heads * width]))
        g.const("head_gain", np.ones((heads, width), np.float32))
    return [p + "q", p + "k", p + "v"]


def add_layer(g: Graph, s: Shape, i: int, x: str, residual: str) -> tuple[str, str]:
    p = f"{i}."
    qkv = g.matmul(p + "qkv", x, s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim)
    past, present = ([f"{side}.{i}.{part}" for part in ("key", "value")] for side in ("past", "present"))
    operands = add_qk_norm(g, s, p, qkv) if s.qk_norm else [qkv, "", ""]
    attended = g.node(
        "GroupQueryAttention", [*operands, *past, "seqlens_k", "total_length", "cos", "sin"], [p + "attn", *present],
        num_heads=s.heads, kv_num_heads=s.kv_heads, do_rotary=1, **MS,
    )  # fmt: skip
    out = g.matmul(p + "o", attended, s.heads * s.head_dim, s.hidden)
    x = g.node(
        "SkipSimplifiedLayerNormalization", [residual, out, "gain"], [p + "n1", "", "", p + "r1"], epsilon=1e-6, **MS
    )
    gate_up = g.matmul(p + "gate_up", x, s.hidden, 2 * s.ffn)
    g.node("Split", [gate_up], [p + "gate", p + "up"], axis=-1, num_outputs=2)
    silu = g.node("QuickGelu", [p + "gate"], [p + "silu"], alpha=1.0, **MS)
    down = g.matmul(p + "down", g.node("Mul", [silu, p + "up"], [p + "mid"]), s.ffn, s.hidden)
    x = g.node(
        "SkipSimplifiedLayerNormalization", [p + "r1", down, "gain"], [p + "n2", "", "", p + "r2"], epsilon=1e-6, **MS
    )
    return x, p + "r2"


def build(s: Shape, bits: int = 32, positions: int = 8192) -> onnx.ModelProto:
    g = Graph(bits)
    angles = np.outer(np.arange(positions), 10000 ** -(np.arange(0, s.head_dim, 2) / s.head_dim)).astype(np.float32)
    g.const("gain", np.ones(s.hidden, np.float32))
    g.const("cos", np.cos(angles))
    g.const("sin", np.sin(angles))
    table = g.const("embed", g.rng.standard_normal((s.vocab, s.hidden), dtype=np.float32) * 0.02)
    residual = g.node("Gather", [table, "input_ids"], ["x"])
    x = g.node("SimplifiedLayerNormalization", [residual, "gain"], ["x.norm"], axis=-1, epsilon=1e-6, stash_type=1)
    for i in range(s.layers):
        x, residual = add_layer(g, s, i, x, residual)
    last = g.node("Gather", [x, g.const("last", np.array([-1]))], ["last.x"], axis=1)
    fills = next(size for size in (128, 64, 32) if s.hidden % size == 0)
    logits = g.matmul("logits", last, s.hidden, s.vocab, least_bits=8, block_size=fills)
    g.node("ArgMax", [logits], ["next_id"], axis=-1, keepdims=0)
    info, cache = helper.make_tensor_value_info, ["B", s.kv_heads, "L", s.head_dim]
    parts = [f"{i}.{part}" for i in range(s.layers) for part in ("key", "value")]
    inputs = [info("input_ids", TensorProto.INT64, ["B", "S"]), info("seqlens_k", TensorProto.INT32, ["B"])]
    inputs += [
        info("total_length", TensorProto.INT32, []),
        *(info(f"past.{n}", TensorProto.FLOAT, cache) for n in parts),
    ]
    outputs = [
        info("next_id", TensorProto.INT64, ["B", 1]),
        *(info(f"present.{n}", TensorProto.FLOAT, cache) for n in parts),
    ]
    graph = helper.make_graph(g.nodes, "ruler", inputs, outputs, g.initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    return model


class Ruler:
    """The hand-made graph, open and bound for one prompt length."""

    def __init__(self, shape: Shape, prompt: int, new: int, threads: int, bits: int = 32) -> None:
        self.prompt, self.new = prompt, new
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.enable_mem_pattern, options.log_severity_level = threads, False, 3
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "ruler.onnx")
            model = build(shape, bits)
            onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location="ruler.data")
            del model
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        size = (1, shape.kv_heads, prompt + new, shape.head_dim)
        parts = [f"{i}.{part}" for i in range(shape.layers) for part in ("key", "value")]
        self.cache = {n: ort.OrtValue.ortvalue_from_numpy(np.zeros(size, np.float32)) for n in parts}
        self.next_id = np.zeros((1, 1), np.int64)
        ids = np.random.default_rng(0).integers(0, shape.vocab, (1, prompt))
        self.prefill = self._bind(ids, np.array([prompt - 1], np.int32), np.array(prompt, np.int32))
        self.step_id, self.last, self.total = np.zeros((1, 1), np.int64), np.zeros(1, np.int32), np.zeros((), np.int32)
        self.step = self._bind(self.step_id, self.last, self.total)

    def _bind(self, ids: Any, last: Any, total: Any) -> Any:
        binding = self.session.io_binding()
        share = ort.OrtValue.ortvalue_from_numpy  # on the CPU the OrtValue and the array are the same memory
        for name, array in (("input_ids", ids), ("seqlens_k", last), ("total_length", total)):
            binding.bind_ortvalue_input(name, share(array))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_ortvalue_output("next_id", share(self.next_id))
        return binding

    def tokens(self) -> Iterator[int]:
        """The greedy tokens, one after the other."""
        self.session.run_with_iobinding(self.prefill)
        yield int(self.next_id[0, 0])
        for past in range(self.prompt, self.prompt + self.new - 1):
            self.step_id[0, 0], self.last[0], self.total[()] = self.next_id[0, 0], past, past + 1
            self.session.run_with_iobinding(self.step)
            yield int(self.next_id[0, 0])

    def run(self) -> tuple[float, float]:
        """Seconds of the prefill, and of one decode step on average."""
        start, tokens = time.perf_counter(), self.tokens()
        next(tokens)
        first = time.perf_counter()
        for _ in tokens:
            pass
        return first - start, (time.perf_counter() - first) / (self.new - 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--bits", type=int, choices=(32, 8, 4), default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    a = parser.parse_args()
    ruler = Ruler(SHAPES[a.shape], a.prompt, a.new, a.threads, a.bits)
    ruler.run()
    prefill, step = ruler.run()
    print(
        json.dumps(
            {
                "shape": a.shape,
                "bits": a.bits,
                "prefill_tokens_per_s": round(a.prompt / prefill, 1),
                "decode_tokens_per_s": round(1 / step, 2),
            }
        )
    )
