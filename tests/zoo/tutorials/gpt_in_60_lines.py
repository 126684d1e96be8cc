"""After "GPT in 60 lines": functions over dictionaries of arrays, here of parameters, and a module around them."""

import torch
from torch import nn


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x):
    exp_x = torch.exp(x - torch.amax(x, dim=-1, keepdim=True))
    return exp_x / torch.sum(exp_x, dim=-1, keepdim=True)


def layer_norm(x, g, b, eps: float = 1e-5):
    mean = torch.mean(x, dim=-1, keepdim=True)
    variance = torch.var(x, dim=-1, keepdim=True, unbiased=False)
    return g * (x - mean) / torch.sqrt(variance + eps) + b


def linear(x, w, b):  # [m, in], [in, out], [out] -> [m, out]
    return x @ w + b


def ffn(x, c_fc, c_proj):
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):  # [n_q, d_k], [n_k, d_k], [n_k, d_v], [n_q, n_k] -> [n_q, d_v]
    return softmax(q @ k.mT / q.shape[-1] ** 0.5 + mask) @ v


def mha(x, c_attn, c_proj, n_head):
    x = linear(x, **c_attn)  # [n_seq, n_embd] -> [n_seq, 3*n_embd]
    qkv = torch.split(x, x.shape[-1] // 3, dim=-1)
    qkv_heads = [torch.split(x, x.shape[-1] // n_head, dim=-1) for x in qkv]
    causal_mask = (1 - torch.tril(torch.ones(x.shape[1], x.shape[1]))) * -1e10
    out_heads = [attention(q, k, v, causal_mask) for q, k, v in zip(*qkv_heads)]
    return linear(torch.hstack([h.transpose(1, 2) for h in out_heads]).transpose(1, 2), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_vocab]
    x = wte[inputs] + wpe[: inputs.shape[1]]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T


class GPT2(nn.Module):
    def __init__(self, vocab=61, dim=48, n_head=3, layers=2, n_ctx=96):
        super().__init__()
        self.n_head = n_head
        self.wte, self.wpe = nn.Parameter(torch.randn(vocab, dim)), nn.Parameter(torch.randn(n_ctx, dim))

        def dense(n, m):
            return nn.ParameterDict({"w": torch.randn(n, m) * 0.1, "b": torch.zeros(m)})

        def norm():
            return nn.ParameterDict({"g": torch.ones(dim), "b": torch.zeros(dim)})

        def block():
            mlp = nn.ModuleDict({"c_fc": dense(dim, 4 * dim), "c_proj": dense(4 * dim, dim)})
            attn = nn.ModuleDict({"c_attn": dense(dim, 3 * dim), "c_proj": dense(dim, dim)})
            return nn.ModuleDict({"mlp": mlp, "attn": attn, "ln_1": norm(), "ln_2": norm()})

        self.blocks, self.ln_f = nn.ModuleList(block() for _ in range(layers)), norm()

    def forward(self, inputs):
        return gpt2(inputs, self.wte, self.wpe, self.blocks, self.ln_f, self.n_head)


def build():
    return GPT2()
