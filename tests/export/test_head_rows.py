"""Long passes of the reference make logits of the wanted rows alone, which are those of a whole pass."""

import numpy as np
import torch
from torch import nn

from tfinfer.export.verify import Reference
from tfinfer.export.verify.head import find_head, only_rows
from tfinfer.export.verify.reference import LONG
from tfinfer.proof.cases import grid


class Capped(nn.Module):
    """A head whose result goes on through element-wise operations."""

    def __init__(self, head=True):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.mix = nn.Embedding(37, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 37) if head else None
        self.widths = []

    def forward(self, ids):
        x = self.mix(self.tokens(ids)).cumsum(1).tanh()
        logits = x @ self.tokens.weight.T if self.head is None else self.head(x)
        self.widths.append(logits.shape[1])
        return 30 * torch.tanh(logits / 30)


def longest():
    case = grid(37, LONG + 77)[-1]
    assert len(case.sequences[0]) == LONG + 77
    return case


def test_the_wanted_rows_of_a_long_pass_are_those_of_a_whole_pass():
    module, case = Capped(), longest()
    whole = Capped()(torch.from_numpy(case.sequences[0])[None])[0].detach()
    found = Reference(module, all_rows=True).expected(case)
    assert len(found) == len(case.rows) > 10
    for row, logits in found.items():
        np.testing.assert_allclose(logits, whole[row.position], atol=1e-5)
    assert max(module.widths) == len({row.position for row in case.rows})  # nothing else became logits


def test_a_head_that_is_no_layer_makes_all_rows():
    module, case = Capped(head=False), longest()
    found = Reference(module, all_rows=True).expected(case)
    assert max(module.widths) == LONG + 77
    assert len(found) == len(case.rows)


def test_the_head_is_the_last_layer_of_its_width_and_no_hook_stays():
    module = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(4, 9))
    head = find_head(module, lambda: module(torch.zeros(1, 3, 4)), 9)
    assert head is module[2]
    with only_rows(head, [0, 2], 3):
        assert module(torch.zeros(1, 3, 4)).shape == (1, 2, 9)
        assert module(torch.zeros(1, 5, 4)).shape == (1, 5, 9)
    assert module(torch.zeros(1, 3, 4)).shape == (1, 3, 9)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
