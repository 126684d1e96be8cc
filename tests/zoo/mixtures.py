"""Small causal decoders with a mixture of experts, the way people write them: one class for each habit.

Each takes ids (B, T) and returns logits (B, T, vocab); `MODULES` names them all.
"""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, DIM, WIDTH, EXPERTS, CHOSEN = 31, 16, 24, 4, 2


class Base(nn.Module):
    """One layer of attention and a mixture; a subclass says how tokens find their experts."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.gate = nn.Linear(DIM, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, WIDTH), nn.SiLU(), nn.Linear(WIDTH, DIM)) for _ in range(EXPERTS)
        )
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, DIM) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, WIDTH) / 4)

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(x + self.mixture(x.reshape(-1, DIM)).view(x.shape))

    def route(self, x):
        return self.gate(x).softmax(-1).topk(CHOSEN, -1)  # (tokens, chosen) each


class Dense(Base):
    """Every expert for every token, and a shared one; weights are 0 where a token did not choose."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        weights = weights / weights.sum(-1, keepdim=True)
        gate = torch.zeros(x.shape[0], EXPERTS).scatter(-1, chosen, weights)
        return x + sum(gate[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Masks(Base):
    """`out[mask] += expert(x[mask])`."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (chosen == i).any(-1)
            out[mask] += expert(x[mask]) * (weights * (chosen == i)).sum(-1)[mask].unsqueeze(-1)
        return out


class WhereIndexAdd(Base):
    """Mixtral's way before there was an interface for experts."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for i, expert in enumerate(self.experts):
            slot, token = torch.where(mask[i])
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class ScatterRows(Base):
    """Rows taken by gather and put back by scatter_add."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = (chosen == i).nonzero(as_tuple=True)
            rows = token[:, None].expand(-1, DIM)
            out = out.scatter_add(0, rows, expert(x.gather(0, rows)) * weights[token, slot][:, None])
        return out


class Switch(Base):
    """One expert for each token."""

    def mixture(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token = (chosen == i).nonzero().squeeze(-1)
            out[token] = expert(x[token]) * weight[token].unsqueeze(-1)
        return out


class SwitchByRows(Base):
    """All experts, and the row of the best: `outputs[torch.arange(tokens), best]`."""

    def mixture(self, x):
        p = self.gate(x).softmax(-1)
        best = p.argmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return outputs[torch.arange(x.shape[0]), best] * p.gather(1, best[:, None])


class DispatchByEinsum(Base):
    """GShard's dispatch and combine, without a capacity."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        combine = torch.einsum("tk,tke->te", weights, F.one_hot(chosen, EXPERTS).to(x.dtype))
        inputs = torch.einsum("te,th->eth", (combine > 0).to(x.dtype), x)
        outputs = torch.stack([expert(inputs[i]) for i, expert in enumerate(self.experts)])
        return torch.einsum("te,eth->th", combine, outputs)


class GatheredWeights(Base):
    """The chosen experts' matrices for each token, and bmm."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        chosen = chosen.reshape(-1)
        y = F.silu(torch.bmm(self.up[chosen], x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)))
        y = torch.bmm(self.down[chosen], y).squeeze(-1) * weights.reshape(-1, 1)
        return y.view(-1, CHOSEN, DIM).sum(1)


class GatheredEinsum(Base):
    """The same in einsum of three operands."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        y = F.silu(torch.einsum("tkfh,th->tkf", self.up[chosen], x))
        return torch.einsum("tkhf,tkf,tk->th", self.down[chosen], y, weights)


class MatrixForEachExpert(Base):
    """bmm over all experts, inputs scaled by their weights before: Llama 4's way."""

    def mixture(self, x):
        logits = self.gate(x)
        best, chosen = logits.topk(CHOSEN, -1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, best).sigmoid()
        inputs = (x.repeat(EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(EXPERTS, -1, DIM)
        y = F.silu(torch.bmm(inputs, self.up.transpose(1, 2)))
        return torch.bmm(y, self.down.transpose(1, 2)).sum(0)


class Groups(Base):
    """The best groups of experts first, as in DeepSeek-V3."""

    def mixture(self, x):
        p = self.gate(x).sigmoid()
        of_groups = p.view(-1, 2, 2).topk(2, -1)[0].sum(-1)
        best = of_groups.topk(1, -1, sorted=False)[1]
        mask = torch.zeros_like(of_groups).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 2, 2).reshape(-1, EXPERTS)
        chosen = p.masked_fill(~mask.bool(), float("-inf")).topk(CHOSEN, -1)[1]
        weights = p.gather(1, chosen)
        gate = torch.zeros_like(p).scatter_(1, chosen, weights / weights.sum(-1, keepdim=True))
        return torch.einsum("the,te->th", torch.stack([expert(x) for expert in self.experts], -1), gate)


class SortedByExpert(Base):
    """Tokens in the order of their experts, and the order of that order to bring them back."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        experts, order = chosen.view(-1).sort()
        y = (self.up[experts] @ x[order // CHOSEN].unsqueeze(-1)).relu()
        y = (self.down[experts] @ y).squeeze(-1)[order.argsort()].view(-1, CHOSEN, DIM)
        return (y * weights[..., None]).sum(1)


class SortedAndWrittenBack(Base):
    """The same with the inverse written by hand."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        experts, order = chosen.view(-1).sort()
        y = (self.down[experts] @ (self.up[experts] @ x[order // CHOSEN].unsqueeze(-1)).relu()).squeeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0))
        return (y[inverse].view(-1, CHOSEN, DIM) * weights[..., None]).sum(1)


class SortedAndAdded(Base):
    """Tokens in the order of their experts, added up where they came from."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        chosen = chosen.view(-1)
        order = chosen.argsort()
        experts, token = chosen[order], order // CHOSEN
        y = (self.down[experts] @ (self.up[experts] @ x[token].unsqueeze(-1)).relu()).squeeze(-1)
        return torch.zeros_like(x).index_add_(0, token, y * weights.view(-1)[order, None])


class LeavesOutByAny(Base):
    """`if mask.any()`: control flow on data, which changes no result."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if mask.any():
                token, slot = torch.where(mask)
                out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class LeavesOutByNumber(Base):
    """`if token.numel() == 0: continue`, and the like."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out, counts = torch.zeros_like(x), torch.bincount(chosen.flatten(), minlength=EXPERTS)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            if token.numel() == 0 or counts[i] == 0:
                continue
            if len(token) > 0:
                out[token] += expert(x[token]) * weights[token, slot, None]
        return out


class LoopsOverThoseHit(Base):
    """`for i in hit.nonzero()`: transformers' way."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS + 1).permute(2, 1, 0)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            i = hit[0]
            if i == EXPERTS:
                continue
            slot, token = torch.where(mask[i])
            y = F.linear(F.linear(x[token], self.up[i]).relu(), self.down[hit].squeeze(0))
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class CountsOneTooMany(Base):
    """One class more than experts, which is never hit, and nobody asks whether it was (Nemotron-H)."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS + 1).permute(2, 1, 0)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().squeeze(-1):
            i = hit.item()
            slot, token = torch.where(mask[i])
            y = F.linear(F.linear(x[token], self.up[i]).relu(), self.down[i])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class LoopsOverUnique(Base):
    """`for i in chosen.unique()`."""

    def mixture(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i in chosen.unique().tolist():
            token, slot = torch.where(chosen == i)
            out.index_add_(0, token, self.experts[i](x[token]) * weights[token, slot, None])
        return out


MODULES = {c.__name__: c for c in Base.__subclasses__()}
