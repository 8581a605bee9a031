"""Copies of what a probe changes (generators, buffers, the optimizer), restored bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

from ..optimizer import Mechanized
from ..torch_internals import get_step_called, own_buffers, set_step_called


class GeneratorStates:
    """States of the random generators of torch (the CPU's and those of GPUs), Python and NumPy.

    Args:
        devices: the devices whose generators are saved besides the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.gpus = {d: torch.cuda.get_rng_state(d) for d in set(devices) if d.type == "cuda"}
        self.python, self.numpy = random.getstate(), numpy.random.get_state()

    def restore(self) -> None:
        """Set all generators back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.gpus.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)


class BufferCopies:
    """A model's buffers, such as batch norm's running statistics: the tensors and their values.

    Args:
        model: the model; None has no buffers.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.saved = [
            (buffers, name, buffer, buffer.clone())
            for module in ([] if model is None else model.modules())
            for buffers, name, buffer in own_buffers(module)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the same tensors back under their names, with the values that they had."""
        for buffers, name, buffer, copy in self.saved:
            buffers[name] = buffer
            # Most are unchanged, and an expanded buffer, whose elements overlap, cannot be written.
            if not torch.equal(buffer, copy):
                buffer.copy_(copy)


class OptimizerState:
    """An optimizer's state and param groups: the objects, and copies of their contents.

    Args:
        optimizer: the optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {p: SavedValue(entries) for p, entries in optimizer.state.items()}
        self.groups = [
            {name: SavedValue(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self.step_called = get_step_called(optimizer)
        self.run_state = optimizer.run_state() if isinstance(optimizer, Mechanized) else None

    @torch.no_grad()
    def restore(self) -> None:
        """Give the same objects their former contents; drop entries that were added."""
        opt = self.optimizer
        for p in list(opt.state):
            if p not in self.state:
                del opt.state[p]
        for p, entries in self.state.items():
            opt.state[p] = entries.restored()
        for group, options in zip(opt.param_groups, self.groups, strict=True):
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]
            group.update({name: option.restored() for name, option in options.items()})
        set_step_called(opt, self.step_called)
        if isinstance(opt, Mechanized) and self.run_state is not None:
            opt.restore_run_state(self.run_state)


class SavedValue:
    """An object and a copy of its contents: of a tensor, or of dicts and lists of tensors.

    Args:
        original: the object.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        if torch.is_tensor(original):
            self.copy: Any = original.detach().clone(memory_format=torch.preserve_format)
        elif isinstance(original, dict):
            self.copy = {key: SavedValue(value) for key, value in original.items()}
        elif isinstance(original, list):
            self.copy = [SavedValue(value) for value in original]

    def restored(self) -> Any:
        """Return the original object with its former contents."""
        if torch.is_tensor(self.original):
            self.original.copy_(self.copy)
        elif isinstance(self.original, dict):
            self.original.clear()
            self.original.update({key: value.restored() for key, value in self.copy.items()})
        elif isinstance(self.original, list):
            self.original[:] = [value.restored() for value in self.copy]
        return self.original
