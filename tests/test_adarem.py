"""AdaRem against its formula in NumPy, its state, and which weights it moves."""

import copy

import numpy
import pytest
import torch
from cases import (
    FEW,
    STEPS,
    assert_same,
    assert_within,
    differs,
    gradients,
    loss_of,
    make_weights,
    run,
    set_gradients,
    snapshot,
    ulp,
    values,
)

from mechanic_fused.tuners import AdaRem

OPTIONS = {"lr": 0.05, "beta": 0.9, "lam": 0.98, "weight_decay": 0.02, "eps": 1e-8}
# A step is a dozen roundings, of numbers no larger than the largest among x, g and m; the quadratic
# shrinks what earlier steps have left of theirs.
ROUNDINGS = 16
NUMPY = {torch.float64: numpy.float64, torch.float32: numpy.float32}


def oracle(dtype, steps=STEPS, lr=0.05, beta=0.9, lam=0.98, weight_decay=0.02, eps=1e-8):
    """The weights after steps in plain arithmetic of one dtype, and the largest number met."""
    kind = NUMPY[dtype]
    xs = [p.detach().numpy().astype(kind) for p in make_weights(dtype=dtype)]
    ms = [numpy.zeros_like(x) for x in xs]
    largest = 0.0
    for t in range(steps):
        gs = [g.numpy() for g in gradients([torch.from_numpy(x) for x in xs], t)]
        for i, (x, m, g) in enumerate(zip(xs, ms, gs, strict=True)):
            largest = max([largest, *(abs(v).max() for v in (x, m, g))])
            b = numpy.sign(g) * m / (abs(m).max() + kind(eps))
            boost = kind(lam ** (t + 1))
            xs[i] = x - kind(lr) * ((1 + boost * b) * g + kind(weight_decay) * x)
            ms[i] = kind(beta) * m + kind(1 - beta) * g
    return [torch.from_numpy(x) for x in xs], torch.tensor(largest, dtype=dtype)


def trained(backend="auto", dtype=torch.float64, steps=STEPS, **options):
    params = make_weights(dtype=dtype)
    opt = AdaRem(params, **{**OPTIONS, **options}, backend=backend)
    run(opt, params, steps)
    return params, opt


