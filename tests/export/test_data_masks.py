"""Masks and biases that are data: one value for each key is held in the cache beside the keys."""

import pytest
import torch
from one_attention import DIM, HEADS, INF, VOCAB, export_and_generate, future
from torch import nn


class Masked(nn.Module):
    """One attention; `change(module, scores, x, ids)` makes the masked scores."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head, self.gate = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB), nn.Linear(DIM, HEADS)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.change = change

    def forward(self, ids):
        x = self.tokens(ids)
        q, k, v = (side(x).view(*ids.shape, HEADS, -1).transpose(1, 2) for side in (self.q, self.k, self.v))
        weights = self.change(self, q @ k.mT / 4, x, ids).softmax(-1)
        return self.head(x + (weights @ v).transpose(1, 2).reshape(x.shape))


def spread(m, scores, x, ids):
    """As doge has it: a value for each head and key, spread over the queries and masked."""
    t = ids.shape[1]
    bias = m.gate(x).transpose(1, 2)[:, :, None, :].expand(-1, -1, t, -1)
    return scores + bias.masked_fill(future(t), -1e9)


def broadcast(m, scores, x, ids):
    bias = m.gate(x).transpose(1, 2)[:, :, None, :]
    return (scores + bias).masked_fill(future(ids.shape[1]), -INF)


def beside_a_table(m, scores, x, ids):
    bias = m.gate(x).transpose(1, 2)[:, :, None, :] + torch.full((ids.shape[1],) * 2, -1e9).triu(1)
    return scores + bias


def forgetting(m, scores, x, ids):
    """A decay between each two positions: what was forgotten up to the one less up to the other."""
    gone = torch.nn.functional.logsigmoid(m.gate(x)).cumsum(1).transpose(1, 2)
    return (scores + (gone[:, :, :, None] - gone[:, :, None, :])).masked_fill(future(ids.shape[1]), -INF)


def per_query(m, scores, x, ids):
    """Another temperature for each query, spread over the keys."""
    t = ids.shape[1]
    warm = m.gate(x).transpose(1, 2).exp()[..., None].expand(-1, -1, -1, t)
    return (scores * warm).masked_fill(future(t), -INF)


def hidden_ids(m, scores, x, ids):
    """Some ids are seen by nobody but themselves."""
    t = ids.shape[1]
    shown = (ids > 5)[:, None, None, :] | torch.eye(t, dtype=torch.bool)
    return scores.masked_fill(~(shown & ~future(t)), -INF)


def same_segment(m, scores, x, ids):
    """A token sees the ones of its own class."""
    kind = (ids > 7).long() + (ids > 14)
    return scores.masked_fill((kind[:, :, None] != kind[:, None, :])[:, None] | future(ids.shape[1]), -1e9)


def looked_up(m, scores, x, ids):
    """What is padding by its id, looked up by rows and keys (t5gemma)."""
    rows, keys = torch.arange(len(ids))[:, None, None, None], torch.arange(ids.shape[1])[None, None, None] + 0
    return scores.masked_fill(~((ids != 3)[rows, keys] & ~future(ids.shape[1])), -1e9)


WAYS = [looked_up, spread, broadcast, beside_a_table, forgetting, per_query, hidden_ids, same_segment]


@pytest.mark.parametrize("change", WAYS)
def test_data_between_queries_and_keys_is_followed(change, tmp_path):
    report = export_and_generate(Masked(change), tmp_path)
    assert {a.operator for a in report.manifest.attention} == {"the module's own operators"}
    held = [entry for entry in report.manifest.cache if entry.past.endswith(".data")]
    assert len(held) == (0 if change is per_query else 1)


def test_a_mask_of_data_for_torchs_own_attention(tmp_path):
    class Segments(Masked):
        def forward(self, ids):
            x = self.tokens(ids)
            q, k, v = (side(x).view(*ids.shape, HEADS, -1).transpose(1, 2) for side in (self.q, self.k, self.v))
            kind = (ids > 7).long() + (ids > 14)
            mask = (kind[:, :, None] == kind[:, None, :])[:, None] & ~future(ids.shape[1])
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.head(x + y.transpose(1, 2).reshape(x.shape))

    export_and_generate(Segments(None), tmp_path)


def test_a_sum_over_masked_keys_is_followed_without_any_attention(tmp_path):
    """A causal mean by a masked table."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)

        def forward(self, ids):
            x, t = self.tokens(ids), ids.shape[1]
            shares = torch.ones(t, t).tril()
            shares = shares / shares.sum(-1, keepdim=True)
            return self.head(x + (x[:, None, :, :] * shares[None, :, :, None]).sum(2))

    export_and_generate(Mean(), tmp_path)
