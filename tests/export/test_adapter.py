"""PEFT adapters merged at export: by hand on every kind of layer, against peft itself, and each way to be wrong."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import SourceError
from tfinfer.export import export_model
from tfinfer.export.sources.lora import merge_adapter
from tfinfer.export.sources.source import from_module

VOCAB, WIDTH, RANK = 19, 8, 3
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class InOut(nn.Module):
    """A linear layer whose weight is (in, out), as some people write it."""

    def __init__(self, n, m):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m) / 3), nn.Parameter(torch.zeros(m))

    def forward(self, x):
        return x @ self.weight + self.bias


class Tiny(nn.Module):
    """A tied decoder with layers of several kinds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "up": InOut(WIDTH, WIDTH)}) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            q, k, v = layer["qkv"](x)[:, None].chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
            x = x + layer["up"](x).relu()
        return self.head(x)


def pair(n, m, rank=RANK):
    """A (rank, in), B (out, rank)."""
    return torch.randn(rank, n) / 3, torch.randn(m, rank) / 3


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    named = {f"base_model.model.{name}": value.clone() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def merged(folder):
    module = Tiny()
    merge_adapter(module, folder)
    return module


def refused(folder, *parts):
    with pytest.raises(SourceError) as caught:
        merged(folder)
    for part in parts:
        assert part in str(caught.value)


def of_qkv(a, b, layer=0):
    return {f"layers.{layer}.qkv.lora_A.weight": a, f"layers.{layer}.qkv.lora_B.weight": b}


def test_a_linear_layer_gets_scale_b_a_and_nothing_else_changes(tmp_path):
    a, b = pair(WIDTH, 3 * WIDTH)
    module, before = merged(write(tmp_path / "a", of_qkv(a, b))), Tiny().state_dict()
    after = module.state_dict()
    name = "layers.0.qkv.weight"
    torch.testing.assert_close(after[name], before[name] + 6 / RANK * b @ a)
    assert [key for key in after if not torch.equal(after[key], before[key])] == [name]
    assert module.head.weight is module.tokens.weight


def test_rslora_and_patterns_scale_each_layer_its_own_way(tmp_path):
    one, two = pair(WIDTH, 3 * WIDTH, 2), pair(WIDTH, 3 * WIDTH)
    tensors = of_qkv(*one) | of_qkv(*two, layer=1)
    config = {"rank_pattern": {"layers.0.qkv": 2}, "alpha_pattern": {r"layers\.\d+\.qkv": 5}, "use_rslora": True}
    module, base = merged(write(tmp_path / "a", tensors, **config)), Tiny()
    for i, (a, b) in enumerate((one, two)):
        expected = base.layers[i]["qkv"].weight + 5 / math.sqrt((2, 3)[i]) * b @ a
        torch.testing.assert_close(module.layers[i]["qkv"].weight, expected)


@pytest.mark.parametrize("config", [{"fan_in_fan_out": True}, {}])
def test_a_weight_that_lies_in_out_gets_its_change_transposed(config, tmp_path):
    a, b = pair(WIDTH, WIDTH)
    if not config:  # by the shape alone, which is only one where in and out differ
        module = nn.ModuleDict({"up": InOut(WIDTH, 5)})
        a, b = pair(WIDTH, 5)
    else:
        module = nn.ModuleDict({"up": InOut(WIDTH, WIDTH)})
    before = module.up.weight.detach().clone()
    merge_adapter(module, write(tmp_path / "a", {"up.lora_A.weight": a, "up.lora_B.weight": b}, **config))
    torch.testing.assert_close(module.up.weight.detach(), before + 2.0 * (b @ a).t())


def test_an_adapted_table_is_parted_from_the_head_that_shared_it(tmp_path):
    a, b = pair(VOCAB, WIDTH)
    tensors = {"tokens.lora_embedding_A": a, "tokens.lora_embedding_B": b}
    module, before = merged(write(tmp_path / "a", tensors)), Tiny().tokens.weight
    torch.testing.assert_close(module.tokens.weight, before + 2.0 * (b @ a).t())
    torch.testing.assert_close(module.head.weight, before)


def test_modules_to_save_biases_and_old_names_replace_parameters(tmp_path):
    a, b = pair(WIDTH, 3 * WIDTH)
    new, bias = torch.randn(VOCAB, WIDTH), torch.randn(3 * WIDTH)
    tensors = of_qkv(a, b) | {
        "head.modules_to_save.default.weight": new,
        "layers.0.qkv.base_layer.bias": bias,
        "layers.1.up.bias": bias[:WIDTH],
    }
    module = merged(write(tmp_path / "a", tensors, bias="all", modules_to_save=["head"]))
    torch.testing.assert_close(module.head.weight.detach(), new)
    torch.testing.assert_close(module.tokens.weight, Tiny().tokens.weight)
    torch.testing.assert_close(module.layers[0]["qkv"].bias.detach(), bias)
    torch.testing.assert_close(module.layers[1]["up"].bias.detach(), bias[:WIDTH])


def test_dora_gives_each_row_its_own_length(tmp_path):
    a, b = pair(WIDTH, 3 * WIDTH)
    lengths = torch.rand(3 * WIDTH) + 0.5
    tensors = of_qkv(a, b) | {"layers.0.qkv.lora_magnitude_vector": lengths}
    weight = merged(write(tmp_path / "a", tensors, use_dora=True)).layers[0]["qkv"].weight
    torch.testing.assert_close(weight.norm(dim=1), lengths)
    torch.testing.assert_close(F.normalize(weight), F.normalize(Tiny().layers[0]["qkv"].weight + 2.0 * b @ a))


def test_a_file_of_torch_save_is_read_without_running_it(tmp_path):
    a, b = pair(WIDTH, 3 * WIDTH)
    folder = write(tmp_path / "a", of_qkv(a, b))
    expected = merged(folder).layers[0]["qkv"].weight
    (folder / "adapter_model.safetensors").unlink()
    torch.save(
        {f"base_model.model.{name}": value for name, value in of_qkv(a, b).items()}, folder / "adapter_model.bin"
    )
    torch.testing.assert_close(merged(folder).layers[0]["qkv"].weight, expected)
    torch.save({"x": Tiny()}, folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin", "besides tensors")


def test_all_that_does_not_fit_is_listed_and_nothing_is_merged(tmp_path):
    a, b = pair(WIDTH, 3 * WIDTH)
    wrong = {
        **of_qkv(a, b),
        "layers.1.qkv.lora_A.weight": a,
        "layers.7.qkv.lora_A.weight": a,
        "layers.0.up.lora_A.weight": torch.randn(RANK, 4),
        "layers.0.up.lora_B.weight": torch.randn(5, RANK),
        "head.weight": torch.randn(3, WIDTH),
        "nonsense": torch.zeros(1),
    }
    module = Tiny()
    with pytest.raises(SourceError) as caught:
        merge_adapter(module, write(tmp_path / "a", wrong))
    message = str(caught.value)
    assert "1 missing: layers.1.qkv.lora_B" in message
    assert "2 not in the module: base_model.model.layers.7.qkv.lora_A.weight, base_model.model.nonsense" in message
    assert "layers.0.up.weight (B A) is [5, 4], expected [8, 8]" in message
    assert f"head.weight is [3, {WIDTH}], expected [{VOCAB}, {WIDTH}]" in message
    assert all(torch.equal(value, Tiny().state_dict()[name]) for name, value in module.state_dict().items())


def test_a_layer_that_the_config_lists_and_the_file_lacks_is_missing(tmp_path):
    folder = write(tmp_path / "a", of_qkv(*pair(WIDTH, 3 * WIDTH)), target_modules=["qkv"])
    refused(folder, "1 missing: layers.1.qkv.lora_A")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"peft_type": "IA3"}, ["type LORA", "IA3", "merge_and_unload"]),
        ({"use_dora": True}, ["missing: layers.0.qkv.lora_magnitude_vector"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["pissa", "own weights were changed"]),
        ({"r": 0}, ["r above 0"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"rank_pattern": {"(a+)+$": 3}}, ["rank_pattern", "(a+)+$"]),
    ],
)
def test_another_kind_of_adapter_is_refused_by_name(config, parts, tmp_path):
    refused(write(tmp_path / "a", of_qkv(*pair(WIDTH, 3 * WIDTH)), **config), *parts)


