"""Per-parameter state: how it is created, laid out, loaded, and handed to a plain base."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends.layout import (
    OWN_STATE,
    REFERENCE_EVERY,
    STATES,
    STEPPED,
    compute_dtype,
    device_of_numbers,
    has_float64,
)
from .distributed import like, wrap
from .kept_blocks import LEAST_ELEMENTS, WHOLE, keep, kept_count, may_be_kept, spread
from .lr_schedule import PEAK
from .options import GROUP_OPTIONS, OPTIM_BITS, X_REF_EVERY
from .param_checks import has_storage, is_dense
from .recording import LearnedScale
from .scale_rows import KEY
from .state_formats import (
    SCALE_SUFFIX,
    StateFormat,
    check_codes,
    codes_of,
    decode,
    encode,
    has_codes,
    new_codes,
    scale_shape,
)
from .torch_internals import dtensor, is_fake, is_fsdp1_flat, local

LOW_BITS = StateFormat(torch.int16)
"""Those of 16-bit weights: integers, and no codes."""


def ensure_state(
    state: dict[str, Any],
    x: Tensor,
    kind: str,
    stored: StateFormat,
    delta: StateFormat | None,
    low_bits: bool,
    phase: int = WHOLE,
    own_dtypes: bool = False,
) -> None:
    """Create the missing entries of a weight's state, and bring the others to its layout.

    Args:
        state: the optimizer's entries for this weight; changed in place.
        x: the weight.
        kind: its update, which names the base's own entries; the base of the fallback creates its
            own.
        stored: how the base's entries are stored.
        delta: how Δ is stored; None in the running form, which has none.
        low_bits: whether the low bits of a 16-bit weight are kept.
        phase: of x_ref, see ``kept_blocks.py``.
        own_dtypes: whether the fallback's base may have chosen its entries' dtypes itself.

    Raises:
        ValueError: for an entry of another shape or without storage, or an x_ref that lacks
            elements.
    """
    names = STATES.get(kind, ())
    _check_given(state, x, (*names, *OWN_STATE), phase)
    if kind not in STATES:
        # The fallback's base steps on copies in the compute dtype, and so does its state, but for
        # what it keeps in a dtype of its own choice. Integers without block scales are its own too.
        for name in [name for name in state if name + SCALE_SUFFIX in state]:
            if has_codes(name, state[name]):
                state[name] = decode(state[name], state.pop(name + SCALE_SUFFIX))
        for name, value in state.items():
            if _is_plain(value) and value.is_floating_point() and value.dim() > 0:
                is_own = own_dtypes and value.dtype is not x.dtype
                inner = value.dtype if is_own else compute_dtype(x.dtype)
                has_shape = value.shape == x.shape
                state[name] = conform(value, x, inner) if has_shape else value.to(inner)
    established = any(state.get(name) is not None for name in names)
    for name in names:
        _store(state, name, x, stored)
    if kind in STEPPED:
        # Float32 and 0-dim, as in torch's fused optimizers. A momentum buffer that was loaded
        # without a count is past its first step.
        step = state.get("step", float(established))
        place = device_of_numbers(x.device)
        if not (torch.is_tensor(step) and step.dtype is torch.float32 and step.device == place):
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=place)
    state["x_ref"] = _reference(state.get("x_ref"), x, phase)
    for name, kept in (("delta", delta), ("x_low", LOW_BITS if low_bits else None)):
        if kept is not None:
            _store(state, name, x, kept)
        else:
            state.pop(name, None)
            state.pop(name + SCALE_SUFFIX, None)


def _copied(value: Tensor) -> Tensor:
    """Return a copy, or the tensor itself where its class has none, as torchao's states."""
    try:
        return value.detach().clone()
    except NotImplementedError:
        return value.detach()


