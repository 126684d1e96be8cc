"""One matrix for the embedding and the head, with a bias of its own, and logits scaled by the root of the width."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as GPT-2 has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.1), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = x.size()[:-1] + (self.nf,)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.c_proj = Conv1D(3 * n_embd, n_embd), Conv1D(n_embd, n_embd)
        self.c_fc, self.c_out = Conv1D(4 * n_embd, n_embd), Conv1D(n_embd, 4 * n_embd)

    def attn(self, x):
        query, key, value = self.c_attn(x).split(x.size(-1), dim=2)
        shape = (*x.shape[:-1], self.n_head, x.size(-1) // self.n_head)
        query, key, value = query.view(shape).transpose(1, 2), key.view(shape).permute(0, 2, 3, 1), value.view(shape)
        w = torch.matmul(query, key) / (value.size(-1) ** 0.5)
        nd = w.size(-1)
        b = torch.tril(torch.ones(nd, nd)).view(1, 1, nd, nd)
        w = w * b - 1e10 * (1 - b)
        a = torch.matmul(F.softmax(w, dim=-1), value.transpose(1, 2))
        return self.c_proj(a.permute(0, 2, 1, 3).contiguous().view(x.shape))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, vocab=61, n_embd=48, n_head=3, layers=2, n_ctx=96):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, n_embd), nn.Embedding(n_ctx, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(layers))
        self.ln_f, self.bias = nn.LayerNorm(n_embd), nn.Parameter(torch.randn(vocab))

    def forward(self, input_ids):
        input_shape = input_ids.size()
        input_ids = input_ids.view(-1, input_shape[-1])
        position_ids = torch.arange(input_ids.size(-1), dtype=torch.long, device=input_ids.device)
        position_ids = position_ids.unsqueeze(0).expand_as(input_ids)
        hidden = self.wte(input_ids) + self.wpe(position_ids)
        for block in self.h:
            hidden = block(hidden)
        hidden = self.ln_f(hidden) * hidden.size(-1) ** -0.5
        return F.linear(hidden, self.wte.weight, self.bias)


def build():
    return Decoder()
