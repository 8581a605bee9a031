"""The faults of the existing packages, each as a check that ours passes and mechanic_pytorch fails.

That it fails matters as much: it shows that the check can. Faults that need several devices or
ranks have no check here.
"""

import io
import pickle

import mechanic_pytorch
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import (
    FEW,
    PLAIN,
    SUM_RTOL,
    SmallNet,
    assert_same,
    batch,
    build,
    double,
    gradients,
    loss_of,
    make_weights,
    run,
    set_gradients,
    train_net,
    values,
)
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

# Steps in which a run with the default s_init learns.
MANY = 300
LEARNED = 0.5
TINY_LR = 1e-4
# x − x_ref cancels where it is small, by a thousand at most: so much worse than 1e-12.
RATIO_RTOL = 1e-9
# Of the weights' bytes: what lists, tables and numbers may take.
SMALL_SHARE = 0.01
LARGE = 1 << 20


def theirs(base, params, **options):
    return mechanic_pytorch.mechanize(PLAIN[base])(params, **options)


def check_save_load_step(make):
    model = SmallNet()
    opt = make("adamw", model.parameters(), lr=1.0)
    train_net(model, opt, FEW)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    other = SmallNet(seed=1)
    fresh = make("adamw", other.parameters(), lr=1.0)
    weights, state = torch.load(file, weights_only=False)
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    train_net(other, fresh, FEW, first=FEW)
    train_net(model, opt, FEW, first=FEW)
    assert_same(values(other.parameters()), values(model.parameters()))


def check_distributed_checkpoint(make, folder):
    model = SmallNet()
    opt = make("adamw", model.parameters(), lr=1.0)
    train_net(model, opt, FEW)
    dcp.save(get_optimizer_state_dict(model, opt), checkpoint_id=folder, no_dist=True)


def check_added_group(make):
    old, new = make_weights(), make_weights(seed=1)
    opt = make("adamw", old, lr=1.0)
    run(opt, old, 1)
    opt.add_param_group({"params": new})
    run(opt, old + new, FEW)


def check_closure(make):
    model = SmallNet()
    opt = make("adamw", model.parameters(), lr=1.0)

    def closure():
        opt.zero_grad()
        z, y = batch(0)
        loss = (model(z) - y).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert torch.is_grad_enabled()


def check_autograd_after_a_closure(make):
    opt = make("adamw", make_weights(), lr=1.0)

    def closure():
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(closure)
    assert torch.is_grad_enabled()


def check_no_gradients(make):
    make("adamw", make_weights(), lr=1.0).step()


def check_nonfinite_gradient(make, bad):
    params = make_weights()
    opt = make("adamw", params, lr=1.0)
    run(opt, params, FEW)
    set_gradients(params, FEW)
    params[0].grad[0] = bad
    opt.step()
    run(opt, params, FEW, first=FEW + 1)
    assert all(p.isfinite().all() for p in params)