def worst(found, expected):
    return max(
        float((a.detach().double() - b.double()).abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def test_follows_the_formula(backend):
    expected, largest = oracle(torch.float64)
    params, _ = trained(backend)
    for p, x in zip(params, expected, strict=True):
        assert_within(p, x, STEPS * ROUNDINGS * ulp(largest))


def test_the_momentum_matters_to_the_formula():
    expected, largest = oracle(torch.float64)
    other, _ = oracle(torch.float64, lam=0.97)
    assert worst(other, expected) > STEPS * ROUNDINGS * ulp(largest)


def test_float32_is_as_near_as_plain_arithmetic(backend):
    expected, _ = oracle(torch.float64)
    plain, largest = oracle(torch.float32)
    params, _ = trained(backend, torch.float32)
    assert worst(params, expected) <= 2 * worst(plain, expected) + ulp(largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_backends_agree_to_the_bit(cpp, dtype):
    assert_same(snapshot(trained(cpp, dtype)[1]), snapshot(trained("reference", dtype)[1]))


def test_bfloat16_weights_keep_a_wide_momentum(backend):
    start = loss_of(make_weights(dtype=torch.bfloat16))
    params, opt = trained(backend, torch.bfloat16)
    assert loss_of(params) < start
    for p in params:
        assert p.dtype is torch.bfloat16
        assert opt.state[p]["exp_avg"].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_bit(backend, dtype):
    whole, opt = trained(backend, dtype)
    half, first = trained(backend, dtype, steps=FEW)
    saved = copy.deepcopy(first.state_dict())
    resumed = [torch.nn.Parameter(x) for x in values(half)]
    second = AdaRem(resumed, backend=backend)
    second.load_state_dict(saved)
    run(second, resumed, STEPS - FEW, first=FEW)
    assert_same(snapshot(second), snapshot(opt))
    assert_same(saved, first.state_dict())


def test_a_load_into_a_used_optimizer_forgets_its_maxima_and_count(backend):
    _, opt = trained(backend)
    params, first = trained(backend, steps=FEW)
    saved = {"weights": values(params), "optimizer": copy.deepcopy(first.state_dict())}
    run(first, params, STEPS)
    first.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for p, x in zip(params, saved["weights"], strict=True):
            p.copy_(x)
    run(first, params, STEPS - FEW, first=FEW)
    assert_same(snapshot(first), snapshot(opt))


def test_the_maxima_are_those_of_a_momentum_that_was_replaced(backend):
    params, opt = trained(backend, steps=FEW)
    other = copy.deepcopy(opt)
    for one in (opt, other):
        for p in one.param_groups[0]["params"]:
            one.state[p]["exp_avg"] = one.state[p]["exp_avg"] / 8
    run(opt, params, 1, first=FEW)
    # The copy has no maxima from before.
    run(other, other.param_groups[0]["params"], 1, first=FEW)
    assert_same(snapshot(opt), snapshot(other))


def test_a_copy_goes_on_alike(backend):
    params, opt = trained(backend, steps=FEW)
    other = copy.deepcopy(opt)
    run(opt, params, FEW, first=FEW)
    run(other, other.param_groups[0]["params"], FEW, first=FEW)
    assert_same(snapshot(other), snapshot(opt))


def test_a_weight_without_gradient_stays_and_the_count_goes_on(backend):
    params, opt = trained(backend, steps=FEW)
    before = copy.deepcopy(opt.state[params[1]]), params[1].detach().clone()
    set_gradients(params, FEW)
    params[1].grad = None
    opt.step()
    assert_same((opt.state[params[1]], params[1].detach()), before)
    assert float(opt.state[params[0]]["step"]) == FEW + 1
    set_gradients(params, FEW + 1)
    opt.step()
    assert float(opt.state[params[1]]["step"]) == FEW + 2
    # Alone from the same numbers, that weight must have moved by the step of number FEW + 2.
    m = before[0]["exp_avg"].numpy()
    x = before[1].numpy()
    g = gradients([torch.from_numpy(v) for v in (values(params)[0].numpy(), x)], FEW + 1)[1].numpy()
    b = numpy.sign(g) * m / (abs(m).max() + 1e-8)
    expected = x - 0.05 * ((1 + 0.98 ** (FEW + 2) * b) * g + 0.02 * x)
    assert_within(params[1], torch.from_numpy(expected), ROUNDINGS * ulp(torch.from_numpy(g)))


def test_without_any_gradient_nothing_moves(backend):
    params, opt = trained(backend, steps=1)
    opt.zero_grad()
    before = snapshot(opt)
    assert opt.step(lambda: 3.0) == 3.0
    assert_same(snapshot(opt), before)


def test_groups_have_options_of_their_own(backend):
    params = make_weights(dtype=torch.float64)
    other = {"lr": 0.02, "beta": 0.5, "lam": 0.9, "weight_decay": 0.0}
    opt = AdaRem(
        [{"params": params[:1]}, {"params": params[1:], **other}], **OPTIONS, backend=backend
    )
    for t in range(FEW):
        set_gradients(params, t)
        opt.step()
    first, largest = oracle(torch.float64, FEW)
    rest, _ = oracle(torch.float64, FEW, **other)
    for p, x in zip(params, [*first[:1], *rest[1:]], strict=True):
        assert_within(p, x, FEW * ROUNDINGS * ulp(largest))


def test_weights_may_move_to_other_memory(backend):
    params, opt = trained(backend, steps=FEW)
    with torch.no_grad():
        for p in params:
            p.data = p.detach().clone()
    run(opt, params, STEPS - FEW, first=FEW)
    assert_same(snapshot(opt), snapshot(trained(backend)[1]))


def test_elements_that_are_not_finite_count_as_zero(backend):
    results = []
    for bad in (float("nan"), float("inf"), 0.0):
        params = make_weights()
        opt = AdaRem(params, **OPTIONS, backend=backend)
        set_gradients(params, 0)
        params[0].grad[1] = bad
        opt.step()
        results.append(snapshot(opt))
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])


def test_an_lr_of_zero_moves_nothing(backend):
    params, _ = trained(backend, torch.float32, lr=0.0)
    assert_same(values(params), values(make_weights()))


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("beta", 1.0),
        ("lam", 1.1),
        ("weight_decay", -0.1),
        ("eps", 0.0),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*got {value}"):
        AdaRem(make_weights(), **{name: value})
    opt = AdaRem(make_weights())
    with pytest.raises(ValueError, match=f"^{name} must"):
        opt.add_param_group({"params": make_weights(), name: value})
    assert len(opt.param_groups) == 1


def test_an_unfit_backend_is_named_at_once():
    with pytest.raises(ValueError, match="nonesuch"):
        AdaRem(make_weights(), backend="nonesuch")


def test_sparse_gradients_are_refused_before_anything_changes(backend):
    params, opt = trained(backend, steps=1)
    before = snapshot(opt)
    set_gradients(params, 1)
    params[-1].grad = params[-1].grad.to_sparse()
    with pytest.raises(ValueError, match="dense"):
        opt.step()
    assert not differs(snapshot(opt), before)


def sharded(name="auto"):
    """Weights that lie over the ranks, or whole ones; what they are after steps, whole."""
    params = make_weights(((4,), (6, 3)))
    if torch.distributed.is_initialized():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        lie = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
        opt = AdaRem(lie, **OPTIONS, backend=name)
        for t in range(FEW):
            whole = [p.detach().full_tensor() for p in lie]
            for p, g in zip(lie, gradients(whole, t), strict=True):
                p.grad = distribute_tensor(g, mesh, [Shard(0)])
            opt.step()
        return [p.detach().full_tensor() for p in lie]
    opt = AdaRem(params, **OPTIONS, backend=name)
    run(opt, params, FEW)
    return values(params)


def test_sharded_weights_step_as_whole_ones(ranks, backend):
    for found in ranks(2).run("test_adarem.sharded", backend):
        assert_same(found, sharded(backend))
