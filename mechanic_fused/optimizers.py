"""The optimizers that users construct: MechanicAdamW and its siblings, and mechanize(Base)."""

from __future__ import annotations

import copyreg
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import backends
from .backends.orthogonalize import QUINTIC
from .base_code import guarded_methods, why_moving
from .lion import Lion
from .muon import Muon
from .optimizer import DEFAULTS, Mechanized
from .options import (
    RENAMED_VARIANTS,
    SCALE_PER,
    USER_OPTIONS,
    accepts_old_names,
    integer,
    one_of,
    tuner_options,
)

T = TypeVar("T", bound=type[Any])
Log = Callable[[dict[str, Any]], None]

_logger = logging.getLogger(__name__)

_OWN_ARGS = """s_decay: λ, the decay of an exact form's tuner (not the weights'), 0 or more;
            None: 0.01.
        tuner_betas: the betas of an exact form's tuner (not the base's), each in (0, 1); None:
            those of the paper's code.
        s_init: the initial scale, above 0; "auto": from the loss and norms; None: the variant's
            own.
        tuner_eps: ε of an exact form's tuner, above 0; None: 1e-8.
        variant: "running", or an exact form x = x_ref + S·Δ: "annealed", or one of the published
            "optax", "paper" and "pytorch", which expect lr = 1; see
            :func:`mechanic_fused.mechanize`. None: "running", or "annealed" where an option that
            only the exact forms have is given.
        scale_per: which weights share a scale: "model", "group" or "parameter".
        backend: "auto", "cpp", "cuda", "triton" or "reference".
        optim_bits: of the base's state, beside weights of two dimensions or more and 4,096
            elements or more: 32, 16 (bfloat16) or 8 (codes by blocks of a row; 16 where no block of
            32 divides it). A param group may have its own.
        state_dtype: None keeps the base's state in float32 (float64 beside float64 weights),
            "param" in the weights' dtype.
        delta_dtype: of the exact forms: None keeps Δ in float32 (float64 beside float64 weights),
            torch.bfloat16 in bfloat16 with stochastic rounding (not beside float64 weights).
        x_ref_every: of the running form: 8 keeps x_ref for one block of 128 elements in eight, of
            weights of 8,192 elements or more; 1 keeps all of it. A param group may have its own.
        bf16_stochastic_round: of the running form: round bfloat16 weights whose state is narrow
            stochastically; without it 16 low bits are kept beside them, so that nothing is lost.
        offload: of the running form: keep the state on the CPU, and step copies of the weights
            there; see :meth:`release_gradients`, with which that is done during the backward pass.
        max_grad_norm: clip the gradients of all weights and ranks to this norm, above 0, within the
            step; None: no clipping.
        reduce_group: the process group over which plain weights are sharded (FSDP1, ZeRO); None for
            DTensors and for weights that every rank has whole.
        loss_group: the process group over whose ranks observed losses are averaged; None: those of
            DTensors' meshes, or ``reduce_group``. DistributedDataParallel needs it where a loss is
            given.
        extra_groups: process groups whose ranks hold other weights of the model (pipeline stages).

    Raises:
        ValueError: for an option out of range, a weight that is complex, sparse or shares memory
            with another, or a backend that is not available."""


def _documented(cls: T) -> T:
    """Insert the arguments that all classes share into a class's docstring."""
    cls.__doc__ = (cls.__doc__ or "").replace("%(own)s", _OWN_ARGS)
    return cls


