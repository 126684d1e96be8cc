"""Views, transposes and repeats that cost nothing: what they leave in the graph must be what torch would have made."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
import sympy  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from tfinfer.export.capture import rules  # noqa: E402, F401  (registers the rules)
from tfinfer.export.capture.axes import Atom, Role, Symbols, axis_of, fixed, flat, same  # noqa: E402
from tfinfer.export.capture.emitter import Emitter  # noqa: E402
from tfinfer.export.capture.follow import RULES, Follower, followed  # noqa: E402
from tfinfer.export.capture.positional import Positional  # noqa: E402
from tfinfer.export.capture.tensor import (  # noqa: E402
    Tensor,
    from_working,
    laid_out,
    shape_vector,
    size_vector,
    sizes,
    working,
)
from tfinfer.export.capture.trace import aten  # noqa: E402
from tfinfer.export.capture.tracing import trace  # noqa: E402

B, S = sympy.symbols("b s", positive=True, integer=True)
SYMBOLS = Symbols(B, S)
FEATURES = 24  # 2 * 2 * 2 * 3: many ways to cut it
RUN_SIZES = [(1, 1), (1, 5), (3, 1), (3, 4), (4, 7)]


def run(emit: Emitter, value: ir.Value, fed: list[dict]) -> list[np.ndarray]:
    """Run what leads to `value`, once for each of `fed`."""
    emit.output(value, "out", ir.DataType.FLOAT, ())
    emit.outputs[-1].shape = None
    emit.nodes = [n for n in emit.nodes if _leads_to(n, emit.outputs[-1])]
    proto = ir.to_proto(emit.model("test", 21))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return [session.run(["out"], {k: v for k, v in feed.items() if k in names})[0] for feed in fed]


def _leads_to(node: ir.Node, value: ir.Value) -> bool:
    todo, seen = [value], set()
    while todo:
        maker = todo.pop().producer()
        if maker is node:
            return True
        if maker is not None and maker not in seen:
            seen.add(maker)
            todo += [i for i in maker.inputs if i is not None]
    return False


def feeds() -> list[dict]:
    """An input of (batch, seq, features) for every pair of sizes, every number of it another one."""
    return [
        {
            "x": np.arange(b * s * FEATURES, dtype=np.float32).reshape(b, s, FEATURES),
            "input_ids": np.zeros((b, s), np.int64),
            "attention_mask": np.ones((b, s), np.int64),
        }
        for b, s in RUN_SIZES
    ]


def start(emit: Emitter) -> Tensor:
    value = emit.input("x", ir.DataType.FLOAT, ("batch", "seq", FEATURES))
    return Tensor.of(value, ((Atom(Role.BATCH),), (Atom(Role.QUERY),), fixed(FEATURES)), torch.float32)


class Pair:
    """What the rules see of a trace: the shapes of nodes; `apply` makes a step on a tensor and keeps it for torch."""

    def __init__(self) -> None:
        self.emit = Emitter()
        self.symbols = SYMBOLS
        self.trace = SimpleNamespace(shape=lambda node: node.shape)
        self.tensor = start(self.emit)
        self.steps = []

    def apply(self, target, shape, *args, **kwargs):
        """shape: what the step makes, as torch.export would have traced it."""
        self.tensor = RULES[target](self, SimpleNamespace(shape=shape, target=target), self.tensor, *args, **kwargs)
        assert [SYMBOLS.product(axis) for axis in self.tensor.axes] == list(shape)

        def concrete(x, b, s):
            made = [int(sympy.sympify(d).subs({B: b, S: s})) for d in shape]
            if target in (aten.view.default, aten.expand.default):
                return x.reshape(made) if target is aten.view.default else x.expand(made)
            return target(x, *args, **kwargs)

        self.steps.append(concrete)

    def in_torch(self, feed: dict) -> np.ndarray:
        x = torch.from_numpy(feed["x"])
        b, s = x.shape[:2]
        for step in self.steps:
            x = step(x, b, s)
        return x.numpy()


def size(axis):
    return math.prod(axis, start=sympy.Integer(1))


def plain(shape):
    return [int(d) if sympy.sympify(d).is_Integer else d for d in map(size, shape)]


@st.composite
def chains(draw):
    """A pair after a random chain of steps. An axis is kept as its factors, so that every view drawn is a legal one."""
    pair, axes = Pair(), [[B], [S], [2, 2, 2, 3]]
    for _ in range(draw(st.integers(1, 7))):
        names = ["view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "repeat", "interleave", "compute"]
        name = draw(st.sampled_from(names))
        rank = len(axes)
        if name == "view":
            factors = [f for axis in axes for f in axis]
            cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=5)))
            axes = [factors[i:j] for i, j in zip([0, *cuts], [*cuts, len(factors)])]
            pair.apply(aten.view.default, plain(axes), None)
        elif name == "transpose":
            i, j = draw(st.integers(-rank, rank - 1)), draw(st.integers(-rank, rank - 1))
            axes[i], axes[j] = axes[j], axes[i]
            pair.apply(aten.transpose.int, plain(axes), i, j)
        elif name == "permute":
            order = draw(st.permutations(range(rank)))
            order = [i - rank if draw(st.booleans()) else i for i in order]
            axes = [axes[i] for i in order]
            pair.apply(aten.permute.default, plain(axes), order)
        elif name == "unsqueeze" and rank < 7:
            dim = draw(st.integers(-rank - 1, rank))
            axes.insert(dim % (rank + 1), [])
            pair.apply(aten.unsqueeze.default, plain(axes), dim)
        elif name == "squeeze" and [] in axes:
            dim = draw(st.sampled_from([i for i, axis in enumerate(axes) if not axis]))
            del axes[dim]
            pair.apply(aten.squeeze.dim, plain(axes), dim - rank if draw(st.booleans()) else dim)
        elif name == "expand":
            lead = [[2]] if draw(st.booleans()) and rank < 7 else []
            axes = lead + [axis or draw(st.sampled_from([[], [2], [2, 3]])) for axis in axes]
            pair.apply(aten.expand.default, plain(axes), None)
        elif name in ("repeat", "interleave") and sum(len(axis) for axis in axes) < 9:
            dim, count = draw(st.integers(0, rank - 1)), draw(st.sampled_from([2, 3]))
            if name == "repeat":
                axes[dim] = [count, *axes[dim]]
                pair.apply(aten.repeat.default, plain(axes), [count if i == dim else 1 for i in range(rank)])
            else:
                axes[dim] = [*axes[dim], count]
                pair.apply(aten.repeat_interleave.self_int, plain(axes), count, dim)
        elif name == "compute":
            compute(pair, [i for i, axis in enumerate(axes) if not {B, S} & set(axis)])
    return pair


def compute(pair: Pair, summed: list[int]) -> None:
    """A step that has to be made along one axis: a running sum along an axis of features, or a sign."""
    t = pair.tensor
    value, order = working(pair.emit, t)
    if summed:
        dim = summed[-1]
        value = pair.emit.op("CumSum", value, pair.emit.constant(order.index(dim), np.int64))
        pair.steps.append(lambda x, b, s: x.cumsum(dim))
    else:
        value = pair.emit.op("Neg", value)
        pair.steps.append(lambda x, b, s: -x)
    pair.tensor = from_working(value, followed(t.axes), order, t.dtype)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(chains())
def test_any_chain_of_views_is_what_torch_makes_of_it_at_sizes_never_traced(pair):
    given_ = feeds()
    made = run(pair.emit, laid_out(pair.emit, pair.tensor), given_)
    for feed, got in zip(given_, made):
        expected = pair.in_torch(feed)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(chains(), st.randoms(use_true_random=False))
def test_laying_out_in_another_order_is_a_transpose_of_the_same_values(pair, random):
    order = list(range(pair.tensor.rank))
    random.shuffle(order)
    given_ = feeds()
    made = run(pair.emit, working(pair.emit, pair.tensor, order)[0], given_)
    for feed, got in zip(given_, made):
        np.testing.assert_allclose(got, pair.in_torch(feed).transpose(order), rtol=1e-5)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(chains())
def test_the_order_of_a_base_names_every_axis_once(pair):
    assert sorted(pair.tensor.order()) == list(range(pair.tensor.rank))


# -- nothing is written ---------------------------------------------------------------------------------------------
def test_a_transpose_and_its_inverse_leave_no_node():
    pair = Pair()
    pair.apply(aten.view.default, [B, S, 4, 6], None)
    pair.apply(aten.transpose.int, [B, 4, S, 6], 1, 2)
    pair.apply(aten.permute.default, [S, B, 6, 4], [2, 0, 3, 1])
    pair.apply(aten.permute.default, [B, 4, S, 6], [1, 3, 0, 2])
    pair.apply(aten.transpose.int, [B, S, 4, 6], -3, -2)
    pair.apply(aten.view.default, [B, S, 24], None)
    assert laid_out(pair.emit, pair.tensor) is pair.tensor.value
    assert pair.emit.nodes == []


def test_heads_that_are_split_and_joined_again_leave_no_transpose_and_no_size():
    pair = Pair()
    pair.apply(aten.view.default, [B, S, 4, 6], None)
    pair.apply(aten.transpose.int, [B, 4, S, 6], 1, 2)
    value, order = working(pair.emit, pair.tensor)  # as an element-wise operation would want it
    negative = from_working(pair.emit.op("Neg", value), pair.tensor.axes, order, torch.float32)
    joined = negative.seen_as(tuple(negative.axes[i] for i in (0, 2, 1, 3)))
    joined = joined.seen_as((joined.axes[0], joined.axes[1], joined.axes[2] + joined.axes[3]))
    laid_out(pair.emit, joined)
    assert [n.op_type for n in pair.emit.nodes] == ["Reshape", "Neg", "Reshape"]


def test_the_sequence_before_the_batch_and_back_costs_nothing_even_with_work_between():
    pair = Pair()
    pair.apply(aten.transpose.int, [S, B, 24], 0, 1)
    compute(pair, [])
    pair.apply(aten.transpose.int, [B, S, 24], 0, 1)
    laid_out(pair.emit, pair.tensor)
    assert [n.op_type for n in pair.emit.nodes] == ["Neg"]


def test_a_repeat_that_nobody_lays_out_is_never_made():
    pair = Pair()
    pair.apply(aten.view.default, [B, S, 4, 6], None)
    pair.apply(aten.repeat_interleave.self_int, [B, S, 12, 6], 3, 2)
    pair.apply(aten.view.default, [B, S, 4, 3, 6], None)
    assert pair.emit.nodes == []
    kept = tuple(tuple(a for a in axis if not a.repeat) for axis in pair.tensor.axes)
    laid_out(pair.emit, pair.tensor, (kept[0], kept[1], kept[2] + kept[3] + kept[4]))
    assert not {"Expand", "Transpose"} & {n.op_type for n in pair.emit.nodes}


# -- regroup --------------------------------------------------------------------------------------------------------
def atoms(*parts):
    made = {"b": Atom(Role.BATCH), "s": Atom(Role.QUERY)}
    return tuple(tuple(made[p] if isinstance(p, str) else Atom(size=p) for p in axis) for axis in parts)


BATCH_SEQ = atoms(["b"], ["s"], [24])


@pytest.mark.parametrize(
    "shape",
    [
        [S, B, 24],
        [B, 24, S],
        [B * 2, S, 12],
        [B, 2, S, 12],
        [B, S * 4, 6, 2],
        [B, S - 1, 24],
        [B, S],
        [B, S, 24, 2],
        [B, S, 5, 5],
        [B, 2, S / 2, 24],
        [B * S * 5, 5],
        [4, B * S * 6],
        [24, B, S],
        [11, 2, 24],
    ],
)
def test_no_view_cuts_or_reorders_a_batch_or_sequence_axis(shape):
    assert SYMBOLS.regroup(BATCH_SEQ, shape) is None


@pytest.mark.parametrize(
    "shape", [[B * S, 24], [B * S * 24], [B, S * 24], [B, S, 1, 24], [1, B, S, 2, 3, 4], [B, 1, S * 2, 12]]
)
def test_joining_whole_axes_is_no_cut(shape):
    axes, _ = SYMBOLS.regroup(BATCH_SEQ, shape)
    assert [SYMBOLS.product(axis) for axis in axes] == shape


def test_a_fixed_axis_is_cut_once_and_the_cut_is_told():
    axes, splits = SYMBOLS.regroup(BATCH_SEQ, [B, S, 2, 3, 4])
    assert [[a.size for a in halves] for halves in splits.values()] == [[2, 12], [3, 4]]
    assert next(iter(splits)) is BATCH_SEQ[2][0]
    assert [a.size for a in flat(axes[2:])] == [2, 3, 4]


def test_factors_that_do_not_fit_into_each_other_are_refused_not_guessed():
    assert SYMBOLS.regroup(atoms([4], [3]), [6, 2]) is None
    axes, _ = SYMBOLS.regroup(atoms([4], [6]), [2, 12])
    assert [SYMBOLS.product(axis) for axis in axes] == [2, 12]


def test_the_two_halves_of_a_repeat_are_repeats():
    repeated = ((Atom(size=6, repeat=True),),)
    axes, _ = SYMBOLS.regroup(repeated, [2, 3])
    assert all(a.repeat for a in flat(axes))


def test_atoms_are_told_apart_by_identity_and_compared_by_meaning():
    one, other = Atom(size=3), Atom(size=3)
    assert one != other
    assert same((one,), (other,))
    assert not same((one,), (Atom(size=4),))
    assert not same((one,), ())
    assert axis_of(BATCH_SEQ, Role.QUERY) == 1
    assert axis_of(BATCH_SEQ, Role.KEY) is None


# -- the operands of Reshape and Expand -----------------------------------------------------------------------------
def constant_of(value: ir.Value) -> list[int]:
    assert value.const_value is not None
    return value.const_value.numpy().tolist()


def test_a_size_that_stays_is_copied_and_one_unknown_size_is_inferred():
    b, s = BATCH_SEQ[0], BATCH_SEQ[1]
    emit = Emitter()
    four, six = fixed(4), fixed(6)
    assert constant_of(shape_vector(emit, (b, s, four, six), BATCH_SEQ)) == [0, 0, 4, 6]
    assert constant_of(shape_vector(emit, (b + s, four, six), BATCH_SEQ)) == [-1, 4, 6]
    assert constant_of(shape_vector(emit, (b, four, s, six), (b, s, four + six))) == [0, 4, -1, 6]
    assert constant_of(shape_vector(emit, (b, (), s), (b, s))) == [0, 1, -1]
    assert emit.nodes == []


def test_two_sizes_that_moved_are_joined_from_the_sizes_of_the_call():
    b, s = BATCH_SEQ[0], BATCH_SEQ[1]
    emit = Emitter()
    value = shape_vector(emit, (fixed(4), b, s), (b, s, fixed(4)))
    assert value.producer().op_type == "Concat"
    fed = [{"input_ids": np.zeros((b_, s_), np.int64)} for b_, s_ in RUN_SIZES]
    made = run_int(emit, value, fed)
    assert made == [[4, b_, s_] for b_, s_ in RUN_SIZES]


def test_an_axis_of_batch_and_positions_is_their_product_where_nothing_can_be_inferred():
    b, s = BATCH_SEQ[0], BATCH_SEQ[1]
    emit = Emitter()
    axes = ((*b, Atom(size=3)), (Atom(size=2), *s), ())
    fed = [{"input_ids": np.zeros((b_, s_), np.int64)} for b_, s_ in RUN_SIZES]
    assert run_int(emit, size_vector(emit, axes), fed) == [[3 * b_, 2 * s_, 1] for b_, s_ in RUN_SIZES]
    assert [sizes(axes, b_, s_, 99) for b_, s_ in RUN_SIZES] == [[3 * b_, 2 * s_, 1] for b_, s_ in RUN_SIZES]


def test_sizes_without_batch_or_positions_are_one_constant():
    emit = Emitter()
    assert constant_of(size_vector(emit, (fixed(4), (), (Atom(size=2), Atom(size=3, repeat=True))))) == [4, 1, 6]


def test_the_keys_are_as_many_as_the_mask_is_wide():
    emit = Emitter()
    value = size_vector(emit, ((Atom(Role.KEY),), (Atom(Role.QUERY),)))
    fed = [{"input_ids": np.zeros((2, 3), np.int64), "attention_mask": np.ones((2, 9), np.int64)}]
    assert run_int(emit, value, fed) == [[9, 3]]


def run_int(emit: Emitter, value: ir.Value, fed: list[dict]) -> list[list[int]]:
    emit.output(value, "out", ir.DataType.INT64, ("n",))
    session = ort.InferenceSession(ir.to_proto(emit.model("test", 21)).SerializeToString())
    names = {i.name for i in session.get_inputs()}
    return [session.run(None, {k: v for k, v in feed.items() if k in names})[0].tolist() for feed in fed]


# -- modules that are traced ----------------------------------------------------------------------------------------
class Views(nn.Module):
    """An embedding whose rows are arranged by a function."""

    def __init__(self, arrange):
        super().__init__()
        self.tokens = nn.Embedding(61, FEATURES)
        self.arrange = arrange

    def forward(self, ids):
        return self.arrange(self.tokens(ids))


def fold_heads(x):
    b, t, _ = x.shape
    return x.view(b, t, 4, 6).transpose(1, 2).reshape(b * 4, t, 6)


def repeat_heads(x):
    b, t, _ = x.shape
    x = x.view(b, t, 2, 12).transpose(1, 2)[:, :, None].expand(b, 2, 3, t, 12).reshape(b, 6, t, 12)
    return x.transpose(1, 2).flatten(2)


def sequence_first(x):
    x = x.transpose(0, 1)
    t, b, _ = x.shape
    return x.contiguous().view(t, b * 3, 8).transpose(0, 1).repeat(1, 1, 2)


def by_numbers(x):
    return x.unflatten(-1, (3, 8)).movedim(2, 0).mT.unsqueeze(2).squeeze(2).repeat_interleave(2, dim=0).contiguous()


@pytest.mark.parametrize("arrange", [fold_heads, repeat_heads, sequence_first, by_numbers])
def test_a_traced_module_that_only_arranges_is_followed_at_other_sizes(arrange):
    torch.manual_seed(0)
    module = Views(arrange)
    captured = trace(module)
    follower = Follower(captured, Positional(captured, captured.seq), 16, "ort")
    for node in captured.nodes:
        if node in captured.data and node.op != "output":
            follower.follow(node)
    (last,) = captured.output.args[0]
    fed = [{"input_ids": np.random.default_rng(0).integers(0, 61, (b, s))} for b, s in RUN_SIZES]
    made = run(follower.emit, laid_out(follower.emit, follower.values[last]), fed)
    for feed, got in zip(fed, made):
        with torch.no_grad():
            expected = module(torch.from_numpy(feed["input_ids"])).numpy()
        np.testing.assert_array_equal(got, expected)