def test_a_folder_without_an_adapter_says_what_was_expected(tmp_path):
    refused(tmp_path, "no adapter_config.json")
    folder = write(tmp_path / "a", of_qkv(*pair(WIDTH, 3 * WIDTH)))
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.safetensors or adapter_model.bin")


def test_a_live_module_keeps_its_own_weights(tmp_path):
    module = Tiny().eval()
    folder = write(tmp_path / "a", of_qkv(*pair(WIDTH, 3 * WIDTH)))
    source = from_module(module, adapters=[folder])
    assert source.reference == "Tiny + a"
    assert torch.equal(module.layers[0]["qkv"].weight, Tiny().layers[0]["qkv"].weight)
    assert source.module.layers[1]["qkv"].weight.data_ptr() == module.layers[1]["qkv"].weight.data_ptr()
    report = export_model(module, tmp_path / "out", adapters=[folder], max_length=64)
    expected = source.module(IDS[:1])[0, -1].argmax()
    with tfinfer.load(report.folder) as model:
        assert model.generate(IDS[0].tolist(), max_tokens=1).token_ids == (int(expected),)


def test_the_command_merges_several_adapters_one_after_the_other(tmp_path):
    file = tmp_path / "tiny.py"
    here = str(Path(__file__).parent)
    file.write_text(f"import sys\nsys.path.insert(0, {here!r})\nfrom test_adapter import Tiny as build\n")
    one = write(tmp_path / "one", of_qkv(*pair(WIDTH, 3 * WIDTH)))
    two = write(tmp_path / "two", of_qkv(*pair(WIDTH, 3 * WIDTH)))
    command = ["export", f"{file}:build", "-o", str(tmp_path / "out"), "--max-length", "64"]
    result = CliRunner().invoke(cli, [*command, "--adapter", str(one), "--adapter", str(two)])
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "tfinfer.json").read_text())
    assert manifest["source"]["reference"] == "tiny.py:build + one + two"
    module = merged(one)
    merge_adapter(module, two)
    expected = module(IDS[:1])[0, -1].argmax()
    with tfinfer.load(tmp_path / "out") as model:
        assert model.generate(IDS[0].tolist(), max_tokens=1).token_ids == (int(expected),)
    result = CliRunner().invoke(cli, [*command, "--overwrite", "--adapter", str(tmp_path / "three")])
    assert result.exit_code == 2
    assert "no adapter_config.json" in result.output


