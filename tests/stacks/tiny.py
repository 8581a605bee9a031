"""A tiny model and its data, and how a training stack is imported for a test."""

import importlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

TOKENS, WIDTH, LENGTH = 16, 16, 8
EXAMPLES, BATCH = 64, 8

# What is left of the loss of a run that has learned, at most. It starts near log(TOKENS), and each
# token follows from the one before, so all of it can go.
LEARNED = 0.5

# No stack may ask the network for anything, nor write its own files outside the test's folder.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


def import_stack(name):
    """The module, or a skip with the reason; on CI, where all is installed, a failure."""
    if importlib.util.find_spec(name) is None:
        missing = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    os.environ.update(OFFLINE)
    return importlib.import_module(name)


def start(program, *arguments, launcher=()):
    """Start a program of this folder; where psutil is missing, which `kill` needs, skip instead."""
    import_stack("psutil")
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *launcher, str(tests / program), *map(str, arguments)],
        env={**os.environ, **OFFLINE, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=120):
    """Wait for a program and expect it to end well."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, printed


def kill_once(process, ready, patience=120):
    """SIGKILL the program and all that it has started, wherever it is, as soon as ready() holds."""
    end = time.monotonic() + patience
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    kill(process)
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL and ready(), printed


def kill(process):
    """SIGKILL a program and all that it has started: torchrun's ranks are sessions of their own."""
    psutil = import_stack("psutil")
    try:
        programs = [psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for program in [*programs, *programs[0].children(recursive=True)]:
        program.kill()


def seed(number):
    """Seed every generator that a data loader or a model may draw from."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class TinyModel(torch.nn.Module):
    """Guesses each next token; has weights that decay and weights that do not."""

    def __init__(self, number=0):
        super().__init__()
        seed(number)
        self.embedding = torch.nn.Embedding(TOKENS, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, TOKENS)

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
    """The examples of step t, in order and around."""
    tokens = Chains().tokens.roll(-size * t, 0)[:size]
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def loss_of(model):
    """The loss over all data."""
    with torch.no_grad():
        return float(model(**batch(0, EXAMPLES))["loss"])
