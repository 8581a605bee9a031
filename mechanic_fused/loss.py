"""The losses that users give: one number, and over which ranks it is averaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_internals import dtensor


def observed(loss: Tensor | float) -> Tensor | float:
    """Return a loss without its graph, as a float64 number.

    Raises:
        ValueError: unless it is one real number.
    """
    if torch.is_tensor(loss):
        if loss.numel() == 1 and not loss.is_complex():
            return loss.detach().reshape(()).double()
        given = f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
    else:
        if isinstance(loss, int | float):
            return float(loss)
        given = repr(loss)
    raise ValueError(f"the loss must be one real number, got {given}")


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
