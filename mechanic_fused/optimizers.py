"""The mechanized optimizers that people ask for by name."""

import torch

from .factory import mechanize
from .lion import Lion

_TUNED = """{formula}, with a learned scale: x = x_ref + S·Δ, and Δ sums what {base} would add.

    Args:
        params: weights or param groups, of float32, bfloat16, float16 or float64, any shape.
        lr, …: every argument of {base}; ``lr`` is the peak of a schedule; its size does not matter.
        s_decay, tuner_betas, s_init, tuner_eps, variant, scale, backend: the tuner's own, by
            keyword: see :func:`mechanic_fused.mechanize`.
        narrow_state: keep {base}'s state in the weights' dtype instead of float32.
        narrow_delta: keep Δ in bfloat16 instead of float32, with stochastic rounding.

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
