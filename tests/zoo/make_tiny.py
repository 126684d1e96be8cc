"""Make the folder that the runtime's tests use where torch was never installed.

    python tests/zoo/make_tiny.py tests/runtime/tiny

A two-layer random decoder of `handwritten.Rotary` over a byte-level BPE of 320 tokens, with a chat template.
"""

import sys
from dataclasses import replace
from pathlib import Path

import handwritten
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tfinfer.export import export_model
from tfinfer.export.sources.source import from_module

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> bytes:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        ["the cat sat on the mat and the dog ran after the cat " * 4, "def main(): return 0\n" * 4], trainer
    )
    return made.to_str().encode()


def main(out: Path) -> None:
    torch.manual_seed(0)
    text = tokenizer()
    handwritten.VOCAB = Tokenizer.from_str(text.decode()).get_vocab_size()
    module = handwritten.Rotary()
    source = replace(
        from_module(module),
        tokenizer=text,
        chat_template=TEMPLATE,
        eos_ids=(0,),
        special_tokens={"eos_token": "<|endoftext|>"},
        generation_config={"eos_token_id": 0},
    )
    report = export_model(source, out, max_length=96, overwrite=True)
    print(*report.verdicts[0].lines(), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
