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
