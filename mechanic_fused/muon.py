"""Muon and AdamW in one optimizer, and which weights of a model are for which."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .backends import formulas
from .backends.orthogonalize import (
    QUINTIC,
    RATIOS,
    matrix_shape,
    product_dtype,
)
from .distributed import like
from .owners import orthogonalized_shards
from .torch_internals import is_fsdp1_flat, local

ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
"""Options of the groups that AdamW steps, where they do not have their own."""

OF_ADAMW = re.compile(
    r"embed|wte|wpe|_tokens?$|(^|[._])lora|"
    r"(^|[._])((lm_)?heads?|classifier|position(al|s)?)([._]|$)"
)
"""Names of matrices that AdamW steps: embeddings, tokens that are weights, low-rank matrices and
heads, but not those of attention."""


class Muon(Optimizer):
    """Step matrices by an orthogonalized momentum, and other weights by AdamW.

    Of groups with ``use_muon=True``: buf = μ·buf + (1−μ)·g; O = NewtonSchulz(μ·buf + (1−μ)·g);
    x −= lr·(ratio·O + weight_decay·x). Of others AdamW with the same lr.

    Args:
        params: weights of two dimensions or more, or param groups; those with ``use_muon=False``
            may have ``betas`` (0.9, 0.95) and ``eps`` (1e-8). See :func:`muon_groups`.
        lr: learning rate, 0 or more.
        weight_decay: decoupled, 0 or more.
        momentum: μ, in [0, 1).
        nesterov: whether O is of Nesterov's momentum, or of buf.
        ns_coefficients: (a, b, c) of each step of NewtonSchulz, or "polar_express".
        eps: the least norm by which a matrix is divided.
        ns_steps: steps of NewtonSchulz, 1 to 99.
        adjust_lr_fn: "match_rms_adamw": ratio = 0.2·√max(rows, columns), by which one lr serves
            both kinds of weights; "original" or None: √max(1, rows/columns).
        ns_dtype: of NewtonSchulz: torch.bfloat16 or float32; None: bfloat16 on GPUs and on CPUs
            with instructions for it, else float32. Beside float64 weights it is float64.

    A group may have ``split_sizes``, the rows of each part of fused projections, whose parts are
    matrices of their own. A weight of three dimensions is as many matrices as its first has
    indices, one of more is a matrix with a row for each index of the first.

    Raises:
        ValueError: for options out of range, or a weight of fewer than two dimensions.

    Source: kellerjordan.github.io/posts/muon; arXiv 2502.16982.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, 4))
        >>> opt = Muon([weight], lr=1e-2)
        >>> (weight**2).sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
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
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "use_muon": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one with ``use_muon=False`` is stepped by AdamW."""
        if not param_group.get("use_muon", True):
            for name, value in ADAMW.items():
                param_group.setdefault(name, value)
        for name in ("split_sizes", "ns_coefficients"):
            if isinstance(param_group.get(name), list):
                param_group[name] = tuple(param_group[name])
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # A checkpoint of torch's Muon has neither.
            group.setdefault("use_muon", True)
            group.setdefault("ns_dtype", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step_weight = self._step_matrix if group["use_muon"] else self._step_other
            for p in group["params"]:
                if p.grad is not None:
                    step_weight(p, p.grad, group)
        return loss

    def to_torch(self) -> tuple[torch.optim.Muon | None, torch.optim.AdamW | None]:
        """Return torch's Muon and AdamW over the same weights, with this state; None without any.

        Raises:
            ValueError: for what torch's Muon does not have: weights of other than two dimensions,
                split_sizes, "polar_express".
        """
        found: list[Any] = []
        for kind, use_muon in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
            groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            for group in groups if use_muon else ():
                _check_for_torch(group)
            names = inspect.signature(kind).parameters
            chosen = [{k: v for k, v in group.items() if k in names} for group in groups]
            optimizer: Any = kind(chosen) if chosen else None
            for p in (p for group in groups for p in group["params"] if p in self.state):
                optimizer.state[p] = {k: v.clone() for k, v in self.state[p].items()}
            found.append(optimizer)
        return found[0], found[1]

    def _step_matrix(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        c = formulas.coefficients(hyper_of_matrices(group), 0.0)
        g, buffer, x = local(like(g, p)), local(state["momentum_buffer"]), local(p)
        direction, moved = formulas.muon_momentum(g, buffer, c)
        buffer.copy_(moved)
        n = direction[None].to(product_dtype(x.device, x.dtype, group), copy=True)
        [made], ratio = orthogonalized_shards(n, p, group)
        x.add_(formulas.muon_update(made.to(x.dtype) * ratio, x, c))

    def _step_other(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        c = formulas.coefficients(hyper_of_others(group), float(state["step"]))
        u, m, v = formulas.adam(g, p, state["exp_avg"], state["exp_avg_sq"], c)
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        state["step"] += 1
        p.add_(u)


def hyper_of_matrices(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the first seven numbers of ``layout.HYPER`` of a group of matrices."""
    decay, eps = group["weight_decay"], group["eps"]
    return group["lr"], group["momentum"], 0.0, eps, 0.0, decay, group["nesterov"]


