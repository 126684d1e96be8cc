"""Turns a sequence into what each position gathers in several heads; knows no cache, all positions are there at once.

Shapes: B batch, S positions, T positions of the memory (S without one), H heads, K key/value heads, D size of a head's
queries and keys, E size of its values.
"""

from torch import Tensor, nn

from tfinfer.errors import InputError

from .checks import KernelForm, Similarity, check_similarity, check_size, resolve_heads
from .positions import RotaryPositions
from .self_attention import build_general
from .similarity import attend


class MultiHeadAttention(nn.Module):
    """Let every position gather from the others in several subspaces at once (Vaswani et al. 2017, 3.2.2).

    With fewer key/value heads than query heads, neighbouring query heads share one: "GQA: Training Generalized
    Multi-Query Transformer Models" (Ainslie et al. 2023); with a single one, "Fast Transformer Decoding: One
    Write-Head is All You Need" (Shazeer 2019).

    Args:
        hidden_size: size of what comes in and of what goes out.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads, a divisor of `num_heads`; `num_heads` when None.
        head_dim: size of a head's queries and keys, d_k; `hidden_size // num_heads` when None.
        value_dim: size of a head's values, d_v; `head_dim` when None.
        memory_size: size of the memory that keys and values are made of; `hidden_size` when None.
        bias: whether the four projections have a bias.
        causal: whether a position sees only itself and what stands before it.
        rotary: turns queries and keys by their positions; may be shared by many layers.
        similarity: what makes weights of queries and keys, see `attend`; "general" has one W for all heads.
        kernel_form: for "kernel", every weight ("quadratic") or sums over the keys ("linear").
        scale: what scores are multiplied by; the similarity's own factor when None, 1.0 for none.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        memory_size: int | None = None,
        bias: bool = True,
        causal: bool = False,
        rotary: RotaryPositions | None = None,
        similarity: Similarity = "scaled_dot",
        kernel_form: KernelForm = "quadratic",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = resolve_heads(hidden_size, num_heads, num_kv_heads, head_dim)
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.memory_size = hidden_size if memory_size is None else memory_size
        check_size("value_dim", self.value_dim)
        check_size("memory_size", self.memory_size)
        check_similarity(similarity, kernel_form, scale)
        self.causal = causal
        self.rotary = rotary
        self.similarity: Similarity = similarity
        self.kernel_form: KernelForm = kernel_form
        self.scale = scale
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(self.memory_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(self.memory_size, self.num_kv_heads * self.value_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, hidden_size, bias=bias)
        self.general = build_general(similarity, self.head_dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """Return what each position of `x` gathers: (batch, seq, hidden) -> (batch, seq, hidden).

        With `memory`, (batch, keys, memory_size), it gathers from there and not from `x`: cross-attention. `mask` is
        boolean, True where a query may attend, and broadcast to (batch, heads, seq, keys); a causal module allows what
        both the mask and the order of positions allow. `position_bias` is added to the scores and broadcast likewise.
        """
        self._check_memory(x, memory)
        source = x if memory is None else memory  # (B, T, memory)
        batch, seq, _ = x.shape
        keys = source.shape[1]
        q = self.q_proj(x).view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, S, D)
        k = self.k_proj(source).view(batch, keys, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(source).view(batch, keys, self.num_kv_heads, self.value_dim).transpose(1, 2)  # (B, K, T, E)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if self.num_kv_heads != self.num_heads:
            k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)  # (B, H, T, D)
            v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)  # (B, H, T, E)
        if self.general is not None:
            q = q @ self.general  # (B, H, S, D)
        heads = attend(
            q,
            k,
            v,
            mask,
            similarity=self.similarity,
            scale=self.scale,
            kernel_form=self.kernel_form,
            causal=self.causal,
            position_bias=position_bias,
        )  # (B, H, S, E)
        joined = heads.transpose(1, 2).reshape(batch, seq, self.num_heads * self.value_dim)  # (B, S, H * E)
        output: Tensor = self.o_proj(joined)  # (B, S, hidden)
        return output

    def _check_memory(self, x: Tensor, memory: Tensor | None) -> None:
        if memory is None and x.shape[-1] != self.memory_size:
            raise InputError(
                f"keys and values are made of a memory of size {self.memory_size} and none came with an x of size "
                f"{x.shape[-1]}; give forward a memory (batch, keys, {self.memory_size})"
            )
        if memory is not None and (self.causal or self.rotary is not None):
            raise InputError(
                "positions of a memory have no order beside those of x, got a memory for an attention that is causal "
                "or rotary; build it with causal=False and rotary=None"
            )
