"""State on the host beside weights on a GPU: the numbers of the CPU, and steps under a backward."""

import pytest
import torch
from support.cases import DTYPES, FUSED, OPTIONS, gradients, make_weights

from mechanic_fused import MechanicAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

STEPS = 8
SHAPES = ((64, 128), (1025,), (3, 5), ())


def quadratic(params, opt, on):
    """Take steps with gradients that are computed on the CPU."""
    for t in range(STEPS):
        for p, g in zip(params, gradients([p.cpu() for p in params], t), strict=True):
            p.grad = g.to(on)
        opt.step()
        if t == 3:
            with torch.no_grad():
                params[0].data.clamp_(-0.5, 0.5)
                params[1].mul_(0.5)


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_the_bits_are_those_of_the_cpu(base, dtype, bits):
    runs = []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in make_weights(SHAPES, dtype)]
        options = {**OPTIONS[base], "s_init": 0.1, "variant": "running", "optim_bits": bits}
        opt = FUSED[base](params, offload=device == "cuda", **options)
        quadratic(params, opt, device)
        runs.append((opt, params))
    (expected, there), (opt, here) = runs
    assert torch.equal(opt.scale, expected.scale)
    for p, q in zip(here, there, strict=True):
        assert torch.equal(p.cpu(), q)
        for name, value in expected.state[q].items():
            assert opt.state[p][name].device.type == "cpu"
            assert torch.equal(opt.state[p][name], value)


def test_released_gradients_have_the_numbers_of_the_ordinary_step():
    runs = []
    for release in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(6))).cuda()
        opt = MechanicAdamW(net.parameters(), lr=1.0, offload=True)
        if release:
            opt.release_gradients()
        for t in range(STEPS):
            x = torch.randn(64, 256, generator=torch.Generator().manual_seed(t)).cuda()
            loss = (net(x) - 1).square().mean()
            loss.backward()
            opt.step(loss=loss)
            opt.zero_grad()
        runs.append((opt, list(net.parameters())))
    (opt, here), (expected, there) = runs
    torch.testing.assert_close(opt.scale, expected.scale, rtol=1e-9, atol=0)
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_only_copies_are_pinned_and_the_gpu_holds_no_state():
    p = torch.nn.Parameter(torch.ones(1 << 20, device="cuda"))
    opt = MechanicAdamW([p], offload=True)
    p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 18
    [[copy]] = [bucket.copies for bucket in opt.plan_step().buckets]
    assert copy.x.is_pinned() and copy.gradient.is_pinned()
    opt.load_state_dict(opt.state_dict())
    assert torch.cuda.max_memory_allocated() - before < 1 << 18
