"""Graphs of every kind by the names of their inputs: a real one, and stand-ins for onnxruntime's session."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tfinfer
from tfinfer.encoding import EncodingModel, TruncationWarning
from tfinfer.errors import IncompatibleModelError, InputError, LengthError, NonFiniteLogitsError, ProviderError
from tfinfer.manifest import EncoderRoles, GraphSpec, PoolingSpec, TensorSpec, TextSpec, TokenIds, load_manifest
from tfinfer.session.providers import Opened

FOLDER = Path(__file__).parent / "tiny_encoder"
ORT = {"float32": "float", "float16": "float16", "int64": "int64", "bfloat16": "bfloat16"}


@pytest.fixture(scope="module")
def encoder():
    with tfinfer.load(FOLDER, threads=1) as loaded:
        yield loaded


# -- run ----------------------------------------------------------------------------------------------------------
def test_run_gives_every_output_and_fills_what_is_known(encoder):
    found = encoder.run({"input_ids": [[2, 5, 6], [2, 7, 3]]})
    assert set(found) == {"hidden_states", "pooled"}
    assert found["hidden_states"].shape[:2] == (2, 3)
    whole = {"attention_mask": np.ones((2, 3), bool), "token_type_ids": np.zeros((2, 3), np.int32)}
    again = encoder.run({"input_ids": np.array([[2, 5, 6], [2, 7, 3]], np.uint8), **whole})
    np.testing.assert_array_equal(again["hidden_states"], found["hidden_states"])
    np.testing.assert_allclose(found["hidden_states"][0].mean(0), encoder.encode([2, 5, 6]), atol=1e-5)
    masked = encoder.run({"input_ids": [[2, 5, 6], [2, 7, 3]], "attention_mask": [[1, 1, 0], [1, 1, 1]]})
    np.testing.assert_allclose(masked["hidden_states"][0, :2].mean(0), encoder.encode([2, 5]), atol=1e-5)


@pytest.mark.parametrize(
    "inputs, error, said",
    [
        ([[1]], InputError, r"input_ids int64 \(batch, seq\).*got list"),
        ({}, InputError, "input_ids is missing"),
        ({"ids": [[1]]}, InputError, "no input ids: expected input_ids int64"),
        ({"input_ids": [1, 2]}, InputError, r"got shape \(2,\)"),
        ({"input_ids": np.zeros((1, 0), np.int64)}, InputError, "no axis may be empty"),
        ({"input_ids": [[1.0]]}, InputError, "got float64"),
        ({"input_ids": [["a"]]}, InputError, "got <U1"),
        ({"input_ids": [[1], [2, 3]]}, InputError, "no array"),
        ({"input_ids": [[-1]]}, InputError, "got -1"),
        ({"input_ids": [[99999]]}, InputError, "got 99999"),
        ({"input_ids": np.array([[2**63]], np.uint64)}, InputError, str(2**63)),
        ({"input_ids": [[1] * 65]}, LengthError, "65 tokens"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}, InputError, "seq is 2"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, InputError, "got 1 to 2"),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0, 7]]}, InputError, r"cannot compute .*input_ids \(1, 2\)"),
    ],
)
def test_wrong_inputs_are_refused_and_the_next_good_ones_work(encoder, inputs, error, said):
    with pytest.raises(error, match=said):
        encoder.run(inputs)
    assert encoder.run({"input_ids": [[1, 2]]})["pooled"].shape[0] == 1


# -- graphs of other kinds ----------------------------------------------------------------------------------------
IDS, MASK = TensorSpec("ids", "int64", ("batch", "seq")), TensorSpec("mask", "int64", ("batch", "seq"))
HIDDEN = TensorSpec("h", "float32", ("batch", "seq", 2))
POOLED = TensorSpec("p", "float32", ("batch", 2))
LOGITS = TensorSpec("logits", "float32", ("batch", 3))
IMAGE = TensorSpec("image", "float32", ("batch", 3, "height", "width"))


class Session:
    """Stands in for onnxruntime's: `outputs` are computed by functions of the feeds."""

    def __init__(self, spec: GraphSpec, compute) -> None:
        def listed(tensors):
            return [SimpleNamespace(name=t.name, type=f"tensor({ORT[t.dtype]})") for t in tensors]

        self.get_inputs, self.get_outputs = lambda: listed(spec.inputs), lambda: listed(spec.outputs)
        self.get_overridable_initializers = list
        self.compute, self.calls = compute, []

    def run(self, names, feeds):
        self.calls.append(feeds)
        return [self.compute[name](feeds) for name in names]


