"""The loss at trial points x − r·d, with everything else as it was before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..vectors.space import Space, Vector
from .snapshot import BufferCopies, GeneratorStates

Closure = Callable[[], Any]
"""Evaluates the model and returns the loss, as for torch's LBFGS."""


@contextmanager
def trial_losses(
    closure: Closure,
    space: Space,
    w: Vector,
    d: Vector,
    *,
    model: nn.Module | None = None,
    process_group: Any = None,
    generators: GeneratorStates | None = None,
) -> Iterator[Callable[[float], Tensor]]:
    """Yield a function that returns the loss at w − r·d, a 0-dim float64 tensor, for any r.

    Every evaluation starts from the same random numbers and buffers and runs without gradients.
    On exit, also after an error, weights, gradients, buffers and generators are as on entry.

    Args:
        closure: evaluates the model. It may clear gradients; a backward pass must depend on
            ``loss.requires_grad``.
        space: the weights.
        w: a copy of the weights.
        d: a vector in the dtype of the arithmetic: see :meth:`Space.zeros`.
        model: the model whose buffers and other gradients are restored, if it has any.
        process_group: the ranks over which the loss is averaged; None for all.
        generators: the states from which every evaluation draws; by default the present ones.
    """
    at_entry = GeneratorStates(x.device for x in space.weights)
    start = at_entry if generators is None else generators
    buffers = BufferCopies(model)
    others = [] if model is None else model.parameters()
    parameters = list(dict.fromkeys([*space.parameters, *others]))

    def loss_at(r: float) -> Tensor:
        if r == 0:
            space.restore(w)
        else:
            space.step_along(space.weights, w, d, float(r))
        start.restore()
        reshard(model)
        with torch.no_grad(), without_gradients(parameters):
            loss = mean_loss(closure(), process_group)
        buffers.restore()
        return loss

    try:
        yield loss_at
    finally:
        space.restore(w)
        reshard(model)
        buffers.restore()
        at_entry.restore()


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Set gradients aside, since a closure may clear them; the same tensors are put back."""
    held = [(p, p.grad) for p in parameters]
    for p, _ in held:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in held:
            p.grad = grad


def reshard(model: nn.Module | None) -> None:
    """Make the modules of fully_shard gather their weights again.

    After a forward pass without gradients the root module keeps its gathered weights, and the next
    pass would use them instead of the present ones.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in () if model is None else model.modules():
        if isinstance(module, kind):
            module.reshard()


def mean_loss(loss: Any, group: Any = None) -> Tensor:
    """Return the loss as a 0-dim float64 tensor, averaged over the ranks of ``group``.

    Ranks evaluate different batches and must decide alike.

    Raises:
        ValueError: if the closure returned anything but one number.
    """
    number = (
        loss.detach()
        if torch.is_tensor(loss)
        else torch.tensor(loss, dtype=torch.float64, device="cpu")
    )
    number = number.double()
    if number.numel() != 1:
        raise ValueError(
            f"a closure must return one number, got a tensor of shape {tuple(number.shape)}"
        )
    number = number.reshape(())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        number = number.clone()
        torch.distributed.all_reduce(number, group=group)
        number /= torch.distributed.get_world_size(group)
    return number
