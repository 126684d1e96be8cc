"""Decoder graphs of one or two attentions by hand, for the tests of passes, and what they give for growing caches."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from tfinfer.export.capture.emitter import CONTRIB, Emitter

FLOAT = ir.DataType.FLOAT
WIDTH, HEADS, KV_HEADS, SIZE, LONGEST = 24, 4, 2, 16, 40


def weights(*shape, seed=0, scale=0.3):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def tables(dims, *, length=LONGEST, scale=1.0, theta=100.0):
    """cos and sin, (length, dims / 2) each."""
    angle = np.outer(np.arange(length), theta ** (-np.arange(dims // 2) / max(1, dims // 2)))
    return (scale * np.cos(angle)).astype(np.float32), (scale * np.sin(angle)).astype(np.float32)


class Graph:
    """A decoder's graph under construction; constants are arrays, `finish` declares its only output of interest."""

    def __init__(self):
        self.emit, self.count = Emitter(), 0
        self.x = self.emit.input("x", FLOAT, ("batch", "seq", WIDTH))

    def op(self, op_type, *inputs, **attributes):
        return self.emit.op(op_type, *map(self.held, inputs), **attributes)

    def held(self, value):
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.kind == "i":
            return self.emit.constant(value)
        self.count += 1
        return self.emit.weight(torch.from_numpy(value), f"w{self.count}")

    def dense(self, width, *, seed, bias=False, x=None):
        product = self.op("MatMul", self.x if x is None else x, weights(WIDTH, width, seed=seed))
        return self.op("Add", product, weights(width, seed=seed + 50)) if bias else product

    def sides(self, *, bias=(False, False, False), size=SIZE, seed=0):
        widths = (HEADS * size, KV_HEADS * size, KV_HEADS * size)
        return [self.dense(n, seed=seed + i, bias=b) for i, (n, b) in enumerate(zip(widths, bias))]

    def split(self, value, size=SIZE):
        return self.op("Reshape", value, np.array([0, 0, -1, size]))

    def rows(self, value):
        return self.op("Reshape", value, np.array([0, 0, -1]))

    def part(self, value, start, end, step=1):
        return self.op("Slice", value, *(np.array([n]) for n in (start, end, 3, step)))

    def at_positions(self, table):
        picked = self.op("Gather", table, self.emit.given("position_ids"), axis=0)
        return self.op("Unsqueeze", picked, np.array([2]))

    def halves(self, value, cos, sin, dims=SIZE, size=SIZE):
        """Turn i with i + dims / 2 of each head, as Llama writes it; what is behind `dims` passes."""
        value = self.split(value, size)
        turning = self.part(value, 0, dims) if dims < size else value
        low, high = self.part(turning, 0, dims // 2), self.part(turning, dims // 2, dims)
        other = self.op("Concat", self.op("Neg", high), low, axis=3)
        wide = [self.at_positions(np.concatenate([table, table], -1)) for table in (cos, sin)]
        turned = self.op("Add", self.op("Mul", turning, wide[0]), self.op("Mul", other, wide[1]))
        if dims < size:
            turned = self.op("Concat", turned, self.part(value, dims, size), axis=3)
        return self.rows(turned)

    def pairs(self, value, cos, sin, dims=SIZE, size=SIZE):
        """Turn 2i with 2i + 1, as GPT-J writes it."""
        value = self.split(value, size)
        even, odd = self.part(value, 0, dims, 2), self.part(value, 1, dims, 2)
        c, s = self.at_positions(cos), self.at_positions(sin)
        first = self.op("Sub", self.op("Mul", even, c), self.op("Mul", odd, s))
        second = self.op("Add", self.op("Mul", odd, c), self.op("Mul", even, s))
        both = [self.op("Unsqueeze", half, np.array([4])) for half in (first, second)]
        turned = self.op("Reshape", self.op("Concat", *both, axis=4), np.array([0, 0, -1, dims]))
        if dims < size:
            turned = self.op("Concat", turned, self.part(value, dims, size), axis=3)
        return self.rows(turned)

    def attend(self, q, k, v, *, size=SIZE, layer=0, **options):
        shape = ("batch", KV_HEADS, "capacity", size)
        past = [self.emit.input(f"past.{layer}.{name}", FLOAT, shape) for name in ("key", "value")]
        lengths = self.emit.seqlens_k(), self.emit.total_length()
        sizes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": size**-0.5} | options
        out = self.emit.multi("GroupQueryAttention", q, k, v, *past, *lengths, outputs=3, domain=CONTRIB, **sizes)
        for name, value in zip(("key", "value"), out[1:]):
            self.emit.output(value, f"present.{layer}.{name}", FLOAT, shape)
        return out[0]

    def finish(self, value, width=HEADS * SIZE):
        self.emit.given("attention_mask")
        self.emit.given("position_ids")
        self.emit.output(value, "y", FLOAT, ("batch", "seq", width))
        return self.emit.model("test", 21)


def operators(model):
    return Counter(node.op_type for node in model.graph)


def attentions(model):
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def results(model):
    """What it gives for a prompt, an append, ragged prompts and ragged steps, over caches of made-up numbers."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    given = {value.name: value.shape for value in session.get_inputs()}
    found = []
    for number, (pasts, news) in enumerate((([0], [7]), ([6], [4]), ([0, 0, 0], [5, 2, 1]), ([3, 9, 0], [1, 1, 1]))):
        seq, ends = max(news), np.add(pasts, news)
        feeds = {
            "x": weights(len(pasts), seq, WIDTH, seed=number, scale=1.0),
            "attention_mask": (np.arange(ends.max()) < ends[:, None]).astype(np.int64),
            "position_ids": np.array(pasts)[:, None] + np.arange(seq),
        }
        for i, (name, shape) in enumerate(given.items()):
            if name.startswith("past."):
                feeds[name] = weights(len(pasts), shape[1], LONGEST, shape[3], seed=20 + i)
        (y,) = session.run(["y"], {name: feeds[name] for name in given})
        found += [row[:new] for row, new in zip(y, news)]
    return found


def unchanged(apply, model, fired):
    """Apply a pass and remove what is dead: it fires that often and the numbers stay; returns the operators left."""
    from tfinfer.export.passes import dead_nodes

    before = results(model)
    assert apply(model) == fired
    dead_nodes.run(model)
    for expected, got in zip(before, results(model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    return operators(model)