@_documented
class MechanicAdamW(Mechanized, torch.optim.AdamW):
    """AdamW with a learned scale: x += S·u.

    u = −lr·(m̂/(√v̂ + ε) + weight_decay·x)

    Args:
        params: weights or param groups, of float32, bfloat16, float16 or float64, of any shape.
        lr: the peak of your schedule; its size does not matter, but for the published forms.
        betas: (β₁, β₂), each in [0, 1).
        eps: the base's ε, 0 or more.
        weight_decay: decoupled, 0 or more; the effective decay is S·lr·weight_decay.
        amsgrad: True uses the fallback.
        maximize: maximize the objective instead of minimizing it.
        foreach, capturable, differentiable, fused: as torch's; ``fused=True`` also lets the kernels
            read GradScaler's numbers on the device, differentiable must be False.
        %(own)s

    Memory beside weights and gradients: x_ref in the weights' dtype, m and v, and beside 16-bit
    weights their low bits; in the exact forms Δ instead of low bits.

    Source: arXiv 2306.00144, Algorithm 1; arXiv 1711.05101.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = MechanicAdamW([weight], lr=1.0)
        >>> (weight**2).sum().backward()
        >>> opt.step()
        >>> lrs = opt.learned_lr()
    """

    _base = torch.optim.AdamW

    @accepts_old_names
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        s_decay: float | None = None,
        tuner_betas: Sequence[float] | None = None,
        s_init: float | str | None = None,
        tuner_eps: float | None = None,
        variant: str | None = None,
        scale_per: str = "model",
        backend: str = "auto",
        optim_bits: int = 32,
        state_dtype: str | None = None,
        delta_dtype: torch.dtype | None = None,
        x_ref_every: int = 1,
        bf16_stochastic_round: bool = False,
        offload: bool = False,
        max_grad_norm: float | None = None,
        reduce_group: Any = None,
        loss_group: Any = None,
        extra_groups: Sequence[Any] = (),
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            s_decay=s_decay,
            tuner_betas=tuner_betas,
            s_init=s_init,
            tuner_eps=tuner_eps,
            variant=variant,
            scale_per=scale_per,
            backend=backend,
            optim_bits=optim_bits,
            state_dtype=state_dtype,
            delta_dtype=delta_dtype,
            x_ref_every=x_ref_every,
            bf16_stochastic_round=bf16_stochastic_round,
            offload=offload,
            max_grad_norm=max_grad_norm,
            reduce_group=reduce_group,
            loss_group=loss_group,
            extra_groups=extra_groups,
        )


@_documented
class MechanicAdam(Mechanized, torch.optim.Adam):
    """Adam with a learned scale: x += S·u.

    u = −lr·m̂/(√v̂ + ε)

    Args:
        params: weights or param groups, of float32, bfloat16, float16 or float64, of any shape.
        lr: the peak of your schedule; its size does not matter, but for the published forms.
        betas: (β₁, β₂), each in [0, 1).
        eps: the base's ε, 0 or more.
        weight_decay: added to the gradient (L2), 0 or more.
        amsgrad: True uses the fallback.
        decoupled_weight_decay: decouple it as AdamW does.
        maximize: maximize the objective instead of minimizing it.
        foreach, capturable, differentiable, fused: as torch's; ``fused=True`` also lets the kernels
            read GradScaler's numbers on the device, differentiable must be False.
        %(own)s

    Memory beside weights and gradients: x_ref in the weights' dtype, m and v, and beside 16-bit
    weights their low bits; in the exact forms Δ instead of low bits.

    Source: arXiv 2306.00144, Algorithm 1; arXiv 1412.6980.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = MechanicAdam([weight], lr=1.0)
        >>> (weight**2).sum().backward()
        >>> opt.step()
        >>> lrs = opt.learned_lr()
    """

    _base = torch.optim.Adam

    @accepts_old_names
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        s_decay: float | None = None,
        tuner_betas: Sequence[float] | None = None,
        s_init: float | str | None = None,
        tuner_eps: float | None = None,
        variant: str | None = None,
        scale_per: str = "model",
        backend: str = "auto",
        optim_bits: int = 32,
        state_dtype: str | None = None,
        delta_dtype: torch.dtype | None = None,
        x_ref_every: int = 1,
        bf16_stochastic_round: bool = False,
        offload: bool = False,
        max_grad_norm: float | None = None,
        reduce_group: Any = None,
        loss_group: Any = None,
        extra_groups: Sequence[Any] = (),
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            s_decay=s_decay,
            tuner_betas=tuner_betas,
            s_init=s_init,
            tuner_eps=tuner_eps,
            variant=variant,
            scale_per=scale_per,
            backend=backend,
            optim_bits=optim_bits,
            state_dtype=state_dtype,
            delta_dtype=delta_dtype,
            x_ref_every=x_ref_every,
            bf16_stochastic_round=bf16_stochastic_round,
            offload=offload,
            max_grad_norm=max_grad_norm,
            reduce_group=reduce_group,
            loss_group=loss_group,
            extra_groups=extra_groups,
        )


