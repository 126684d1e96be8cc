"""Mixtures of experts: every way in which people write them is followed, proved, and generates what PyTorch does."""

import mixtures
import pytest
import torch
import torch.nn.functional as F
from mixtures import CHOSEN, DIM, EXPERTS, VOCAB
from torch import nn

import tfinfer
from tfinfer.errors import CaptureError
from tfinfer.export import export_model
from tfinfer.export.capture import capture
from tfinfer.export.sources import load_source

LENGTH = 80


def seeded(kind):
    """Larger than usual weights, so that experts differ and no mistake hides in noise."""
    torch.manual_seed(0)
    module = kind().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return module


def greedy(model, ids, count):
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("name", mixtures.MODULES)
def test_a_mixture_is_exported_proved_and_generates_what_pytorch_does(name, tmp_path):
    module = seeded(mixtures.MODULES[name])
    export_model(module, tmp_path / "out", max_length=LENGTH)
    ids = torch.randint(0, VOCAB, (1, 9))
    with tfinfer.load(tmp_path / "out") as loaded:
        assert list(loaded.generate(ids[0].tolist(), max_tokens=64, stop_ids=[]).token_ids) == greedy(module, ids, 64)


def test_experts_run_on_their_own_tokens_alone():
    """Picked tokens stay picked in the graph: nothing is computed for tokens that chose otherwise."""
    made = [node.op_type for node in capture(seeded(mixtures.WhereIndexAdd), max_length=LENGTH).model.graph]
    assert [made.count("NonZero"), made.count("ScatterND")] == [EXPERTS, EXPERTS]


# -- refused ------------------------------------------------------------------------------------------------------
class ExpertChoice(mixtures.Base):
    """Experts choose tokens: whether a token is chosen depends on those behind it."""

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        weights, token = self.gate(x).softmax(-1).transpose(1, 2).topk(1, -1)  # (B, experts, 1)
        rows = token.expand(-1, -1, DIM)
        return self.head(x.scatter_add(1, rows, x.gather(1, rows) * weights))


class LooksUpTokens(mixtures.Base):
    """An index that is no token's own."""

    def mixture(self, x):
        return x[self.gate(x).argmax(-1)]


class SumsPicked(mixtures.Base):
    def mixture(self, x):
        picked = x[(self.gate(x)[:, 0] > 0).nonzero().squeeze(-1)]
        return x + picked.sum(0)


class Balanced(mixtures.Base):
    """A share of all tokens scales the result."""

    def mixture(self, x):
        _, chosen = self.route(x)
        return x * F.one_hot(chosen, EXPERTS).sum((0, 1))[chosen[:, 0]].unsqueeze(-1)


class HowMany(mixtures.Base):
    def mixture(self, x):
        return x * torch.arange(int((self.gate(x) > 0).sum())).float().mean()


REFUSED = {
    ExpertChoice: "mixes positions",
    LooksUpTokens: "looks up positions or rows by data.*torch.where",
    SumsPicked: "mixes the tokens that were picked",
    Balanced: "mixes positions",
    HowMany: "must not depend on the values of the ids|refuse|depends|computes with",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_routing_that_no_cache_can_follow_is_refused(kind):
    with pytest.raises(CaptureError, match=REFUSED[kind]):
        capture(seeded(kind), max_length=LENGTH)


class ScalesIfAny(mixtures.Base):
    """Control flow on data that does change the result: it leaves out more than experts without tokens."""

    def mixture(self, x):
        _, chosen = self.route(x)
        return x * 2 if (chosen == 0).any() else x


def test_control_flow_that_changes_the_result_is_refused():
    with pytest.raises(CaptureError, match=r"control flow on data changes what .* torch.where"):
        capture(seeded(ScalesIfAny), max_length=LENGTH)


# -- integers -----------------------------------------------------------------------------------------------------
class OfIntegers(nn.Module):
    """A number for each token and feature, what `operation` makes of it, and the head."""

    def __init__(self, operation):
        super().__init__()
        self.tokens, self.head, self.operation = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB), operation

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        order = x.argsort(dim=-1, stable=True) - 5  # (B, T, DIM) int64, some below 0
        return self.head(self.operation(order, ids[..., None]).float() + x)


INTEGERS = {
    "floor of a quotient": lambda n, ids: n // 3,
    "truncated quotient": lambda n, ids: torch.div(n, 3, rounding_mode="trunc"),
    "remainder": lambda n, ids: n % 3,
    "fmod": lambda n, ids: torch.fmod(n, 3),
    "and": lambda n, ids: n & 6,
    "or, exclusive or": lambda n, ids: (n | 1) ^ ids,
    "not": lambda n, ids: ~n,
    "shifts": lambda n, ids: (n << 2) - (n >> 1),
    "descending": lambda n, ids: n.sort(-1, descending=True)[0] * n[..., :1],
    "smallest": lambda n, ids: n.topk(3, -1, largest=False)[0].sum(-1, keepdim=True) * n.argmin(-1, keepdim=True),
    "all, any": lambda n, ids: (n > 0).all(-1, keepdim=True) | (n == ids).any(-1, keepdim=True) | (n != 3),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_arithmetic_is_what_pytorch_does(name, tmp_path):
    torch.manual_seed(0)
    export_model(OfIntegers(INTEGERS[name]).eval(), tmp_path / "out", max_length=20)


# -- transformers -------------------------------------------------------------------------------------------------
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": EXPERTS,
    "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN, "moe_k": CHOSEN,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = [
    "qwen2_moe",
    "granitemoe",
    "phimoe",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm4_moe", "ernie4_5_moe", "afmoe")),
]


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_transformers_is_exported_and_generates_what_pytorch_does(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    known = transformers.AutoConfig.for_model(family).to_dict()
    config = transformers.AutoConfig.for_model(family, **{k: v for k, v in SIZES.items() if k in known})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3) + (parameter.dim() == 1)
            )
    model.save_pretrained(tmp_path / "checkpoint")
    export_model(load_source(str(tmp_path / "checkpoint")), tmp_path / "out", max_length=LENGTH)
    ids = torch.randint(3, 97, (1, 9))
    wanted = greedy(lambda given: model(given, use_cache=False).logits, ids, 64)
    with tfinfer.load(tmp_path / "out") as loaded:
        assert list(loaded.generate(ids[0].tolist(), max_tokens=64, stop_ids=[]).token_ids) == wanted
