"""Which checkpoints cannot be loaded: errors that name the entry, before anything has changed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backends import quantize
from .backends.layout import LOG_TUNER, OWN_STATE, tuner_width
from .kept_blocks import LEAST_ELEMENTS, may_be_kept
from .options import RUNNING, USER_OPTIONS, tuner_options
from .param_checks import has_storage
from .scale_rows import KEY
from .state_formats import SCALE_SUFFIX, check_codes, codes_of, has_codes
from .torch_internals import local

Group = dict[str, Any]


def check_tuner_states(saved: list[Group]) -> None:
    """Raise ValueError if a saved group holds a tuner's state that its options cannot have.

    Args:
        saved: the groups of a state dict under today's names; those of a plain base hold none.
    """
    for i, group in enumerate(saved):
        if KEY not in group:
            continue
        rows = group[KEY]
        if not torch.is_tensor(rows):
            raise ValueError(
                f"the tuner's state must be a tensor, got a {type(rows).__name__}: with FSDP1 and "
                "broadcast_from_rank0 torch hands the other ranks a description of it; load the "
                "full state dict on every rank instead"
            )
        options = {name: group[name] for name in USER_OPTIONS if name in group}
        if options.keys() >= set(USER_OPTIONS):
            options = tuner_options(**options)
        of = f"param group {i} of the checkpoint"
        if rows.dim() != 2 or not rows.is_floating_point() or not has_storage(rows):
            raise ValueError(
                f"the tuner's state must be plain floating-point numbers (scales, columns), got "
                f"{rows.dtype} of shape {tuple(rows.shape)} for {of}"
            )
        columns = rows.shape[1]
        if options.get("variant") == RUNNING and columns != len(LOG_TUNER):
            raise ValueError(
                "the checkpoint's tuner state must have the columns of this version: expected the "
                f"shape (scales, {len(LOG_TUNER)}), got {tuple(rows.shape)} for {of}; load it with "
                "the version that wrote it, and give s_init= the learned scale here"
            )
        betas = options.get("tuner_betas")
        if options.get("variant") != RUNNING and betas and columns != tuner_width(len(betas)):
            raise ValueError(
                f"the checkpoint's tuner state must have the columns of {len(betas)} tuner_betas: "
                f"expected the shape (scales, {tuner_width(len(betas))}), got {tuple(rows.shape)} "
                f"for {of}"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"the tuner's state must be finite, got {rows.tolist()} for {of}")


def check_scales(saved: list[Group], param_groups: list[Group], scale_per: str) -> None:
    """Raise ValueError if saved groups have scales for other parts of the model."""
    tensors = [group[KEY] for group in saved if KEY in group]
    for theirs, group in zip(tensors, param_groups, strict=False):
        rows = len(group["params"]) if scale_per == "parameter" else 1
        if len(theirs) != rows:
            raise ValueError(
                f"the checkpoint must be of an optimizer with scale_per={scale_per!r}: expected "
                f"{rows} scales for a group of {len(group['params'])} parameters, got {len(theirs)}"
            )
    if scale_per == "model" and not all(torch.equal(t, tensors[0]) for t in tensors):
        raise ValueError(
            "the checkpoint must be of an optimizer with scale_per='model', got groups that have "
            "learned different scales"
        )


def check_entries(
    saved: dict[str, Any], param_groups: list[Group], names: tuple[str, ...] | None
) -> None:
    """Raise ValueError if a weight's saved state cannot be its state, or groups have other sizes.

    Args:
        saved: a state dict.
        param_groups: the optimizer's.
        names: of the base's own state, which the fused updates read; None for the fallback, whose
            base may keep anything.
    """
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    expected = [len(group["params"]) for group in param_groups]
    if sizes != expected:
        raise ValueError(
            f"the checkpoint's param groups must hold as many weights as the optimizer's, expected "
            f"{expected}, got {sizes}; a plain base that was made with scale_per='parameter' has a "
            "group for each weight"
        )
    for i, (theirs, group) in enumerate(zip(saved["param_groups"], param_groups, strict=True)):
        called = group.get("param_names")
        for j, (key, p) in enumerate(zip(theirs["params"], group["params"], strict=True)):
            entries = saved["state"].get(key)
            if entries is None:
                continue
            weight = repr(called[j]) if called else f"parameter {j} of param group {i}"
            if not isinstance(entries, dict):
                raise ValueError(
                    f"the checkpoint's state of {weight} must be a dict of entries, got a "
                    f"{type(entries).__name__}"
                )
            is_matrix = group.get("use_muon", False)  # for which no steps are counted
            if "exp_avg_sq" in (names or ()) and "step" not in entries and not is_matrix:
                raise ValueError(
                    f"the checkpoint's state of {weight} lacks step, the number of steps in its "
                    f"moments, got {sorted(entries)}"
                )
            for name in (*OWN_STATE, *(names or ())):
                if entries.get(name) is not None:
                    of = f"{name} of {weight}, of shape {tuple(p.shape)},"
                    if name in (*(names or ()), "delta") and has_codes(name, entries[name]):
                        check_codes(name, entries, p, f"the checkpoint's {of}")
                        _check_scales(name, entries, f"the checkpoint's {of}")
                    else:
                        _check_entry(name, entries[name], p, f"the checkpoint's {of}")


def _check_entry(name: str, value: Any, p: Tensor, what: str) -> None:
    if name == "step":
        one = value.numel() == 1 and has_storage(value) if torch.is_tensor(value) else True
        if not one or isinstance(value, str) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{what} must be a finite number of 0 or more, got {value!r}")
        return
    if not torch.is_tensor(value):
        raise ValueError(f"{what} must be a tensor, got a {type(value).__name__}")
    wanted = "torch.int16" if name == "x_low" else "a floating-point dtype"
    if value.dtype is not torch.int16 if name == "x_low" else not value.is_floating_point():
        raise ValueError(f"{what} must have {wanted}, got {value.dtype}")
    if value.shape != p.shape and not (name == "x_ref" and _may_be_part(value, p)):
        raise ValueError(f"{what} must have its shape, got {tuple(value.shape)}")
    if not has_storage(local(value)):
        raise ValueError(
            f"{what} must be a plain tensor with storage of its own, got a {type(value).__name__} "
            f"on {value.device}"
        )


def _check_scales(name: str, entries: Group, what: str) -> None:
    """Raise ValueError unless the numbers of the block scales of codes can be those of a state."""
    scales = local(entries[name + SCALE_SUFFIX])
    most = quantize.largest_scale(codes_of(name)) * (1 + 1e-6)
    if not bool(((scales >= 0) & (scales <= most)).all()):
        raise ValueError(
            f"{what} holds codes: expected {name}{SCALE_SUFFIX} of numbers from 0 to "
            f"{most:.4g}, got {scales.min()} to {scales.max()}"
        )


def _may_be_part(x_ref: Tensor, p: Tensor) -> bool:
    long_enough = p.numel() >= LEAST_ELEMENTS
    return x_ref.dim() == 1 and long_enough and may_be_kept(len(x_ref), local(p).numel())