@_documented
class MechanicSGD(Mechanized, torch.optim.SGD):
    """SGD with a learned scale: x += S·u.

    d = g + weight_decay·x;  buffer = momentum·buffer + (1 − dampening)·d;  u = −lr·buffer, without
    momentum −lr·d, with Nesterov −lr·(d + momentum·buffer).

    Args:
        params: weights or param groups, of float32, bfloat16, float16 or float64, of any shape.
        lr: the peak of your schedule; its size does not matter, but for the published forms.
        momentum: μ, 0 or more.
        dampening: dampening of the momentum.
        weight_decay: added to the gradient (L2), 0 or more.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        maximize: maximize the objective instead of minimizing it.
        foreach, differentiable, fused: accepted as torch's; ``fused=True`` also lets the kernels
            read GradScaler's numbers on the device, differentiable must be False.
        %(own)s

    Memory beside weights and gradients: x_ref in the weights' dtype, the momentum buffer, and
    beside 16-bit weights their low bits; in the exact forms Δ instead of low bits.

    Source: arXiv 2306.00144, Algorithm 1.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = MechanicSGD([weight], lr=1.0, momentum=0.9)
        >>> (weight**2).sum().backward()
        >>> opt.step()
        >>> lrs = opt.learned_lr()
    """

    _base = torch.optim.SGD

    @accepts_old_names
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        s_decay: float | None = None,
        tuner_betas: Sequence[float] | None = None,
        s_init: float | str | None = None,
        tuner_eps: float | None = None,
        variant: str | None = None,
        scale_per: str = "model",
        backend: str = "auto",
        optim_bits: int = 32,
        state_dtype: str | None = None,
        delta_dtype: torch.dtype | None = None,
        x_ref_every: int = 1,
        bf16_stochastic_round: bool = False,
        offload: bool = False,
        max_grad_norm: float | None = None,
        reduce_group: Any = None,
        loss_group: Any = None,
        extra_groups: Sequence[Any] = (),
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            s_decay=s_decay,
            tuner_betas=tuner_betas,
            s_init=s_init,
            tuner_eps=tuner_eps,
            variant=variant,
            scale_per=scale_per,
            backend=backend,
            optim_bits=optim_bits,
            state_dtype=state_dtype,
            delta_dtype=delta_dtype,
            x_ref_every=x_ref_every,
            bf16_stochastic_round=bf16_stochastic_round,
            offload=offload,
            max_grad_norm=max_grad_norm,
            reduce_group=reduce_group,
            loss_group=loss_group,
            extra_groups=extra_groups,
        )


