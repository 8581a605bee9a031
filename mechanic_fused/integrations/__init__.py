"""The learned rate in the logs of training stacks, and optimizers by name in their registries.

Nothing here imports a stack before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..lr_schedule import lr_of
from ..muon import muon_groups
from ..optimizer import Mechanized
from ..optimizers import (
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicMuon,
    MechanicSGD,
)
from ..recording import LearnedScale

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
    """Return the values to log; reads the device.

    "effective_lr" is S·lr of the first param group, "effective_lr/1" of the second, and so on;
    "mechanic/scale" is the first S of the first optimizer, "mechanic/grad_norm" the norm of its
    gradients in the last step. Empty where there is no mechanized optimizer.

    Args:
        wrapper: see :func:`unwrapped`.
        lrs: of the param groups in the step that is logged, from :func:`scheduled_lrs`, where a
            scheduler has moved on since; of another length they are ignored.

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
    if lrs is not None and len(lrs) == len(now) and list(lrs) != now:
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


def show_d(wrapper: Any) -> None:
    """Let param groups have an entry "d", as Prodigy's have: lr·d is the learned rate.

    For tools that log ``group["d"] * group["lr"]``, of which nothing else can be made. Nothing is
    read before they do; a state dict has the number, which is read then. To be called again after
    ``add_param_group``, and for a copy of the optimizer.

    Args:
        wrapper: see :func:`unwrapped`.

    Raises:
        ValueError: for a base whose param groups have a "d" of their own.

    Example:
        >>> import torch
        >>> opt = MechanicSGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> show_d(opt)
        >>> opt.param_groups[0]["d"] * opt.param_groups[0]["lr"]
        0.0
    """

    def put(optimizer: Any) -> None:
        for i, group in enumerate(optimizer.param_groups):
            group["d"] = LearnedScale(optimizer, i)

    def write(optimizer: Any, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            group["d"] = float(group["d"]) if "d" in group else 0.0

    for found in unwrapped(wrapper):
        if "d" in found.defaults:
            raise ValueError(
                f'param groups must have no "d", got those of {type(found).__name__}, whose base '
                "has one"
            )
        put(found)
        found.register_state_dict_post_hook(write)
        found.register_load_state_dict_post_hook(put)


def log_learned_rates(trainer: Any) -> None:
    """Let a transformers Trainer log :func:`learned_rates` wherever it logs the loss.

    Args:
        trainer: the Trainer; the callback goes before those of trackers.

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


def observe_losses(trainer: Any) -> None:
    """Give the optimizer of a transformers Trainer the loss of every micro-batch.

    With gradients accumulated over n of them ``training_step`` returns an n-th of each loss.

    Args:
        trainer: the Trainer; its optimizer may be made later. On several ranks the optimizer needs
            ``loss_group``.
    """
    plain = trainer.training_step

    def training_step(*args: Any, **options: Any) -> Any:
        share = plain(*args, **options)
        for opt in unwrapped(trainer.optimizer):
            opt.observe(share * trainer.current_gradient_accumulation_steps)
        return share

    trainer.training_step = training_step


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


BY_NAME: dict[str, type[Mechanized]] = {cls.__name__: cls for cls in CLASSES}
"""What configurations may name; add classes of mechanize() here."""


def make(model: Any, name: str = "MechanicAdamW", **options: Any) -> Mechanized:
    """Return an optimizer of a model's weights that require gradients; Muon with its groups.

    Args:
        model: a torch.nn.Module.
        name: a key of BY_NAME.
        options: of the class; ``lr`` is 1.0 unless it is given.

    Raises:
        ValueError: for another name.

    Example:
        >>> import torch
        >>> type(make(torch.nn.Linear(2, 2), "MechanicMuon")).__name__
        'MechanicMuon'
    """
    if name not in BY_NAME:
        raise ValueError(f"the optimizer must be one of {', '.join(BY_NAME)}, got {name!r}")
    cls = BY_NAME[name]
    trained = (p for p in model.parameters() if p.requires_grad)
    groups = muon_groups(model) if issubclass(cls, MechanicMuon) else trained
    return cls(groups, **{"lr": 1.0, **options})


class MuonFactory:
    """MechanicMuon for transformers' Trainer, which passes the model, from which groups are made.

    ``Trainer(…, optimizer_cls_and_kwargs=(MuonFactory, {"lr": 1.0}))``
    """

    def __call__(self, model: Any, *_: Any, **options: Any) -> Mechanized:
        """Return the optimizer."""
        return make(model, MechanicMuon.__name__, **options)


def register_llamafactory() -> None:
    """Register "mechanic" with LLaMA-Factory 1: ``optim_config: {name: mechanic}``.

    Beside ``name`` the configuration may have ``optimizer``, a key of BY_NAME, and its options.
    """

    def mechanic(model: Any, config: Any) -> Mechanized:
        options = {key: value for key, value in dict(config).items() if key != "name"}
        return make(model, options.pop("optimizer", "MechanicAdamW"), **options)

    llamafactory_plugin()("mechanic").register()(mechanic)


def llamafactory_plugin() -> Any:
    """Return LLaMA-Factory's class of plugins that make optimizers."""
    try:
        from llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer import OptimizerPlugin
    except ImportError:  # until 0.9.5
        from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
    return OptimizerPlugin


def register_timm(classes: Iterable[type[Mechanized]] = CLASSES) -> list[str]:
    """Put optimizers into timm's registry; return their names, such as "mechanicadamw".

    ``timm.optim.create_optimizer_v2(model, opt="mechanicadamw", lr=1.0)`` and timm's ``--opt`` take
    those names then.

    Args:
        classes: the mechanized optimizers, also those that mechanize() returns.
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
