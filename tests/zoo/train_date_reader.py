"""Train the shipped date reader on dates made on the fly.

    python tests/zoo/train_date_reader.py --out tests/zoo/date_reader --steps 5000

Writes tokenizer.json (one token per character), tokenizer_config.json (its special tokens), model.safetensors,
held_out.tsv (1,000 unseen dates) and training.json. Needs torch, tokenizers and safetensors; no network. Every batch
is drawn from the seed and its step, so a run that goes on from its checkpoint sees what it would have seen.
"""

import argparse
import datetime
import json
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from date_reader import build
from dates import Pair, training_pairs, unseen_pairs
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

BATCH, PART, UNSEEN = 256, 64, 1000
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PAD, START, END, UNKNOWN = range(4)  # their ids
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz ,.-/'"
ISO_LENGTH = 10


def make_tokenizer() -> Tokenizer:
    """One token per character, for source and target; case, outer blanks and typographic marks make no difference."""
    tokens = [*SPECIAL.values(), *ALPHABET]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    same = [(Regex(r"[‘’]"), "'"), (Regex(r"[‐-―−]"), "-"), (Regex(r"\s+"), " ")]  # noqa: RUF001
    replaced = [normalizers.Replace(pattern, content) for pattern, content in same]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *replaced, normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    return tokenizer


def source_ids(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """The characters of each text, padded at the end to the longest: (B, S)."""
    rows = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def target_ids(tokenizer: Tokenizer, dates: list[str]) -> torch.Tensor:
    """<s>, the ten characters of each ISO date, </s>: (B, 12)."""
    return torch.tensor([[START, *encoding.ids, END] for encoding in tokenizer.encode_batch(dates)])


@torch.no_grad()
def greedy(model: torch.nn.Module, src: torch.Tensor) -> list[list[int]]:
    """The likeliest ids after <s>, up to </s>, for each row of a padded source (B, S)."""
    model.eval()
    memory, padding = model.encode(src), src == PAD
    tgt = torch.full((len(src), 1), START)
    for _ in range(ISO_LENGTH + 1):
        logits = model.decode(tgt, memory, padding)[:, -1]  # (B, vocab)
        tgt = torch.cat((tgt, logits.argmax(-1, keepdim=True)), dim=1)
    rows = [row[1:] for row in tgt.tolist()]
    return [row[: row.index(END)] if END in row else row for row in rows]


def read(model: torch.nn.Module, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The ISO date that the model reads in each text."""
    return tokenizer.decode_batch(greedy(model, source_ids(tokenizer, texts)))


def misread(model: torch.nn.Module, tokenizer: Tokenizer, pairs: list[Pair]) -> list[tuple[str, str, str]]:
    """What was not read exactly: (text, expected, got)."""
    got = read(model, tokenizer, [text for text, _ in pairs])
    return [(text, iso, answer) for (text, iso), answer in zip(pairs, got, strict=True) if answer != iso]


def rate_at(step: int, steps: int, peak: float = 2e-3) -> float:
    """Warm up over 200 steps, then a cosine down to a hundredth of the peak."""
    return peak * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def loss_at(model: torch.nn.Module, tokenizer: Tokenizer, seed: int, step: int) -> torch.Tensor:
    """The mean loss of a step's batch, taken in parts of similar length so that little of it is padding."""
    pairs = sorted(training_pairs(f"{seed}/{step}", BATCH), key=lambda pair: len(pair[0]))
    losses = []
    for first in range(0, BATCH, PART):
        texts, dates = zip(*pairs[first : first + PART], strict=True)
        src, tgt = source_ids(tokenizer, list(texts)), target_ids(tokenizer, list(dates))
        logits = model(src, tgt[:, :-1])  # (PART, 11, vocab)
        losses.append(F.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten()))
    return torch.stack(losses).mean()


def train(model: torch.nn.Module, tokenizer: Tokenizer, seed: int, steps: int, checkpoint: Path | None) -> float:
    """Train in place; returns the seconds it took, those before a checkpoint included."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    done, seconds = 0, 0.0
    if checkpoint and checkpoint.is_file():
        state = torch.load(checkpoint)
        done, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = time.time() - seconds
    for step in range(done, steps):
        if step % 500 == 0:
            wrong = len(misread(model, tokenizer, training_pairs(f"{seed}/check", 500)))
            print(f"step {step}: {wrong} of 500 misread, {time.time() - start:.0f} s", flush=True)
            if checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"step": step, "seconds": time.time() - start}, checkpoint)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        loss = loss_at(model, tokenizer, seed, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.5f} {time.time() - start:.0f} s", flush=True)
    return time.time() - start


def initial(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_uniform_(parameter)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="a file to go on from, written every 500 steps")
    arguments = parser.parse_args()
    out, steps, seed = arguments.out, arguments.steps, arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokenizer, model = make_tokenizer(), initial(seed)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(SPECIAL, indent=2) + "\n")
    unseen = unseen_pairs(seed, UNSEEN)
    (out / "held_out.tsv").write_text("".join(f"{text}\t{iso}\n" for text, iso in unseen))
    seconds = train(model, tokenizer, seed, steps, arguments.checkpoint)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, out / "model.safetensors")
    wrong = misread(model, tokenizer, unseen)
    report = {
        "command": f"python tests/zoo/train_date_reader.py --out {out} --steps {steps} --seed {seed}",
        "date": datetime.date.today().isoformat(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "batch": BATCH,
        "seed": seed,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "unseen": UNSEEN,
        "exact": UNSEEN - len(wrong),
        "misread": [{"text": text, "expected": iso, "got": got} for text, iso, got in wrong],
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "tokenizers")},
    }
    (out / "training.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(report)


if __name__ == "__main__":
    main()
