"""The character-level language model and the text that the examples and benchmarks train on.

The text is Python's documentation, which comes with Python as `pydoc_data.topics`, so nothing is
downloaded. It differs a little between Python versions, and so do the losses.
"""

from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Text(NamedTuple):
    """The text as numbers: character i of the vocabulary is token i."""

    vocabulary: str
    train: Tensor  # int64 (characters,)
    validation: Tensor  # int64 (characters,)

    def encode(self, string: str) -> list[int]:
        return [self.vocabulary.index(character) for character in string]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.vocabulary[token] for token in tokens)


def load_text(validation_share: float = 0.1) -> Text:
    """Return Python's help topics; the last tenth is the validation text."""
    # Some topics quote others at length. Each paragraph is kept once, so that no validation text
    # occurs in the training text.
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    string = "\n\n".join(paragraphs)
    vocabulary = "".join(sorted(set(string)))
    number = {character: token for token, character in enumerate(vocabulary)}
    tokens = torch.tensor([number[character] for character in string])
    split = int(len(tokens) * (1 - validation_share))
    return Text(vocabulary, tokens[:split], tokens[split:])


def random_batch(tokens: Tensor, size: int, context: int, generator: torch.Generator) -> Tensor:
    """Return windows of context + 1 tokens at random positions, (size, context + 1)."""
    windows = tokens.unfold(0, context + 1, 1)  # a view of all windows
    return windows[torch.randint(len(windows), (size,), generator=generator)]


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, both residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.perceptron(x)

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))


class CharModel(nn.Module):
    """A decoder-only transformer: tokens (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(
        self, vocabulary: int, width: int = 64, layers: int = 2, heads: int = 4, context: int = 128
    ):
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)  # as GPT-2

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next token, in nats, over (batch, length + 1)."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: CharModel, tokens: Tensor, batch: int = 64) -> float:
    """Return the loss over `tokens`, in windows that do not overlap."""
    windows = tokens.unfold(0, model.context + 1, model.context)
    losses = [model.loss(part) * len(part) for part in windows.split(batch)]
    return (torch.stack(losses).sum() / len(windows)).item()


@torch.no_grad()
def generate(
    model: CharModel, tokens: list[int], length: int, generator: torch.Generator
) -> list[int]:
    """Return `tokens` and `length` more, sampled from the model."""
    tokens = list(tokens)
    for _ in range(length):
        logits = model(torch.tensor([tokens[-model.context :]]))[0, -1]
        tokens.append(torch.multinomial(logits.softmax(0), 1, generator=generator).item())
    return tokens
