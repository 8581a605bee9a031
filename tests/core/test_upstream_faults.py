"""Each known fault of mechanic_pytorch has a check, which it fails and ours passes.

That it fails matters as much: it shows that the check can. Faults that need several devices or
ranks have no check here.
"""

import functools
import io
import itertools
import pickle
import tempfile

import mechanic_pytorch
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import cases
from support.cases import FEW, IMPLEMENTATIONS, PLAIN, SmallNet, assert_same, make_weights, values
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

MANY = 300  # steps in which a run with the default s_init learns
TINY_LR = 1e-4
RATIO_RTOL = 1e-9  # x − x_ref cancels where it is small, by a thousand: so much worse than 1e-12
SMALL_SHARE = 0.01  # of the weights' bytes: what lists, tables and numbers may take
LARGE = 1 << 20
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def train(make, params=None, base="adamw", steps=FEW, **options):
    params = make_weights() if params is None else params
    opt = make(base, params, **{"lr": 1.0, **options})
    cases.run(opt, params, steps)
    return opt, params


def check_learning(make, params, steps=MANY, **options):
    before = cases.loss_of(params)
    train(make, params, steps=steps, **options)
    assert cases.loss_of(params) < cases.LEARNED * before


def check_save_load_step(make):
    model, other = SmallNet(), SmallNet(seed=1)
    opt, fresh = (make("adamw", net.parameters(), lr=1.0) for net in (model, other))
    cases.train_net(model, opt, FEW)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=False)
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    cases.train_net(other, fresh, FEW, first=FEW)
    cases.train_net(model, opt, FEW, first=FEW)
    assert_same(values(other.parameters()), values(model.parameters()))


def check_distributed_checkpoint(make):
    model = SmallNet()
    opt = make("adamw", model.parameters(), lr=1.0)
    cases.train_net(model, opt, FEW)
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(get_optimizer_state_dict(model, opt), checkpoint_id=folder, no_dist=True)


def check_added_group(make):
    opt, old = train(make, steps=1)
    new = make_weights(seed=1)
    opt.add_param_group({"params": new})
    cases.run(opt, old + new, FEW)


def check_closure(make):
    model = SmallNet()
    opt = make("adamw", model.parameters(), lr=1.0)

    def closure():
        opt.zero_grad()
        loss = cases.net_loss(model, 0)
        loss.backward()
        return loss

    opt.step(closure)
    assert torch.is_grad_enabled()


def check_autograd_after_a_closure(make):
    def closure():
        raise KeyError("the loss")

    opt, _ = train(make, steps=0)
    with pytest.raises(KeyError, match="the loss"):
        opt.step(closure)
    assert torch.is_grad_enabled()


def check_no_gradients(make):
    train(make, steps=0)[0].step()


def check_nonfinite_gradient(bad, make):
    opt, params = train(make)
    cases.set_gradients(params, FEW)
    params[0].grad[0] = bad
    opt.step()
    cases.run(opt, params, FEW, first=FEW + 1)
    assert all(p.isfinite().all() for p in params)


def check_grad_scaler(make):
    """With fused=True the scaler leaves unscaling to the optimizer: to all of it."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        opt, params = train(make, make_weights(dtype=torch.float64), steps=0, fused=True)
        for t in range(2 * FEW):
            overflows = t == FEW
            if scaler is None:
                cases.run(opt, params, 0 if overflows else 1, first=t)
                continue
            scale = float(scaler.scale(torch.ones(())))
            cases.give(params, [scale * g for g in cases.gradients(params, t)])
            if overflows:
                params[1].grad[0, 0] = torch.inf
            scaler.step(opt)
            scaler.update()
        found.append(values(params))
    assert all(x.isfinite().all() for x in found[1])
    torch.testing.assert_close(*found, rtol=cases.SUM_RTOL, atol=cases.SUM_RTOL)


def check_pickle(make):
    opt, params = train(make)
    others, other = pickle.loads(pickle.dumps((params, opt)))
    cases.run(other, others, FEW, first=FEW)


def check_maximize(make):
    opt, params = train(make, steps=0, maximize=True)
    before = cases.loss_of(params)
    for t in range(MANY):
        cases.give(params, [-g for g in cases.gradients(params, t)])
        opt.step()
    assert cases.loss_of(params) < cases.LEARNED * before


def large_weights(dtype):
    """Return weights of which none is near 0, where a tiny step is above the spacing of numbers."""
    params = make_weights(dtype=dtype)
    cases.write(params, [p + p.sign() for p in values(params)])
    return params


def check_bfloat16_weights_move(make):
    check_learning(make, large_weights(torch.bfloat16))


def check_tiny_base_lr(make):
    check_learning(make, large_weights(torch.float32), lr=TINY_LR)


def check_the_default_dtype_does_not_matter(make):
    """As bfloat16, four of the six betas are 1."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found.append(values(train(make, steps=MANY // 3)[1]))
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(*found)


