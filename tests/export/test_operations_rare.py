"""Rare operations, several in one small decoder: with a rule of their own, or said by torch in terms of others."""

import pytest
import torch
import torch.nn.functional as F
from one_operation import Applies
from torch import nn

from tfinfer.errors import CaptureError
from tfinfer.export import export_model
from tfinfer.export.capture import capture
from tfinfer.export.capture.equations import letters_of


def square(x):
    return x.unflatten(-1, (4, 4))


OPERATIONS = {
    "trigonometry": lambda x, w: (x / 9).tan() + x.tanh().asin() + x.tanh().acos() + torch.atan2(x, w),
    "angles": lambda x, w: torch.atan2(x, x.roll(1, -1)) + torch.atan2(x.round(), x.round()) + x.deg2rad().rad2deg(),
    "hyperbolas": lambda x, w: x.sinh() / x.cosh() + x.asinh() + (x.abs() + 1.5).acosh() + (x / 9).tanh().atanh(),
    "errors": lambda x, w: x.erfc() + torch.special.ndtr(x) + torch.special.entr(x.abs() + 0.1),
    "logarithms": lambda x, w: (x.abs() + 1).log10() + (x.abs() + 1).log2() + torch.logit(x.sigmoid(), 1e-3),
    "sums of exponents": lambda x, w: torch.logaddexp(x, w) + torch.logaddexp2(x, w) + x.logsumexp(-1, keepdim=True),
    "products with logarithms": lambda x, w: torch.xlogy(x, w) + torch.special.xlog1py(x, w) + x.sinc(),
    "roots": lambda x, w: torch.hypot(x, w) + x.abs().float_power(w).float() + torch.pow(2.5, x),
    "rounding": lambda x, w: x + x.trunc() + x.fix() + x.frac() + x.round(decimals=2) + x // w,
    "rounding towards zero": lambda x, w: x + torch.div(x, 0.5, rounding_mode="trunc"),
    "signs": lambda x, w: x * x.sgn() + x * x.signbit() + torch.copysign(x, -w) + torch.heaviside(x, w),
    "what is no number": lambda x, w: x * x.isfinite() + x.masked_fill(x.isinf(), 0) + (x / 0).nan_to_num(0, 1, -1),
    "the larger of numbers": lambda x, w: torch.fmax(x, w) + torch.fmin(x / 0 * 0, w) + x * torch.isclose(x, w),
    "bounds of vectors": lambda x, w: torch.clamp(x, -w, w) + torch.clamp(x, min=w) + torch.clamp_max(x, w),
    "other names": lambda x, w: torch.multiply(x, w) + torch.subtract(x, w) + torch.divide(x, w) + x.negative(),
    "comparisons by other names": lambda x, w: x * torch.greater(x, w) + x * torch.less_equal(x, 0) + x.absolute(),
    "numbers of truth": lambda x, w: x + x.logical_not() + torch.rsub(x, w, alpha=2) + x.add(w, alpha=2),
    "products and sums": lambda x, w: torch.addcmul(x, x, w, value=0.3) + torch.addcdiv(x, x, w, value=0.2),
    "thresholds": lambda x, w: F.threshold(x, 0.1, 0.0) + F.softshrink(x) + F.hardshrink(x) + F.tanhshrink(x),
    "slopes": lambda x, w: F.celu(x, 0.7) + F.prelu(x, w[:1]) + F.rrelu(x, 0.1, 0.5) + F.softsign(x),
    "a slope for each feature": lambda x, w: F.prelu(x.mT, w).mT,
    "softplus of its own": lambda x, w: F.softplus(x, 2.0, 5.0),
    "turned": lambda x, w: x.flip(-1) + x.roll(1, -1) + square(x).rot90(1, (2, 3)).flatten(2),
    "diagonals": lambda x, w: torch.cat([square(x).diagonal(dim1=-2, dim2=-1)] * 4, -1) + square(x).tril().flatten(2),
    "a diagonal beside": lambda x, w: x[..., :3] @ w.new_ones(3, 16) + square(x).diagonal(1, 2, 3) @ w.new_ones(3, 16),
    "joined": lambda x, w: torch.hstack([x.mT, -x.mT])[:, ::2].mT + torch.dstack([x, x]).flatten(2)[..., :16],
    "cut": lambda x, w: torch.cat(torch.tensor_split(x, 3, -1)[::-1], -1) + x.narrow(-1, 3, 1),
    "moved": lambda x, w: x.movedim(1, 2).moveaxis(2, 1) + x.unsqueeze(1).unsqueeze(-1).squeeze((1, -1)),
    "norms": lambda x, w: x / x.norm(3, -1, True) + x / torch.linalg.norm(x, float("inf"), -1, True),
    "norms of extremes": lambda x, w: x / torch.linalg.vector_norm(x, 0, -1, True) + x.norm(-float("inf"), -1, True),
    "norms by group": lambda x, w: (
        F.group_norm(x.reshape(-1, 16), 4).view_as(x) + F.instance_norm(x.reshape(-1, 4, 4)).view_as(x)
    ),
    "moments": lambda x, w: x - torch.var_mean(x, -1, keepdim=True)[1] + torch.var_mean(x, -1, True)[0][..., None],
    "both extremes": lambda x, w: x - torch.aminmax(x, dim=-1, keepdim=True).max + x.prod(-1, keepdim=True),
    "similarities": lambda x, w: (
        x * F.cosine_similarity(x, x * 2 + w, dim=-1)[..., None] + x * F.pairwise_distance(x, x * 2)[..., None]
    ),
    "products of vectors": lambda x, w: x * torch.inner(x, w)[..., None] + x * torch.linalg.vecdot(x, x)[..., None],
    "products with a vector": lambda x, w: x * (x @ w)[..., None] + torch.tensordot(x, torch.outer(w, w), dims=1),
    "products with a stack": lambda x, w: (x.unflatten(-1, (4, 1, 4)) @ w.view(4, 4, 1) @ w.view(4, 1, 4)).flatten(2),
    "cross product": lambda x, w: torch.cat([torch.linalg.cross(x[..., :3], x[..., 3:6]), x[..., 3:]], -1),
    "weighed products": lambda x, w: (
        torch.addmm(w, x.flatten(0, 1), torch.outer(w, w), beta=0.5, alpha=2).view_as(x)
        + torch.baddbmm(x, x, torch.outer(w, w).expand(x.shape[0], 16, 16), alpha=0.3)
    ),
    "a chain of products": lambda x, w: torch.linalg.multi_dot([x.flatten(0, 1), w[:, None], w[None]]).view_as(x),
    "outer product of itself": lambda x, w: torch.einsum("bti,btj->btij", x, x).sum(-1),
    "outer product by hand": lambda x, w: (x[..., None] * x[:, :, None]).sum(2),
    "einsum with an ellipsis": lambda x, w: torch.einsum("...d,de", x, torch.outer(w, w)),
    "einsum without a result": lambda x, w: torch.einsum("abc,cd", x, torch.outer(w, w)),
    "einsum of three": lambda x, w: torch.einsum("btd,de,ef->btf", x, torch.outer(w, w), torch.outer(w, w)),
    "einsum of one": lambda x, w: x * torch.einsum("btd->bt", x)[..., None] + torch.einsum("btd->bdt", x).mT,
    "einsum of vectors": lambda x, w: torch.einsum("btd,d->btd", x, w) + torch.einsum("d,btd,e->bte", w, x, w),
}  # fmt: skip
# What has no word in ONNX, and what moves positions: refused, by the name that the module uses.
REFUSED = {
    "aten.i0.default": lambda x, w: x.i0(),
    "aten.lgamma.default": lambda x, w: x.lgamma(),
    "aten.logcumsumexp.default": lambda x, w: x.logcumsumexp(-1),
    "aten.flip.default: moves positions": lambda x, w: x.flip(1),
    "aten.roll.default: moves positions": lambda x, w: x.roll(1, 1),
    "takes a diagonal": lambda x, w: x * torch.einsum("btii->bt", square(x))[..., None],
    "draws its slopes at random": lambda x, w: F.rrelu(x, training=True),
    "aten.logsumexp.default: mixes positions": lambda x, w: x - x.logsumexp(1, keepdim=True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rare_operation_is_followed_and_proved(name, tmp_path):
    module = Applies(OPERATIONS[name])
    report = export_model(module, tmp_path / "out", max_length=32, kind="decoder", attention=False)
    assert report.verdicts[0].passed


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_has_no_word_for_is_refused_by_the_name_that_the_module_uses(name):
    with pytest.raises(CaptureError, match=name):
        capture(Applies(REFUSED[name]), max_length=32)


def test_an_einsum_is_read_as_torch_reads_it():
    assert letters_of("...d,de", [3, 2])[0][0][-1] == "d"
    inputs, out = letters_of("ab...,b...c->c...a", [4, 4])
    assert out == f"c{inputs[0][2:]}a"
    assert letters_of("ij,jk", [2, 2]) == (["ij", "jk"], "ik")
    assert letters_of("ba,c", [2, 1]) == (["ba", "c"], "abc")
    assert letters_of("ii->i", [2]) is None


class KeysFirst(nn.Module):
    """Attention by einsum with its operands the other way round: keys, then queries; values, then weights."""

    def __init__(self):
        super().__init__()
        self.tokens, self.qkv, self.head = nn.Embedding(31, 16), nn.Linear(16, 48), nn.Linear(16, 31)

    def forward(self, ids):
        x = self.tokens(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        scores = torch.einsum("bkhd,bqhd->bhqk", k, q)
        hidden = torch.ones(*ids.shape[-1:] * 2, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.head(x + torch.einsum("bkhd,bhqk->bqhd", v, weights).flatten(2))


def test_keys_and_values_in_front_of_queries_and_weights_become_the_same_operator(tmp_path):
    manifest = export_model(KeysFirst(), tmp_path / "out", max_length=32).manifest
    assert [(a.operator, a.pattern) for a in manifest.attention] == [("GroupQueryAttention", "causal")]
