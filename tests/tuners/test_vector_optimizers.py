"""What every optimizer made of vector ops promises; see support/vector_optimizers.py."""

import copy
import pickle

import pytest
import torch
from support.cases import (
    DTYPES,
    FEW,
    LEARNED,
    STEPS,
    WIDE,
    WIDTHS,
    assert_same,
    assert_within,
    differs,
    loss_of,
    make_weights,
    ulp,
    values,
)
from support.vector_optimizers import (
    METHODS,
    NEED_CLOSURE,
    SEARCHING,
    Run,
    sharded,
    tolerances,
    worst,
)

of_methods = pytest.mark.parametrize("name", METHODS)
of_variants = pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name, method in METHODS.items() for variant in method.variants],
)
OTHER_GROUP = {
    "AdaRem": {"lr": 0.02, "weight_decay": 0.0, "beta": 0.5, "lam": 0.9},
    "ExtrapolatedSGD": {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.0},
    "CGQ": {"weight_decay": 0.0},
}
"""Options that may differ between groups."""


def variant_of(name, variant):
    return METHODS[name].variants[variant]


def no_searches(name):
    return {"probability": 0.0} if name == "CGQ" else {}


# The formula


@of_variants
def test_it_follows_its_oracle(backend, name, variant):
    run = Run(name, backend, **variant_of(name, variant)).steps()
    expected, atol = tolerances(run)
    for p, x in zip(run.params, expected.xs, strict=True):
        assert_within(p, x, atol["xs"])
    for number, value in expected.learned.items():
        assert run.group[number] == pytest.approx(value, rel=0, abs=atol[number])


@of_methods
def test_another_formula_would_be_seen(name):
    run = Run(name).steps()
    expected, atol = tolerances(run)
    method = METHODS[name]
    assert worst(method.oracle(torch.float64, run, **method.mutant).xs, expected.xs) > atol["xs"]


@of_variants
def test_float32_is_as_near_as_plain_arithmetic(backend, name, variant):
    run = Run(name, backend, torch.float32, **variant_of(name, variant)).steps()
    expected, plain = (run.method.oracle(dtype, run) for dtype in (torch.float64, torch.float32))
    bound = 2 * worst(plain.xs, expected.xs) + ulp(plain.largest)
    assert worst(run.params, expected.xs) <= bound


@of_methods
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree_to_the_bit(cpp, name, dtype):
    # A search adds products in an order of the backend's.
    runs = [Run(name, b, dtype, **no_searches(name)).steps() for b in (cpp, "reference")]
    assert_same(*(run.snapshot() for run in runs))


@of_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_learn_with_state_of_the_dtype_of_the_arithmetic(backend, name, dtype):
    run = Run(name, backend, dtype)
    before = loss_of(run.params)
    run.steps()
    assert loss_of(run.params) < LEARNED * before
    for p in run.params:
        assert p.dtype is dtype
        state = {k: v.dtype for k, v in run.opt.state[p].items() if k != "step"}
        assert state == {
            entry: dtype if narrow else WIDE[dtype] for entry, narrow in run.method.state.items()
        }


@pytest.mark.parametrize("name", OTHER_GROUP)
def test_groups_have_options_of_their_own(backend, name):
    other, params = OTHER_GROUP[name], make_weights(dtype=torch.float64)
    groups = [{"params": params[:1]}, {"params": params[1:], **other}]
    run = Run(name, backend, params=groups, **no_searches(name))
    run.follow(run.opt, 0).steps(FEW)
    first, rest = (run.method.oracle(torch.float64, run, **o) for o in ({}, other))
    for p, x in zip(params, [*first.xs[:1], *rest.xs[1:]], strict=True):
        assert_within(p, x, FEW * run.method.roundings * ulp(first.largest))


@pytest.mark.parametrize("name", ["AdaRem", "ExtrapolatedSGD"])
def test_an_lr_of_0_moves_nothing(backend, name):
    run = Run(name, backend, torch.float32, lr=0.0).steps(FEW)
    assert_same(values(run.params), values(make_weights()), run.closure.seen[-1])


