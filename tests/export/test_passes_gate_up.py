"""Gate and up of a gated feed-forward become one product and a Split; everything else stays."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

import mixtures  # noqa: E402
from gqa_graph import WIDTH, Graph, operators, unchanged, weights  # noqa: E402

from tfinfer.export import export_model  # noqa: E402
from tfinfer.export.passes import joined, packed_gate_up, pipeline, quantise  # noqa: E402

WIDE = 40
CONTRIB = ["FastGelu", "QuickGelu"]


def activate(g, value, op_type="Sigmoid"):
    return g.op(op_type, value, domain="com.microsoft" if op_type in CONTRIB else "")


def gated(g, *, bias=(False, False), op_type="Sigmoid", swapped=False):
    gate, up = (g.dense(WIDE, seed=i, bias=b) for i, b in enumerate(bias))
    activated = activate(g, gate, op_type)
    return g.op("Mul", up, activated) if swapped else g.op("Mul", activated, up)


def finished(g, value, width=WIDE):
    return g.finish(value, width)


@pytest.mark.parametrize("op_type", ["Gelu", "Relu", "Sigmoid", "Tanh", *CONTRIB])
def test_two_products_become_one(op_type):
    g = Graph()
    model = finished(g, gated(g, op_type=op_type))
    assert unchanged(packed_gate_up.run, model, 1) == {"MatMul": 1, "Split": 1, op_type: 1, "Mul": 1}
    (product,) = (n for n in model.graph if n.op_type == "MatMul")
    assert product.inputs[1].const_value.shape == (WIDTH, 2 * WIDE)
    assert packed_gate_up.run(model) == 0


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("swapped", [False, True])
def test_biases_go_along_whichever_operand_is_activated(bias, swapped):
    g = Graph()
    left = unchanged(packed_gate_up.run, finished(g, gated(g, bias=bias, swapped=swapped)), 1)
    assert left == {"MatMul": 1, "Add": 1, "Split": 1, "Sigmoid": 1, "Mul": 1}


def test_an_activation_takes_its_own_bias():
    g = Graph()
    gate = g.op("FastGelu", g.dense(WIDE, seed=0), weights(WIDE, seed=9), domain="com.microsoft")
    left = unchanged(packed_gate_up.run, finished(g, g.op("Mul", gate, g.dense(WIDE, seed=1))), 1)
    assert left == {"MatMul": 1, "Split": 1, "FastGelu": 1, "Mul": 1}


def test_weights_that_several_layers_share_are_joined_once():
    g = Graph()
    held = [g.held(weights(WIDTH, WIDTH, seed=i)) for i in range(2)]
    x = g.x
    for _ in range(2):
        x = g.op("Mul", activate(g, g.op("MatMul", x, held[0])), g.op("MatMul", x, held[1]))
    model = finished(g, x, WIDTH)
    assert unchanged(packed_gate_up.run, model, 2)["MatMul"] == 2
    (weight,) = (v for v in model.graph.initializers.values() if v.dtype is ir.DataType.FLOAT)
    assert [part.value.name for part in weight.meta[joined.PARTS]] == [value.name for value in held]


# -- what stays -----------------------------------------------------------------------------------------------------
def gate_read_elsewhere(g):
    gate, up = g.dense(WIDE, seed=0), g.dense(WIDE, seed=1)
    return g.op("Add", g.op("Mul", activate(g, gate), up), gate)


def up_read_elsewhere(g):
    gate, up = g.dense(WIDE, seed=0), g.dense(WIDE, seed=1)
    return g.op("Sub", g.op("Mul", activate(g, gate), up), up)


def product_before_its_bias_read_elsewhere(g):
    gate, plain = g.dense(WIDE, seed=0), g.dense(WIDE, seed=1)
    up = g.op("Add", plain, weights(WIDE, seed=2))
    return g.op("Sub", g.op("Mul", activate(g, gate), up), plain)


def another_input(g):
    return g.op("Mul", activate(g, g.dense(WIDE, seed=0)), g.dense(WIDE, seed=1, x=g.op("Neg", g.x)))


def one_product(g):
    gate = g.dense(WIDE, seed=0)
    return g.op("Mul", activate(g, gate), gate)


def not_activated(g):
    return g.op("Mul", g.op("Neg", g.dense(WIDE, seed=0)), g.dense(WIDE, seed=1))


def moving_weight(g):
    square = g.op("MatMul", g.op("Transpose", g.x, perm=[0, 2, 1]), g.x)
    return g.op("Mul", activate(g, g.op("MatMul", g.x, square)), g.dense(WIDTH, seed=1))


STAY = [
    gate_read_elsewhere, up_read_elsewhere, product_before_its_bias_read_elsewhere, another_input, one_product,
    not_activated, moving_weight,
]  # fmt: skip


@pytest.mark.parametrize("make", STAY)
def test_other_products_stay(make):
    g = Graph()
    model = finished(g, make(g), WIDTH if make is moving_weight else WIDE)
    before = operators(model)
    assert unchanged(packed_gate_up.run, model, 0) == before


def test_a_product_that_comes_out_of_the_graph_stays():
    g = Graph()
    gate, up = g.dense(WIDE, seed=0), g.dense(WIDE, seed=1)
    g.emit.output(up, "up", ir.DataType.FLOAT, ("batch", "seq", WIDE))
    assert packed_gate_up.run(finished(g, g.op("Mul", activate(g, gate), up))) == 0


# -- when -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [False, True])
def test_it_is_for_graphs_that_go_on_from_their_past(steps):
    g = Graph()
    out = gated(g)
    if steps:
        g.emit.input("past_states.0", ir.DataType.FLOAT, (1,))
    assert pipeline.run(finished(g, out)).get("packed_gate_up") == (1 if steps else None)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_joined_weight_becomes_small_as_its_parts_would_and_goes_by_their_names(bits):
    def small(pack, keep=()):
        g = Graph()
        x = g.op("MatMul", g.x, weights(WIDTH, 32, seed=5))
        gate, up = (g.op("MatMul", x, weights(32, WIDE, seed=i)) for i in range(2))
        model = finished(g, g.op("Mul", activate(g, gate), up))
        fired = packed_gate_up.run(model) if pack else 0
        names = quantise.weights_of(model)
        quantise.run(model, quantise.Recipe(bits, 8, 32, keep=keep))
        return model, fired, names

    (packed, fired, names), (apart, _, plain) = small(True), small(False)
    assert fired == 1
    assert names[-1][1:] == tuple(name for (name,) in plain)
    found = [[v.const_value.numpy() for v in n.inputs[1:]] for n in packed.graph if n.op_type == "MatMulNBits"]
    expected = [[v.const_value.numpy() for v in n.inputs[1:]] for n in apart.graph if n.op_type == "MatMulNBits"]
    for whole, *parts in zip(*found, *expected):
        np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert operators(small(True, keep=(plain[-1][0],))[0])["MatMulNBits"] == 0


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(mixtures.DIM, mixtures.WIDTH, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(mixtures.WIDTH, mixtures.DIM)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("name", ["Dense", "Masks", "WhereIndexAdd"])
def test_each_expert_of_a_mixture_is_packed(name, tmp_path):
    torch.manual_seed(0)
    module = getattr(mixtures, name)()
    module.experts = torch.nn.ModuleList(Expert() for _ in range(mixtures.EXPERTS))
    export_model(module.eval(), tmp_path / "out", max_length=32)  # proved, or it raises
    left = operators(ir.load(tmp_path / "out" / "decoder.onnx"))
    assert (left["Split"], left["QuickGelu"]) == (mixtures.EXPERTS, mixtures.EXPERTS)
