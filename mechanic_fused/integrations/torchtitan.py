"""torchtitan's container of optimizers with ours by name and one S, and its metrics with S·lr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer

from ..fused_bases import fallback_reason
from ..optimizer import Mechanized
from ..plan import SAME_EVERY
from ..step import step_together
from . import BY_NAME, learned_rates, scheduled_lrs, unwrapped


class MechanicContainer(OptimizersContainer):
    """An OptimizersContainer that steps the mechanized optimizers of all model parts together.

    An ``optimizer_name`` may be a key of ``integrations.BY_NAME`` besides torchtitan's own.
    ``implementation="fused_opt_states_bf16"`` makes ``optim_bits=16`` of those with a fused update.

    Args:
        config: MechanicContainer.Config, with the fields of OptimizersContainer.Config.
        model_parts: of this rank.

    Raises:
        RuntimeError: in a step, if ranks have learned different S: ranks of a pipeline whose
            group is not in the optimizers' ``extra_groups``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The fields of OptimizersContainer.Config."""

    optimizers: list[Any]

    def __init__(self, config: Any, *, model_parts: list[torch.nn.Module]) -> None:
        if config.implementation == "fused_opt_states_bf16":
            given = config.optimizer_factory_kwargs_by_name
            named = {group.optimizer_name for group in config.param_groups} & BY_NAME.keys()
            fused = [name for name in named if fallback_reason(BY_NAME[name]._base, []) is None]
            narrow = {name: {"optim_bits": 16, **given.get(name, {})} for name in fused}
            config = replace(config, optimizer_factory_kwargs_by_name={**given, **narrow})
        self.steps_taken = 0
        self.lrs: list[float] | None = None
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return BY_NAME.get(name) or OptimizersContainer._resolve_optimizer_factory(name)

    def _register_bf16_optimizer_state_hook(self) -> None:
        """Leave ours out: their narrow state is of ``optim_bits``."""
        every = self.optimizers
        self.optimizers = [opt for opt in every if not isinstance(opt, Mechanized)]
        super()._register_bf16_optimizer_state_hook()
        self.optimizers = every

    def step(self, closure: None = None) -> None:
        """Take one step of every optimizer, the mechanized ones with one scale."""
        if closure is not None:
            raise TypeError("torchtitan's container takes no closure, expected None")
        ours = unwrapped(self.optimizers)
        if ours:  # first, since their errors come before anything has changed
            self.lrs = scheduled_lrs(ours)
            step_together(ours)
            self.steps_taken += 1
            is_power_of_two = self.steps_taken & (self.steps_taken - 1) == 0
            if is_power_of_two or self.steps_taken % SAME_EVERY == 0:
                compare_scales(ours[0])
        for opt in self.optimizers:
            if not isinstance(opt, Mechanized):
                opt.step()


class MechanicMetrics(MetricsProcessor):
    """A MetricsProcessor that logs :func:`~mechanic_fused.integrations.learned_rates` too."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The fields of MetricsProcessor.Config."""

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log on every rank: S may still have to be reduced."""
        found = learned_rates(self.optimizers, getattr(self.optimizers, "lrs", None))
        super().log(*args, extra_metrics={**(extra_metrics or {}), **found})


def compare_scales(opt: Mechanized) -> None:
    """Raise RuntimeError if S differs between the ranks of a job, which train one model."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    scale = opt.scale.detach().double()
    ends = torch.cat([scale, -scale])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    greatest, least = ends[: len(scale)], -ends[len(scale) :]
    if not torch.equal(greatest, least):
        raise RuntimeError(
            f"ranks have learned S between {least.tolist()} and {greatest.tolist()}, expected the "
            "same: with a pipeline, name the group of its stages once the container is made: "
            'for opt in optimizers: opt.extra_groups = (parallel_dims.get_mesh("pp").get_group(),)'
        )
