"""A module that writes into no tensor is traced once; one that does is made functional by torch, and both are right."""

import pytest
import torch
from one_operation import Applies

import tfinfer.export.capture.writes as writes
from tfinfer.export import export_model

PLAIN = {
    "nothing": lambda x, w: x * w,
    "a copy behind a transpose": lambda x, w: x.view(*x.shape[:2], 4, 4).transpose(2, 3).contiguous().view(x.shape),
    "types": lambda x, w: x.to(torch.float64).to(torch.float32) + x.float(),
    "views by other names": lambda x, w: torch.cat(x.unflatten(-1, (2, 8)).flatten(2).chunk(2, -1)[::-1], -1),
    "transposes by other names": lambda x, w: x.unflatten(-1, (4, 4)).mT.swapaxes(2, 3).swapdims(3, 2).flatten(2),
    "comparisons by longer names": lambda x, w: x * torch.greater(x, 0) + w * torch.less_equal(x, w),
    "dropout in evaluation": lambda x, w: torch.nn.functional.dropout(x, 0.3, False),
}
WRITING = {
    "in place": lambda x, w: x.clone().mul_(w),
    "into a part": lambda x, w: torch.cat([(x * 1)[..., :8].add_(1), x[..., 8:]], -1),
}


def traced_again(monkeypatch):
    """How often torch was asked to trace a program again."""
    asked, run = [], torch.export.ExportedProgram.run_decompositions

    def counted(program, *arguments, **options):
        asked.append(arguments)
        return run(program, *arguments, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    return asked


@pytest.mark.parametrize("name", PLAIN)
def test_a_module_that_writes_nothing_is_traced_once(name, tmp_path, monkeypatch):
    asked = traced_again(monkeypatch)
    export_model(Applies(PLAIN[name]), tmp_path / "out", max_length=48)
    assert asked == []


@pytest.mark.parametrize("name", WRITING)
def test_a_module_that_writes_is_made_functional_by_torch(name, tmp_path, monkeypatch):
    asked = traced_again(monkeypatch)
    export_model(Applies(WRITING[name]), tmp_path / "out", max_length=48)
    assert asked


def test_dropout_that_drops_in_evaluation_is_not_taken_away():
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(2, 3),))
    graph = program.graph
    given = next(node for node in graph.nodes if node.op == "placeholder")
    made = graph.call_function(torch.ops.aten.dropout.default, (given, 0.5, True))
    assert not writes._is_plain(made)


def alone(x, index):
    return torch.zeros_like(x).index_add_(0, index, x).index_add_(0, index, x)


def seen_by_a_view(x, index):
    sums = torch.zeros_like(x)
    first = sums[:1]
    sums.index_add_(0, index, x)
    return first + x


def into_what_was_given(x, index):
    return x.clone().index_add_(0, index, x) + x


@pytest.mark.parametrize("function, again", [(alone, 0), (seen_by_a_view, 1), (into_what_was_given, 1)])
def test_sums_into_zeros_need_no_second_trace_unless_something_else_sees_them(function, again, monkeypatch):
    class Adds(torch.nn.Module):
        def forward(self, x, index):
            return function(x, index)

    asked = traced_again(monkeypatch)
    given = torch.randn(3, 4), torch.tensor([1, 0, 0])
    program = writes.without_writes(torch.export.export(Adds(), given))
    assert len(asked) == again
    assert not any(n.op == "call_function" and n.target._schema.is_mutable for n in program.graph.nodes)
    assert torch.equal(program.module()(*given), function(*given))