def check_absent_gradients(make):
    """SGD's Δ is −lr·Σg, so x − x_ref must be the same multiple of Σg for every weight."""
    opt, params = train(make, make_weights(dtype=torch.float64), "sgd", steps=0, lr=0.01)
    start, total = values(params), [torch.zeros_like(p) for p in params]
    for t in range(MANY):
        for i, g in enumerate(cases.gradients(params, t)):
            params[i].grad = None if (t + i) % 2 else g
            if params[i].grad is not None:
                total[i] += g
        opt.step()
    moved = [(p - x) / g for p, x, g in zip(values(params), start, total, strict=True)]
    ratios = torch.cat([ratio.detach().flatten() for ratio in moved])
    middle = ratios.median()
    assert middle < 0
    torch.testing.assert_close(ratios, middle.expand_as(ratios), rtol=RATIO_RTOL, atol=0)


class CountHostReads(TorchDispatchMode):
    """Counts the operations that would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::equal")
        return func(*args, **(kwargs or {}))


def check_host_reads(make):
    """They must not grow with the number of weights."""
    counts = []
    for copies in (1, 10):
        opt, params = train(make, [p for seed in range(copies) for p in make_weights(seed=seed)])
        cases.set_gradients(params, FEW)
        with CountHostReads() as reads:
            opt.step()
        counts.append(reads.count)
    assert counts[0] == counts[1]


def allocated_by(call):
    """Return the bytes that torch's allocator hands out during a call, freed or not."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]")


def check_allocations(make):
    for base, dtype in (("adamw", torch.float32), ("sgd", torch.bfloat16)):
        params = [torch.nn.Parameter(torch.ones(LARGE, dtype=dtype)) for _ in range(3)]
        opt = make(base, params, lr=1.0)
        for step in range(3):
            cases.give(params, [torch.full_like(p, 1.0 + step) for p in params])
            if step < 2:
                opt.step()
        assert allocated_by(opt.step) < SMALL_SHARE * sum(p.nbytes for p in params)


# Fault → how ours are checked, and what mechanic_pytorch does in that check.
FAULTS = {
    "save, load, step": (check_save_load_step, KeyError),
    "distributed checkpoint": (check_distributed_checkpoint, KeyError),
    "add_param_group after a step": (check_added_group, KeyError),
    "closure": (check_closure, RuntimeError),
    "autograd stays off": (check_autograd_after_a_closure, AssertionError),
    "no gradients": (check_no_gradients, (TypeError, AttributeError)),
    "NaN gradient": (functools.partial(check_nonfinite_gradient, torch.nan), AssertionError),
    "inf gradient": (functools.partial(check_nonfinite_gradient, torch.inf), AssertionError),
    "fused=True and GradScaler": (check_grad_scaler, AssertionError),
    "pickle": (check_pickle, (AttributeError, pickle.PicklingError)),
    "maximize": (check_maximize, AssertionError),
    "bfloat16 weights": (check_bfloat16_weights_move, AssertionError),
    "bfloat16 by default": (check_the_default_dtype_does_not_matter, AssertionError),
    "gradients that come and go": (check_absent_gradients, AssertionError),
    "tiny base lr": (check_tiny_base_lr, AssertionError),
}
# Promised for the fused path alone.
FUSED_FAULTS = {
    "host reads for each weight": (check_host_reads, AssertionError),
    "copies of the weights' size": (check_allocations, AssertionError),
}
ALL = {**FAULTS, **FUSED_FAULTS}


@pytest.mark.parametrize(
    ("implementation", "fault"),
    [*itertools.product(IMPLEMENTATIONS, FAULTS), *itertools.product(["cpp"], FUSED_FAULTS)],
)
def test_ours_lacks_the_fault(implementation, fault):
    if implementation == "cpp":
        cases.skip_unless_available("cpp")
    ALL[fault][0](functools.partial(cases.build, implementation))


@pytest.mark.parametrize("fault", ALL)
def test_the_check_finds_the_fault(fault):
    def theirs(base, params, **options):
        return mechanic_pytorch.mechanize(PLAIN[base])(params, **options)

    check, error = ALL[fault]
    with pytest.raises(error):
        check(theirs)
