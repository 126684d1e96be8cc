"""Small modules of the catalogue's parts, and how each kind of exported folder is compared with its module."""

import contextlib

import numpy as np
import torch
from torch import nn

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.modules import TransformerConfig

VOCAB, HIDDEN, LONGEST = 23, 16, 48
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def config(**changes):
    """One small block; `changes` are fields of the config."""
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    return TransformerConfig(**(sizes | {"max_length": LONGEST} | changes))


class Gathering(nn.Module):
    """ids (B, S) -> what each of several attentions gathers from the ids' vectors, by its name."""

    def __init__(self, attentions, hidden=HIDDEN, vocab=VOCAB):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.attentions = nn.ModuleDict(attentions)
        self.heads = {name: hasattr(attention, "num_heads") for name, attention in attentions.items()}

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, :]  # (B, 1, S): all queries alike
        gathered = {}
        for name, attention in self.attentions.items():
            gathered[name] = attention(x, mask[:, None] if self.heads[name] and mask is not None else mask)
        return gathered


class NextWord(nn.Module):
    """ids (B, S) -> logits (B, S, vocab): positions, causal attentions side by side, a head over all they gather."""

    def __init__(self, attentions, sizes, hidden=HIDDEN):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCAB, hidden), nn.Embedding(LONGEST, hidden)
        self.attentions, self.head = nn.ModuleList(attentions), nn.Linear(hidden + sum(sizes), VOCAB)

    def forward(self, input_ids):
        x = self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(torch.cat([x, *(attention(x) for attention in self.attentions)], dim=-1))


@contextlib.contextmanager
def exported(module, folder, **options):
    """The folder's model; without the graph of attention's weights unless asked for."""
    report = export_model(module, folder / "out", **({"attention": False} | options))
    with tfinfer.load(report.folder, threads=1) as model:
        yield model


def ids_of(*shape, seed=0, vocab=VOCAB):
    """Made-up ids but 0, which stands for padding."""
    return np.random.default_rng(seed).integers(1, vocab, shape)


def ragged(lengths, seed=0, vocab=VOCAB):
    """Ids of rows of these lengths, padded with 0, and their mask."""
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return ids_of(*mask.shape, seed=seed, vocab=vocab) * mask, mask


def computed(module, *inputs, **named):
    """What PyTorch computes, as arrays by the names of outputs; one tensor alone is `output`."""
    with torch.no_grad():
        given = {name: torch.as_tensor(array) for name, array in named.items()}
        out = module.eval()(*map(torch.as_tensor, inputs), **given)
    return {k: v.numpy() for k, v in out.items()} if isinstance(out, dict) else {"output": out.numpy()}


def check_run(module, model, **inputs):
    """A graph without an axis of its own for padding gives what the module gives."""
    expected, found = computed(module, **inputs), model.run(inputs)
    assert found.keys() == expected.keys() or (len(found) == len(expected) == 1)
    for one, other in zip(found.values(), expected.values()):
        np.testing.assert_allclose(one, other, **CLOSE)
    return found


def check_encoder(module, model, longest=LONGEST):
    """Texts alone, together and of the longest length give what PyTorch computes of each without padding.

    Where nothing sees what stands behind it the graph takes no mask: padding changes nothing by itself.
    """
    takes = {tensor.name for tensor in model.manifest.graphs["encoder"].inputs}
    for number, lengths in enumerate(([1], [7, 7], [20, 3, 1, 9], [longest])):
        ids, mask = ragged(lengths, seed=number)
        found = model.run({"input_ids": ids} | ({"attention_mask": mask} if "attention_mask" in takes else {}))
        for row, length in enumerate(lengths):
            expected = computed(module, ids[row : row + 1, :length])
            assert len(found) == len(expected)
            for name, one in found.items():
                other = expected.get(name, next(iter(expected.values())))
                one = one[row, :length] if one.ndim == 3 else one[row]
                np.testing.assert_allclose(one, other[0], **CLOSE, err_msg=f"{name} of {length} in {lengths}")


def greedy(module, ids, count, *source):
    """Greedy tokens by full passes."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(computed(module, *source, [ids])["output"][0, -1].argmax()))
    return tuple(ids[-count:])


def check_cached(module, model, length=31):
    """A prompt in uneven pieces and steps behind it, and rows of different lengths together."""
    ids = ids_of(length)
    expected = computed(module, ids[None])["output"][0]
    decoder = model.decoder
    cache = decoder.open_cache(1, 4)
    slot, found = cache.acquire(), []
    for first, last in ((0, 6), (6, 7), (7, length - 9)):
        found += list(decoder.prefill(cache, slot, ids[first:last], keep=last - first))
    found += [decoder.step(cache, [slot], [token])[0].copy() for token in ids[length - 9 :]]
    np.testing.assert_allclose(np.stack(found), expected, **CLOSE)
    cache.close()
    prompts = [ids_of(n, seed=n).tolist() for n in (1, 17, 6)]
    together = model.generate(prompts, max_tokens=8, stop_ids=[])
    assert [c.token_ids for c in together] == [greedy(module, prompt, 8) for prompt in prompts]


def check_pair(module, model, start):
    """Every source's target in pieces and steps, and sources of different lengths together."""
    decoder = model.decoder
    target = np.concatenate([[start], ids_of(20)])
    cache = decoder.open_cache(2, 4)
    for length in (1, 9):
        source = ids_of(length, seed=length)
        expected = computed(module, source[None], target[None])["output"][0]
        slot = cache.acquire()
        decoder.encode(cache, slot, source)
        found = [row for a, b in ((0, 1), (1, 8)) for row in decoder.prefill(cache, slot, target[a:b], keep=b - a)]
        found += [decoder.step(cache, [slot], [token])[0].copy() for token in target[8:]]
        np.testing.assert_allclose(np.stack(found), expected, **CLOSE)
    cache.close()
    sources = [ids_of(n, seed=n).tolist() for n in (14, 1, 5)]
    together = model.generate(sources, max_tokens=8, stop_ids=[])
    assert [c.token_ids for c in together] == [greedy(module, [start], 8, [source]) for source in sources]
