"""Positional values read as tables, and the tables read again in the graph: rows of different lengths must not mix."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tfinfer.export.capture import tables  # noqa: E402
from tfinfer.export.capture.axes import Role  # noqa: E402
from tfinfer.export.capture.emitter import Emitter  # noqa: E402
from tfinfer.export.capture.place import (  # noqa: E402
    BATCH,
    Placed,
    gather_by_distance,
    gather_rows,
    gather_square,
    slice_positions,
)
from tfinfer.export.capture.tables import (  # noqa: E402
    ByDistance,
    NotStable,
    PerKey,
    Square,
    TooLarge,
    close,
    read_rows,
    read_square,
    sampled_rows,
)

INF, NAN = float("inf"), float("nan")
LENGTHS = [2, 3, 40, 97, 300]  # below, at and above what is read whole
HEADS = torch.tensor([[[0.5]], [[2.0]]], dtype=torch.float64)


def per_key(rows, n):
    return torch.sin(torch.arange(n)).expand(2, len(rows), n) * HEADS


def by_distance(rows, n):
    return -(rows[:, None] - torch.arange(n)).abs() * HEADS


def one_sided(rows, n):
    distance = rows[:, None] - torch.arange(n)
    return torch.where(distance < 0, -INF, -distance.double()) * HEADS


def chunked(rows, n):
    return torch.where(rows[:, None] // 8 == torch.arange(n) // 8, 0.0, -INF)[None]


def products(rows, n):
    return torch.sin(rows[:, None] * torch.arange(n).double())[None]


READ = [
    (per_key, PerKey),
    (by_distance, ByDistance),
    (one_sided, ByDistance),
    (chunked, Square),
    (products, Square),
]


@pytest.mark.parametrize("length", LENGTHS[2:])
@pytest.mark.parametrize("value, kind", READ)
def test_each_kind_is_recognised_and_its_table_gives_the_value_back(value, kind, length):
    read = read_square(value, length)
    assert type(read) is kind
    i, j = torch.arange(length)[:, None], torch.arange(length)
    whole = value(torch.arange(length), length)
    again = read.table
    if kind is PerKey:
        again = read.table[..., None, :]
    if kind is ByDistance:
        again = read.table[..., i - j + length - 1]
    assert close(whole, again.expand_as(whole))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_value_that_is_the_same_everywhere_is_one_per_key_not_a_square(length):
    assert isinstance(read_square(lambda rows, n: torch.zeros(len(rows), n), length), PerKey)


@pytest.mark.parametrize("value", [per_key, by_distance, chunked])
def test_two_positions_are_enough(value):
    read = read_square(value, 2)
    assert read.table.shape[-1] in (2, 3)


def test_the_widths_of_the_tables_are_those_of_their_kind():
    assert read_square(per_key, 100).table.shape == (2, 100)
    assert read_square(by_distance, 100).table.shape == (2, 199)
    assert read_square(chunked, 100).table.shape == (1, 100, 100)


def test_truth_values_are_read_too():
    read = read_square(lambda rows, n: torch.arange(n) <= rows[:, None], 120)
    assert isinstance(read, ByDistance)
    assert read.table.dtype == torch.bool
    assert read.table.tolist() == [False] * 119 + [True] * 120


# -- close ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "left, right, equal",
    [
        ([1.0, NAN], [1.0, 7.0], True),
        ([1.0, 7.0], [1.0, NAN], True),
        ([NAN, NAN], [NAN, -INF], True),
        ([1.0, NAN], [2.0, NAN], False),
        ([-INF, 1.0], [-INF, 1.0], True),
        ([INF], [INF], True),
        ([-INF, 1.0], [-1e9, 1.0], False),
        ([-1e9, 1.0], [-INF, 1.0], False),
        ([-INF], [INF], False),
        ([-INF, 1.0], [0.0, 1.0], False),
        ([1.0], [1.0 + 5e-7], True),
        ([1.0], [1.0 + 5e-6], False),
        ([0.0], [5e-7], True),
        ([1e6], [1e6 + 0.5], True),
        ([1e6], [1e6 + 5], False),
        ([], [], True),
    ],
)
def test_close_lets_rounding_and_nan_pass_and_nothing_else(left, right, equal):
    for dtype in (torch.float32, torch.float64):
        assert close(torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype)) is equal


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_close_is_exact_where_nothing_rounds(dtype):
    zeros, ones = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    assert close(zeros, zeros)
    assert not close(zeros, ones)


def test_one_hidden_key_beside_many_equal_ones_is_a_difference():
    """A -inf makes no tolerance: 1e-6 of infinity would let everything pass."""
    left = torch.zeros(50)
    left[3] = -INF
    right = left.clone()
    right[7] = 1.0
    assert not close(left, right)


# -- what a cache cannot continue -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value",
    [
        lambda rows, n: (torch.arange(n) - n).expand(len(rows), n).double(),
        lambda rows, n: (rows[:, None] * n + torch.arange(n)).double(),
        lambda rows, n: torch.full((len(rows), n), 1.0 / n),
        lambda rows, n: torch.arange(n).flip(0) >= rows[:, None],
        lambda rows, n: torch.where(torch.arange(n) == n - 1, 0.0, -INF).expand(len(rows), n),
    ],
)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_a_value_that_changes_with_the_whole_length_is_not_stable(value, length):
    with pytest.raises(NotStable):
        read_square(value, length)


def test_a_table_of_pairs_larger_than_the_limit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(tables, "SQUARE_BYTES", 2 * 100 * 100 * 8 - 1)

    def value(rows, n):
        return products(rows, n) * HEADS

    with pytest.raises(TooLarge) as error:
        read_square(value, 100)
    assert error.value.args == (2 * 100 * 100 * 8,)
    monkeypatch.setattr(tables, "SQUARE_BYTES", 2 * 100 * 100 * 8)
    assert isinstance(read_square(value, 100), Square)


@pytest.mark.parametrize("value", [per_key, by_distance])
def test_a_small_table_is_never_too_large(monkeypatch, value):
    monkeypatch.setattr(tables, "SQUARE_BYTES", 0)
    read_square(value, 200)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_are_read_along_any_axis(axis):
    def value(n):
        return torch.arange(n, dtype=torch.float64).reshape([n if i == axis else 1 for i in range(3)]).expand(
            [n if i == axis else 2 for i in range(3)]
        )  # fmt: skip

    table = read_rows(value, axis, 77)
    assert table.shape[axis] == 77
    assert torch.equal(table, value(77))


def test_rows_that_change_with_the_length_are_not_stable():
    with pytest.raises(NotStable):
        read_rows(lambda n: torch.arange(n).double() / n, 0, 60)
    with pytest.raises(NotStable):
        read_rows(lambda n: torch.arange(n).flip(0), 0, 60)


@pytest.mark.parametrize("length", [1, 2, 47, 96, 97, 1000, 4096])
def test_the_sampled_rows_are_sorted_valid_and_hold_both_ends(length):
    rows = sampled_rows(length).tolist()
    assert rows == sorted(set(rows))
    assert rows[0] == 0
    assert rows[-1] == length - 1
    assert length > 96 or rows == list(range(length))
    assert len(rows) <= max(96, 100)


def test_a_change_at_any_power_of_two_is_seen():
    """Chunks and buckets begin at powers of two: the rows on both sides of each are read."""
    rows = set(sampled_rows(4096).tolist())
    assert {p + d for e in range(1, 12) for p in [1 << e] for d in (-1, 0, 1)} <= rows


# -- in the graph ---------------------------------------------------------------------------------------------------
LENGTH = 23
RAGGED = [
    np.array([[0, 1, 2, 3]]),
    np.array([[7], [0], [22]]),
    np.array([[4, 5, 6], [18, 19, 20]]),
]


def evaluate(emit: Emitter, value: ir.Value, positions: np.ndarray) -> np.ndarray:
    emit.output(value, "out", ir.DataType.FLOAT, ())
    emit.outputs[-1].shape = None
    session = ort.InferenceSession(ir.to_proto(emit.model("test", 21)).SerializeToString())
    total = int(positions.max()) + 1
    fed = {"position_ids": positions, "attention_mask": np.ones((len(positions), total), np.int64)}
    names = {i.name for i in session.get_inputs()}
    return session.run(["out"], {k: v for k, v in fed.items() if k in names})[0]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def check(make, order, expected):
    """`make(emit)` arranged in `order` is broadcast to `expected(positions, total)`, whose axes are the data's own."""
    for positions in RAGGED:
        emit = Emitter()
        placed = make(emit)
        got = evaluate(emit, placed.arranged(emit, order, 0), positions)
        wanted = expected(torch.from_numpy(positions), int(positions.max()) + 1).permute(*order).numpy()
        np.testing.assert_array_equal(np.broadcast_to(got, wanted.shape), wanted)


ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)]