def doubled(feeds):
    """Hidden states that say which id they are of: (id, 2 id)."""
    return np.stack([feeds["ids"], 2 * feeds["ids"]], -1).astype(np.float32)


COMPUTE = {"h": doubled, "p": lambda feeds: doubled(feeds)[:, 0], "logits": lambda feeds: np.zeros((1, 3), np.float32)}


@pytest.fixture
def open_with(monkeypatch):
    """Opens a model whose graph has these inputs, outputs and roles."""

    def opened(inputs, outputs, compute=COMPUTE, declared=None, **changes):
        spec = GraphSpec("encoder.onnx", {"": 18}, inputs, outputs)
        names = {t.name for t in (*inputs, *outputs)}
        parts = {"input_ids": "ids", "attention_mask": "mask", "hidden_states": "h", "pooled": "p"}
        roles = EncoderRoles(**{part: name for part, name in parts.items() if name in names})
        session = Session(declared or spec, compute)
        monkeypatch.setattr(
            "tfinfer.session.tuned.open_session",
            lambda path, threads, **_: Opened(session, "cpu", threads, "cpu: asked for"),
        )
        changed = {"graphs": {"encoder": spec}, "encoder": roles, "pooling": None, "vocab_size": 1000, **changes}
        model = EncodingModel(dataclasses.replace(load_manifest(FOLDER), **changed), FOLDER)
        return model, session

    return opened


def test_without_a_mask_only_equal_lengths_share_a_batch(open_with):
    model, session = open_with((IDS,), (HIDDEN,))
    rows = [[1, 2], [3], [4, 5], [6], [7, 8, 9]]
    np.testing.assert_array_equal(model.encode(rows)[:, 0], [np.mean(row) for row in rows])
    assert [feeds["ids"].tolist() for feeds in session.calls] == [[[7, 8, 9]], [[1, 2], [4, 5]], [[3], [6]]]
    assert all(set(feeds) == {"ids"} for feeds in session.calls)


def test_rows_are_padded_with_the_models_own_id(open_with):
    model, session = open_with((IDS, MASK), (HIDDEN,), token_ids=TokenIds(pad=9))
    model.encode([[1, 2], [3]])
    assert session.calls[0]["ids"].tolist() == [[1, 2], [3, 9]]
    assert session.calls[0]["mask"].tolist() == [[1, 1], [1, 0]]


def test_a_module_that_pools_itself_allows_nothing_else(open_with):
    model, _ = open_with((IDS, MASK), (POOLED,))
    for pooling in (None, "pooled"):
        np.testing.assert_array_equal(model.encode([[4, 5], [6]], pooling=pooling), [[4, 8], [6, 12]])
    with pytest.raises(InputError, match="pools by itself"):
        model.encode([1], pooling="mean")


def test_the_folders_own_pooling_is_the_default(open_with):
    model, _ = open_with((IDS, MASK), (HIDDEN, POOLED), pooling=PoolingSpec("last", True))
    np.testing.assert_allclose(model.encode([1, 3]), np.array([1, 2]) / 5**0.5, atol=1e-6)
    np.testing.assert_array_equal(model.encode([1, 3], normalize=False), [3, 6])
    np.testing.assert_array_equal(model.encode([1, 3], pooling="cls", normalize=False), [1, 2])


def test_a_classifier_is_for_run(open_with):
    model, _ = open_with((IDS, MASK), (LOGITS,))
    with pytest.raises(InputError, match=r"logits.*use run"):
        model.encode([1])
    assert model.run({"ids": [[1]]})["logits"].shape == (1, 3)


def test_a_graph_of_images_is_for_run(open_with):
    model, session = open_with((IMAGE,), (LOGITS,))
    for call in (model.encode, model.encode_iter):
        with pytest.raises(InputError, match=r"takes image.*use run"):
            call(["a"])
    model.run({"image": np.zeros((2, 3, 4, 5), np.uint8)})
    assert session.calls[0]["image"].dtype == np.float32
    with pytest.raises(InputError, match=r"image float32 \(batch, 3, height, width\), got shape \(2, 1, 4, 5\)"):
        model.run({"image": np.zeros((2, 1, 4, 5))})