@_documented
class MechanicLion(Mechanized, Lion):
    """Lion with a learned scale: x += S·u.

    u = −lr·(sign(β₁·m + (1−β₁)·g) + weight_decay·x);  m = β₂·m + (1−β₂)·g.

    Args:
        params: weights or param groups, of float32, bfloat16, float16 or float64, of any shape.
        lr: the peak of your schedule; its size does not matter, but for the published forms.
        betas: (β₁, β₂), each in [0, 1).
        weight_decay: decoupled, 0 or more; the effective decay is S·lr·weight_decay.
        maximize: maximize the objective instead of minimizing it.
        %(own)s

    Memory beside weights and gradients: x_ref in the weights' dtype, m, and beside 16-bit weights
    their low bits; in the exact forms Δ instead of low bits.

    Source: arXiv 2306.00144, Algorithm 1; arXiv 2302.06675, Algorithm 2.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = MechanicLion([weight], lr=1.0)
        >>> (weight**2).sum().backward()
        >>> opt.step()
        >>> lrs = opt.learned_lr()
    """

    _base = Lion

    @accepts_old_names
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        s_decay: float | None = None,
        tuner_betas: Sequence[float] | None = None,
        s_init: float | str | None = None,
        tuner_eps: float | None = None,
        variant: str | None = None,
        scale_per: str = "model",
        backend: str = "auto",
        optim_bits: int = 32,
        state_dtype: str | None = None,
        delta_dtype: torch.dtype | None = None,
        x_ref_every: int = 1,
        bf16_stochastic_round: bool = False,
        offload: bool = False,
        max_grad_norm: float | None = None,
        reduce_group: Any = None,
        loss_group: Any = None,
        extra_groups: Sequence[Any] = (),
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            s_decay=s_decay,
            tuner_betas=tuner_betas,
            s_init=s_init,
            tuner_eps=tuner_eps,
            variant=variant,
            scale_per=scale_per,
            backend=backend,
            optim_bits=optim_bits,
            state_dtype=state_dtype,
            delta_dtype=delta_dtype,
            x_ref_every=x_ref_every,
            bf16_stochastic_round=bf16_stochastic_round,
            offload=offload,
            max_grad_norm=max_grad_norm,
            reduce_group=reduce_group,
            loss_group=loss_group,
            extra_groups=extra_groups,
        )


class MechanicMuon(Mechanized, Muon):
    """Muon for matrices and AdamW for other weights with one learned scale: x += S·u.

    Of groups with ``use_muon=True``: u = −lr·(ratio·O + weight_decay·x), O = NewtonSchulz(n),
    n = μ·buf + (1−μ)·g, buf = μ·buf + (1−μ)·g. Of others AdamW's u.

    Args:
        params: weights of two dimensions or more, or param groups, as :func:`muon_groups` makes
            them; those with ``use_muon=False`` may have ``betas`` and ``eps``.
        lr: the peak of your schedule; its size does not matter.
        weight_decay: decoupled, 0 or more; the effective decay is S·lr·weight_decay.
        momentum: μ, in [0, 1).
        nesterov: whether O is of Nesterov's momentum, or of buf.
        ns_coefficients: (a, b, c) of each step of NewtonSchulz, or "polar_express".
        eps: the least norm by which a matrix is divided.
        ns_steps: steps of NewtonSchulz, 1 to 99.
        adjust_lr_fn: "match_rms_adamw": ratio = 0.2·√max(rows, columns), by which one scale serves
            both kinds of weights; "original" or None: √max(1, rows/columns), with a scale for each
            group.
        ns_dtype: of NewtonSchulz: torch.bfloat16 or float32; None: bfloat16 on GPUs and on CPUs
            with instructions for it, else float32. Beside float64 weights it is float64.
        s_init, backend, optim_bits, state_dtype, x_ref_every: as of :class:`MechanicAdamW`.
        bf16_stochastic_round, max_grad_norm, loss_group, extra_groups: as there.
        scale_per: also as there; None: "model" with "match_rms_adamw", else "group".

    Memory beside weights and gradients: x_ref in the weights' dtype, the momentum of matrices, and
    AdamW's state of the others.

    Raises:
        ValueError: for an option out of range, or in a group with ``use_muon=True`` a weight of
            fewer than two dimensions or a flat shard (FSDP1, ZeRO).

    Source: arXiv 2306.00144, Algorithm 1; kellerjordan.github.io/posts/muon; arXiv 2502.16982.

    Example:
        >>> from mechanic_fused import muon_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        >>> opt = MechanicMuon(muon_groups(model))
        >>> loss = model(torch.ones(2, 4)).square().mean()
        >>> loss.backward()
        >>> opt.step(loss=loss)
    """

    _base = Muon

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] | str = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        ns_dtype: torch.dtype | None = None,
        s_init: float | str | None = None,
        scale_per: str | None = None,
        backend: str = "auto",
        optim_bits: int = 32,
        state_dtype: str | None = None,
        x_ref_every: int = 1,
        bf16_stochastic_round: bool = False,
        max_grad_norm: float | None = None,
        loss_group: Any = None,
        extra_groups: Sequence[Any] = (),
    ) -> None:
        if scale_per is None:
            scale_per = "model" if adjust_lr_fn == "match_rms_adamw" else "group"
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            ns_dtype=ns_dtype,
            s_init=s_init,
            scale_per=scale_per,
            backend=backend,
            optim_bits=optim_bits,
            state_dtype=state_dtype,
            x_ref_every=x_ref_every,
            bf16_stochastic_round=bf16_stochastic_round,
            max_grad_norm=max_grad_norm,
            loss_group=loss_group,
            extra_groups=extra_groups,
        )


