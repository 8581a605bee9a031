"""The losses that users give: one number, and over which ranks it is averaged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from .backends.layout import device_of_numbers
from .torch_internals import dtensor


def observed(loss: Tensor | float) -> Tensor | float:
    """Return a loss without its graph, as a float64 number.

    Raises:
        ValueError: unless it is one real number.
    """
    if torch.is_tensor(loss):
        if loss.numel() == 1 and not loss.is_complex() and loss.dtype is not torch.bool:
            loss = loss.detach().reshape(())
            return loss.to(device_of_numbers(loss.device)).double()
        given = f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
    else:
        # Also numbers of numpy, but no strings.
        if isinstance(loss, SupportsFloat) and not isinstance(loss, bool):
            return float(loss)
        given = repr(loss)
    raise ValueError(f"the loss must be one real number, got {given}")


class LossWatcher:
    """A forward hook that hands on the ``loss`` of what one model returns while it trains.

    A copy of the model, an average of its weights perhaps, has a hook that does nothing.

    Args:
        observe: the optimizer's method; referenced weakly, as the model is.
        model: the model.
    """

    def __init__(self, observe: Callable[[Any], None], model: torch.nn.Module) -> None:
        self._observe, self._model = weakref.WeakMethod(observe), weakref.ref(model)

    def __call__(self, module: torch.nn.Module, _: Any, output: Any) -> None:
        observe = self._observe()
        if observe is None or module is not self._model():
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if module.training and torch.is_grad_enabled() and loss is not None:
            observe(loss)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _ignore(module: Any, _: Any, output: Any) -> None:
    """Do nothing."""


def _no_hook() -> Callable[..., None]:
    return _ignore


def knows_loss_groups(
    param_groups: list[dict[str, Any]], reduce_group: Any, loss_group: Any
) -> bool:
    """Return whether it is known over which ranks to average the losses of each."""
    distributed = torch.distributed
    if loss_group is not None or reduce_group is not None:
        return True
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    weights = [p for group in param_groups for p in group["params"]]
    return distributed.get_world_size() == 1 or any(isinstance(p, dtensor()) for p in weights)


def check_loss_groups(
    param_groups: list[dict[str, Any]], reduce_group: Any, loss_group: Any
) -> None:
    """Raise ValueError where ranks have losses of their own and nothing says whose to average."""
    if not knows_loss_groups(param_groups, reduce_group, loss_group):
        raise ValueError(
            "each rank has a loss of its own: expected loss_group=, the process group over which "
            "to average them (torch.distributed.group.WORLD under DistributedDataParallel), "
            "got None"
        )
