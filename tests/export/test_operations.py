"""One operation each in a small decoder, exported and proved: the allow-list must say of it what torch does."""

import pytest
import torch
import torch.nn.functional as F
from one_operation import Applies

from tfinfer.export import export_model


def places(x):
    """A table over positions for each row of the batch, (batch, seq, 16)."""
    return torch.arange(x.shape[1]).float().sin()[None, :, None].expand_as(x)


OPERATIONS = {
    "square": lambda x, w: x.square(),
    "relu6": lambda x, w: F.relu6(x * 9),
    "hardtanh": lambda x, w: F.hardtanh(x),
    "selu": lambda x, w: F.selu(x),
    "elu": lambda x, w: F.elu(x),
    "leaky relu": lambda x, w: F.leaky_relu(x, 0.2),
    "log sigmoid": lambda x, w: F.logsigmoid(x),
    "softplus": lambda x, w: F.softplus(x),
    "mish": lambda x, w: F.mish(x),
    "hardswish": lambda x, w: F.hardswish(x),
    "hardsigmoid": lambda x, w: F.hardsigmoid(x),
    "gated": lambda x, w: torch.cat([F.glu(x), F.glu(-x)], -1),
    "one side": lambda x, w: x.clamp(min=-0.5) + x.clamp(max=0.5),
    "between": lambda x, w: x.clamp(-1, 1),
    "joined with a table": lambda x, w: torch.cat([x, places(x), w.expand(*x.shape[:2], 16)], -1)[..., 8:24] + x,
    "stacked on a table": lambda x, w: torch.stack([places(x), x], 2).sum(2) * x,
    "more axes than the other, which lie between its own": lambda x, w: (
        torch.stack([x, 2 * x, x * w], -2).permute(2, 0, 1, 3) + x.sin()
    ).sum(0),
    "a table beside rows and positions in one axis": lambda x, w: (
        (x.reshape(-1, 4, 4).permute(1, 0, 2) * w.view(4, 1, 4)).permute(1, 0, 2).reshape(x.shape)
    ),
    "lerp": lambda x, w: torch.lerp(x, x * 2, w),
    "softmin": lambda x, w: F.softmin(x, -1),
    "log softmax": lambda x, w: F.log_softmax(x, -1),
    "norm": lambda x, w: x / x.norm(dim=-1, keepdim=True),
    "absolute norm": lambda x, w: x / torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True),
    "rms norm": lambda x, w: F.rms_norm(x, (16,), w),
    "rms norm alone": lambda x, w: F.rms_norm(x, (16,)),
    "layer norm alone": lambda x, w: F.layer_norm(x, (16,)),
    "variance": lambda x, w: x / (x.var(-1, keepdim=True) + 1).sqrt(),
    "deviation": lambda x, w: x / x.std(-1, keepdim=True, unbiased=False),
    "largest": lambda x, w: x - x.amax(-1, keepdim=True) + x.min(-1, keepdim=True).values,
    "pieces": lambda x, w: torch.cat([x.narrow(2, 8, 8), x[..., :8]], 2),
    "uneven pieces": lambda x, w: torch.cat(x.split([4, 12], -1)[::-1], -1),
    "unbound": lambda x, w: torch.stack(x.unflatten(-1, (2, 8)).unbind(2), -1).flatten(2),
    "strided": lambda x, w: torch.stack([x[..., ::2], x[..., 1::2]], -1).flatten(2),
    "reversed": lambda x, w: x[:, :, torch.arange(15, -1, -1)],
    "selected": lambda x, w: x.index_select(-1, torch.arange(15, -1, -1)),
    "repeated": lambda x, w: x[..., [3, 1]].repeat(1, 1, 8),
    "einsum with weights": lambda x, w: torch.einsum("btd,de->bte", x, torch.outer(w, w)),
    "product with weights": lambda x, w: x @ torch.outer(w, w),
    "product of vectors": lambda x, w: torch.einsum("btd,btd->bt", x, x)[..., None] * x,
    "reversed difference": lambda x, w: 1 - x,
    "reversed quotient": lambda x, w: 1 / (x.abs() + 1),
    "cube": lambda x, w: x**3,
    "power": lambda x, w: x.abs() ** w,
    "base": lambda x, w: 2**x,
    "choice": lambda x, w: torch.where(x > 0, x, -w),
    "choice of numbers": lambda x, w: x * torch.where(x > 0, 1.0, 0.5),
    "not equal": lambda x, w: x * (x.round() != 0),
    "and, or, not": lambda x, w: x.masked_fill(((x > 0) & (x < 1)) | ~(x > -1), 0.0),
    "sign": lambda x, w: torch.sign(x) * w,
    "maximum": lambda x, w: torch.maximum(x, w) + torch.minimum(x, w),
    "waves": lambda x, w: x.sin() + x.cos() + x.atan(),
    "erf": lambda x, w: x * 0.5 * (1 + torch.erf(x / 1.41)),
    "logarithms": lambda x, w: torch.log1p(x.abs()) + torch.log(x.abs() + 1) + torch.expm1(x / 9) + torch.exp2(x / 9),
    "rounded down": lambda x, w: x + torch.div(x, 0.5, rounding_mode="floor"),
    "float64": lambda x, w: (x.double() * 2).float(),
    "zeros like": lambda x, w: torch.maximum(x, torch.zeros_like(x)) + torch.ones_like(x),
    "moved and back": lambda x, w: x.movedim(1, 2).mul(2).swapaxes(1, 2),
    "one by one": lambda x, w: F.linear(x.flatten(0, 1), torch.outer(w, w), w).view(x.shape),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_followed_and_proved(name, tmp_path):
    assert export_model(Applies(OPERATIONS[name]), tmp_path / "out", max_length=64).verdicts[0].passed
