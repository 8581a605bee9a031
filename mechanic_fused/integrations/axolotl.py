"""A plugin of axolotl: its trainer steps with an optimizer of ours.

.. code-block:: yaml

    plugins: [mechanic_fused.integrations.axolotl.MechanicPlugin]
    mechanic: {optimizer: MechanicAdamW, betas: [0.9, 0.95]}
    weight_decay: 0.1
"""

from __future__ import annotations

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..optimizers import MechanicMuon
from . import BY_NAME, MuonFactory, log_learned_rates, observe_losses


class MechanicArgs(BaseModel):
    """The plugin's configuration: ``optimizer``, a name, and its options."""

    mechanic: dict[str, Any] | None = None


class MechanicPlugin(BasePlugin):
    """Chooses the optimizer once the trainer is made, gives the loss, and logs the learned rate."""

    def get_input_args(self) -> str:
        """Return the path of the class of the configuration."""
        return f"{MechanicArgs.__module__}.{MechanicArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set the trainer's optimizer.

        Raises:
            ValueError: if the name is not a key of ``BY_NAME``.
        """
        options: dict[str, Any] = {"lr": 1.0, **(cfg.mechanic or {})}
        name = options.pop("optimizer", "MechanicAdamW")
        if name not in BY_NAME:
            raise ValueError(
                f"mechanic.optimizer must be one of {', '.join(BY_NAME)}, got {name!r}"
            )
        is_muon = issubclass(BY_NAME[name], MechanicMuon)
        trainer.optimizer_cls_and_kwargs = (MuonFactory if is_muon else BY_NAME[name], options)
        if torch.distributed.is_initialized():
            options.setdefault("loss_group", torch.distributed.group.WORLD)
        observe_losses(trainer)
        log_learned_rates(trainer)
