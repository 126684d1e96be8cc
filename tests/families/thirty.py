"""The table of causal families that tests/export/test_families.py proves, row by row. Data alone.

A row: the family, what its configuration says beside its defaults, and how its attentions were written: operator,
pattern, how many layers.
"""

from __future__ import annotations

GQA = "GroupQueryAttention"
CAUSAL = [(GQA, "causal", 2)]
WINDOW = [(GQA, "causal, window 7", 2)]
FAMILIES = {
    "llama": ({}, CAUSAL),
    "mistral": ({}, WINDOW),
    "qwen2": ({}, CAUSAL),
    "qwen3": ({}, CAUSAL),
    "gemma": ({}, CAUSAL),
    "gemma2": ({}, [(GQA, "causal, window 7, soft cap 50", 1), (GQA, "causal, soft cap 50", 1)]),
    "gemma3_text": ({}, [(GQA, "causal, window 7", 1), (GQA, "causal", 1)]),
    "phi": ({}, CAUSAL),
    "phi3": ({"sliding_window": 7}, WINDOW),
    "gpt2": ({}, CAUSAL),
    "gpt_neo": ({}, [(GQA, "causal", 1), (GQA, "causal, window 7", 1)]),
    "gpt_neox": ({}, CAUSAL),
    "gptj": ({}, CAUSAL),
    "opt": ({}, CAUSAL),
    "bloom": ({}, [(GQA, "causal, a bias per key", 2)]),
    "mpt": ({}, [(GQA, "causal, a bias by distance", 2)]),
    "falcon": ({}, CAUSAL),
    "olmo2": ({}, CAUSAL),
    "stablelm": ({}, CAUSAL),
    "starcoder2": ({"sliding_window": 7}, WINDOW),
    "granite": ({}, CAUSAL),
    "cohere": ({}, CAUSAL),
    "glm": ({}, CAUSAL),
    "smollm3": ({}, CAUSAL),
    "codegen": ({}, CAUSAL),
    "biogpt": ({}, CAUSAL),
    "xglm": ({}, CAUSAL),
    "mixtral": ({}, CAUSAL),
    "qwen3_moe": ({}, CAUSAL),
    "olmoe": ({}, CAUSAL),
}  # fmt: skip


def table() -> list[str]:
    """Return the rows as lines of a markdown table; each of them stands for a test that passes."""
    lines = ["| family | attention | result |", "|---|---|---|"]
    for family, (changes, ways) in FAMILIES.items():
        said = ", ".join(f"`{name}={value}`" for name, value in changes.items())
        written = "; ".join(f"{pattern} ({operator})" for operator, pattern, _ in ways)
        lines.append(f"| {family}{f' with {said}' if said else ''} | {written} | proved; 64 tokens as PyTorch's |")
    return lines
