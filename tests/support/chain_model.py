"""A tiny model that learns chains of tokens, and their data as training stacks want them."""

import random

import numpy as np
import torch

TOKENS, WIDTH, LENGTH = 16, 16, 8
EXAMPLES, BATCH = 32, 8

LEARNED = 0.5
"""What is left of the loss of a run that has learned, at most. It starts near log(TOKENS), and
each token follows from the one before, so all of it can go."""


class ChainModel(torch.nn.Module):
    """Guesses each next token; has weights that decay and weights that do not.

    Those that decay come first, so that param groups keep the order of the model: clipping adds
    up the norms of gradients in whichever order a stack has them.
    """

    def __init__(self, seed=0):
        super().__init__()
        # Every generator that a data loader or a model may draw from.
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(TOKENS, WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = torch.nn.Linear(WIDTH, TOKENS, bias=False)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, input_ids, labels):
        x = torch.tanh(self.hidden(self.norm(self.embedding(input_ids))))
        logits = self.head(x)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class Chains(torch.utils.data.Dataset):
    """Chains of tokens in which each follows from the one before."""

    def __init__(self):
        rng = torch.Generator().manual_seed(7)
        chain = [torch.randint(TOKENS, (EXAMPLES,), generator=rng)]
        for _ in range(LENGTH):
            chain.append((5 * chain[-1] + 3) % TOKENS)
        self.tokens = torch.stack(chain, 1)

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i, :-1], "labels": self.tokens[i, 1:]}


def batch(t, size=BATCH):
    """Return the examples of step t, in order and around."""
    tokens = Chains().tokens.roll(-size * t, 0)[:size]
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def loss_of(model):
    """Return the loss over all data."""
    with torch.no_grad():
        return float(model(**batch(0, EXAMPLES))["loss"])
