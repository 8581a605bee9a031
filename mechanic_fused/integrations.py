"""The learned rate in the logs of training stacks, and optimizers by name in their registries.

Nothing here imports a stack before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .lr_schedule import lr_of
from .optimizer import Mechanized
from .optimizers import (
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicMuon,
    MechanicSGD,
)

WRAPS = ("optimizer", "optimizers", "_optimizer", "base_optimizer", "optim")
"""Attributes by which wrappers hold an optimizer, or several."""

DEPTH = 5
"""Wrappers around each other at most."""


def unwrapped(wrapper: Any) -> list[Mechanized]:
    """Return the mechanized optimizers inside a wrapper, an engine or a container, each once.

    Args:
        wrapper: an optimizer; what holds one as ``optimizer``, ``optimizers``, ``_optimizer``,
            ``base_optimizer`` or ``optim``, as Accelerate's, DeepSpeed's and torchtitan's do; or a
            list of those.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> opt = MechanicSGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> unwrapped(SimpleNamespace(optimizer=SimpleNamespace(optim=opt))) == [opt]
        True
    """
    return list({id(found): found for found in _inside(wrapper, DEPTH)}.values())


def _inside(wrapper: Any, depth: int) -> Iterator[Mechanized]:
    if isinstance(wrapper, Mechanized):
        yield wrapper
    elif depth and isinstance(wrapper, (list, tuple)):
        for each in wrapper:
            yield from _inside(each, depth)
    elif depth and hasattr(wrapper, "__dict__"):
        held = (vars(wrapper).get(name) for name in WRAPS)
        for each in held:
            yield from _inside(each, depth - 1)


def learned_rates(wrapper: Any, lrs: Sequence[float] | None = None) -> dict[str, float]:
    """Return what there is to log; reads the device.

    "effective_lr" is S·lr of the first param group, "effective_lr/1" of the second, and so on;
    "mechanic/scale" is S, "mechanic/grad_norm" the norm of the gradients in the last step. Empty
    where there is no mechanized optimizer.

    Args:
        wrapper: see :func:`unwrapped`.
        lrs: of the param groups in the step that is logged, from :func:`scheduled_lrs`, where a
            scheduler has moved on since.

    Example:
        >>> import torch
        >>> opt = MechanicSGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> learned_rates(opt)["effective_lr"]
        0.0
    """
    found = unwrapped(wrapper)
    if not found:
        return {}
    rates = [rate for opt in found for rate in opt.learned_lr()]
    now = scheduled_lrs(wrapper)
    if lrs is not None and list(lrs) != now:
        known = [[s for s in own if s] for opt in found for own in opt.group_scales()]
        scales = [sum(own) / len(own) if own else 0.0 for own in known]
        rates = [scale * lr for scale, lr in zip(scales, lrs, strict=True)]
    names = ["effective_lr", *(f"effective_lr/{i}" for i in range(1, len(rates)))]
    own = {"mechanic/scale": found[0].scale[0].item()}
    own["mechanic/grad_norm"] = found[0].grad_norm.item()
    return {**dict(zip(names, rates, strict=True)), **own}


def scheduled_lrs(wrapper: Any) -> list[float]:
    """Return the lr of every param group as the schedule has it, without S."""
    groups = [group for opt in unwrapped(wrapper) for group in opt.param_groups]
    return [float(lr_of(group)) for group in groups]


def log_learned_rates(trainer: Any) -> None:
    """Let a transformers Trainer log :func:`learned_rates` wherever it logs the loss.

    Args:
        trainer: its callbacks are called in order, so this one goes before those of trackers.

    Raises:
        TypeError: for something that has no callbacks.
    """
    from transformers import TrainerCallback

    class LearnedRates(TrainerCallback):
        lrs: Sequence[float] | None = None

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **of_step: Any) -> None:
            self.lrs = scheduled_lrs(of_step.get("optimizer") or trainer.optimizer)

        def on_log(self, args: Any, state: Any, control: Any, **of_step: Any) -> None:
            logs = of_step.get("logs") or {}
            if "loss" in logs:
                found = learned_rates(of_step.get("optimizer") or trainer.optimizer, self.lrs)
                logs.update(found)
                state.log_history[-1].update(found)

    handler = getattr(trainer, "callback_handler", None)
    if handler is None:
        raise TypeError(f"expected a transformers Trainer, got {type(trainer).__name__}")
    handler.callbacks.insert(0, LearnedRates())


def lightning_callback() -> Any:
    """Return a Lightning callback that logs :func:`learned_rates` as often as the trainer logs."""
    from lightning.pytorch.callbacks import Callback

    class LearnedRates(Callback):
        lrs: Sequence[float] | None = None

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.lrs = scheduled_lrs(list(trainer.optimizers))

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step % trainer.log_every_n_steps == 0:
                module.log_dict(learned_rates(list(trainer.optimizers), self.lrs))

    return LearnedRates()


CLASSES: tuple[type[Mechanized], ...] = (
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicMuon,
    MechanicSGD,
)


def register_timm(classes: Iterable[type[Mechanized]] = CLASSES) -> list[str]:
    """Put optimizers into timm's registry; return their names, such as "mechanicadamw".

    ``timm.optim.create_optimizer_v2(model, opt="mechanicadamw", lr=1.0)`` and timm's ``--opt`` take
    those names then.

    Args:
        classes: of mechanized optimizers, also those of mechanize().
    """
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry

    for cls in classes:
        momentum = "momentum" in cls.__init__.__annotations__
        info = OptimInfo(
            name=cls.__name__.lower(),
            opt_class=cls,
            description=f"{cls.__name__}: learns the scale of its updates",
            has_eps="eps" in cls.__init__.__annotations__,
            has_momentum=momentum,
            has_betas="betas" in cls.__init__.__annotations__,
        )
        default_registry.register(info)
    return [cls.__name__.lower() for cls in classes]
