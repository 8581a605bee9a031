"""Keeping: what a probe must leave behind exactly as it was, copied and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optimizer import Mechanized

OURS = ("_dry_run_done", "_squared_norm", "_has_started")
"""What a mechanized optimizer knows beside its param_groups and state."""


class Generators:
    """States of the random generators: torch's on the CPU and ``devices``, Python's, NumPy's."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.gpus = {d: torch.cuda.get_rng_state(d) for d in set(devices) if d.type == "cuda"}
        self.python, self.numpy = random.getstate(), numpy.random.get_state()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.gpus.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)


class Buffers:
    """A model's buffers, batch norm's running statistics among them: tensors and their places."""

    def __init__(self, model: nn.Module | None) -> None:
        self.held = [
            (module, name, buffer, buffer.clone())
            for module in ([] if model is None else model.modules())
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for module, name, buffer, copy in self.held:
            module._buffers[name] = buffer
            # Many have not moved, and one that shares its memory with itself cannot be written.
            if not torch.equal(buffer, copy):
                buffer.copy_(copy)


class OptimizerState:
    """An optimizer's state and param_groups: the same objects get the same bits back."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {p: Copied(entries) for p, entries in optimizer.state.items()}
        self.groups = [
            {name: Copied(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        # By this mark torch's schedulers know whether a step has come before theirs.
        self.called = vars(optimizer).get("_opt_called", False)
        self.own = {name: vars(optimizer).get(name) for name in OURS}

    @torch.no_grad()
    def restore(self) -> None:
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
        opt._opt_called = self.called  # type: ignore[attr-defined]
        if isinstance(opt, Mechanized):
            # Its plan still has the sums of the step that was taken back.
            opt._drop_derived()
            vars(opt).update(self.own)


class Copied:
    """An object and a copy of its contents."""

    def __init__(self, original: Any) -> None:
        self.original = original
        if torch.is_tensor(original):
            self.copy: Any = original.detach().clone(memory_format=torch.preserve_format)
        elif isinstance(original, dict):
            self.copy = {key: Copied(value) for key, value in original.items()}
        elif isinstance(original, list):
            self.copy = [Copied(value) for value in original]

    def restored(self) -> Any:
        """Return the original with its contents as they were."""
        if torch.is_tensor(self.original):
            self.original.copy_(self.copy)
        elif isinstance(self.original, dict):
            self.original.clear()
            self.original.update({key: value.restored() for key, value in self.copy.items()})
        elif isinstance(self.original, list):
            self.original[:] = [value.restored() for value in self.copy]
        return self.original


@contextmanager
def no_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Set gradients aside: a closure may clear them, and the very same tensors come back."""
    held = [(p, p.grad) for p in parameters]
    for p, _ in held:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in held:
            p.grad = grad


def reshard(model: nn.Module | None) -> None:
    """Let fully_shard's modules gather their weights anew: a pass without gradients keeps them."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in () if model is None else model.modules():
        if isinstance(module, kind):
            module.reshard()