_made: dict[Any, type[Any]] = {}
"""Options → the class made for them, so that an unpickled optimizer has the class it had."""


@accepts_old_names
def mechanize(
    Base: type[Optimizer],
    s_decay: float | None = None,
    betas: Sequence[float] | None = None,
    s_init: float | str | None = None,
    eps: float | None = None,
    store_delta: bool = True,
    log_func: Log | None = None,
    log_every: int = 0,
    *,
    variant: str | None = None,
    scale_per: str = "model",
    backend: str = "auto",
    tuner_betas: Sequence[float] | None = None,
    tuner_eps: float | None = None,
) -> type[Any]:
    """Return a class of optimizers that learn the scale of Base's updates.

    x += S·u, where u is Base's update. S starts between the estimate from the loss,
    S·‖g‖·‖u‖ = loss/13, and that from norms of n weights, S·‖u‖ = 0.46·‖x‖/∛n, or at the latter
    where no loss is observed; then ln S moves by h = ⟨g, x − x_ref⟩ over its root mean square. In
    the exact forms x = x_ref + S·Δ, where Δ is the sum of Base's updates, and S = Σ s is learned
    from h = ⟨g, Δ⟩ + λ·S·(‖g‖/‖x‖)·⟨x, Δ⟩.

    Args:
        Base: a subclass of torch.optim.Optimizer; the result is a subclass of it.
        s_decay: λ of the exact forms, 0 or more; None: 0.01.
        betas: the betas of an exact form's tuner (not Base's), each in (0, 1); mechanic_pytorch's
            name for ``tuner_betas``.
        s_init: the initial scale, above 0; None: the variant's own. "auto": as above; in an exact
            form c·‖x‖/‖lr₀·d₁‖ with c = 1e-4, the base's first direction d₁ and the schedule's peak
            lr₀.
        eps: ε of an exact form's tuner, above 0; mechanic_pytorch's name for ``tuner_eps``.
        store_delta: accepted for mechanic_pytorch's sake; the exact forms always store Δ.
        log_func: called with {"iter_count": int, "s": float}; None: the module's logger.
        log_every: call ``log_func`` every so many steps, which reads the device; 0: never.
        variant: "running", or an exact form: "optax", "paper" or "pytorch", the published ones, or
            "annealed": optax's with s_init="auto", with λ and ε per unit of lr₀, so that the base's
            lr does not matter, and with s moving by lr/lr₀ of its update, so that the weights come
            to rest with the schedule. None: "running", or "annealed" where an option that only the
            exact forms have is given.
        scale_per: which weights share a scale: "model", "group" or "parameter".
        backend: "auto", "cpp", "cuda", "triton" or "reference".
        tuner_betas, tuner_eps: as ``betas`` and ``eps``, under the constructor's names.

    Returns:
        A class whose constructor takes Base's own arguments and, by keyword, the options of
        :class:`MechanicAdamW` from ``s_decay`` on. Where Base has a keyword of the same name, such
        as ``max_grad_norm``, that one goes in ``base_options={"max_grad_norm": …}``.

    Raises:
        TypeError: if Base is not an optimizer class, or needs a closure at every step, or has
            methods beside ``step`` that move weights, or methods of the same names as Mechanic.
        ValueError: for options out of range.

    Source: arXiv 2306.00144, Algorithm 1.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = mechanize(torch.optim.RAdam)([weight], lr=1.0)
        >>> (weight ** 2).sum().backward()
        >>> opt.step()
    """
    if not (isinstance(Base, type) and issubclass(Base, Optimizer)):
        raise TypeError(f"Base must be a subclass of torch.optim.Optimizer, got {Base!r}")
    if issubclass(Base, Mechanized):
        raise TypeError(
            f"Base must be a plain optimizer, got {Base.__name__}, which is already mechanized"
        )
    if issubclass(Base, torch.optim.LBFGS):
        raise TypeError("Base must step without a closure, got LBFGS, which needs one")
    why = why_moving(Base)
    if why:
        raise TypeError(why)
    if log_func is not None and not callable(log_func):
        raise ValueError(f"log_func must be callable, got {log_func!r}")
    options: dict[str, Any] = {
        "s_decay": s_decay,
        "tuner_betas": betas if tuner_betas is None else tuner_betas,
        "s_init": s_init,
        "tuner_eps": eps if tuner_eps is None else tuner_eps,
        "variant": variant,
        "scale_per": one_of("scale_per", scale_per, SCALE_PER),
        "backend": backend,
        "log_func": log_func or _log_scale,
        "log_every": integer("log_every", log_every, 0),
    }
    checked = tuner_options(**{k: options[k] for k in USER_OPTIONS})
    options["tuner_betas"] = checked["tuner_betas"]
    backends.check(backend)
    return _class_of(Base, options)


