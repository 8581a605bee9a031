"""Sums over ranks: what a weight is sharded over, and one all-reduce for each process group.

A scale is learned from sums over all weights. What a rank holds of them is added to one row for
each set of process groups that shards them; each row meets each of its groups once, and then the
rows are added. All ranks get the same bits, so they cannot part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .lr_schedule import pace, track_peak_lr
from .options import OPTIONS

Groups = tuple[Any, ...]
"""The process groups that shard a weight; the empty tuple: every rank has all of it."""

Rows = dict[Groups, Tensor]
"""Sums of this rank, one tensor for each set of groups."""


def dtensor() -> Any:
    """Return the class DTensor, or an empty tuple as long as nobody has imported it.

    Importing it takes longer than importing everything of ours.
    """
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def local(t: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: a DTensor's own part, any other tensor itself."""
    if not isinstance(t, dtensor()):
        return t
    part: Any = t._local_tensor
    # A collective that is still running hides its result in a wrapper without storage.
    return part.wait() if hasattr(part, "wait") else part


def like(t: Tensor, weight: Tensor) -> Tensor:
    """Return t sharded as the weight is. A collective where a DTensor's placements differ.

    Raises:
        ValueError: if only one of the two is a DTensor.
    """
    kind = dtensor()
    if isinstance(t, kind) != isinstance(weight, kind):
        raise ValueError(
            "a tensor must be sharded as its weight is, expected "
            f"{_placing(weight)}, got {_placing(t)}, shape {tuple(t.shape)}"
        )
    there: Any = weight
    here: Any = t
    if isinstance(t, kind) and (
        here.placements != there.placements or here.device_mesh != there.device_mesh
    ):
        return here.redistribute(there.device_mesh, there.placements)
    return t


def local_gradients(weights: list[Any]) -> list[Tensor | None]:
    """Return this rank's parts of the gradients of DTensors, sharded as their weights are.

    The usual case is told without a call for each: for a thousand small weights those would take
    as long as their step.
    """
    grads = [weight.grad for weight in weights]
    try:
        pairs = [(g._spec, weight._spec) for g, weight in zip(grads, weights, strict=True)]
        # FSDP makes gradients by their weights' own specification.
        if all([a is b or (a.mesh is b.mesh and a.placements == b.placements) for a, b in pairs]):
            parts = [g._local_tensor for g in grads]
            if all([type(part) is Tensor for part in parts]):
                return parts
    except AttributeError:  # None and plain tensors have no specification
        pass
    return [
        g if g is None else local(like(g, weight)) for g, weight in zip(grads, weights, strict=True)
    ]


