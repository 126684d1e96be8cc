"""Make the encoder-decoder's folder that the runtime's tests use where torch was never installed.

    python tests/zoo/make_tiny_seq2seq.py tests/runtime/tiny_seq2seq

`nn.Transformer` with random weights over characters: "</s>" ends a source and a target, "<s>" begins a target.
"""

import string
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from tfinfer.export import export_model
from tfinfer.export.sources.source import from_module

PAD, START, END = 0, 1, 2
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", " ", *string.ascii_lowercase]
HIDDEN, LONGEST_SOURCE, LONGEST = 16, 32, 40


def tokenizer() -> bytes:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(VOCABULARY[:4])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return made.to_str().encode()


class Seq2Seq(nn.Module):
    """source_ids (batch, source), target_ids (batch, target) -> logits (batch, target, vocab)"""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), HIDDEN)
        self.positions = nn.Embedding(LONGEST, HIDDEN)
        self.transformer = nn.Transformer(HIDDEN, 2, 1, 2, 24, batch_first=True)
        self.head = nn.Linear(HIDDEN, len(VOCABULARY))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.positions(torch.arange(ids.shape[1]))

    def forward(self, source_ids: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target_ids.shape[1])
        padding = {"src_key_padding_mask": source_ids == PAD, "memory_key_padding_mask": source_ids == PAD}
        x = self.transformer(self.embed(source_ids), self.embed(target_ids), tgt_mask=mask, **padding)
        return self.head(x)


def main(out: Path) -> None:
    torch.manual_seed(4)
    module = Seq2Seq().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name:  # random weights say little: without this every source gives nearly the same target
                parameter.mul_(4)
    source = replace(
        from_module(module),
        tokenizer=tokenizer(),
        special_tokens={"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
        pad_id=PAD,
        bos_id=START,
        eos_ids=(END,),
        decoder_start=(START,),
        says="encoder-decoder",
    )
    report = export_model(
        source, out, max_length=LONGEST, max_source_length=LONGEST_SOURCE, attention=False, overwrite=True
    )
    print(*report.verdicts[0].lines(), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
