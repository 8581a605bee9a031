"""Beside its ops a step of one bucket runs nothing: on a GPU each operation is a launch.

tests/gpu/test_steps.py counts the launches of the ops themselves.
"""

import pytest
import torch
from support.cases import EXACT, FUSED, OPTIONS, RUNNING
from support.kernels import INTERPRETED
from support.lockstep import drawn, give_gradients, optimizer
from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):
    """The operations that make or write tensors; views do neither."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = [a for a in func._schema.arguments if a.alias_info and not a.alias_info.is_write]
        name = func._schema.name
        if name.startswith("aten::") and not views:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def second_step(kernels, base, **options):
    """Return what a step runs whose gradients are where they were."""
    opt, params = optimizer(kernels, base, drawn(torch.float32, (3, 1025)), **options)
    for t in range(2):
        give_gradients(params, t)
        opt.step()
    with Recorded() as recorded:
        opt.step()
    return recorded.names


@pytest.mark.parametrize("variant", [EXACT, RUNNING])
@pytest.mark.parametrize("base", FUSED)
def test_a_step_of_one_bucket_is_its_ops(kernels, base, variant):
    """Three of the exact form, two of the running form."""
    if kernels.name == "triton" and INTERPRETED:
        pytest.skip("the interpreter runs kernels by operations of torch")
    assert second_step(kernels, base, variant=variant, **OPTIONS[base]) == []


def test_what_is_recorded_shows(kernels):
    """Clipping adds up the norm by torch, so it must be seen."""
    assert "aten::sum" in second_step(kernels, "adamw", max_grad_norm=1.0)
