"""What a base brings beside step(): attributes under our names, methods that move weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .torch_internals import is_fake

OWN_ATTRIBUTES = ("max_grad_norm", "reduce_group", "loss_group", "extra_groups")
"""Attributes of ours that users set, which a base may have under the same names."""

MOVE_WEIGHTS = ("first_step", "second_step", "swap_swa_sgd", "swap_swa", "update_swa")
"""Methods of published bases that move weights: of SAM and of SWA."""

OF_BASE, RUNS = "_of_base", "_base_runs"
"""Attributes of a mechanized optimizer: the base's own attributes under our names, and whether its
code runs."""


def why_moving(base: type[Optimizer]) -> str:
    """Return why a base whose methods move weights cannot be mechanized, or the empty string."""
    names = [name for name in MOVE_WEIGHTS if hasattr(base, name)]
    if hasattr(base, "train") and hasattr(base, "eval"):  # schedule-free ones
        names += ["train", "eval"]
    if not names:
        return ""
    return (
        f"Base must move weights in step() alone, got {base.__name__}, whose "
        f"{' and '.join(f'{name}()' for name in names)} would move them to where S = 1 is"
    )


@contextmanager
def base_code(optimizer: Optimizer) -> Iterator[None]:
    """Let the base find its own attributes under our names, while its code runs."""
    attributes = vars(optimizer)
    theirs: dict[str, Any] = attributes.setdefault(OF_BASE, {})
    ours = {name: attributes[name] for name in theirs}
    attributes.update(theirs)
    attributes[RUNS] = True
    try:
        yield
    finally:
        attributes[RUNS] = False
        for name in theirs:
            theirs[name] = attributes[name]
        attributes.update(ours)


@contextmanager
def base_constructor(optimizer: Optimizer, owner: type[Optimizer]) -> Iterator[None]:
    """Keep our attributes while the base's constructor runs, and what it sets under their names.

    Args:
        optimizer: with our attributes set.
        owner: the class that has our methods.

    Raises:
        TypeError: where the base takes a name for which there is no other place.
    """
    attributes = vars(optimizer)
    ours = {name: attributes[name] for name in OWN_ATTRIBUTES}
    attributes[RUNS] = True
    own = _public_names(owner)
    read_only = {name for name in own if isinstance(getattr(owner, name), property)}
    try:
        yield
    except AttributeError as error:
        taken = [name for name in read_only if f"'{name}'" in str(error)]
        if taken:
            raise _clash(optimizer, taken) from error
        raise
    attributes[RUNS] = False
    taken = sorted(own & attributes.keys() - set(OWN_ATTRIBUTES))
    if taken:
        raise _clash(optimizer, taken)
    attributes[OF_BASE] = {
        name: attributes[name] for name, value in ours.items() if attributes[name] is not value
    }
    attributes.update(ours)


def _public_names(owner: type[Optimizer]) -> set[str]:
    """Return the names of what a class has beside what every optimizer has."""
    return {
        name for name in dir(owner) if not name.startswith("_") and not hasattr(Optimizer, name)
    }


def _clash(optimizer: Optimizer, names: list[str]) -> TypeError:
    return TypeError(
        f"the base must leave {', '.join(names)} to {type(optimizer).__name__}, which has "
        "attributes of these names, got a base whose constructor sets them"
    )


def guarded_methods(base: type[Optimizer], owner: type[Optimizer]) -> dict[str, Callable[..., Any]]:
    """Return a base's public methods, each of which raises where it has moved weights.

    Args:
        base: its methods; those that every optimizer has are left out.
        owner: the class that has our methods, which come first.

    Raises:
        TypeError: for a base with a method under the name of one of ours.
    """
    own = _public_names(owner)
    found = {}
    for name in dir(base):
        if name.startswith("_") or hasattr(Optimizer, name):
            continue
        if name in own:
            raise TypeError(
                f"Base must not have a method {name}, which Mechanic has as well, got "
                f"{base.__name__}"
            )
        method = inspect.getattr_static(base, name)
        if inspect.isfunction(method):
            found[name] = _guarded(method)
    return found


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if vars(self).get(RUNS, True):
            return method(self, *args, **kwargs)
        members = [p for group in self.param_groups for p in group["params"]]
        weights = [p.detach() for p in members if p.device.type != "meta" and not is_fake(p)]
        before = [x.clone() for x in weights]
        with base_code(self):
            returned = method(self, *args, **kwargs)
        if any(map(_differ, weights, before)):
            with torch.no_grad():
                for x, old in zip(weights, before, strict=True):
                    x.copy_(old)
            raise TypeError(
                f"{method.__name__}() of the base must leave the weights alone: it has moved them "
                "to where S = 1 would be; they are as before, the base's own state may not be"
            )
        return returned

    return call


def _differ(x: Tensor, old: Tensor) -> bool:
    return not bool(((x == old) | ((x != x) & (old != old))).all())