# Going on


@of_methods
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_it_resumes_to_the_bit(backend, name, dtype):
    straight = Run(name, backend, dtype).steps()
    half = Run(name, backend, dtype).steps(FEW)
    saved = copy.deepcopy(half.opt.state_dict())
    resumed = half.resumed()
    resumed.steps(STEPS - FEW)
    assert_same(resumed.snapshot(), straight.snapshot())
    assert_same(half.opt.state_dict(), saved)
    assert resumed.closure.calls == [call for call in straight.closure.calls if call[0] >= FEW]


@of_methods
def test_a_load_into_a_used_optimizer_leaves_nothing_of_the_old_run(backend, name):
    straight, run = Run(name, backend).steps(), Run(name, backend).steps(FEW)
    saved, xs = copy.deepcopy(run.opt.state_dict()), values(run.params)
    run.steps(STEPS).opt.load_state_dict(saved)
    with torch.no_grad():
        for p, x in zip(run.params, xs, strict=True):
            p.copy_(x)
    run.follow(run.opt, FEW).steps(STEPS - FEW)
    assert_same(run.snapshot(), straight.snapshot())


@of_methods
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_and_pickles_go_on_alike(backend, name, copied):
    run, twin = (Run(name, backend).steps(FEW) for _ in range(2))
    run.steps(FEW)
    twin.follow(copied(twin.opt), FEW).steps(FEW)
    assert_same(run.snapshot(), twin.snapshot())


@of_methods
def test_weights_may_move_to_other_memory(backend, name):
    run = Run(name, backend).steps(FEW)
    for p in run.params:
        p.data = p.detach().clone()
    run.steps(STEPS - FEW)
    assert_same(run.snapshot(), Run(name, backend).steps().snapshot())


@of_methods
def test_a_weight_without_gradient_stays(backend, name):
    run = Run(name, backend).steps(FEW)
    absent, other = run.params[1], values(run.params)[0]
    before = copy.deepcopy(run.opt.state[absent]), absent.detach().clone()

    def partly():
        loss = run.closure()
        absent.grad = None
        return loss

    for options in ({"probability": 0.0}, {"probability": 1.0}) if name == "CGQ" else ({},):
        run.group.update(options)
        run.opt.step(partly)
    assert_same((run.opt.state[absent], absent.detach()), before)
    assert not torch.equal(run.params[0], other)


@of_methods
def test_autograd_sees_the_writes(backend, name):
    run = Run(name, backend)
    graph = (run.params[0] ** 2).sum()
    run.steps(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


# What is refused, and that it changes nothing


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, *refused) for name, method in METHODS.items() for refused in method.refused],
)
def test_options_out_of_range_are_refused(name, option, value):
    with pytest.raises(ValueError, match=f"^{option} must .*got {value}"):
        Run(name, **{option: value})
    opt = Run(name).opt
    if name != "AutoGD":  # It has one group.
        words = "must be the same|must .*got"
        with pytest.raises(ValueError, match=f"^{option} ({words}) "):
            opt.add_param_group({"params": make_weights(), option: value})
    assert len(opt.param_groups) == 1


@of_methods
def test_an_unsuitable_backend_is_named_at_once(name):
    with pytest.raises(ValueError, match="nonesuch"):
        Run(name, "nonesuch")


@pytest.mark.parametrize("name", NEED_CLOSURE)
def test_a_missing_closure_and_missing_gradients_are_refused(backend, name):
    run = Run(name, backend).steps(FEW)
    run.opt.zero_grad()
    before = run.snapshot()
    with pytest.raises(ValueError, match=f"{name} needs a closure .* got None"):
        run.opt.step()
    with pytest.raises(ValueError, match="must do the backward pass, got no gradients"):
        run.opt.step(lambda: torch.tensor(1.0))
    assert_same(run.snapshot(), before)