def check_grad_scaler(make):
    """With fused=True the scaler leaves unscaling to the optimizer: to all of it."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        params = make_weights(dtype=torch.float64)
        opt = make("adamw", params, lr=1.0, fused=True)
        for t in range(2 * FEW):
            overflows = t == FEW
            if scaler is None:
                run(opt, params, 0 if overflows else 1, first=t)
                continue
            scale = float(scaler.scale(torch.ones(())))
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = scale * g
            if overflows:
                params[1].grad[0, 0] = torch.inf
            scaler.step(opt)
            scaler.update()
        found.append(values(params))
    assert all(x.isfinite().all() for x in found[1])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=SUM_RTOL, atol=SUM_RTOL)


def check_pickle(make):
    params = make_weights()
    opt = make("adamw", params, lr=1.0)
    run(opt, params, FEW)
    others, other = pickle.loads(pickle.dumps((params, opt)))
    run(other, others, FEW, first=FEW)


def check_maximize(make):
    params = make_weights()
    before = loss_of(params)
    opt = make("adamw", params, lr=1.0, maximize=True)
    for t in range(MANY):
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = -g
        opt.step()
    assert loss_of(params) < LEARNED * before


def make_large_weights(dtype):
    """None near 0, where even a tiny step would be above the spacing of numbers."""
    params = make_weights(dtype=dtype)
    with torch.no_grad():
        for p in params:
            p.copy_(p + p.sign())
    return params


def check_bfloat16_weights_move(make):
    params = make_large_weights(torch.bfloat16)
    before = loss_of(params)
    run(make("adamw", params, lr=1.0), params, MANY)
    assert loss_of(params) < LEARNED * before


def check_tuner_is_wide_whatever_the_default_dtype(make):
    """As bfloat16, four of the six betas are 1."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            params = make_weights()
            run(make("adamw", params, lr=1.0), params, MANY // 3)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(values(params))
    assert_same(found[1], found[0])


def check_absent_gradients(make):
    """SGD's Δ is −lr·Σg, so x − x_ref must be the same multiple of Σg for every weight."""
    params = make_weights(dtype=torch.float64)
    start = [double(p) for p in params]
    total = [torch.zeros_like(x) for x in start]
    opt = make("sgd", params, lr=0.01)
    for t in range(MANY):
        for i, g in enumerate(gradients(params, t)):
            params[i].grad = None if (t + i) % 2 else g
            if params[i].grad is not None:
                total[i] += g
        opt.step()
    ratios = torch.cat(
        [((p - x) / g).detach().flatten() for p, x, g in zip(params, start, total, strict=True)]
    )
    middle = ratios.median()
    assert middle < 0
    torch.testing.assert_close(ratios, middle.expand_as(ratios), rtol=RATIO_RTOL, atol=0)


def check_tiny_base_lr(make):
    params = make_large_weights(torch.float32)
    before = loss_of(params)
    run(make("adamw", params, lr=TINY_LR), params, MANY)
    assert loss_of(params) < LEARNED * before


class CountHostReads(TorchDispatchMode):
    """On a GPU each of these would wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


def check_host_reads(make):
    """They must not grow with the number of weights."""
    counts = []
    for copies in (1, 10):
        params = [p for seed in range(copies) for p in make_weights(seed=seed)]
        opt = make("adamw", params, lr=1.0)
        run(opt, params, FEW)
        set_gradients(params, FEW)
        with CountHostReads() as reads:
            opt.step()
        counts.append(reads.count)
    assert counts[0] == counts[1]


def allocated_by(call):
    """Bytes that torch's allocator hands out during a call, freed or not."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]")


def check_allocations(make):
    for base, dtype in (("adamw", torch.float32), ("sgd", torch.bfloat16)):
        params = [torch.nn.Parameter(torch.ones(LARGE, dtype=dtype)) for _ in range(3)]
        opt = make(base, params, lr=1.0)
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + step)
            if step < 2:
                opt.step()
        taken = allocated_by(opt.step)
        assert taken < SMALL_SHARE * sum(p.nbytes for p in params)


# Fault → how ours are checked, and what mechanic_pytorch does in that check.
FAULTS = {
    "save, load, step": (check_save_load_step, KeyError),
    "add_param_group after a step": (check_added_group, KeyError),
    "closure": (check_closure, RuntimeError),
    "autograd stays off": (check_autograd_after_a_closure, AssertionError),
    "no gradients": (check_no_gradients, (TypeError, AttributeError)),
    "NaN gradient": (lambda make: check_nonfinite_gradient(make, torch.nan), AssertionError),
    "inf gradient": (lambda make: check_nonfinite_gradient(make, torch.inf), AssertionError),
    "fused=True and GradScaler": (check_grad_scaler, AssertionError),
    "pickle": (check_pickle, (AttributeError, pickle.PicklingError)),
    "maximize": (check_maximize, AssertionError),
    "bfloat16 weights": (check_bfloat16_weights_move, AssertionError),
    "bfloat16 by default": (check_tuner_is_wide_whatever_the_default_dtype, AssertionError),
    "gradients that come and go": (check_absent_gradients, AssertionError),
    "tiny base lr": (check_tiny_base_lr, AssertionError),
}
# Promised for the fused road alone.
FUSED_FAULTS = {
    "host reads for each weight": (check_host_reads, AssertionError),
    "copies of the weights' size": (check_allocations, AssertionError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ours_lacks_the_fault(road, fault):
    check, _ = FAULTS[fault]
    check(lambda base, params, **options: build(road, base, params, **options))


@pytest.mark.parametrize("fault", FUSED_FAULTS)
def test_the_fused_road_lacks_the_fault(cpp, fault):
    check, _ = FUSED_FAULTS[fault]
    check(lambda base, params, **options: build(cpp, base, params, **options))


@pytest.mark.parametrize("fault", [*FAULTS, *FUSED_FAULTS])
def test_the_check_finds_the_fault(fault):
    check, error = {**FAULTS, **FUSED_FAULTS}[fault]
    with pytest.raises(error):
        check(theirs)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_ours_can_be_saved_by_distributed_checkpoint(road, tmp_path):
    check_distributed_checkpoint(lambda *args, **options: build(road, *args, **options), tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_theirs_cannot(tmp_path):
    with pytest.raises(KeyError):
        check_distributed_checkpoint(theirs, tmp_path)