def _is_plain(value: Any) -> bool:
    """Return whether an entry is a tensor, sharded or not, and none that stores otherwise."""
    if not torch.is_tensor(value):
        return False
    return type(local(value)) in (Tensor, torch.nn.Parameter) or is_fake(value)


def _store(state: dict[str, Any], name: str, x: Tensor, stored: StateFormat) -> None:
    """Bring an entry of the state to how it is to be stored; create it of zeros."""
    scale_name, codes = name + SCALE_SUFFIX, codes_of(name)
    old: Any = state.get(name)
    scales = state.pop(scale_name, None)
    if has_codes(name, old):
        shape = scale_shape(x, stored.block) if stored.block else None
        is_format = tuple(scales.shape) == shape
        if is_format and _is_laid_out(old, x) and _is_laid_out(scales, x):
            state[scale_name] = scales
            return
        old = decode(old, scales)
    if not stored.block:
        state[name] = conform(old, x, stored.dtype)
    elif old is None:
        state[name], state[scale_name] = new_codes(x, stored.block, codes)
    else:
        wide = conform(old, x, torch.float32)
        state[name], state[scale_name] = encode(wide, x, stored.block, codes)


def _is_laid_out(t: Tensor, x: Tensor) -> bool:
    """Return whether codes or scales are where x is, sharded as x is, and without gaps."""
    if isinstance(t, dtensor()) != isinstance(x, dtensor()) or t.device != x.device:
        return False
    there: Any = x
    here: Any = t
    if isinstance(x, dtensor()) and (
        here.placements != there.placements or here.device_mesh != there.device_mesh
    ):
        return False
    return local(t).is_contiguous()


def _check_given(state: dict[str, Any], x: Tensor, names: tuple[str, ...], phase: int) -> None:
    for name in (*names, "step"):
        value = state.get(name)
        if torch.is_tensor(value) and not (is_fake(x) or has_storage(local(value))):
            raise ValueError(
                f"{name} of a weight of shape {tuple(x.shape)} must be a plain tensor with storage "
                f"of its own, got a {type(value).__name__}"
            )
    may_be_part = phase != WHOLE or x.numel() >= LEAST_ELEMENTS
    found = {
        name: tuple(state[name].shape)
        for name in names
        if torch.is_tensor(state.get(name))
        and state[name].shape != x.shape
        and not (name == "x_ref" and may_be_part and is_part(state[name], x))
    }
    if found:
        raise ValueError(
            f"the state of a weight must have its shape, expected {tuple(x.shape)}, got "
            f"{', '.join(f'{name} of shape {shape}' for name, shape in found.items())}; a weight "
            "that grows or shrinks keeps its state with opt.replace_parameter(old, new, index_map)"
        )
    for name in filter(lambda name: has_codes(name, state[name]), state):
        if name not in names and name + SCALE_SUFFIX not in state:
            continue  # of the fallback's base
        check_codes(name, state, x, f"{name} of a weight of shape {tuple(x.shape)}")


def _reference(old: Tensor | None, x: Tensor, phase: int) -> Tensor:
    """Return x_ref: laid out as x, or the elements that are kept of this rank's shard."""
    mine = local(x).detach()
    if phase == WHOLE:
        if old is None:
            return x.detach().clone(memory_format=torch.preserve_format)
        if is_part(old, x) and x.numel() >= LEAST_ELEMENTS and may_be_kept(len(old), mine.numel()):
            raise ValueError(
                "an x_ref that was kept for one block in eight has no other elements: expected "
                f"x_ref_every={REFERENCE_EVERY} to stay in its param group, got 1"
            )
        return conform(old, x, x.dtype)
    if old is None:
        return keep(mine, mine, phase)
    if is_part(old, x) and len(old) == kept_count(mine.numel(), phase):
        return old.to(x.device, x.dtype)
    kept = keep(local(conform(old, x, x.dtype)), mine, phase)
    if bool(kept.isnan().any()):
        raise ValueError(
            "the x_ref of a checkpoint lacks elements that are kept here: expected one of a run "
            f"whose weight of shape {tuple(x.shape)} had the same strides, {x.stride()}, and the "
            "same layout over ranks, or an x_ref that is whole"
        )
    return kept