@pytest.mark.parametrize("order", ORDERS)
def test_rotary_rows_are_taken_at_each_rows_own_positions(order):
    table = numbers(1, 1, LENGTH, 6)

    def expected(at, total):
        return table[0, 0][at][:, None]  # (batch, 1, seq, dim)

    check(lambda emit: gather_rows(emit, table, 2), order, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_a_table_with_heads_in_front_keep_their_heads(order):
    table = numbers(1, 3, LENGTH, 6)

    def expected(at, total):
        return torch.stack([table[0, :, row] for row in at])

    check(lambda emit: gather_rows(emit, table, 2), order, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("heads", [1, 3])
def test_keys_are_all_columns_up_to_the_longest_row(order, heads):
    table = numbers(1, heads, 1, LENGTH)

    def expected(at, total):
        return table[:, :, :, :total].expand(len(at), heads, at.shape[1], total)

    check(lambda emit: slice_positions(emit, table, 3, Role.KEY), order, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_bias_by_distance_stands_where_each_row_stands(order, heads):
    table = numbers(1, heads, 2 * LENGTH - 1)

    def expected(at, total):
        distance = at[:, :, None] - torch.arange(total) + LENGTH - 1
        return table[0][:, distance].transpose(0, 1)

    check(lambda emit: gather_by_distance(emit, table, LENGTH, [0, 1], 2, 3, None), order, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_square_is_its_rows_at_the_new_positions_and_its_columns_up_to_the_longest(order, heads):
    table = numbers(1, heads, LENGTH, LENGTH)

    def expected(at, total):
        return torch.stack([table[0][:, row, :total] for row in at])

    check(lambda emit: gather_square(emit, table, [0, 1], 2, 3, None), order, expected)


@pytest.mark.parametrize("query, key, rest", [(1, 3, [0, 2]), (3, 1, [0, 2]), (2, 1, [0, 3])])
def test_positions_may_lie_along_any_two_axes_of_the_data(query, key, rest):
    table = numbers(1, 5, LENGTH, LENGTH)
    heads = rest[1]

    def expected(at, total):
        value = torch.stack([table[0][:, row, :total] for row in at])  # batch, heads, query, key
        return value.permute([(0, heads, query, key).index(i) for i in range(4)])

    check(lambda emit: gather_square(emit, table, rest, query, key, None), (0, 1, 2, 3), expected)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_of_any_table_are_those_of_direct_indexing(data):
    batch, seq, heads = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)))
    starts = data.draw(st.lists(st.integers(0, LENGTH - seq), min_size=batch, max_size=batch))
    at = torch.tensor(starts)[:, None] + torch.arange(seq)
    total = int(at.max()) + 1
    distances, square = numbers(heads, 2 * LENGTH - 1), numbers(heads, LENGTH, LENGTH)
    wanted = [
        torch.stack([square[:, row, :total] for row in at]),
        distances[:, at[:, :, None] - torch.arange(total) + LENGTH - 1].transpose(0, 1),
    ]
    for make, expected in zip(
        (
            lambda emit: gather_square(emit, square, [1], 2, 3, None),
            lambda emit: gather_by_distance(emit, distances, LENGTH, [1], 2, 3, None),
        ),
        wanted,
    ):
        emit = Emitter()
        got = evaluate(emit, make(emit).arranged(emit, range(4), 0), at.numpy())
        np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected.numpy())


