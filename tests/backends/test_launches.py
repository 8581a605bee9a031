"""Beside the three verbs a step of one bucket runs nothing: on a GPU each operation is a launch."""

import pytest
from cases import FUSED, OPTIONS, QUICK, make_weights, set_gradients
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


@pytest.mark.parametrize("base", FUSED)
def test_a_step_of_one_bucket_is_three_verbs(cpp, base):
    params = make_weights()
    opt = FUSED[base](params, backend=cpp, **QUICK, **OPTIONS[base])
    for t in range(2):
        set_gradients(params, t)
        opt.step()
    with Recorded() as recorded:
        opt.step()
    assert recorded.names == []


def test_what_is_recorded_shows(cpp):
    """Clipping adds up the norm by torch, so it must be seen."""
    params = make_weights()
    opt = FUSED["adamw"](params, backend=cpp, max_grad_norm=1.0, **QUICK)
    set_gradients(params, 0)
    opt.step()
    with Recorded() as recorded:
        opt.step()
    assert "aten::sum" in recorded.names