def check_replacement(old: Tensor, new: Tensor, index_map: Tensor) -> None:
    """Raise ValueError unless rows of ``new`` can be those of ``old`` that a map names."""
    for name, p in (("old", old), ("new", new)):
        if isinstance(p, dtensor()) or is_fsdp1_flat(p):
            raise ValueError(
                f"{name} must be a plain weight, whose rows are all here, got a {type(p).__name__}"
            )
    if not isinstance(new, torch.nn.Parameter) or not new.is_leaf:
        raise ValueError(f"new must be a torch.nn.Parameter, got a {type(new).__name__}")
    wanted = (old.shape[1:], old.dtype, old.device)
    if old.dim() == 0 or new.dim() == 0 or (new.shape[1:], new.dtype, new.device) != wanted:
        raise ValueError(
            f"new must have rows as old has them, expected the shape (rows, "
            f"{', '.join(map(str, old.shape[1:]))}), {old.dtype} on {old.device}, got "
            f"{tuple(new.shape)}, {new.dtype} on {new.device}"
        )
    if index_map.dtype is not torch.int64 or index_map.shape != new.shape[:1]:
        raise ValueError(
            f"index_map must name a row of old for each row of new, expected ({len(new)},) int64, "
            f"got {tuple(index_map.shape)} {index_map.dtype}"
        )
    if len(new) and not -1 <= int(index_map.min()) <= int(index_map.max()) < len(old):
        raise ValueError(
            f"index_map must hold row numbers of old, expected -1 (a row of its own) to "
            f"{len(old) - 1}, got {int(index_map.min())} to {int(index_map.max())}"
        )


def mapped_state(
    state: dict[str, Any], old: Tensor, new: Tensor, index_map: Tensor
) -> dict[str, Any]:
    """Return the entries of ``old`` for ``new``: row i is the row that ``index_map`` names.

    A row of its own (−1) starts as at the start of a run: x_ref = x and zeros elsewhere. So does
    the x_ref of all rows where it is kept in part. In the exact forms x_ref also takes what the
    weights' values changed by, since x = x_ref + S·Δ.

    Args:
        state: the entries of ``old``.
        old, new, index_map: as checked by :func:`check_replacement`.
    """

    def of_rows(t: Tensor, otherwise: Tensor | None = None) -> Tensor:
        rows = index_map.to(t.device)  # with offload that is not the weights'
        kept = rows >= 0
        mapped = (
            t.new_zeros((len(new), *t.shape[1:]))
            if otherwise is None
            else otherwise.detach().to(t.device, t.dtype, copy=True)
        )
        mapped[kept] = t[rows[kept]]
        return mapped

    def has_rows(name: str, t: Any) -> bool:
        of = name.removesuffix(SCALE_SUFFIX)
        is_scale = of != name and has_codes(of, state.get(of))
        return torch.is_tensor(t) and (t.shape == old.shape or is_scale)

    found = {
        name: of_rows(value) if has_rows(name, value) else value for name, value in state.items()
    }
    x_ref = state.get("x_ref")
    if x_ref is not None and x_ref.shape == old.shape:
        found["x_ref"] = of_rows(x_ref, new)
        if "delta" in state:
            kept = index_map.to(old.device) >= 0
            found["x_ref"][kept] += (new.detach() - of_rows(old.detach()))[kept]
    else:
        found.pop("x_ref", None)
    return found


def is_part(x_ref: Tensor, x: Tensor) -> bool:
    """Return whether an x_ref has not the shape of x, and so holds kept elements alone."""
    return x_ref.dim() == 1 and x_ref.shape != x.shape and not isinstance(x_ref, dtensor())