def test_a_graph_that_takes_more_than_ids_is_for_run(open_with):
    model, _ = open_with((IDS, IMAGE), (HIDDEN,))
    with pytest.raises(InputError, match="takes image"):
        model.encode([1])
    with pytest.raises(InputError, match="image is missing"):
        model.run({"ids": [[1]]})


def test_floats_that_do_not_fit_are_refused(open_with):
    half = TensorSpec("image", "float16", ("batch", "n"))
    model, session = open_with((half,), (LOGITS,))
    with pytest.raises(InputError, match="too large"):
        model.run({"image": [[1e6]]})
    model.run({"image": [[np.inf, 1.0]]})
    assert session.calls[0]["image"].dtype == np.float16


def test_types_that_numpy_lacks_are_refused(open_with):
    model, _ = open_with((TensorSpec("x", "bfloat16", ("n",)),), (LOGITS,))
    with pytest.raises(InputError, match="no bfloat16"):
        model.run({"x": [1.0]})
    model, _ = open_with((IDS,), (TensorSpec("h", "bfloat16", ("batch", "seq", 2)),))
    with pytest.raises(InputError, match="no bfloat16"):
        model.encode([1])


def test_half_precision_becomes_float32(open_with):
    half = TensorSpec("h", "float16", ("batch", "seq", 2))
    model, _ = open_with((IDS,), (half,), {"h": lambda feeds: doubled(feeds).astype(np.float16)})
    assert model.encode([1, 3]).tolist() == [2, 4]
    assert model.encode([1, 3], pooling="none").dtype == model.encode([1, 3]).dtype == np.float32


def test_what_is_not_finite_is_an_error_that_names_the_text(open_with):
    def broken(feeds):
        return np.where(feeds["ids"][..., None] == 7, np.nan, doubled(feeds))

    model, _ = open_with((IDS, MASK), (HIDDEN,), {"h": broken})
    with pytest.raises(NonFiniteLogitsError, match="text 1"):
        model.encode([[1, 2], [7], [3]])
    with pytest.raises(NonFiniteLogitsError, match="text 2"):
        list(model.encode_iter([[1, 2], [3], [7]], window=1))
    assert model.encode([[1, 2], [3]]).shape == (2, 2)


@pytest.mark.parametrize(
    "raised, error",
    [
        (RuntimeError("Failed to allocate memory"), ProviderError),
        (RuntimeError("shape"), InputError),
        (KeyError(), KeyError),
    ],
)
def test_what_onnxruntime_raises_becomes_an_error_of_the_tree(open_with, raised, error):
    def fail(feeds):
        raise raised

    model, _ = open_with((IDS,), (HIDDEN,), {"h": fail})
    with pytest.raises(error):
        model.encode([1])


def test_a_graph_that_is_not_the_manifests_is_refused(open_with):
    for declared in (GraphSpec("", {}, (IDS, MASK), (HIDDEN,)), GraphSpec("", {}, (IDS,), (POOLED,))):
        with pytest.raises(IncompatibleModelError, match="disagree"):
            open_with((IDS,), (HIDDEN,), declared=declared)
    with pytest.raises(IncompatibleModelError, match=r"\(batch, seq\)"):
        open_with((IDS,), (HIDDEN,), encoder=EncoderRoles("other", hidden_states="h"))
    with pytest.raises(IncompatibleModelError, match="3 axes"):
        open_with((IDS,), (POOLED,), encoder=EncoderRoles("ids", hidden_states="p"))
    model, _ = open_with((IDS,), (HIDDEN,), {"h": lambda feeds: doubled(feeds)[:, :1]})
    with pytest.raises(IncompatibleModelError, match=r"expected \(1, 2, 2\)"):
        model.encode([1, 2])


def test_a_folder_without_a_tokenizer_takes_ids(open_with):
    model, _ = open_with((IDS,), (HIDDEN,), text=TextSpec())
    assert model.encode([[1, 2]]).shape == (1, 2)
    with pytest.raises(InputError, match="no tokenizer"):
        model.encode("a")
    with pytest.warns(TruncationWarning):
        assert model.encode([[5] * 99], pooling="none", truncate=True)[0].shape == (64, 2)