def wrap(part: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's part as a tensor of the weight's kind, sharded as the weight is."""
    if not isinstance(weight, dtensor()):
        return part
    there: Any = weight
    return dtensor().from_local(
        part,
        there.device_mesh,
        there.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _placing(t: Any) -> str:
    return f"a DTensor of {t.placements}" if isinstance(t, dtensor()) else "a plain tensor"


def shards(weight: Tensor, reduce_group: Any) -> Groups:
    """Return the process groups over which a weight's elements are spread.

    Args:
        weight: a parameter; DTensors say themselves how they are sharded.
        reduce_group: over what plain tensors are sharded, or None.

    Raises:
        ValueError: for a weight of FSDP1 when no group is given.
    """
    if not isinstance(weight, dtensor()):
        if reduce_group is None and getattr(weight, "_fsdp_flattened", False):
            raise ValueError(
                "weights sharded by FullyShardedDataParallel (FSDP1) need reduce_group=, the "
                "process group over which they are sharded (torch.distributed.group.WORLD where "
                "no process_group was given to FSDP); fully_shard (FSDP2) needs none"
            )
        return () if reduce_group is None else (reduce_group,)
    mesh, placements = weight.device_mesh, weight.placements
    # Not isinstance(placement, Shard): a dimension that is sharded twice has a placement which is
    # none.
    return tuple(
        mesh.get_group(i)
        for i, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    )


def place(groups: Groups) -> int:
    """Return this rank's number among those that hold different parts of a weight."""
    found = 0
    for group in groups:
        found = found * group.size() + torch.distributed.get_rank(group)
    return found


def merge(parts: Iterable[Rows]) -> Rows:
    """Return rows added up by their groups."""
    merged: Rows = {}
    for rows in parts:
        for groups, row in rows.items():
            merged[groups] = merged[groups] + row if groups in merged else row
    return merged


def reduce(rows: Rows, extra_groups: Sequence[Any] = ()) -> Tensor:
    """Return the sum over all ranks: one all-reduce for each process group that shards anything.

    The rows themselves are left as they are. Every rank must call it, also with sums of nothing.

    Args:
        rows: this rank's, all of one shape, with the same groups in the same order on every rank
            of a group.
        extra_groups: groups whose ranks hold other weights of the same model: pipeline stages.
    """
    if not any(rows) and not extra_groups:
        return _total(list(rows.values()))
    parts = [row.clone() for row in rows.values()]
    for group in dict.fromkeys(group for groups in rows for group in groups):
        chosen = [i for i, groups in enumerate(rows) if group in groups]
        # Stacked and taken apart again without an index tensor, which would have to be uploaded.
        stacked = torch.stack([parts[i] for i in chosen])
        torch.distributed.all_reduce(stacked, group=group)
        for i, part in zip(chosen, stacked.unbind(), strict=True):
            parts[i] = part
    total = _total(parts)
    for group in extra_groups:
        torch.distributed.all_reduce(total, group=group)
    return total


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


@torch.no_grad()
def step_together(optimizers: Sequence[Any]) -> None:
    """Let several optimizers over parts of one model take one step with one scale.

    For containers that have an optimizer for each part of a model, such as the stages of a
    pipeline: sums are taken over all parts and reduced once, and the parts learn the same S.

    Args:
        optimizers: mechanized ones, with the same tuner options; every rank must call this with
            parts that are sharded over the same groups in the same order.

    Raises:
        ValueError: for gradients or weights that cannot be used, or optimizers whose options
            differ; nothing has changed then.

    Example:
        >>> import torch
        >>> from mechanic_fused import MechanicSGD
        >>> parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        >>> optimizers = [MechanicSGD(part.parameters(), lr=1.0) for part in parts]
        >>> parts[1](parts[0](torch.ones(1, 2))).sum().backward()
        >>> step_together(optimizers)
    """
    groups = [group for opt in optimizers for group in opt.param_groups]
    started = any([opt._started for opt in optimizers])
    if started:
        track_peak_lr(groups, started)
    check_alike(optimizers)
    extra = tuple(dict.fromkeys(g for opt in optimizers for g in opt.extra_groups))
    try:
        # A list, so that all are made ready.
        shared = any([opt.prepare() for opt in optimizers]) or len(optimizers) > 1
        questions = merge([opt.inspect(shared) for opt in optimizers])
        answers = reduce(questions, extra) if questions else None
        rows = [opt.accumulate(answers, shared) for opt in optimizers]
        if any(rows):
            if not started:
                # Not before: the lr of a dry step tells nothing.
                track_peak_lr(groups, started)
            norms = merge([opt.measure_start() for opt in optimizers])
            if norms:
                start = reduce(norms, extra)
                for opt in optimizers:
                    opt.start(start)
            total, together = reduce(merge(rows), extra), pace(groups)
            for opt, own in zip(optimizers, rows, strict=True):
                if own:
                    opt.apply(total, together)
    finally:
        for opt in optimizers:
            opt.finish()


def check_alike(optimizers: Sequence[Any]) -> None:
    """Raise ValueError unless optimizers that step as one learn one scale by the same rules."""
    if len(optimizers) < 2:
        return
    first = optimizers[0]
    for opt in optimizers:
        if opt._scale_kind != "global":
            raise ValueError(
                "optimizers that step together must have one scale: expected scale='global', "
                f"got {opt._scale_kind!r}"
            )
        if opt.max_grad_norm != first.max_grad_norm:
            raise ValueError(
                "optimizers that step together must have the same max_grad_norm, expected "
                f"{first.max_grad_norm}, got {opt.max_grad_norm}"
            )
        if opt._started != first._started:
            raise ValueError(
                "optimizers that step together must have started together: reset_scale() of all "
                "starts anew"
            )
    for opt in optimizers:
        for name in OPTIONS:
            mine, others = opt.param_groups[0][name], first.param_groups[0][name]
            if mine != others:
                raise ValueError(
                    f"optimizers that step together must have the same {name}, expected {others}, "
                    f"got {mine}"
                )