def conform(old: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``old`` in x's layout, on its device and in ``dtype``; zeros for None.

    Raises:
        ValueError: for another shape than x's.
    """
    if old is None:
        return torch.zeros_like(x, dtype=dtype, memory_format=torch.preserve_format)
    if old.shape != x.shape:
        raise ValueError(
            f"a weight's state must have its shape, expected {tuple(x.shape)}, "
            f"got {tuple(old.shape)}"
        )
    if isinstance(x, dtensor()) and not isinstance(old, dtensor()):
        # The checkpoint of a single process holds whole tensors; each rank takes its shard.
        from torch.distributed.tensor import distribute_tensor

        old = distribute_tensor(old.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
    old = like(old, x)
    mine, theirs = local(x), local(old)
    same_layout = not is_dense(mine) or theirs.stride() == mine.stride()
    if old.dtype is dtype and old.device == x.device and same_layout:
        return old
    return torch.empty_like(x, dtype=dtype, memory_format=torch.preserve_format).copy_(old)


def save_spread(
    optimizer: Optimizer,
    save: Callable[[], dict[str, Any]],
    phases: Callable[[list[Tensor]], list[int]],
) -> dict[str, Any]:
    """Save as torch does, but give an x_ref that is kept in part its weight's shape and sharding.

    So it fits a run with other shards, and torch.distributed.checkpoint. Sharded integers of 16
    bits are saved in 32, since no process group gathers them. It happens before the user's own
    hooks see the state dict.

    Args:
        phases: weights → their phases, see ``kept_blocks.py``.
    """

    def spread_each(saving: Optimizer, saved: dict[str, Any]) -> None:
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        weights = [p for group in saving.param_groups for p in group["params"]]
        parts = [
            (key, p, entries["x_ref"])
            for key, p in zip(keys, weights, strict=True)
            if "x_ref" in (entries := saved["state"].get(key, {})) and is_part(entries["x_ref"], p)
        ]
        found = phases([p for _, p, _ in parts]) if parts else []
        for (key, p, x_ref), phase in zip(parts, found, strict=True):
            mine = local(p).detach()
            # Of a weight that has been cut since it says nothing, and stays as it is.
            if phase != WHOLE and len(x_ref) == kept_count(mine.numel(), phase):
                whole = wrap(spread(x_ref, mine, phase), p)
                saved["state"][key] = {**saved["state"][key], "x_ref": whole}
        for key, p in zip(keys, weights, strict=True):
            entries = saved["state"].get(key, {})
            if isinstance(p, dtensor()) and any(map(_is_short, entries.values())):
                saved["state"][key] = {
                    name: wrap(local(value).int(), p) if _is_short(value) else value
                    for name, value in entries.items()
                }

    hook = optimizer.register_state_dict_post_hook(spread_each, prepend=True)
    try:
        return save()
    finally:
        hook.remove()


def _is_short(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype is torch.int16


def with_short_integers(states: dict[Any, Any]) -> dict[Any, Any]:
    """Return the saved states with low bits and codes of Δ in 16 bits again.

    Raises:
        ValueError: for numbers that do not fit.
    """

    def short(name: str, value: Any) -> Any:
        if name not in ("x_low", "delta") or not torch.is_tensor(value):
            return value
        if value.dtype is not torch.int32:
            return value
        shortened = value.to(torch.int16)
        if not torch.equal(local(shortened).int(), local(value)):
            raise ValueError(
                f"{name} of a weight of shape {tuple(value.shape)} must hold integers of 16 bits, "
                f"got {int(local(value).min())} to {int(local(value).max())}"
            )
        return shortened

    return {
        key: {name: short(name, value) for name, value in entries.items()}
        if isinstance(entries, dict)
        else entries
        for key, entries in states.items()
    }


def load_keeping_dtypes(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    check: Callable[[dict[str, Any]], None],
    device: torch.device | None = None,
) -> None:
    """Load as torch does, but give every state tensor the dtype in which it was saved.

    Torch casts state to the weight's dtype, which would round a float32 Δ to bfloat16 and destroy
    low bits. Our hooks see the state dict as the user's own hooks have left it, and run before the
    user's post hooks do.

    Args:
        check: raises for a state dict that does not fit; nothing has changed then.
        device: where the state is to be, if that is not where its weight is: torch, which would
            move it to the weight, then gets numbers alone.
    """
    seen: dict[str, Any] = {}

    def note(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any] | None:
        check(loaded)
        seen.update(loaded)
        if device is None:
            return None
        numbers = {
            key: {k: v for k, v in entries.items() if not torch.is_tensor(v) or v.dim() == 0}
            for key, entries in loaded["state"].items()
        }
        return {**loaded, "state": numbers}

    def restore_tensors(loading: Optimizer) -> None:
        keys = [key for group in seen["param_groups"] for key in group["params"]]
        weights = [p for group in loading.param_groups for p in group["params"]]
        for key, p in zip(keys, weights, strict=True):
            for name, value in (seen["state"].get(key) or {}).items():
                if torch.is_tensor(value):
                    place = device or p.device
                    copied = _copied(value)
                    if copied.dtype is torch.float64 and not has_float64(place):
                        copied = copied.float()
                    loading.state[p][name] = copied.to(place)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(note),
        optimizer.register_load_state_dict_post_hook(restore_tensors, prepend=True),
    ]
    try:
        load(state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def to_base(
    optimizer: Any,
    base: Callable[..., Optimizer],
    group_scales: list[list[float]],
    state_names: tuple[str, ...] | None,
) -> Optimizer:
    """Return a plain ``base`` over the optimizer's weights at lr·S, with the base's own state.

    Args:
        optimizer: a mechanized optimizer.
        base: its base class.
        group_scales: S of each param group: one number, or one for each of its weights.
        state_names: the names of the base's own state; None: all but ours.
    """
    groups: list[dict[str, Any]] = []
    weights: list[Tensor] = []
    ours = ("params", KEY, PEAK, OPTIM_BITS, X_REF_EVERY, *GROUP_OPTIONS)
    for group, scales in zip(optimizer.param_groups, group_scales, strict=True):
        options = {
            k: v for k, v in group.items() if k not in ours and not isinstance(v, LearnedScale)
        }
        # A group with a scale for each weight becomes a group for each weight.
        members = [group["params"]] if len(scales) == 1 else [[p] for p in group["params"]]
        for params, scale in zip(members, scales, strict=True):
            lrs = {
                k: float(options[k]) * scale
                for k in ("lr", "initial_lr")
                if options.get(k) is not None
            }
            groups.append({**options, **lrs, "params": params})
            weights += params
    required = {
        name: optimizer.defaults[name]
        for name, parameter in inspect.signature(base).parameters.items()
        if parameter.default is parameter.empty and name in optimizer.defaults
    }
    plain = base(groups, **required)
    entries: dict[Any, Any] = {}
    for i, p in enumerate(weights):
        state = optimizer.state.get(p, {})
        names = [
            k for k in state if k not in OWN_STATE and (state_names is None or k in state_names)
        ]
        if names:
            entries[i] = {k: _plain(state, k) for k in state if k in names}
    # What an optimizer keeps beside its weights' state is handed on unchanged.
    entries.update({k: v for k, v in optimizer.state.items() if not torch.is_tensor(k)})
    plain.load_state_dict({"state": entries, "param_groups": plain.state_dict()["param_groups"]})
    return plain


def _plain(state: dict[str, Any], name: str) -> Any:
    """Return a copy of an entry as a base keeps it: numbers for codes."""
    value = state[name]
    if has_codes(name, value):
        return decode(value, state[name + SCALE_SUFFIX])
    return value.clone() if torch.is_tensor(value) else copy.copy(value)