def hyper_of_others(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the same of a group that AdamW steps."""
    return group["lr"], *group["betas"], group["eps"], 0.0, group["weight_decay"], False


def hyper_of_group(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return those numbers of a group of either kind, whose options are checked before."""
    check_group(group)
    return (hyper_of_matrices if group["use_muon"] else hyper_of_others)(group)


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for options out of range, or a weight that is no matrix."""
    for name in ("lr", "weight_decay", "eps"):
        if not float(group[name]) >= 0:
            raise ValueError(f"{name} must be 0 or more, got {group[name]}")
    if group.get("maximize"):
        raise ValueError("maximize must be False: torch's Muon minimizes, got True")
    if not group["use_muon"]:
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        return
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']}")
    coefficients, steps, name = (group[k] for k in ("ns_coefficients", "ns_steps", "adjust_lr_fn"))
    if coefficients != "polar_express" and (
        isinstance(coefficients, str) or len(coefficients) != 3
    ):
        raise ValueError(
            f"ns_coefficients must be three numbers or 'polar_express', got {coefficients!r}"
        )
    if not 1 <= steps < 100:
        raise ValueError(f"ns_steps must be 1 to 99, got {steps}")
    if name is not None and name not in RATIOS:
        raise ValueError(f"adjust_lr_fn must be None, {' or '.join(RATIOS)}, got {name!r}")
    if group["ns_dtype"] not in (None, torch.bfloat16, torch.float32):
        raise ValueError(
            f"ns_dtype must be None, torch.bfloat16 or torch.float32, got {group['ns_dtype']}"
        )
    for p in group["params"]:
        if is_fsdp1_flat(p):
            raise ValueError(
                "Muon needs the rows of a matrix, and FullyShardedDataParallel (FSDP1) flattens "
                f"them: expected fully_shard (FSDP2), got a flat weight of shape {tuple(p.shape)}"
            )
        if p.dim() < 2:
            raise ValueError(
                "Muon steps weights of two dimensions or more: expected use_muon=False in the "
                f"param group of others, as muon_groups(model) has it, got shape {tuple(p.shape)}"
            )
        rows = matrix_shape(p.shape)[1]
        sizes = group.get("split_sizes")
        if sizes and (sum(sizes) != rows or min(sizes) < 1):
            raise ValueError(
                f"split_sizes must be the rows of each part, expected a sum of {rows} for a weight "
                f"of shape {tuple(p.shape)}, got {tuple(sizes)}"
            )


def _check_for_torch(group: dict[str, Any]) -> None:
    """Raise ValueError where torch's Muon has no such option."""
    if isinstance(group["ns_coefficients"], str) or group.get("split_sizes"):
        raise ValueError(
            "torch's Muon has three ns_coefficients and no split_sizes, got "
            f"{group['ns_coefficients']!r} and {group.get('split_sizes')}"
        )
    for p in group["params"]:
        if p.dim() != 2:
            raise ValueError(
                f"torch's Muon steps weights of two dimensions, got shape {tuple(p.shape)}"
            )


class MuonGroups(list[dict[str, Any]]):
    """Param groups for Muon; printed, a table of which weight is in which."""

    def __str__(self) -> str:
        lines = [("weight", "shape", "numbers", "stepped by")]
        for group in self:
            by = "Muon" if group["use_muon"] else "AdamW"
            named = group["params"]
            if group.get("param_names"):  # an optimizer has taken the names apart
                named = zip(group["param_names"], named, strict=True)
            for name, p in named:
                shape = " × ".join(map(str, p.shape)) or "–"
                lines.append((name, shape, f"{p.numel():,}", by))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join(rows)


def muon_groups(model: nn.Module, **options: Any) -> MuonGroups:
    """Return param groups: matrices for Muon, all other weights for AdamW.

    AdamW takes weights of fewer than two dimensions, those of ``nn.Embedding``, those whose names
    contain embed, wte or wpe, end in _token, or have a part that begins with lora or is called
    position, head, heads, lm_head or classifier. Weights that require no gradient are left out.

    Args:
        model: its weights.
        options: of the group of matrices, such as ``lr`` or ``split_sizes``.

    Returns:
        A list of groups with named weights; printed, it is a table.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4))
        >>> print(muon_groups(model))
        weight    shape   numbers  stepped by
        1.weight  4 × 4   16       Muon
        0.weight  10 × 4  40       AdamW
        1.bias    4       4        AdamW
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    embeddings = {m.weight for m in model.modules() if isinstance(m, kinds)}
    matrices: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_other = p.dim() < 2 or p in embeddings
        is_other |= OF_ADAMW.search(name.lower()) is not None
        (others if is_other else matrices).append((name, p))
    groups = [
        {"params": matrices, "use_muon": True, **options},
        {"params": others, "use_muon": False},
    ]
    return MuonGroups(group for group in groups if group["params"])
