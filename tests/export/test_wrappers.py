"""What people put around or inside a module: taken off, followed as it computes, or refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tfinfer
from tfinfer.errors import SourceError
from tfinfer.export import export_model
from tfinfer.export.sources.source import from_module

VOCAB, WIDTH, HEADS = 29, 24, 3


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)

    def embed(self, ids):
        return self.tokens(ids) + self.places(torch.arange(ids.shape[1]))

    def rest(self, x):
        q, k, v = (p.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, ids):
        return self.rest(self.embed(ids))


def greedy(module, ids, count=12):
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
    return tuple(ids[-count:])


def exported(module, tmp_path):
    report = export_model(module, tmp_path / "out", max_length=64)
    assert report.manifest.attention[0].operator == "GroupQueryAttention"
    with tfinfer.load(report.folder) as model:
        return model.generate([3, 1, 4], max_tokens=12).token_ids


class AutocastInside(Plain):
    def forward(self, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.rest(self.embed(ids)).float()


class AutocastAround(Plain):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, ids):
        return self.rest(self.embed(ids)).float()


class AutocastOff(Plain):
    def forward(self, ids):
        with torch.autocast("cpu", enabled=False):
            return self.rest(self.embed(ids))


class WithoutGradients(Plain):
    @torch.no_grad()
    def forward(self, ids):
        return super().forward(ids)


class Inference(Plain):
    @torch.inference_mode()
    def forward(self, ids):
        return super().forward(ids)


class GradientsInParts(Plain):
    def forward(self, ids):
        with torch.no_grad():
            x = self.embed(ids)
        with torch.set_grad_enabled(True):
            x = x * 1.0
        with torch.enable_grad():
            return self.rest(x)


class NotCompiled(Plain):
    @torch._dynamo.disable
    def rest(self, x):
        return super().rest(x)


class Checkpointed(Plain):
    def forward(self, ids):
        return checkpoint(self.rest, self.embed(ids), use_reentrant=False)


class CheckpointedAgain(Plain):
    def forward(self, ids):
        return checkpoint(self.rest, self.embed(ids), use_reentrant=True)


MODULES = [
    AutocastInside, AutocastAround, AutocastOff, WithoutGradients, Inference, GradientsInParts, NotCompiled,
    Checkpointed, CheckpointedAgain,
]  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_modes_inside_a_module_change_nothing_in_float32(kind, tmp_path):
    assert exported(kind(), tmp_path) == greedy(Plain(), [3, 1, 4])


def test_an_export_under_autocast_is_one_in_float32(tmp_path):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = exported(Plain(), tmp_path)
    assert got == greedy(Plain(), [3, 1, 4])


def test_modes_are_as_before_after_an_export(tmp_path):
    exported(Plain(), tmp_path)
    x = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with torch.no_grad(), torch.enable_grad():
        assert (x * 2).requires_grad
    with torch.no_grad(), torch.set_grad_enabled(True):
        assert (x * 2).requires_grad


def compiled(module):
    module.compile()
    return module


def partly_compiled(module):
    module.head = torch.compile(module.head)
    return module


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile, compiled, partly_compiled, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m)),
        lambda m: nn.DataParallel(torch.compile(m)), nn.Module.train, nn.Module.half, nn.Module.bfloat16,
        nn.Module.double,
    ],
    ids=["compile", "compile in place", "compiled part", "DataParallel", "both", "both otherwise", "training", "half",
         "bfloat16", "double"],
)  # fmt: skip
def test_what_is_around_a_module_is_taken_off(wrap, tmp_path):
    module = wrap(Plain())
    plain = Plain() if wrap not in (nn.Module.half, nn.Module.bfloat16) else copy.deepcopy(module).float()
    assert exported(module, tmp_path) == greedy(plain.eval(), [3, 1, 4])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_distributed_data_parallel_is_taken_off(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        module = nn.parallel.DistributedDataParallel(Plain())
        assert from_module(module.eval()).module is module.module
    finally:
        distributed.destroy_process_group()


def hooked(module):
    module.qkv.register_forward_pre_hook(lambda part, args: (args[0] * 0.5,))
    module.head.register_forward_hook(lambda part, args, out: out.roll(1, -1) if False else out * torch.arange(VOCAB))
    module.register_forward_hook(lambda part, args, out: -out)
    return module


def weight_normed(module):
    module.head = nn.utils.parametrizations.weight_norm(module.head)
    with torch.no_grad():
        module.head.parametrizations.weight.original0 *= torch.rand(VOCAB, 1)
    return module


def spectral_normed(module):
    module.head = nn.utils.parametrizations.spectral_norm(module.head)
    return module.eval()


def old_weight_norm(module):
    module.head = nn.utils.weight_norm(module.head)
    return module.eval()


def tied(module):
    module.head.weight = module.tokens.weight
    return module


class Named(nn.Parameter):
    """A subclass that only bears a name."""


def subclassed(module):
    module.head.weight = Named(module.head.weight.data)
    return module


@pytest.mark.parametrize("change", [hooked, weight_normed, spectral_normed, old_weight_norm, tied, subclassed])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_changes_the_values_on_the_way_is_followed(change, tmp_path):
    module = change(Plain())
    expected = greedy(module.eval(), [3, 1, 4])
    assert exported(module, tmp_path) == expected
    if change in (hooked, weight_normed, tied):  # the others leave the tokens as they are, by what they begin with
        assert expected != greedy(Plain(), [3, 1, 4])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("wrap", "parts"),
    [
        (lambda m: torch.jit.trace(m.eval(), torch.zeros(2, 5, dtype=torch.int64)), ["TorchScript", "was scripted"]),
        (lambda m: torch.jit.script(nn.Sequential(m.tokens, m.head)), ["TorchScript"]),
        (lambda m: torch.ao.quantization.quantize_dynamic(m.eval(), {nn.Linear}), ["qkv", "quantised", "from before"]),
        (lambda m: m.to("meta"), ["meta device"]),
    ],
    ids=["traced", "scripted", "quantised", "meta"],
)
def test_what_hides_the_module_or_its_weights_is_refused_by_name(wrap, parts, tmp_path):
    with pytest.raises(SourceError) as caught:
        export_model(wrap(Plain()), tmp_path / "out")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


class Narrow(torch.Tensor):
    """As the tensors of quantisation libraries are: one that holds others."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Narrow(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner)
        raise RuntimeError("not now")


def test_a_tensor_that_holds_others_is_refused_with_its_type():
    module = Plain()
    module.head.weight = nn.Parameter(Narrow(torch.zeros(VOCAB, WIDTH)), requires_grad=False)
    with pytest.raises(SourceError, match=r"head\.weight: is a Narrow"):
        from_module(module)