@of_methods
def test_sparse_gradients_are_refused(backend, name):
    run = Run(name, backend).steps(FEW)
    before = run.snapshot()

    def sparse():
        loss = run.closure()
        run.params[-1].grad = run.params[-1].grad.to_sparse()
        return loss

    with pytest.raises(ValueError, match="dense"):
        run.opt.step(sparse)
    assert_same(run.snapshot(), before)


@pytest.mark.parametrize(
    ("name", "call"), [*((name, 1) for name in METHODS), *((name, 2) for name in SEARCHING)]
)
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_an_error_in_the_closure_changes_nothing(backend, name, call, dtype):
    """Not weights, state, gradients nor generators: in the first call, and at a trial point."""
    run = Run(name, backend, dtype, **(METHODS[name].searches or {})).steps(FEW)
    before, calls, generators = run.snapshot(), [], [torch.get_rng_state()]

    def fails():
        loss = run.closure()
        calls.append([p.grad for p in run.params])
        if len(calls) == call:
            raise RuntimeError("the loss could not be had")
        torch.rand(3)
        generators.append(torch.get_rng_state())
        return loss

    with pytest.raises(RuntimeError, match="could not be had"):
        run.opt.step(fails)
    assert_same(run.snapshot(), before)
    if name == "ExtrapolatedSGD":
        assert differs(run.closure.seen[-1], before["weights"])  # It was ahead.
    assert torch.equal(torch.get_rng_state(), generators[-1])
    assert all(p.grad is g is not None for p, g in zip(run.params, calls[0], strict=True))


# Trial points


@pytest.mark.parametrize("name", SEARCHING)
def test_trials_draw_the_same_numbers_and_move_neither_generators_nor_buffers(name):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        )
        return model, torch.ones(6, 4).cumsum(0)

    draws, counts = [], []

    def closure_of(model, z):
        def closure():
            model.zero_grad()
            draws.append(torch.rand(3))
            counts.append(int(model[1].num_batches_tracked))
            loss = model(z).square().mean()
            if loss.requires_grad:
                loss.backward()
            return loss

        return closure

    model, z = make()
    method = METHODS[name]
    options = {**method.options, **method.searches}
    opt = method.make(model.parameters(), **options, model=model)
    torch.manual_seed(1)
    opt.step(closure_of(model, z))
    after = torch.get_rng_state()
    assert len(draws) > 2 and all(torch.equal(draw, draws[0]) for draw in draws)
    # All trials see the buffers as the call with gradients left them.
    assert counts == [0, *[1] * (len(counts) - 1)]
    alone, z = make()
    torch.manual_seed(1)
    closure_of(alone, z)()
    assert torch.equal(after, torch.get_rng_state())
    assert_same(dict(model.named_buffers()), dict(alone.named_buffers()))


# Ranks


@of_methods
def test_sharded_weights_step_as_whole_ones(ranks, backend, name):
    options = no_searches(name)
    for found in ranks(2).run("support.vector_optimizers.sharded", name, backend, **options):
        assert_same(found, sharded(name, backend, **options))


def averaged(name):
    """Return weights, lr and calls of ranks with losses of their own and the average gradient."""
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    opt = METHODS[name].make([weight], **METHODS[name].options)
    parallel = torch.distributed.is_initialized()
    targets = [torch.distributed.get_rank()] if parallel else [0, 1]
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        losses = [(1 + target) * (weight - 5 * target).square().sum() / 2 for target in targets]
        loss = torch.stack(losses).mean()
        if loss.requires_grad:
            loss.backward()
            if parallel:
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= torch.distributed.get_world_size()
        return loss

    for _ in range(STEPS):
        opt.step(closure)
    return weight.detach(), opt.param_groups[0]["lr"], calls


@pytest.mark.parametrize("name", SEARCHING)
def test_ranks_with_losses_of_their_own_decide_alike(ranks, name):
    found = ranks(2).run("test_vector_optimizers.averaged", name)
    # A sum of two numbers is the same in any order.
    assert_same(*found, averaged(name))
