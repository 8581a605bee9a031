"""Per-parameter state: made, laid out like its weight, loaded with the dtype of the save."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends.layout import STATES, STEPPED, compute_dtype
from .bucket import is_dense
from .distributed import dtensor, like, local
from .lr_schedule import PEAK
from .options import OPTIONS
from .tuner import KEY

OURS = ("x_ref", "delta")
"""The entries that Mechanic adds to a parameter's state."""


def ensure(
    state: dict[str, Any], x: Tensor, kind: str, dtype: torch.dtype, delta: torch.dtype
) -> None:
    """Make what is missing of a weight's state, and give the rest the weight's layout and device.

    Args:
        state: the optimizer's entries for this weight, changed in place.
        x: the weight.
        kind: its update, which names the base's own entries; "general": the base makes them.
        dtype: the dtype of the base's entries.
        delta: the dtype of Δ.
    """
    names = STATES.get(kind, ())
    if kind not in STATES:
        # The base of the general road steps on wide copies, so its state is wide too.
        for name, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point() and value.dim() > 0:
                like_weight = value.shape == x.shape
                inner = compute_dtype(x.dtype)
                state[name] = conform(value, x, inner) if like_weight else value.to(inner)
    established = any(state.get(name) is not None for name in names)
    for name in names:
        state[name] = conform(state.get(name), x, dtype)
    if kind in STEPPED:
        # The float32 0-dim tensor of torch's fused optimizers. A momentum buffer that came without
        # a count is past its first step.
        step = state.get("step", float(established))
        if not (torch.is_tensor(step) and step.dtype is torch.float32 and step.device == x.device):
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=x.device)
    state["x_ref"] = (
        conform(state["x_ref"], x, x.dtype)
        if "x_ref" in state
        else x.detach().clone(memory_format=torch.preserve_format)
    )
    state["delta"] = conform(state.get("delta"), x, delta)


def conform(old: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``old`` with x's layout and device and with ``dtype``; zeros where it is None."""
    if old is None:
        return torch.zeros_like(x, dtype=dtype, memory_format=torch.preserve_format)
    if old.shape != x.shape:
        raise ValueError(
            f"a weight's state must have its shape, expected {tuple(x.shape)}, "
            f"got {tuple(old.shape)}"
        )
    if isinstance(x, dtensor()) and not isinstance(old, dtensor()):
        # A state dict of a single process holds whole tensors; each rank takes its part.
        from torch.distributed.tensor import distribute_tensor

        old = distribute_tensor(old.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
    old = like(old, x)
    mine, theirs = local(x), local(old)
    same_layout = not is_dense(mine) or theirs.stride() == mine.stride()
    if old.dtype is dtype and old.device == x.device and same_layout:
        return old
    return torch.empty_like(x, dtype=dtype, memory_format=torch.preserve_format).copy_(old)


def load_keeping_dtypes(optimizer: Optimizer, load: Any, state_dict: dict[str, Any]) -> None:
    """Load as torch does, but leave every state tensor the dtype that it was saved in.

    torch casts floating state to the weight's dtype, which would round a float32 Δ to bfloat16.
    The hooks see the state dict as the user's own hooks have left it, and act before the user's
    post hooks do.
    """
    seen: dict[str, Any] = {}

    def remember(_: Optimizer, loaded: dict[str, Any]) -> None:
        seen.update(loaded)

    def restore(loading: Optimizer) -> None:
        keys = [key for group in seen["param_groups"] for key in group["params"]]
        weights = [p for group in loading.param_groups for p in group["params"]]
        for key, p in zip(keys, weights, strict=True):
            for name, value in (seen["state"].get(key) or {}).items():
                if torch.is_tensor(value) and value.is_floating_point():
                    loading.state[p][name] = value.detach().clone().to(p.device)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(remember),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        load(state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def to_base(optimizer: Any, base: type[Any], kept: tuple[str, ...] | None) -> Optimizer:
    """Return a plain ``base`` over the optimizer's weights at lr·S, with the base's own state.

    Args:
        optimizer: a mechanized optimizer.
        base: its base class.
        kept: the names of the base's own state; None: all but ours.
    """
    groups: list[dict[str, Any]] = []
    weights: list[Tensor] = []
    for group, scales in zip(optimizer.param_groups, optimizer.group_scales(), strict=True):
        options = {k: v for k, v in group.items() if k not in ("params", KEY, PEAK, *OPTIONS)}
        # One scale for the whole group keeps it whole; one for each weight takes it apart.
        parts = [group["params"]] if len(scales) == 1 else [[p] for p in group["params"]]
        for part, scale in zip(parts, scales, strict=True):
            rates = {k: float(options[k]) * scale for k in ("lr", "initial_lr") if k in options}
            groups.append({**options, **rates, "params": part})
            weights += part
    required = {
        name: optimizer.defaults[name]
        for name, parameter in inspect.signature(base).parameters.items()
        if parameter.default is parameter.empty and name in optimizer.defaults
    }
    plain = base(groups, **required)
    entries: dict[Any, Any] = {}
    for i, p in enumerate(weights):
        state = optimizer.state.get(p, {})
        names = [k for k in state if k not in OURS and (kept is None or k in kept)]
        if names:
            entries[i] = {
                k: copy.copy(v) if not torch.is_tensor(v) else v.clone()
                for k, v in state.items()
                if k in names
            }
    # What an optimizer keeps beside its weights' state goes along as it is.
    entries.update({k: v for k, v in optimizer.state.items() if not torch.is_tensor(k)})
    plain.load_state_dict({"state": entries, "param_groups": plain.state_dict()["param_groups"]})
    return plain
