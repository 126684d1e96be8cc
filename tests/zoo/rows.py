"""The table of decoders: which module, what attention the exporter must read in it, what must come of it.

Imports nothing but the standard library, so that `tests/tables.py` can print it anywhere.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ZOO = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One file with a `build()`.

    attention: as `ways` says it of the manifest. refused: what the error must say where no cache can follow the module.
    waits: why the row cannot pass yet.
    """

    file: str
    attention: str = ""
    refused: str = ""
    waits: str = ""

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def path(self) -> Path:
        return ZOO / self.file

    @property
    def description(self) -> str:
        """The module's own docstring, a line."""
        return (ast.get_docstring(ast.parse(self.path.read_text("utf-8"))) or "").splitlines()[0].rstrip(".")

    @property
    def result(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        return "waits" if self.waits else "64 of 64 tokens"


def ways(manifest: object) -> str:
    """The ways of attention that a manifest reports, and its states."""
    found = [f"{a.count} x {a.operator}: {a.pattern}" for a in manifest.attention]  # type: ignore[attr-defined]
    states = len(manifest.states)  # type: ignore[attr-defined]
    return "; ".join([*found, *([f"{states} running states"] if states else [])])


ROWS = (
    Row("decoders/mingpt.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/nanogpt.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/masked_fill_inf.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/masked_fill_1e10.py", "1 x GroupQueryAttention: causal; 1 x the module's own operators: as written"),
    Row("decoders/additive_triu.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/where_mask.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/finfo_min_mask.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/index_mask.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/vmap_mask.py", "2 x GroupQueryAttention: causal, window 12"),
    Row("decoders/chunked_mask.py", "2 x GroupQueryAttention: causal, a table"),
    Row("decoders/padding_mask.py", "2 x the module's own operators: as written"),
    Row("decoders/einsum_heads_last.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/folded_bmm.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/baddbmm.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/baddbmm_empty.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/xformers_layout.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/functional_multi_head.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/heads_in_a_loop.py", "6 x GroupQueryAttention: causal"),
    Row("decoders/softmax_by_hand.py", "2 x the module's own operators: as written"),
    Row("decoders/flash_by_hand.py", "4 x the module's own operators: as written"),
    Row("decoders/alibi.py", "2 x GroupQueryAttention: causal, a bias by distance"),
    Row("decoders/t5_bias.py", "2 x GroupQueryAttention: causal, a bias by distance"),
    Row("decoders/learned_distance.py", "2 x GroupQueryAttention: causal, a bias by distance"),
    Row("decoders/shaw_relative.py", "2 x the module's own operators: as written"),
    Row("decoders/transformer_xl.py", refused="cuts the sequence in pieces"),
    Row("decoders/windowed_bias.py", "2 x GroupQueryAttention: causal, window 5, a bias per key"),
    Row("decoders/sliding_window.py", "1 x GroupQueryAttention: causal; 1 x GroupQueryAttention: causal, window 8"),
    Row("decoders/rotary_complex.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/rotary_halves.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/rotary_interleaved.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/partial_rotary.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/no_positions.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/position_buffer.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/sinusoidal_slice.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/scaled_embedding.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/parallel_block.py", "2 x the module's own operators: as written"),
    Row("decoders/multi_query.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/grouped_repeat_interleave.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/grouped_expand.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/grouped_tiled.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/grouped_enable_gqa.py", "2 x Attention: causal"),
    Row("decoders/latent_attention.py", "2 x GroupQueryAttention: causal, of a latent of 24"),
    Row("decoders/shared_cache.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/value_residual.py", "3 x GroupQueryAttention: causal"),
    Row("decoders/qk_norm.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/soft_cap.py", "2 x GroupQueryAttention: causal, soft cap 5"),
    Row("decoders/sinks.py", "2 x GroupQueryAttention: causal, sinks"),
    Row("decoders/sinks_by_query.py", "2 x the module's own operators: as written"),
    Row("decoders/persistent_memory.py", refused="takes positions to which some were added"),
    Row("decoders/talking_heads.py", "2 x the module's own operators: as written"),
    Row("decoders/gated_attention.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/differential_attention.py", "2 x the module's own operators: as written"),
    Row("decoders/weights_twice.py", "2 x the module's own operators: as written"),
    Row("decoders/relu_attention.py", "2 x the module's own operators: as written"),
    Row("decoders/indexed_keys.py", "4 x the module's own operators: as written"),
    Row("decoders/gathered_distance.py", "2 x the module's own operators: as written"),
    Row("decoders/linear_attention.py", "4 running states"),
    Row("decoders/torch_encoder.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/torch_encoder_mask.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/torch_decoder_layer.py", "4 x GroupQueryAttention: causal"),
    Row("decoders/torch_decoder_empty_memory.py", refused="this operation is not followed with these operands"),
    Row("decoders/multihead_batch_first.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/multihead_sequence_first.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/post_norm.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/norms_by_hand.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/layer_scale.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/hyper_connections.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/universal.py", "4 x GroupQueryAttention: causal"),
    Row("decoders/tied_head.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/factorised_embedding.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/one_hot.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/weight_norm.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/mixture_of_softmaxes.py", "1 x GroupQueryAttention: causal"),
    Row("decoders/scaled_logits.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/gated_feed_forwards.py", "4 x GroupQueryAttention: causal"),
    Row("decoders/soft_experts.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/top_experts.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/causal_convolution.py", "2 x GroupQueryAttention: causal; 2 running states"),
    Row("decoders/token_shift.py", "2 x GroupQueryAttention: causal; 2 running states"),
    Row("decoders/token_shift_cat.py", "2 x GroupQueryAttention: causal; 1 running states"),
    Row("decoders/nanochat.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/positions_argument.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/returns_tuple.py", "2 x the module's own operators: as written"),
    Row("decoders/returns_dict.py", "2 x GroupQueryAttention: causal"),
    Row("decoders/returns_dataclass.py", "2 x GroupQueryAttention: causal"),
    Row("tutorials/lets_build_gpt.py", "8 x Attention: causal"),
    Row("tutorials/annotated_transformer.py", "2 x GroupQueryAttention: causal"),
    Row("tutorials/llama_from_scratch.py", "2 x GroupQueryAttention: causal"),
    Row("tutorials/gpt_in_60_lines.py", "6 x GroupQueryAttention: causal"),
)
