"""Turns the vectors of a sequence into one: a mean, or a sum weighed by attention; sentences and documents by them.

Shapes: B batch, S positions, N sentences, W words of a sentence.
"""

import torch
from torch import Tensor, nn

from .checks import check_size
from .config import TransformerConfig
from .encoder import Encoder
from .stack import Stack, build_embedding


def masked_mean(x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens: (batch, seq, hidden) -> (batch, hidden); 0 for a row without any.

    `attention_mask`, (batch, seq), is 1 where there is a token.
    """
    if attention_mask is None:
        return x.mean(dim=1)  # (B, hidden)
    present = (attention_mask != 0).unsqueeze(-1).to(x.dtype)  # (B, S, 1)
    return (x * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)  # (B, hidden)


class AverageOfWords(nn.Module):
    """Take the mean of the words' vectors as the sentence's, and project it where `hidden_size` is given.

    The average of "Deep Unordered Composition Rivals Syntactic Methods for Text Classification" (Iyyer et al. 2015,
    2.1), the measure that every other sentence encoder has to beat.
    """

    def __init__(self, vocab_size: int, embedding_size: int, *, hidden_size: int | None = None) -> None:
        super().__init__()
        check_size("vocab_size", vocab_size)
        check_size("embedding_size", embedding_size)
        self.embedding = build_embedding(vocab_size, embedding_size)
        self.projection: nn.Module = nn.Identity()
        if hidden_size is not None:
            check_size("hidden_size", hidden_size)
            self.projection = nn.Linear(embedding_size, hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the sentence's vector: (batch, seq) -> (batch, hidden); the mask is that of `masked_mean`."""
        mean = masked_mean(self.embedding(input_ids), attention_mask)  # (B, embedding)
        sentence: Tensor = self.projection(mean)  # (B, hidden)
        return sentence


class AttentionPooling(nn.Module):
    """Sum vectors by how much a learned context asks for each of them (Yang et al. 2016, equations 5 to 7).

    u = tanh(W x + b), and x is weighed by softmax(u . context) over the sequence.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.context = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return one vector: (batch, seq, hidden) -> (batch, hidden); the mask, (batch, seq), is 1 at tokens.

        A row needs at least one token.
        """
        scores = self.context(torch.tanh(self.proj(x)))  # (B, S, 1)
        if attention_mask is not None:
            scores = scores.masked_fill((attention_mask == 0).unsqueeze(-1), float("-inf"))
        weights = scores.softmax(dim=1)  # (B, S, 1), each row sums to 1
        return (weights * x).sum(dim=1)  # (B, hidden)


class HierarchicalEncoder(nn.Module):
    """Encode words into sentences and sentences into a document, pooling both by attention.

    "Hierarchical Attention Networks for Document Classification" (Yang et al. 2016), with the blocks of a transformer
    where the paper has recurrent networks. No word sees another sentence, so the cost grows with sentences squared plus
    words per sentence squared. Both levels are built from `config`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.words = Encoder(config)
        self.word_pooling = AttentionPooling(config.hidden_size)
        self.sentences = Stack(config, causal=False)
        self.sentence_pooling = AttentionPooling(config.hidden_size)

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of the words."""
        return self.words.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the document's vector: (batch, sentences, words) -> (batch, hidden).

        `attention_mask`, (batch, sentences, words), is 1 where there is a word; a sentence without words is none, and a
        document needs at least one word.
        """
        batch, sentences, _ = input_ids.shape
        word_mask, sentence_mask = None, None
        if attention_mask is not None:
            present = attention_mask != 0  # (B, N, W)
            sentence_mask = present.any(dim=-1)  # (B, N)
            # a softmax over no word is not defined: where there is no sentence it takes all, and nobody looks
            word_mask = (present | ~sentence_mask.unsqueeze(-1)).flatten(0, 1)  # (B * N, W)
        words = self.words(input_ids.flatten(0, 1), word_mask)  # (B * N, W, hidden)
        # by way of one axis: going from B * N straight to B and N, torch.export would rule out a single sentence
        flat = self.word_pooling(words, word_mask).flatten()  # (B * N * hidden,)
        vectors = flat.view(batch, sentences, words.shape[-1])  # (B, N, hidden)
        hidden_states = self.sentences.run(self.sentences.place(vectors), sentence_mask)  # (B, N, hidden)
        document: Tensor = self.sentence_pooling(hidden_states, sentence_mask)  # (B, hidden)
        return document
