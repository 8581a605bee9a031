"""mechanize(Base): the class of a torch optimizer that finds its own learning rate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from . import backends
from .mechanized import Mechanized
from .options import BETAS, CHECKED, checked_options
from .tuner import check_scale

Log = Callable[[dict[str, Any]], None]

_logger = logging.getLogger(__name__)

_made: dict[Any, type[Any]] = {}
"""Each class once, so that an unpickled optimizer has the class that it was pickled with."""


def mechanize(
    Base: type[Optimizer],
    s_decay: float = 0.01,
    betas: Sequence[float] = BETAS,
    s_init: float | str | None = None,
    eps: float = 1e-8,
    store_delta: bool = True,
    log_func: Log | None = None,
    log_every: int = 0,
    *,
    variant: str = "scaled",
    scale: str = "global",
    backend: str = "auto",
) -> type[Any]:
    """Make a class of optimizers that learn the scale of Base's updates.

    x = x_ref + S·Δ, where Δ is the sum of the updates that Base makes and S = Σ s is learned from
    h = ⟨g, Δ⟩ + λ·S·(‖g‖/‖x‖)·⟨x, Δ⟩.

    Args:
        Base: a subclass of torch.optim.Optimizer; the result is a subclass of it.
        s_decay: λ, 0 or more.
        betas: the tuner's betas (not Base's), each in (0, 1).
        s_init: the scale to start from; by default the variant's own. "auto": c·‖x‖/‖lr₀·d₁‖ with
            c = 1e-4, the base's first direction d₁ and the schedule's peak lr₀.
        eps: the tuner's ε.
        store_delta: accepted for mechanic_pytorch's sake; Δ is always stored.
        log_func: called with {"iter_count": int, "s": float}; by default the module's logger.
        log_every: call ``log_func`` every so many steps; 0: never. Otherwise each step reads the
            device.
        variant: "optax", "paper" or "pytorch", the published forms of the tuner, or "scaled": ours,
            which is optax's with s_init="auto", with λ and ε per unit of lr₀, so that the base's lr
            does not matter, and with s taking lr/lr₀ of each move, so that the weights come to rest
            with the schedule.
        scale: "global", "group" or "parameter": which weights share a scale.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        A class whose constructor takes Base's own arguments and, by keyword, ``s_decay``,
        ``tuner_betas``, ``s_init``, ``tuner_eps``, ``variant``, ``scale``, ``backend`` and
        ``narrow_state`` (keep Base's state in the weight's dtype instead of float32) and
        ``narrow_delta`` (keep Δ in bfloat16 instead of float32, rounded up or down by the odds of
        where it lies between two numbers, so that small updates count on average; float64 weights
        keep theirs).

    Raises:
        TypeError: if Base is not an optimizer class, or needs a closure at every step.
        ValueError: for options out of range.

    Source: arXiv 2306.00144, Algorithm 1.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = mechanize(torch.optim.RAdam, s_decay=0.0)([weight], lr=1.0)
        >>> (weight ** 2).sum().backward()
        >>> opt.step()
    """
    if not (isinstance(Base, type) and issubclass(Base, Optimizer)):
        raise TypeError(f"Base must be a subclass of torch.optim.Optimizer, got {Base!r}")
    if issubclass(Base, Mechanized):
        raise TypeError(f"Base must be a plain optimizer, got {Base.__name__}, mechanized already")
    if issubclass(Base, torch.optim.LBFGS):
        raise TypeError("Base must step without a closure, got LBFGS, which evaluates it again")
    if not isinstance(log_every, int) or log_every < 0:
        raise ValueError(f"log_every must be a whole number, 0 or more, got {log_every!r}")
    if log_func is not None and not callable(log_func):
        raise ValueError(f"log_func must be callable, got {log_func!r}")
    options: dict[str, Any] = {
        "s_decay": s_decay,
        "tuner_betas": betas,
        "s_init": s_init,
        "tuner_eps": eps,
        "variant": variant,
        "scale": scale,
        "backend": backend,
        "log_func": log_func or _log_scale,
        "log_every": log_every,
    }
    checked = checked_options(**{k: options[k] for k in CHECKED})
    options["tuner_betas"] = checked["tuner_betas"]
    check_scale(scale)
    backends.check(backend)
    return _class_of(Base, options)


def is_mechanized(optimizer: object) -> bool:
    """Return whether an optimizer was made by mechanize."""
    return isinstance(optimizer, Mechanized)


def _log_scale(data: dict[str, Any]) -> None:
    _logger.info("step %d: s = %g", data["iter_count"], data["s"])


def _class_of(base: type[Optimizer], options: dict[str, Any]) -> type[Any]:
    key = (base, *options.values())
    if key not in _made:
        members = {
            "_base": base,
            "_class_options": options,
            "__reduce_ex__": _reduce,
            "__doc__": f"{base.__name__} with a learned scale: see mechanic_fused.mechanize.",
        }
        _made[key] = type(f"Mechanic{base.__name__}", (Mechanized, base), members)
    return _made[key]


def _reduce(optimizer: Any, protocol: Any) -> Any:
    """A class made in a function is not found by its name; one that a module names is."""
    base, options = optimizer._base, optimizer._class_options
    if type(optimizer) is not _made.get((base, *options.values())):
        return Optimizer.__reduce_ex__(optimizer, protocol)
    return _restore, (base, options), optimizer.__getstate__()


def _restore(base: type[Optimizer], options: dict[str, Any]) -> Any:
    cls: Any = _class_of(base, options)
    return cls.__new__(cls)
