"""Train the shipped example on the standard library's own source.

    python tests/zoo/train_python_writer.py --out tests/zoo/python_writer --steps 6000
    python tests/zoo/train_python_writer.py --held-out held_out.txt

Writes tokenizer.json (byte-level BPE, 2,048 tokens), model.safetensors and training.json. Needs torch, tokenizers and
safetensors; no network. Files of `test` folders are left out, one file in fifty is held out for the loss it reports;
the second command writes those, for measurements, and trains nothing.
"""

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from python_writer import build
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT, BATCH = 256, 16
END = "<|endoftext|>"


def sources():
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    return [text for p in files if 200 < len(text := p.read_text(encoding="utf-8", errors="ignore")) < 400_000]


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def flat_ids(tokenizer, texts):
    end = tokenizer.token_to_id(END)
    ids = [np.array([*e.ids, end], np.int64) for e in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(ids))


def batch_of(ids, generator):
    starts = torch.randint(0, len(ids) - CONTEXT - 1, (BATCH,), generator=generator)
    rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def loss_on(model, ids, batches=40):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(batches):
        x, y = batch_of(ids, generator)
        losses.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item())
    return sum(losses) / len(losses)


def train(model, ids, steps, peak=3e-3):
    generator = torch.Generator().manual_seed(0)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    start = time.time()
    for step in range(steps):
        rate = peak * min(1, (step + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = batch_of(ids, generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path)
    where.add_argument("--held-out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    texts = sources()
    held_out, training = texts[::50], [t for i, t in enumerate(texts) if i % 50]
    if arguments.held_out:
        arguments.held_out.write_text("\n".join(held_out), encoding="utf-8")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(training)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    ids, unseen = flat_ids(tokenizer, training), flat_ids(tokenizer, held_out)
    print(
        f"{len(training)} files, {len(ids)} tokens, {sum(p.numel() for p in model.parameters())} parameters", flush=True
    )
    train(model, ids, arguments.steps)
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, arguments.out / "model.safetensors")
    report = {
        "steps": arguments.steps,
        "tokens": len(ids),
        "loss": loss_on(model, ids),
        "held_out_loss": loss_on(model, unseen),
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(report)


if __name__ == "__main__":
    main()