def test_a_constant_spreads_over_the_axes_that_it_has():
    table = numbers(1, 3, 1, 5)
    emit = Emitter()
    placed = Placed.constant(emit, table, "slopes")
    assert placed.dims == (1, 3)
    value = placed.arranged(emit, (3, 2, 1, 0), 0)
    got = evaluate(emit, emit.op("Identity", value), RAGGED[0])
    np.testing.assert_array_equal(np.broadcast_to(got, (5, 1, 3, 1)), table.permute(3, 2, 1, 0).numpy())


def test_a_single_number_needs_no_axis():
    emit = Emitter()
    placed = Placed.constant(emit, torch.full((1, 1), 0.25), "table")
    assert placed.dims == ()
    assert evaluate(emit, emit.op("Identity", placed.arranged(emit, range(4), 0)), RAGGED[0]) == 0.25


def test_rows_put_the_batch_in_front():
    emit = Emitter()
    assert gather_rows(emit, numbers(1, 3, LENGTH, 6), 2).dims == (BATCH, 2, 1, 3)


def test_equal_tables_are_one_initializer():
    emit = Emitter()
    for _ in range(2):
        gather_rows(emit, numbers(1, 1, LENGTH, 6), 2)
        slice_positions(emit, numbers(LENGTH, 6), 0, Role.KEY)
    stored = [v for v in emit.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert len(stored) == 1
    gather_rows(emit, numbers(LENGTH, 6).half(), 0)
    assert len([v for v in emit.initializers.values() if v.dtype == ir.DataType.FLOAT16]) == 1
