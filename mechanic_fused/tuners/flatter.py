"""FlatterFaster: a momentum that follows the lr by a power law."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from ..options import number

POWER = 2 / 3
MAX_MOMENTUM = 0.999
"""The largest β; at lr = 0 the law gives 1."""


class FlatterFaster:
    """Couple the momentum to the lr so that 1 − β is proportional to lr^(2/3).

    β = 1 − (1 − β_ref)·(lr/lr_ref)^(2/3), clamped to [0, 0.999], for each param group. β is
    ``momentum`` of SGD, or the first of Adam's ``betas``. It is set on construction and by
    :meth:`step`.

    Args:
        optimizer: any torch optimizer whose groups have ``betas`` or ``momentum``, a mechanized one
            included. β_ref is their present value.
        reference_lr: lr_ref. By default each group's ``initial_lr``, which lr schedulers set, or
            else its present lr. Pass it if ``initial_lr`` is not the peak, as with OneCycleLR.

    Raises:
        ValueError: for groups without momentum, or with a momentum or lr_ref out of range.

    It needs no memory and no passes over the weights. With a mechanized optimizer the law sees the
    lr in param_groups, which is the schedule, and not the learned scale.

    Source: arXiv 2210.16400, which derives the law for SGD with label noise. Ours: the same law for
    Adam's β₁, the reference point and the clamp.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import FlatterFaster
        >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
        >>> schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=1 / 8)
        >>> coupling = FlatterFaster(opt)
        >>> opt.step()
        >>> schedule.step()
        >>> coupling.step()
        >>> round(opt.param_groups[0]["momentum"], 6)  # an eighth of the lr: a quarter of 1 − β
        0.975
    """

    def __init__(self, optimizer: Optimizer, reference_lr: float | None = None) -> None:
        self.optimizer = optimizer
        self.reference_lr = reference_lr
        self.references: list[tuple[float, float]] = []
        """(lr_ref, β_ref) of each group."""
        self.step()

    def step(self) -> None:
        """Set each group's momentum from its present lr; call it after the lr scheduler's step.

        The references of groups added since the last call are their present lr and momentum.

        Raises:
            ValueError: for an added group without momentum; nothing has changed then.
        """
        groups = self.optimizer.param_groups
        added = groups[len(self.references) :]
        self.references += [self._reference(group) for group in added]
        for group, (lr, beta) in zip(groups, self.references, strict=True):
            set_momentum(group, coupled_momentum(float(group["lr"]) / lr, beta))

    def get_last_momentum(self) -> list[float]:
        """Return the present β of each group."""
        return [get_momentum(group) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs besides the optimizer's state dict, which has the momenta."""
        return {"references": [list(pair) for pair in self.references]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`, and set the momenta from the present lrs.

        Raises:
            ValueError: for other entries, another number of groups, or references out of range;
                nothing has changed then.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"expected the entries {sorted(self.state_dict())}, got {sorted(state)}"
            )
        references = [(float(lr), float(beta)) for lr, beta in state["references"]]
        if len(references) != len(self.optimizer.param_groups):
            raise ValueError(
                f"expected references of {len(self.optimizer.param_groups)} param groups, "
                f"got {len(references)}"
            )
        if not all(0 < lr < math.inf and 0 < beta < 1 for lr, beta in references):
            raise ValueError(f"expected references lr > 0 and β in (0, 1), got {references}")
        self.references = references
        self.step()

    def _reference(self, group: dict[str, Any]) -> tuple[float, float]:
        lr = self.reference_lr
        if lr is None:
            lr = float(group.get("initial_lr", group["lr"]))
        number("reference_lr", lr, 0, above=True)
        beta = get_momentum(group)
        if not 0 < beta < 1:
            raise ValueError(f"expected a momentum in (0, 1) to couple, got {beta}")
        return lr, beta


def coupled_momentum(ratio: float, reference: float) -> float:
    """Return β for lr/lr_ref = ``ratio`` and β_ref = ``reference``."""
    return min(MAX_MOMENTUM, max(0.0, 1 - (1 - reference) * ratio**POWER))


def get_momentum(group: dict[str, Any]) -> float:
    """Return a group's momentum.

    Raises:
        ValueError: for a group without momentum.
    """
    if "betas" in group:
        return float(group["betas"][0])
    if "momentum" in group:
        return float(group["momentum"])
    names = sorted(name for name in group if name != "params")
    raise ValueError(f"expected a param group with betas or momentum, got one with {names}")


def set_momentum(group: dict[str, Any], beta: float) -> None:
    """Set a group's momentum."""
    if "betas" in group:
        group["betas"] = (beta, *group["betas"][1:])
    else:
        group["momentum"] = beta
