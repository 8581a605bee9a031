"""The running form over ranks: its sums are reduced while the caller goes on, and losses too."""

import contextlib
import warnings

import pytest
import torch
from support import sharding
from support.cases import RUNNING
from support.sharding import Run
from torch import distributed, nn

from mechanic_fused import MechanicSGD, plan, step_together

STEPS = 14
OPTIONS = {"variant": RUNNING, "s_init": None}


@contextlib.contextmanager
def waits_noted(noted):
    """Note which all-reduces are started, and when somebody waits for one."""
    all_reduce = distributed.all_reduce

    class Noted:
        def __init__(self, work):
            self.work = work

        def wait(self):
            noted.append("wait")
            return self.work.wait()

    def noting(*args, async_op=False, **kwargs):
        noted.append("start" if async_op else "sync")
        work = all_reduce(*args, async_op=async_op, **kwargs)
        return Noted(work) if async_op else work

    distributed.all_reduce = noting
    try:
        yield
    finally:
        distributed.all_reduce = all_reduce


def steps_and_waits(layout, read):
    """Return what happens to the reductions in two steps, and in what reads S between them."""
    run, noted = Run(layout, **OPTIONS), []
    run.train(0, 3)
    float(run.inner.scale)
    with waits_noted(noted):
        for t in (3, 4):
            run.backward(t)
            noted.append(f"step {t}")
            run.opt.step()
            noted.append("end")
            read(run.inner)
    return noted


def nothing(opt):
    pass


def scale(opt):
    return opt.scale


def state(opt):
    return opt.state_dict()


def norm(opt):
    return opt.grad_norm


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1", "zero1", "tp"])
def test_nothing_waits_for_the_sums_within_a_step(ranks, layout):
    for found in ranks(2).run(steps_and_waits, layout, nothing):
        assert found == ["step 3", "start", "end", "step 4", "wait", "start", "end"]


@pytest.mark.parametrize("read", [scale, state, norm])
def test_who_reads_waits(ranks, read):
    for found in ranks(2).run(steps_and_waits, "fsdp2", read):
        assert found == ["step 3", "start", "end", "wait", "step 4", "start", "end", "wait"]


# Losses that only some ranks have


def losses_of_some(layout, given):
    run = Run(layout, **OPTIONS)
    for t in range(STEPS):
        run.backward(t)
        if distributed.get_rank() in given:
            run.inner.observe(3.0 + distributed.get_rank())
        run.opt.step()
    return run.inner.scale, run.inner.scale_source


@pytest.mark.parametrize("given", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp", "zero1"])
def test_losses_are_averaged_over_the_ranks_that_have_one(ranks, layout, given):
    results = ranks(2).run(losses_of_some, layout, given)
    alone = Run("single", **OPTIONS)
    for t in range(STEPS):
        alone.backward(t)
        alone.opt.step(loss=sum(3.0 + rank for rank in given) / len(given))
    for found, source in results:
        assert source == "loss"
        assert torch.equal(found, results[0][0])
        torch.testing.assert_close(found, alone.inner.scale, rtol=1e-4, atol=0)


def refuse_losses():
    weight = nn.Parameter(torch.ones(3))
    opt = MechanicSGD([weight], lr=1.0)
    weight.grad = torch.ones(3)
    for give in (lambda: opt.observe(1.0), lambda: opt.step(loss=1.0)):
        with pytest.raises(ValueError, match="expected loss_group="):
            give()
    assert opt.scale == 0

    def closure():
        return torch.tensor(1.0)

    with pytest.warns(UserWarning, match="the closure's loss is not observed"):
        assert opt.step(closure) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
    assert opt.scale_source == "norms"


def test_a_loss_of_each_rank_needs_a_group(ranks):
    ranks(2).run(refuse_losses)


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
def test_released_gradients_give_the_ordinary_step(ranks, layout):
    size = sharding.LAYOUTS[layout].ranks
    options = {**OPTIONS, "observed": True, "steps": STEPS}
    results = ranks(size).run(sharding.run, layout, released=True, **options)
    sharding.assert_agrees(results, sharding.run("single", **options))


def test_optimizers_that_step_together_are_one():
    weights = [nn.Parameter(torch.arange(1.0, 4.0) + i) for i in range(2)]
    others = [nn.Parameter(p.detach().clone()) for p in weights]
    apart = [MechanicSGD([p], lr=0.1, momentum=0.9) for p in weights]
    one = MechanicSGD(others, lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        for params in (weights, others):
            for p in params:
                p.grad = 2 * p.detach()
        loss = float(sum(p.detach().square().sum() for p in weights))
        apart[0].observe(loss)
        one.observe(loss)
        step_together(apart)
        one.step()
        assert apart[0].grad_norm == pytest.approx(float(one.grad_norm), rel=1e-12)
        assert apart[0].scale == apart[1].scale
        torch.testing.assert_close(apart[0].scale, one.scale, rtol=1e-12, atol=0)
    for p, q in zip(weights, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    assert not torch.equal(weights[0], torch.arange(1.0, 4.0))


def error_of_a_rank_that_was_reset(layout, checked_every):
    """Return what each rank raises once one of them has another S, and after how many steps."""
    plan.SAME_EVERY = checked_every
    try:
        run = Run(layout, **OPTIONS)
        for t in range(STEPS):
            if t == 11 and distributed.get_rank() == 1:  # S is no longer estimated
                run.inner._tuner.state[:, 0] *= 1.001
            run.backward(t)
            run.opt.step()
    except RuntimeError as error:
        return str(error), t
    finally:
        plan.SAME_EVERY = 100
    return "", STEPS


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1", "hsdp"])
def test_ranks_with_another_scale_are_found(ranks, layout):
    size = 4 if layout == "hsdp" else 2
    for error, step in ranks(size).run(error_of_a_rank_that_was_reset, layout, 4):
        assert "the ranks must have one S" in error
        assert step == 12


def steps_of_ranks_by_themselves():
    """Return how many steps are taken where ranks share the loss alone."""
    plan.SAME_EVERY = 4
    try:
        weight = nn.Parameter(torch.ones(4) * (1 + distributed.get_rank()))
        opt = MechanicSGD([weight], lr=1.0, loss_group=distributed.group.WORLD)
        for _ in range(STEPS):
            weight.grad = weight.detach().clone()
            opt.step(loss=(weight.detach() ** 2).sum())
    finally:
        plan.SAME_EVERY = 100
    scale = opt.scale.item()
    return int(opt._tuner.counters[0, 0]), scale


def test_ranks_that_share_the_loss_alone_may_learn_for_themselves(ranks):
    (steps, scale), (others, other) = ranks(2).run(steps_of_ranks_by_themselves)
    assert steps == others == STEPS
    assert scale != other
