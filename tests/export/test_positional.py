"""Some rows of a positional value, computed without the others: they must be the rows of the whole value."""

import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from torch import nn  # noqa: E402

from tfinfer.errors import CaptureError  # noqa: E402
from tfinfer.export.capture import positional as positional_module  # noqa: E402
from tfinfer.export.capture.positional import Positional, longest_length, read_by_data  # noqa: E402
from tfinfer.export.capture.trace import aten, is_computed  # noqa: E402
from tfinfer.export.capture.tracing import trace  # noqa: E402

LONGEST = 96


class Made(nn.Module):
    """Returns what `make(module, length, ids)` makes of the length alone."""

    def __init__(self, make):
        super().__init__()
        self.register_buffer("table", torch.randn(LONGEST, 5, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("square", torch.randn(LONGEST, LONGEST, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("stacked", torch.randn(1, 2, LONGEST, LONGEST, generator=torch.Generator().manual_seed(2)))
        self.register_buffer("buckets", torch.randn(2, 9, generator=torch.Generator().manual_seed(3)))
        self.make = make

    def forward(self, ids):
        return self.make(self, ids.shape[1], ids)


def distance(t):
    at = torch.arange(t)
    return at[:, None] - at


def causal(t):
    return torch.ones(t, t, dtype=torch.bool).tril()


MAKES = {
    "arange": lambda m, t, ids: torch.arange(t),
    "arange with a start": lambda m, t, ids: torch.arange(3, t + 3),
    "arange with a step": lambda m, t, ids: torch.arange(5, 2 * t + 5, 2),
    "arange downwards": lambda m, t, ids: torch.arange(t - 1, -1, -1),
    "arange of floats": lambda m, t, ids: torch.arange(t, dtype=torch.float32) / 7,
    "tril": lambda m, t, ids: torch.ones(t, t).tril(),
    "tril above": lambda m, t, ids: torch.ones(t, t, dtype=torch.bool).tril(2),
    "tril below": lambda m, t, ids: torch.tril(torch.ones(t, t), diagonal=-3),
    "triu": lambda m, t, ids: torch.full((t, t), -1e9).triu(),
    "triu above": lambda m, t, ids: torch.full((t, t), float("-inf")).triu(1),
    "triu below": lambda m, t, ids: torch.triu(torch.ones(t, t, dtype=torch.int64), diagonal=-2),
    "a window of tril and triu": lambda m, t, ids: torch.ones(t, t).tril(1).triu(-4),
    "tril of heads": lambda m, t, ids: torch.ones(1, 2, t, t).tril(),
    "tril that is no square": lambda m, t, ids: torch.ones(t, 7).tril(1),
    "triu across": lambda m, t, ids: torch.ones(7, t).triu(2),
    "zeros": lambda m, t, ids: torch.zeros(t, t),
    "ones beside a number": lambda m, t, ids: torch.ones(2, t, 3, t),
    "full of truth": lambda m, t, ids: torch.full((t, t), True),
    "the like of another": lambda m, t, ids: torch.zeros_like(torch.ones(t, t)) + 2,
    "the start of a buffer": lambda m, t, ids: m.table[:t] + 0,
    "a corner of a buffer": lambda m, t, ids: m.square[:t, :t] + 0,
    "a corner of a buffer of heads": lambda m, t, ids: m.stacked[:, :, :t, :t] + 0,
    "the end of a buffer": lambda m, t, ids: m.table[-t:] + 0,
    "the middle of a buffer": lambda m, t, ids: m.table[4 : t + 4] + 0,
    "every other row of a buffer": lambda m, t, ids: m.table[: 2 * t : 2] + 0,
    "columns of the middle": lambda m, t, ids: m.square[:t, 5 : t + 5] + 0,
    "the start of what is as long": lambda m, t, ids: torch.arange(t)[0:t] * 2,
    "some columns of a table": lambda m, t, ids: m.table[:t][:, 1:4] + 0,
    "all but the first of one more": lambda m, t, ids: torch.arange(t + 1)[1:] * 2,
    "transpose": lambda m, t, ids: distance(t).transpose(0, 1) + 0,
    "transpose of other axes": lambda m, t, ids: (m.stacked[:, :, :t, :t] * 2).transpose(1, 2) + 0,
    "transpose from behind": lambda m, t, ids: m.square[:t, :t].mT + distance(t),
    "t": lambda m, t, ids: distance(t).t() + 0,
    "permute": lambda m, t, ids: (m.stacked[:, :, :t, :t] * 2).permute(2, 0, 3, 1) + 0,
    "permute from behind": lambda m, t, ids: (m.stacked[:, :, :t, :t] * 2).permute(0, -1, 1, -2) + 0,
    "expand": lambda m, t, ids: torch.arange(t)[None].expand(3, t) + 0,
    "expand to a square": lambda m, t, ids: torch.arange(t)[:, None].expand(t, t) + 0,
    "expand to more rows": lambda m, t, ids: torch.arange(t).expand(t, t) + 0,
    "expand with -1": lambda m, t, ids: distance(t)[None, None].expand(2, 3, -1, -1) + 0,
    "expand what has one row": lambda m, t, ids: m.table[:1, :1].expand(t, t) + 0,
    "unsqueeze in front": lambda m, t, ids: distance(t).unsqueeze(0).unsqueeze(0) + 0,
    "unsqueeze between": lambda m, t, ids: distance(t).unsqueeze(1) + 0,
    "unsqueeze behind": lambda m, t, ids: distance(t).unsqueeze(-1) + 0,
    "pointwise": lambda m, t, ids: torch.where(distance(t) < 0, float("-inf"), -distance(t) * 0.5),
    "pointwise by broadcast": lambda m, t, ids: torch.arange(t)[:, None] * torch.arange(t) + torch.arange(t),
    "pointwise of several ranks": lambda m, t, ids: m.buckets[:, 0, None, None] * distance(t) + torch.ones(2, 1, 1),
    "comparison": lambda m, t, ids: torch.logical_and(distance(t) >= 0, ~causal(t).logical_not()),
    "both of two truths": lambda m, t, ids: (distance(t) >= 0) & (distance(t) < 5) | ~causal(t),
    "chunks": lambda m, t, ids: torch.arange(t)[:, None] // 8 == torch.arange(t) // 8,
    "another type": lambda m, t, ids: causal(t).float().clone().to(torch.int64),
    "masked fill": lambda m, t, ids: torch.zeros(t, t).masked_fill(~causal(t), float("-inf")),
    "index": lambda m, t, ids: m.square[torch.arange(t)[:, None], torch.arange(t)[None]],
    "index by one row": lambda m, t, ids: m.square[torch.arange(t), torch.arange(t)],
    "index by buckets": lambda m, t, ids: m.buckets[:, distance(t).clamp(0, 8)],
    "index of heads by buckets": lambda m, t, ids: m.buckets[torch.arange(2)[:, None, None], distance(t).clamp(0, 8)],
    "index of what is computed": lambda m, t, ids: (m.square * 2)[
        (distance(t) + 20).clamp(0, 40), torch.arange(t)[None]
    ],
    "gather of a buffer by positions": lambda m, t, ids: m.table[torch.arange(t)] + 1,
    "embedding": lambda m, t, ids: nn.functional.embedding(torch.arange(t), m.table),
    "sines": lambda m, t, ids: torch.outer(torch.arange(t).float(), m.table[0]).sin(),
    "halves": lambda m, t, ids: torch.cat([m.table[:t], m.table[:t]], dim=-1).cos(),
    "cumsum": lambda m, t, ids: torch.ones(t, t).cumsum(0),
    "sum": lambda m, t, ids: distance(t).sum(1),
    "flip": lambda m, t, ids: distance(t).flip(0),
    "stack": lambda m, t, ids: torch.stack([torch.arange(t), torch.arange(t) * 2], dim=1),
    "view": lambda m, t, ids: distance(t).view(1, t, t) * 2,
}  # fmt: skip


class All(Made):
    """Everything of MAKES at once, traced once."""

    def __init__(self):
        super().__init__(None)

    def forward(self, ids):
        return tuple(make(self, ids.shape[1], ids) for make in MAKES.values())


@pytest.fixture(scope="module")
def everything():
    captured = trace(All())
    return captured, dict(zip(MAKES, captured.output.args[0]))


def _has_rows(captured, node):
    value = node.meta.get("val")
    return (
        node not in captured.data
        and is_computed(node)
        and isinstance(value, torch.Tensor)
        and captured.seq in captured.shape(node)
    )


def leading_to(node):
    found, todo = {}, [node]
    while todo:
        at = todo.pop()
        if at not in found:
            found[at] = None
            todo += at.all_input_nodes
    return list(found)


@pytest.mark.parametrize("name", MAKES)
def test_rows_of_a_value_are_those_of_the_whole(name, everything, monkeypatch):
    monkeypatch.setattr(positional_module, "SQUARE_LIMIT", 0)  # so that nothing is small enough to be computed whole
    captured, last = everything
    nodes = [n for n in leading_to(last[name]) if _has_rows(captured, n)]
    assert last[name] in nodes
    for length in (2, 23, 40):
        for rows in ([length - 1], [length - 1, 0, length // 2, 1], list(range(length))):
            rows = torch.tensor(rows)
            for node in nodes:
                whole = Positional(captured, captured.seq).value(node, length)
                for axis in [i for i, size in enumerate(captured.shape(node)) if size == captured.seq]:
                    cut = Positional(captured, captured.seq).rows(node, axis, rows, length)
                    assert cut.dtype == whole.dtype
                    assert torch.equal(cut, whole.index_select(axis, rows)), (node, axis, length)


CUT = [
    "tril", "triu above", "a window of tril and triu", "zeros", "full of truth", "a corner of a buffer",
    "transpose", "permute", "expand to a square", "expand to more rows", "unsqueeze in front", "unsqueeze behind",
    "comparison", "chunks", "another type", "masked fill", "index", "index of heads by buckets",
    "pointwise", "both of two truths",
]  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_mask_is_not_computed_whole_for_some_of_its_rows(name, everything, monkeypatch):
    """At the longest length of a large module the whole would be many gigabytes."""
    monkeypatch.setattr(positional_module, "SQUARE_LIMIT", 0)
    captured, last = everything
    positional, whole = Positional(captured, captured.seq), []
    compute = positional._compute
    positional._compute = lambda node: whole.append(node) or compute(node)
    axis = next(i for i, size in enumerate(captured.shape(last[name])) if size == captured.seq)
    positional.rows(last[name], axis, torch.tensor([3, 17]), 18)
    made = [n for n in whole if _has_rows(captured, n)]
    assert [n for n in made if captured.shape(n).count(captured.seq) > 1] == []


def test_a_square_much_larger_than_memory_is_read_at_its_rows():
    def make(m, t, ids):
        at = torch.arange(t)
        hidden = torch.full((t, t), float("-inf")).triu(1)
        return hidden[None, None].masked_fill((at[:, None] - at >= 1000)[None, None], float("-inf"))

    captured = trace(Made(make))
    last = [n for n in captured.nodes if _has_rows(captured, n)][-1]
    length = 300_000  # whole: 360 GB
    value = Positional(captured, captured.seq).rows(last, 2, torch.tensor([0, length - 1]), length)
    assert value.shape == (1, 1, 2, length)
    assert (value[0, 0] == 0).sum(-1).tolist() == [1, 1000]


def test_a_value_is_computed_once_for_a_length_and_anew_for_another():
    captured = trace(Made(MAKES["tril"]))
    (node,) = [n for n in captured.nodes if n.target is aten.tril.default]
    positional = Positional(captured, captured.seq)
    first = positional.value(node, 9)
    assert positional.value(node, 12).shape == (12, 12)
    assert positional.value(node, 9) is first


def test_a_length_that_is_computed_from_the_ids_is_refused():
    captured = trace(Made(lambda m, t, ids: (ids.sum() + torch.arange(t)) * 2))
    data = [n for n in captured.nodes if n in captured.data and is_computed(n)]
    with pytest.raises(CaptureError, match="computed from the values of the ids"):
        Positional(captured, captured.seq).value(data[-1], 5)


def test_sizes_are_those_of_one_row():
    captured = trace(Made(lambda m, t, ids: torch.ones(ids.shape[0], t) + ids))
    (node,) = [n for n in captured.nodes if n.target is aten.ones.default]
    assert Positional(captured, captured.seq).value(node, 7).shape == (1, 7)


# -- the longest length ---------------------------------------------------------------------------------------------
class Added(nn.Module):
    """Ids beside something positional."""

    def __init__(self, make, rows=LONGEST):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, 5), nn.Embedding(rows, 5)
        self.register_buffer("table", torch.randn(rows, 5))
        self.make = make

    def forward(self, ids):
        return self.tokens(ids) + self.make(self, ids.shape[1])


def embedded(m, t):
    return m.positions(torch.arange(t))


def shifted(m, t):
    """OPT's way: the first two rows belong to no position."""
    return m.positions(torch.arange(t) + 2)


def guarded(m, t):
    assert t <= 40
    return m.table[:t]


def sliced(m, t):
    return m.table[:t]


def unlimited(m, t):
    return torch.arange(t)[:, None] / 100.0


@functools.cache
def traced(make, rows):
    return trace(Added(make, rows))


def longest(make, wanted=None, default=4096, rows=LONGEST):
    captured = traced(make, rows)
    return longest_length(Positional(captured, captured.seq), read_by_data(captured, captured.seq), wanted, default)


@pytest.mark.parametrize("make, length", [(embedded, 96), (shifted, 94), (guarded, 40), (sliced, 96)])
def test_the_longest_length_is_what_the_module_allows(make, length):
    assert longest(make) == length
    assert longest(make, wanted=length) == length
    assert longest(make, wanted=12) == 12
    assert longest(make, default=20) == 20


@pytest.mark.parametrize("make, length", [(embedded, 96), (shifted, 94), (guarded, 40), (sliced, 96)])
def test_more_than_the_module_allows_is_refused_with_what_it_allows(make, length):
    for wanted in (length + 1, 5000):
        with pytest.raises(CaptureError, match=f"at most {length} tokens, {wanted} were asked"):
            longest(make, wanted=wanted)


def test_a_module_without_a_limit_gets_the_default_or_what_is_asked_for():
    assert longest(unlimited, default=777) == 777
    assert longest(unlimited, wanted=10_000) == 10_000


@pytest.mark.parametrize("rows", [12, 13, 64, 65, 127])
def test_the_search_for_the_limit_is_not_off_by_one(rows):
    assert longest(embedded, rows=rows) == rows


def test_positions_that_never_fit_are_refused(monkeypatch):
    monkeypatch.setattr("tfinfer.export.capture.positional.Positional.rows", _fails)
    with pytest.raises(CaptureError, match="even for two tokens"):
        longest(embedded)


def _fails(self, *args):
    raise IndexError("index out of range in self")


def test_only_what_data_reads_counts_towards_the_limit():
    """A mask that is made but never used says nothing."""

    def make(m, t):
        m.positions(torch.arange(t))
        return torch.arange(t)[:, None] / 100.0

    assert longest(make, wanted=1000) == 1000