def is_mechanized(optimizer: object) -> bool:
    """Return whether an optimizer learns its scale: one of this module's, or of mechanize()."""
    return isinstance(optimizer, Mechanized)


def _log_scale(data: dict[str, Any]) -> None:
    _logger.info("step %d: s = %g", data["iter_count"], data["s"])


def _class_of(base: type[Optimizer], options: dict[str, Any]) -> type[Any]:
    key = (base, *options.values())
    if key not in _made:
        members = {
            "_base": base,
            "_class_options": options,
            "__signature__": _signature(base),
            "__reduce_ex__": _reduce,
            **guarded_methods(base, Mechanized),
            "__doc__": f"{base.__name__} with a learned scale: see mechanic_fused.mechanize.",
        }
        # A base whose class has a metaclass of its own keeps it, and its class is not pickled.
        metaclass: Any = _MadeClass if type(base) is type else type(base)
        _made[key] = metaclass(f"Mechanic{base.__name__}", (Mechanized, base), members)
    return _made[key]


class _MadeClass(type):
    """The class of mechanize()'s classes, by which pickle knows them: no module names them."""


def _reduce_class(cls: Any) -> Any:
    base, options = cls._base, cls._class_options
    if cls is _made.get((base, *options.values())):
        return _class_of, (base, options)
    return cls.__qualname__  # a subclass of the user's, which a module names


copyreg.pickle(_MadeClass, _reduce_class)


def _signature(base: type[Optimizer]) -> inspect.Signature:
    """Return the base's own arguments followed by ours."""
    ours = [
        p
        for p in inspect.signature(Mechanized.__init__).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    theirs = list(inspect.signature(base).parameters.values())
    names = {p.name for p in ours}
    before = [
        p for p in theirs if p.kind is not inspect.Parameter.VAR_KEYWORD and p.name not in names
    ]
    after = [p for p in theirs if p.kind is inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*before, *ours, *after])


def _reduce(optimizer: Any, protocol: Any) -> Any:
    """Pickle by base and options, unless a module names the class."""
    base, options = optimizer._base, optimizer._class_options
    if type(optimizer) is not _made.get((base, *options.values())):
        return Optimizer.__reduce_ex__(optimizer, protocol)
    return restore, (base, options), optimizer.__getstate__()


def restore(base: type[Optimizer], options: dict[str, Any]) -> Any:
    """Return an optimizer without state, of the class that mechanize() made for these options."""
    if "scale" in options:  # pickled by 0.1
        options = dict(options)
        kind = options.pop("scale")
        options["scale_per"] = "model" if kind == "global" else kind
        options["variant"] = RENAMED_VARIANTS.get(options["variant"], options["variant"])
        options["log_func"] = options["log_func"] or _log_scale
    ordered = {name: options[name] for name in DEFAULTS}
    cls: Any = _class_of(base, ordered)
    return cls.__new__(cls)