OPTIONS = {
    "plain": {"target_modules": ["qkv"]},
    "patterns": {"target_modules": ["qkv"], "rank_pattern": {"layers.1.qkv": 2}, "alpha_pattern": {"qkv": 9}},
    "rslora": {"target_modules": ["qkv"], "use_rslora": True},
    "dora": {"target_modules": ["qkv"], "use_dora": True},
    "table": {"target_modules": ["qkv", "tokens"]},
    "head": {"target_modules": ["qkv"], "modules_to_save": ["head"], "bias": "all"},
    "tied head": {"target_modules": ["head"]},
    "lora bias": {"target_modules": ["qkv"], "lora_bias": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_merged_weights_compute_what_peft_computes(options, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=RANK, lora_alpha=6, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter) if "magnitude" in name else torch.randn_like(parameter) / 3)
    model.save_pretrained(tmp_path / "a")
    expected = model(IDS)
    assert not torch.allclose(expected, Tiny()(IDS), atol=1e-2)
    torch.testing.assert_close(merged(tmp_path / "a")(IDS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_checkpoint_folder_takes_the_adapter_that_peft_trained_on_it(kind, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"gpt2": {"n_positions": 32}, "llama": {"intermediate_size": 32, "max_position_embeddings": 32}}[kind]
    config = transformers.AutoConfig.for_model(kind, **sizes, **more)
    base = transformers.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}[kind]
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, target_modules=targets, fan_in_fan_out=kind == "gpt2"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 3)
    model.eval().save_pretrained(tmp_path / "a")
    from tfinfer.export.sources import load_source

    source = load_source(str(tmp_path / "base"), adapters=[tmp_path / "a"])
    torch.testing.assert_close(source.module(IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)
