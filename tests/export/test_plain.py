"""Modules that are no transformers over ids, translated whole, and run by onnxruntime at sizes never traced."""

import dataclasses
import json

import elmo
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import vision
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tfinfer.errors import CaptureError, InputError
from tfinfer.export.capture.plain import RANGES, InputSpec, parse_input, translate


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


class Recurrent(nn.Module):
    """A recurrent layer, its output and its last states."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(24, 40, **options)

    def forward(self, x):
        y, last = self.layer(x)
        return {"y": y, "h": last[0], "c": last[1]} if isinstance(last, tuple) else {"y": y, "h": last}


def session(model):
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())


def check(module, runner, **inputs):
    """The graph's outputs are the module's own, whichever the sizes are."""
    with torch.no_grad():
        expected = module.eval()(*inputs.values())
    expected = expected if isinstance(expected, dict) else {"output": expected}
    found = runner.run(list(expected), {name: x.numpy() for name, x in inputs.items()})
    for name, ours in zip(expected, found):
        np.testing.assert_allclose(ours, expected[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def shapes(values):
    return {v.name: [d if isinstance(d, int) else str(d) for d in v.shape] for v in values}


def operators(model):
    return {node.op_type for node in model.graph.all_nodes()}


# -- what is asked for ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, expected",
    [
        ("pixels:float32[batch,3,height,width]", InputSpec("pixels", torch.float32, ("batch", 3, "height", "width"))),
        (" ids : int64[ batch , 16 ] ", InputSpec("ids", torch.int64, ("batch", 16))),
        ("keep:bool[]", InputSpec("keep", torch.bool, ())),
    ],
)
def test_an_input_is_read(text, expected):
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "expected name:dtype"),
        ("x", "expected name:dtype"),
        ("x:float32", "expected name:dtype"),
        ("1x:float32[a]", "expected name:dtype"),
        ("x:float[a]", "the type of x to be one of float32"),
        ("x:float32[a,]", "the axis ''"),
        ("x:float32[0]", "the axis '0'"),
        ("x:float32[-1]", "the axis '-1'"),
        ("x:float32[2*a]", "the axis '2*a'"),
        ("x:float32[a]\n,y", "expected name:dtype"),
    ],
)
def test_anything_else_is_refused(text, why):
    with pytest.raises(InputError) as caught:
        parse_input(text)
    assert why in str(caught.value)


# -- whole modules --------------------------------------------------------------------------------------------------
def test_elmo_at_any_batch_and_number_of_words():
    module = elmo.Elmo()
    model = translate(module, [parse_input("characters:int64[batch,words,16]")])
    assert shapes(model.graph.outputs) == {"embeddings": ["batch", "words", 128], "layers": [3, "batch", "words", 128]}
    assert "LSTM" in operators(model)
    assert not operators(model) & {"Loop", "Scan"}
    assert model.ir_version <= 10
    assert model.graph.opset_imports[""] <= 24
    runner = session(model)
    for batch, words in ((1, 1), (2, 3), (5, 41)):
        check(module, runner, characters=torch.randint(0, 262, (batch, words, elmo.CHARS)))


@pytest.mark.parametrize("option", "ABC")
def test_images_of_any_size(option):
    module = vision.Classifier(option)
    model = translate(module, [parse_input("pixels:float32[batch,3,height,width]")])
    assert shapes(model.graph.inputs) == {"pixels": ["batch", 3, "height", "width"]}
    assert shapes(model.graph.outputs) == {"output": ["batch", 10]}
    runner = session(model)
    for batch, height, width in ((1, 32, 32), (3, 97, 41), (2, 224, 224), (1, 5, 1)):
        check(module, runner, pixels=torch.randn(batch, 3, height, width))


# -- recurrent layers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True, "bias": False},
        {"num_layers": 2, "dropout": 0.3},
        {"num_layers": 2, "bidirectional": True, "bias": False},
        {"num_layers": 3, "batch_first": True, "bidirectional": True},
    ],
    ids=str,
)
def test_recurrent_layers_become_their_operators(kind, options):
    module = Recurrent(kind, **options)
    first = options.get("batch_first", False)
    model = translate(
        module, [InputSpec("x", torch.float32, ("batch", "length", 24) if first else ("length", "batch", 24))]
    )
    found = [node for node in model.graph.all_nodes() if node.op_type == kind.__name__]
    assert len(found) == options.get("num_layers", 1)
    assert all(weight is None or weight.is_initializer() for node in found for weight in node.inputs[1:4])
    assert not operators(model) & {"Loop", "Scan"}
    runner = session(model)
    for batch, length in ((1, 1), (2, 5), (7, 1), (4, 130)):
        check(module, runner, x=torch.randn(*((batch, length) if first else (length, batch)), 24))


def test_a_plain_recurrent_layer_with_relu():
    module = Recurrent(nn.RNN, nonlinearity="relu", bidirectional=True)
    runner = session(translate(module, [InputSpec("x", torch.float32, ("length", "batch", 24))]))
    check(module, runner, x=torch.randn(6, 2, 24))


def test_states_may_be_given():
    class Continued(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru = nn.LSTM(8, 12, 2, batch_first=True), nn.GRU(12, 12, 2, batch_first=True)

        def forward(self, x, h, c):
            y, (h, c) = self.lstm(x, (h, c))
            y, last = self.gru(y, h)
            return {"y": y, "h": h, "c": c, "last": last}

    module = Continued()
    texts = "x:float32[batch,length,8]", "h:float32[2,batch,12]", "c:float32[2,batch,12]"
    # a state's outputs may not have its name: the graph's names are one space
    with pytest.raises(InputError, match="none an input's"):
        translate(module, [parse_input(text) for text in texts])
    model = translate(module, [parse_input(text) for text in texts], outputs=["y", "h_n", "c_n", "last"])
    feed = {"x": torch.randn(3, 9, 8), "h": torch.randn(2, 3, 12), "c": torch.randn(2, 3, 12)}
    with torch.no_grad():
        expected = module(**feed)
    found = session(model).run(None, {name: x.numpy() for name, x in feed.items()})
    for ours, theirs in zip(found, expected.values()):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_a_layer_called_twice_on_a_sequence_without_a_batch_has_its_weights_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 6)

        def forward(self, x):
            return self.lstm(self.lstm(x)[0])[0]  # (length, 6)

    module = Twice()
    model = translate(module, [parse_input("x:float32[length,6]")])
    first, second = (node for node in model.graph.all_nodes() if node.op_type == "LSTM")
    assert first.inputs[1:4] == second.inputs[1:4]
    check(module, session(model), x=torch.randn(17, 6))


# -- names and structure --------------------------------------------------------------------------------------------
def test_outputs_are_named_by_their_keys_and_nest():
    @dataclasses.dataclass
    class Answer:
        first: torch.Tensor
        rest: tuple
        nothing: None = None

    module = Function(lambda x: Answer(x, (x + 1, {"double": 2 * x, "again": x})))
    model = translate(module, [parse_input("x:float32[n]")])
    names = ["first", "rest_0", "rest_1_double", "rest_1_again"]
    assert [v.name for v in model.graph.outputs] == names
    assert shapes(model.graph.outputs) == {name: ["n"] for name in names}
    x = np.arange(7, dtype=np.float32)
    for ours, expected in zip(session(model).run(None, {"x": x}), (x, x + 1, 2 * x, x)):
        np.testing.assert_array_equal(ours, expected)


def test_outputs_of_a_tuple_are_numbered_or_named():
    module = Function(lambda x: (x + 1, x * 2))
    spec = [parse_input("x:float32[n]")]
    assert [v.name for v in translate(module, spec).graph.outputs] == ["output_0", "output_1"]
    assert [v.name for v in translate(module, spec, outputs=["up", "twice"]).graph.outputs] == ["up", "twice"]
    with pytest.raises(InputError, match="expected 2 names of outputs"):
        translate(module, spec, outputs=["one"])


def test_inputs_are_given_by_keyword_where_the_module_knows_their_names():
    class Options(nn.Module):
        def forward(self, ids, mask=None, offset=None):
            return ids + offset

    specs = [parse_input("ids:int64[batch,length]"), parse_input("offset:int64[batch,1]")]
    runner = session(translate(Options(), specs))
    found = runner.run(None, {"ids": np.ones((4, 3), np.int64), "offset": np.full((4, 1), 5)})[0]
    np.testing.assert_array_equal(found, np.full((4, 3), 6))


def test_equal_names_are_one_size():
    module = Function(lambda a, b: torch.cat([a, b], 1))
    model = translate(module, [parse_input("a:float32[batch,m]"), parse_input("b:float32[batch,n]")])
    assert shapes(model.graph.inputs) == {"a": ["batch", "m"], "b": ["batch", "n"]}
    (rows, columns) = shapes(model.graph.outputs)["output"]
    assert rows == "batch"
    assert {"m", "n"} <= set(columns.replace("+", " ").split())


def test_names_of_values_inside_give_way():
    module = Function(lambda x: {"relu": x + 1, "add": torch.relu(x) + 3})
    check(module, session(translate(module, [parse_input("x:float32[n]")])), x=torch.randn(5))


def test_the_range_of_every_named_axis_is_noted():
    table = torch.randn(300, 4)
    module = Function(lambda x: x[:, : x.shape[1] - 8] + table[8 : x.shape[1]])
    model = translate(module, [parse_input("x:float32[batch,time,4]")])
    ranges = json.loads(model.metadata_props[RANGES])
    assert ranges["batch"] == [2, None]
    assert ranges["time"][1] == 300


def test_nothing_is_left_behind(capsys):
    module = Recurrent(nn.LSTM, dropout=0.5, num_layers=2).train()
    x, state = torch.randn(4, 2, 24), torch.get_rng_state()
    names = [name for name, _ in module.named_parameters()]
    translate(module, [parse_input("x:float32[length,batch,24]")])
    assert capsys.readouterr() == ("", "")
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert names == [name for name, _ in module.named_parameters()]
    module(x)["y"].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


# -- samples --------------------------------------------------------------------------------------------------------
def test_a_sample_sets_the_sizes_that_a_module_needs():
    module = Function(lambda x: x.unflatten(1, (-1, 25)).sum(-1))
    spec = parse_input("x:float32[batch,time]")
    with pytest.raises(CaptureError, match="give a sample"):
        translate(module, [spec])
    runner = session(translate(module, [spec], {"x": torch.randn(2, 75)}))
    check(module, runner, x=torch.randn(5, 200))


def test_a_module_shorter_than_the_long_sizes_is_traced_with_short_ones():
    table = torch.randn(32, 4)
    module = Function(lambda x: x + table[: x.shape[1]])
    runner = session(translate(module, [parse_input("x:float32[batch,time,4]")]))
    for time in (1, 32):
        check(module, runner, x=torch.randn(2, time, 4))


@pytest.mark.parametrize(
    "sample", [torch.randn(2, 5), torch.randn(2, 5, 4).double(), torch.randn(2, 5, 3), torch.randn(1, 5, 4)]
)
def test_a_sample_is_what_was_declared(sample):
    with pytest.raises(InputError, match="the sample of x: expected"):
        translate(nn.Identity(), [parse_input("x:float32[batch,time,4]")], {"x": sample})


@pytest.mark.parametrize("texts, sample", [([], {}), (["x:bool[a]", "x:bool[b]"], {}), (["x:bool[a]"], {"y": None})])
def test_inputs_have_different_names(texts, sample):
    with pytest.raises(InputError, match="different names"):
        translate(nn.Identity(), [parse_input(text) for text in texts], sample)


# -- refusals -------------------------------------------------------------------------------------------------------
def packed(lstm):
    return lambda x, n: lstm(pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False))[1][0]


@pytest.mark.parametrize(
    "function, why",
    [
        (lambda x: x.sum() if x.sum() > 0 else x, "torch.export cannot capture the module"),
        (lambda x: sum(x[:, i] for i in range(x.shape[1])), "the axis time of x is pinned to 96"),
        (lambda x: torch.linalg.qr(x).R, "torch.onnx cannot write the module"),
        (lambda x: (x, 3), "expected every output to be a tensor; got int for output_1"),
        (nn.LSTM(24, 8, proj_size=4, batch_first=True), "proj_size"),
    ],
)
def test_what_cannot_be_translated_is_refused(function, why):
    with pytest.raises(CaptureError) as caught:
        translate(Function(function), [parse_input("x:float32[batch,time,24]")])
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_packed_sequences_are_refused():
    lstm = nn.LSTM(6, 6, batch_first=True)
    specs = [parse_input("x:float32[batch,time,6]"), parse_input("lengths:int64[batch]")]
    with pytest.raises(CaptureError, match="expected padded sequences, got a packed one"):
        translate(Function(packed(lstm)), specs)


def test_a_size_that_is_pinned_only_while_writing_is_refused(monkeypatch):
    """torch.export keeps aten.rnn_tanh whole; what torch.onnx makes of it would be as many steps as were traced."""
    monkeypatch.setattr("tfinfer.export.capture.recurrent.LAYERS", {})
    with pytest.raises(CaptureError, match="the axis time of x is pinned to 96"):
        translate(Recurrent(nn.RNN, batch_first=True), [parse_input("x:float32[batch,time,24]")])
