"""Make the encoder's folder that the runtime's tests use where torch was never installed.

    python tests/zoo/make_tiny_encoder.py tests/runtime/tiny_encoder

One random layer as BERT has it: embeddings of ids, positions and token types, attention with a mask of keys, a
feed-forward block, and a pooled vector from the first token; over a WordPiece of letters and a few words.
"""

import datetime
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tfinfer import manifest as m
from tfinfer.integrity import sha256
from tfinfer.version import __version__

HIDDEN, HEADS, WIDE, MAX_LENGTH, OPSET = 16, 2, 32, 64, 18
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "after", "was", "red", "##ing", "##ed", "##s"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS, ".", ",", "?", "!"]
IDS = {"input_ids": "int64", "attention_mask": "int64", "token_type_ids": "int64"}


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(VOCABULARY[:4])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


class Builder:
    """Nodes one after the other; a weight is random and named after its use."""

    def __init__(self) -> None:
        self.nodes, self.weights, self.random = [], [], np.random.default_rng(0)

    def node(self, op: str, *inputs: str, out: str = "", **attributes: object) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.normal(0, 0.4, shape).astype(np.float32))

    def linear(self, x: str, name: str, size: int, to: int) -> str:
        return self.node("Add", self.node("MatMul", x, self.weight(f"{name}.weight", size, to)), self.weight(name, to))

    def norm(self, x: str, name: str) -> str:
        scale = self.constant(f"{name}.weight", np.ones(HIDDEN, np.float32))
        return self.node("LayerNormalization", x, scale, self.weight(name, HIDDEN), axis=-1)

    def heads(self, x: str, name: str, order: list[int]) -> str:
        split = self.constant(f"{name}.split", np.array([0, 0, HEADS, HIDDEN // HEADS], np.int64))
        return self.node("Transpose", self.node("Reshape", self.linear(x, name, HIDDEN, HIDDEN), split), perm=order)


def attention(b: Builder, x: str) -> str:
    query, key, value = (b.heads(x, n, o) for n, o in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])))
    scores = b.node("Div", b.node("MatMul", query, key), b.constant("scale", np.float32((HIDDEN // HEADS) ** 0.5)))
    axes = b.constant("axes", np.array([1, 2], np.int64))
    seen = b.node("Unsqueeze", b.node("Cast", "attention_mask", to=TensorProto.BOOL), axes)
    masked = b.node("Where", seen, scores, b.constant("hidden", np.float32(-1e9)))
    mixed = b.node("Transpose", b.node("MatMul", b.node("Softmax", masked, axis=-1), value), perm=[0, 2, 1, 3])
    merged = b.node("Reshape", mixed, b.constant("merge", np.array([0, 0, HIDDEN], np.int64)))
    return b.linear(merged, "o", HIDDEN, HIDDEN)


def graph(path: Path) -> None:
    b = Builder()
    zero, one = b.constant("zero", np.int64(0)), b.constant("one", np.int64(1))
    length = b.node("Gather", b.node("Shape", "input_ids"), one, axis=0)
    positions = b.node("Gather", b.weight("positions", MAX_LENGTH, HIDDEN), b.node("Range", zero, length, one))
    words = b.node("Gather", b.weight("words", len(VOCABULARY), HIDDEN), "input_ids")
    types = b.node("Gather", b.weight("types", 2, HIDDEN), "token_type_ids")
    x = b.norm(b.node("Add", b.node("Add", words, types), positions), "norm.0")
    x = b.norm(b.node("Add", x, attention(b, x)), "norm.1")
    inner = b.node("Relu", b.linear(x, "up", HIDDEN, WIDE))
    scale = b.constant("norm.2.weight", np.ones(HIDDEN, np.float32))
    last = b.node("Add", x, b.linear(inner, "down", WIDE, HIDDEN))
    hidden = b.node("LayerNormalization", last, scale, b.weight("norm.2", HIDDEN), out="hidden_states", axis=-1)
    first = b.node("Gather", hidden, zero, axis=1)
    b.node("Tanh", b.linear(first, "pooler", HIDDEN, HIDDEN), out="pooled")
    made = helper.make_graph(
        b.nodes,
        "tiny_encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in IDS],
        [
            helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, ["batch", "seq", HIDDEN]),
            helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", HIDDEN]),
        ],
        b.weights,
    )
    save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9), path)


def manifest(files: dict[str, m.FileSpec]) -> m.Manifest:
    outputs = (
        m.TensorSpec("hidden_states", "float32", ("batch", "seq", HIDDEN)),
        m.TensorSpec("pooled", "float32", ("batch", HIDDEN)),
    )
    inputs = tuple(m.TensorSpec(name, dtype, ("batch", "seq")) for name, dtype in IDS.items())
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return m.Manifest(
        format_version=m.FORMAT_VERSION,
        kind="encoder",
        graphs={"encoder": m.GraphSpec("encoder.onnx", {"": OPSET}, inputs, outputs)},
        roles=None,
        cache=(),
        vocab_size=len(VOCABULARY),
        num_logits=0,
        max_length=MAX_LENGTH,
        all_rows=True,
        dtype="float32",
        flavor="standard",
        attention=(m.AttentionSpec("MatMul", "full", 1, "written by hand"),),
        token_ids=m.TokenIds(pad=0),
        text=m.TextSpec(tokenizer="tokenizer.json"),
        requires={"onnxruntime": "1.24"},
        source=m.SourceSpec("module", "tests/zoo/make_tiny_encoder.py", {"tfinfer": __version__}, created),
        files=files,
        proof=m.ProofSpec("cpu", (), 0, not_run="not proved: the graph was written by hand"),
        encoder=m.EncoderRoles(**{name: name for name in (*IDS, "hidden_states", "pooled")}),
        pooling=m.PoolingSpec("mean", False),
    )


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    graph(out / "encoder.onnx")
    tokenizer().save(str(out / "tokenizer.json"), pretty=False)
    names = ("encoder.onnx", "tokenizer.json")
    files = {name: m.FileSpec(sha256(out / name), (out / name).stat().st_size) for name in names}
    (out / m.FILE_NAME).write_text(manifest(files).to_json(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
