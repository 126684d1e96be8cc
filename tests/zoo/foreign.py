"""Decoders as other exporters write them: a past of exactly the held length goes in, a longer present comes out.

Textbook attention in one layer over random weights, written by hand so that every way of theirs can be had:

    python tests/zoo/foreign.py tests/runtime/tiny_foreign

makes the folder that the runtime's tests use, in the layout of transformers.js.
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model
from tokenizers import Tokenizer, models, pre_tokenizers

HIDDEN, HEADS, SIZE, VOCAB, MAX_LENGTH = 16, 2, 8, 40, 64
PAST, PRESENT = "past_key_values.0.{}", "present.0.{}"


class Builder:
    """Nodes one after the other, and weights."""

    def __init__(self) -> None:
        self.nodes, self.weights, self.random = [], [], np.random.default_rng(3)

    def node(self, op, *inputs, out="", **attributes):
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(self, name, value):
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name, *shape):
        return self.constant(name, self.random.normal(0, 0.4, shape).astype(np.float32))

    def heads(self, x, name):
        """(batch, new, hidden) -> (batch, heads, new, size)"""
        split = self.constant(f"{name}.split", np.array([0, 0, HEADS, SIZE], np.int64))
        projected = self.node("MatMul", x, self.weight(name, HIDDEN, HEADS * SIZE))
        return self.node("Transpose", self.node("Reshape", projected, split), perm=[0, 2, 1, 3])


def _grown(b, new, side, branch):
    """What was held and what is new; with a branch, what is new alone where there is no past."""
    past, present = PAST.format(side), PRESENT.format(side)
    if not branch:
        return b.node("Concat", past, new, out=present, axis=2)
    kind = helper.make_tensor_value_info(f"{side}_there", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info(f"{side}_none", TensorProto.FLOAT, None)
    there = helper.make_graph([helper.make_node("Concat", [past, new], [f"{side}_there"], axis=2)], "a", [], [kind])
    none = helper.make_graph([helper.make_node("Identity", [new], [f"{side}_none"])], "b", [], [other])
    return b.node("If", "use_cache_branch", out=present, then_branch=there, else_branch=none)


def _seen(b, lazy):
    """(batch, 1, new, total): which keys each new position sees; lazily, all of them where there is a past."""
    total = b.node("Gather", b.node("Shape", "attention_mask"), b.constant("one", np.int64(1)), axis=0)
    keys = b.node("Range", b.constant("zero", np.int64(0)), total, "one")
    behind = b.node("LessOrEqual", keys, b.node("Unsqueeze", "position_ids", b.constant("last", np.array([2]))))
    if lazy:
        first = b.node("Gather", "position_ids", "zero", axis=1)  # (batch,)
        held = b.node("Greater", first, "zero")
        behind = b.node("Or", behind, b.node("Unsqueeze", held, b.constant("two", np.array([1, 2]))))
    there = b.node("Unsqueeze", b.node("Cast", "attention_mask", to=TensorProto.BOOL), b.constant("row", np.array([1])))
    return b.node("Unsqueeze", b.node("And", behind, there), "row")


def decoder(
    path: Path, *, branch: bool = False, lazy: bool = False, open_sizes: bool = False, wrong: bool = False,
    last_row: bool = False, keep: bool = False, external: bool = False, extra: tuple = (),
) -> None:  # fmt: skip
    """Write one. branch: a flag says whether there is a past. lazy: behind a past only one new position is right.

    open_sizes: heads and sizes are named axes. wrong: what is cached is not what a whole pass has. last_row: logits of
    the last position alone. keep: of so many as a scalar input says. extra: further inputs.
    """
    b = Builder()
    words = b.node("Gather", b.weight("words", VOCAB, HIDDEN), "input_ids")
    x = b.node("Add", words, b.node("Gather", b.weight("places", MAX_LENGTH, HIDDEN), "position_ids"))
    q, k, v = (b.heads(x, name) for name in "qkv")
    if wrong:
        length = b.node("Cast", b.node("Gather", b.node("Shape", "input_ids"), b.constant("n", np.int64(1))), to=1)
        v = b.node("Mul", v, length)
    key, value = _grown(b, k, "key", branch), _grown(b, v, "value", branch)
    scores = b.node("MatMul", q, b.node("Transpose", key, perm=[0, 1, 3, 2]))
    masked = b.node("Where", _seen(b, lazy), scores, b.constant("hidden", np.float32(-1e9)))
    mixed = b.node("Transpose", b.node("MatMul", b.node("Softmax", masked, axis=-1), value), perm=[0, 2, 1, 3])
    merged = b.node("Reshape", mixed, b.constant("merge", np.array([0, 0, HEADS * SIZE], np.int64)))
    x = b.node("Add", x, b.node("MatMul", merged, b.weight("o", HEADS * SIZE, HIDDEN)))
    if last_row:
        x = b.node("Gather", x, b.constant("tail", np.array([-1])), axis=1)
    if keep:
        start = b.node("Unsqueeze", b.node("Neg", "num_logits_to_keep"), b.constant("at", np.array([0])))
        ends = (b.constant("end", np.array([2**31])), b.constant("axis", np.array([1])))
        x = b.node("Slice", x, start, *ends)
        extra = (*extra, ("num_logits_to_keep", TensorProto.INT64, []))
    b.node("MatMul", x, b.weight("head", HIDDEN, VOCAB), out="logits")
    save(path, b, branch, open_sizes, external, extra)


def save(path, b, branch, open_sizes, external, extra):
    info, long = helper.make_tensor_value_info, TensorProto.INT64
    heads, size = ("heads", "size") if open_sizes else (HEADS, SIZE)
    shape = {"past": ["batch", heads, "past", size], "present": ["batch", heads, "past + new", size]}
    inputs = [info(n, long, ["batch", a]) for n, a in (("input_ids", "new"), ("attention_mask", "past + new"))]
    inputs += [info("position_ids", long, ["batch", "new"])]
    inputs += [info(PAST.format(side), TensorProto.FLOAT, shape["past"]) for side in ("key", "value")]
    inputs += [info("use_cache_branch", TensorProto.BOOL, [1])] if branch else []
    inputs += [info(name, kind, axes) for name, kind, axes in extra]
    outputs = [info("logits", TensorProto.FLOAT, ["batch", None, VOCAB])]
    outputs += [info(PRESENT.format(side), TensorProto.FLOAT, shape["present"]) for side in ("key", "value")]
    graph = helper.make_graph(b.nodes, "foreign", inputs, outputs, b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = {"save_as_external_data": True, "location": path.name + "_data", "size_threshold": 256} if external else {}
    save_model(model, path, **beside)


def describe(folder: Path, **more: object) -> None:
    """The files beside a graph of ours."""
    config = {"vocab_size": VOCAB, "max_position_embeddings": MAX_LENGTH, "eos_token_id": 2, "bos_token_id": 1}
    config |= {"num_attention_heads": HEADS, "hidden_size": HIDDEN} | more
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, " ": 3} | {chr(97 + i): 4 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    said = {"eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def main(out: Path) -> None:
    decoder(out / "onnx" / "model.onnx", external=True)
    decoder(out / "onnx" / "model_merged.onnx", branch=True)
    describe(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
