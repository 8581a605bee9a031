"""Every private name of torch that this package touches, with the reason for each.

Torch may change these without notice: ``tests/core/test_torch_internals.py`` has a test for each.
No other file names one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch.optim import Optimizer


def dtensor() -> Any:
    """Return the class DTensor, or an empty tuple while no module has imported it.

    ``sys.modules`` because importing torch.distributed.tensor takes longer than importing this
    whole package.
    """
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def local(t: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or any other tensor itself.

    ``DTensor._local_tensor`` (torch 2.0) because ``to_local()`` is differentiable, returns a view
    each time and takes 30 times as long.
    """
    if not isinstance(t, dtensor()):
        return t
    shard: Any = t._local_tensor
    # A collective that is still running hides its result in a wrapper without storage.
    return shard.wait() if hasattr(shard, "wait") else shard


def local_tensors(weights: list[Any]) -> list[Tensor]:
    """Return the shards of DTensors without waiting for a collective: to compare addresses."""
    return [weight._local_tensor for weight in weights]


def is_fake(t: Tensor) -> bool:
    """Return whether a tensor, or the shard of a DTensor, is one of FakeTensorMode's: without data.

    ``torch._subclasses.fake_tensor`` (torch 2.0) has no public counterpart. ``sys.modules``, since
    importing it takes longer than importing this whole package.
    """
    fake_tensor = sys.modules.get("torch._subclasses.fake_tensor")
    return isinstance(local(t), getattr(fake_tensor, "FakeTensor", ()))


def in_fake_mode() -> bool:
    """Return whether FakeTensorMode is active, so that new tensors have no data.

    ``torch._C._get_dispatch_mode`` (torch 2.2) is what torch asks; it takes 0.1 µs.
    """
    return _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None


def global_offset(weight: Any) -> tuple[int, ...]:
    """Return where this rank's shard of a DTensor begins in each dimension of the whole tensor.

    ``compute_local_shape_and_global_offset`` (torch 2.4) is what torch.distributed.checkpoint goes
    by; it knows how uneven shards and a dimension that is sharded twice are cut.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return offset


def plain_local_gradients(weights: list[Any]) -> list[Tensor] | None:
    """Return the shards of all gradients if each is sharded as its weight is, else None.

    ``DTensor._spec`` (torch 2.0) because comparing specs takes a tenth of the time of the public
    ``placements`` and ``device_mesh`` of a thousand small weights.
    """
    grads = [weight.grad for weight in weights]
    try:
        pairs = [(g._spec, weight._spec) for g, weight in zip(grads, weights, strict=True)]
        # FSDP gives gradients the spec object of their weights.
        if all([a is b or (a.mesh is b.mesh and a.placements == b.placements) for a, b in pairs]):
            shards = [g._local_tensor for g in grads]
            if all([type(shard) is Tensor for shard in shards]):
                return shards
    except AttributeError:  # None and plain tensors have no spec
        pass
    return None


read_version: Callable[[Tensor], int] = attrgetter("_version")
"""Read a tensor's version counter, which every in-place write advances.

``Tensor._version`` (torch 0.4) has no public counterpart.
"""


def is_fsdp1_flat(weight: Tensor) -> bool:
    """Return whether FullyShardedDataParallel (FSDP1) has flattened this weight.

    ``_fsdp_flattened`` (torch 1.12) is the only mark of a flat parameter.
    """
    return bool(getattr(weight, "_fsdp_flattened", False))


def padding_of(weight: Tensor) -> int:
    """Return the number of elements at the end of FSDP1's flat weight that are no weights.

    ``_shard_numel_padded`` (torch 2.0) is the only place that knows it, 0 for all other weights.
    """
    return int(getattr(weight, "_shard_numel_padded", 0))


def unhooked_step(base: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """Return the base's ``step`` without the wrapper that runs step hooks.

    Torch replaces ``step`` by a wrapper marked ``hooked`` (torch 2.0) whose ``__wrapped__`` is the
    original; our own ``step`` has run the hooks already.
    """
    step: Any = base.step
    return step.__wrapped__ if hasattr(step, "hooked") else step


def mute_capturable_warning(optimizer: Any) -> None:
    """Keep a copied optimizer from asking its groups whether they are capturable.

    ``_warned_capturable_if_run_uncaptured`` (torch 1.12) is set in the constructor and lost in
    copies; without it the base reads an option that not every base has.
    """
    optimizer._warned_capturable_if_run_uncaptured = True


def get_step_called(optimizer: Any) -> bool:
    """Return whether ``step`` has been called.

    ``_opt_called`` (torch 1.1): by it schedulers warn when they are stepped before the optimizer.
    """
    return bool(vars(optimizer).get("_opt_called", False))


def set_step_called(optimizer: Any, called: bool) -> None:
    """Set what :func:`get_step_called` returns: a probe takes its trial step back."""
    optimizer._opt_called = called


def inner_schedulers(scheduler: Any) -> tuple[Any, ...]:
    """Return the schedulers that a SequentialLR or ChainedScheduler is made of.

    ``_schedulers`` (torch 1.11) has no public counterpart.
    """
    return tuple(getattr(scheduler, "_schedulers", ()))


def own_buffers(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield (mapping, name, buffer) of a module's own buffers.

    ``Module._buffers`` (torch 0.1) because ``named_buffers`` skips a buffer that is registered
    twice, and a replaced buffer is to be put back under its name.
    """
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield module._buffers, name, buffer


class SupportsGradScaler:
    """Mixin: tell torch's GradScaler to leave unscaling and skipping to the optimizer.

    ``_step_supports_amp_scaling`` (torch 1.12) is what GradScaler reads. Torch's fused optimizers
    set it in their constructors, so it needs a setter. It is not supported where plain weights are
    sharded: GradScaler then takes found_inf from one rank alone.
    """

    reduce_group: Any
    _reads_grad_scaler = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self._reads_grad_scaler and self.reduce_group is None

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, supports: bool) -> None:
        self._reads_grad_scaler = supports
