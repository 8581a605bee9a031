"""The mechanized optimizers that people ask for by name."""

import torch

from .factory import mechanize
from .lion import Lion

_TUNED = """{formula}, with a learned scale: x = x_ref + S·Δ, and Δ sums what {base} would add.

    Takes every argument of {base}, with ``lr=1.0`` meant for most runs, and by keyword the tuner's
    own: ``s_decay``, ``tuner_betas``, ``s_init``, ``tuner_eps``, ``variant``, ``scale``,
    ``backend``, ``narrow_state``: see :func:`mechanic_fused.mechanize`.

    Raises:
        ValueError: for options out of range.

    Source: arXiv 2306.00144.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = Mechanic{base}([weight], lr=1.0)
        >>> (weight ** 2).sum().backward()
        >>> opt.step()
        >>> rates = opt.learned_lr()
    """


class MechanicAdamW(mechanize(torch.optim.AdamW)):  # type: ignore[misc]
    __doc__ = _TUNED.format(base="AdamW", formula="Adam with decoupled weight decay")


class MechanicAdam(mechanize(torch.optim.Adam)):  # type: ignore[misc]
    __doc__ = _TUNED.format(base="Adam", formula="Adam")


class MechanicSGD(mechanize(torch.optim.SGD)):  # type: ignore[misc]
    __doc__ = _TUNED.format(base="SGD", formula="SGD with or without momentum")


class MechanicLion(mechanize(Lion)):  # type: ignore[misc]
    __doc__ = _TUNED.format(base="Lion", formula="Lion")
