"""einsum throughout, weights included, with heads behind the positions: (batch, position, head, feature)."""

import torch
from torch import einsum, nn


class Attention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.W_Q = nn.Parameter(torch.randn(h, d, d // h) * 0.1)
        self.W_K = nn.Parameter(torch.randn(h, d, d // h) * 0.1)
        self.W_V = nn.Parameter(torch.randn(h, d, d // h) * 0.1)
        self.W_O = nn.Parameter(torch.randn(h, d // h, d) * 0.1)
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.randn(h, d // h) * 0.1) for _ in range(3))
        self.b_O = nn.Parameter(torch.zeros(d))
        self.register_buffer("IGNORE", torch.tensor(-1e5))

    def forward(self, x):
        q = einsum("bpd,hdk->bphk", x, self.W_Q) + self.b_Q
        k = einsum("bpd,hdk->bphk", x, self.W_K) + self.b_K
        v = einsum("bpd,hdk->bphk", x, self.W_V) + self.b_V
        scores = einsum("bqhk,bphk->bhqp", q, k) / self.W_Q.shape[-1] ** 0.5
        pattern = self.apply_causal_mask(scores).softmax(-1)
        z = einsum("bphk,bhqp->bqhk", v, pattern)
        return einsum("bqhk,hkd->bqd", z, self.W_O) + self.b_O

    def apply_causal_mask(self, scores):
        all_ones = torch.ones(scores.size(-2), scores.size(-1), device=scores.device)
        mask = torch.triu(all_ones, diagonal=1).bool()
        return scores.masked_fill(mask, self.IGNORE)


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.W_in, self.W_out = nn.Parameter(torch.randn(d, 4 * d) * 0.1), nn.Parameter(torch.randn(4 * d, d) * 0.1)
        self.b_in, self.b_out = nn.Parameter(torch.zeros(4 * d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        hidden = torch.nn.functional.gelu(einsum("bpd,dm->bpm", x, self.W_in) + self.b_in)
        return einsum("bpm,md->bpd", hidden, self.W_out) + self.b_out


class Transformer(nn.Module):
    def __init__(self, vocab=61, d=48, h=3, layers=2, n_ctx=96):
        super().__init__()
        self.W_E, self.W_pos = nn.Parameter(torch.randn(vocab, d)), nn.Parameter(torch.randn(n_ctx, d) * 0.1)
        self.ln = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * layers))
        self.attn = nn.ModuleList(Attention(d, h) for _ in range(layers))
        self.mlp = nn.ModuleList(MLP(d) for _ in range(layers))
        self.W_U = nn.Parameter(torch.randn(d, vocab) * 0.1)

    def forward(self, tokens):
        residual = self.W_E[tokens] + self.W_pos[: tokens.shape[1], :]
        for i, (attn, mlp) in enumerate(zip(self.attn, self.mlp)):
            residual = residual + attn(self.ln[2 * i](residual))
            residual = residual + mlp(self.ln[2 * i + 1](residual))
        return einsum("bpd,dv->bpv", residual, self.W_U)


def build():
    return Transformer()
