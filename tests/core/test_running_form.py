"""The running form x += S·u: beside its oracle, in 16 bits, and where others write weights."""

import copy
import itertools
import math
import pickle

import numpy
import pytest
import torch
from support.beside_oracle import Beside, give_arrays, noisy_gradients
from support.cases import (
    CASES,
    FEW,
    FULL,
    RUNNING,
    SCALE_PER,
    STEPS,
    SmallNet,
    Training,
    assert_same,
    batch,
    give,
    gradients,
    make_weights,
)
from test_oracle import ABSENT

from mechanic_fused import MechanicAdamW, MechanicSGD
from mechanic_fused.backends import formulas
from mechanic_fused.options import LOG_TUNING

STARTS = ("loss", "norms", "s_init")


def beside(implementation, base, start, **options):
    own = {"s_init": 0.02} if start == "s_init" else {}
    return Beside(implementation, base, variant=RUNNING, **own, **options)


def quadratic(xs):
    """Return a loss that the noisy gradients descend, as a float."""
    return sum(float(((1 + i % 5) * (x - math.cos(i)) ** 2).sum()) for i, x in enumerate(xs)) / 2


def loss_of(start):
    return quadratic if start == "loss" else None


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", CASES)
def test_each_base_and_start_agrees_with_the_oracle(implementation, case, start):
    base, options = CASES[case]
    both = beside(implementation, base, start, **options)
    both.run(loss=loss_of(start))
    assert both.opt.scale_source == start


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scale_per", SCALE_PER)
@pytest.mark.parametrize("case", FULL)
def test_groups_and_scales_agree_with_the_oracle(implementation, case, scale_per, start):
    base, options = CASES[case]
    other = {"momentum": 0.0} if base == "sgd" else {"betas": (0.7, 0.9)}

    def groups(weights):
        return [
            {"params": weights[:1], "weight_decay": 0.2},
            {"params": weights[1:], "lr": 0.5 * options["lr"], **other},
        ]

    both = beside(implementation, base, start, groups=groups, scale_per=scale_per, **options)
    both.run(loss=loss_of(start))


def there_and_back(t):
    """Up from a tenth, at 1, down to 0, and up again."""
    return (min(t + 1, 10) if t < 25 else max(35 - t, 0) if t < 38 else min(t - 37, 10)) / 10


@pytest.mark.parametrize("tensor", [False, True], ids=["", "tensor lr"])
@pytest.mark.parametrize("start", STARTS)
def test_s_follows_its_estimate_while_the_lr_warms_up(implementation, start, tensor):
    lr = torch.tensor(2.0, dtype=torch.float64) if tensor else 2.0
    both = beside(implementation, "adamw", start, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(both.opt, there_and_back)
    loss = loss_of(start)
    for t in range(60):
        observed = {"loss": loss(both.oracle.x)} if loss else {}
        both.step(t + 1, lr_factor=there_and_back(t), **observed)
        schedule.step()


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
@pytest.mark.parametrize("case", ["sgd", "dampening", "adamw betas", "lion decay"])
def test_gradients_may_come_and_go(implementation, case, scale_per):
    def edit(t, grads):
        return [None if i in ABSENT.get(t, ()) else g for i, g in enumerate(grads)]

    base, options = CASES[case]
    beside(implementation, base, "loss", scale_per=scale_per, **options).run(edit, quadratic)


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
@pytest.mark.parametrize("at", [{1: math.nan}, {5: math.nan, 6: math.inf, 12: -math.inf}])
@pytest.mark.parametrize("case", ["dampening", "adamw betas", "lion decay"])
def test_a_nonfinite_gradient_costs_its_own_element_and_step(implementation, case, at, scale_per):
    base, options = CASES[case]
    both = beside(implementation, base, "loss", scale_per=scale_per, **options)

    def edit(t, grads):
        if t in at:
            grads[3][[0, 4097]] = at[t]
        return grads

    both.run(edit, quadratic)
    assert both.opt.nonfinite_steps == both.oracle.nonfinite_steps == len(at)


def test_zero_gradients_change_nothing_at_the_start_and_are_a_step_later(implementation):
    def edit(t, grads):
        zero = t < 4 or t == 9
        return [0 * g for g in grads] if zero else grads

    beside(implementation, "adamw", "loss", weight_decay=0.1).run(edit, quadratic)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_loss_that_says_nothing_is_no_start(implementation, bad):
    both = beside(implementation, "adamw", "norms")
    both.run(loss=lambda xs: bad)
    assert both.opt.scale_source == "norms"


def test_a_loss_may_be_missing_now_and_then(implementation):
    both = beside(implementation, "adamw", "loss")
    for t in range(1, STEPS + 1):
        both.step(t, loss=quadratic(both.oracle.x) if t % 3 == 1 else None)
    assert both.opt.scale_source == "loss"


# 16-bit weights


def joined(training):
    """Return the float32 numbers that 16-bit weights and their low bits stand for."""
    return [formulas.join(p.detach(), training.opt.state[p]["x_low"]) for p in training.params]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FULL)
def test_sixteen_bit_weights_lose_no_update(implementation, case, dtype):
    """With the same gradients they are float32 weights, seen with 16 bits."""
    base, options = CASES[case]
    low = Training(implementation, base, dtype=dtype, variant=RUNNING, s_init=1e-3, **options)
    wide = [torch.nn.Parameter(p.detach().float()) for p in low.params]
    full = Training(implementation, base, wide, variant=RUNNING, s_init=1e-3, **options)
    for t in range(STEPS):
        grads = gradients(low.params, t)
        low.step(grads)
        full.step([g.float() for g in grads])
        assert_same(joined(low), full.x)
        for x, wide in zip(low.x, full.x, strict=True):  # the nearest, of two any
            assert_same((x.float() - wide).abs(), (wide.to(dtype).float() - wide).abs())
    assert low.opt.scale == full.opt.scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_were_set_to_zero_stay_there(implementation, dtype):
    """A mask prunes weights that have low bits by then, and their gradients from then on."""
    one = Training(implementation, "sgd", dtype=dtype, variant=RUNNING).run(FEW)
    assert any(one.opt.state[p]["x_low"].any() for p in one.params)
    with torch.no_grad():
        for p in one.params:
            p[::2] = 0
    for t in range(FEW):
        grads = gradients(one.params, t)
        for g in grads:
            g[::2] = 0
        one.step(grads)
    assert all((p[::2] == 0).all() and p[1::2].any() for p in one.params)


# Writes of others


def test_what_others_write_is_where_the_weights_are():
    """Every step moves x from where it finds it, whoever put it there and however."""
    params = make_weights()
    opt = MechanicSGD(params, lr=0.5, s_init=0.1)
    for t in range(FEW):
        for p in params:
            p.data.add_(1.0)
        before, scale = [p.detach().clone() for p in params], opt.scale
        grads = gradients(params, t)
        give(params, grads)
        opt.step()
        for p, x, g in zip(params, before, grads, strict=True):
            expected = x.double() - scale * 0.5 * g.double()
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_a_group_without_an_lr_stays():
    params = make_weights()
    opt = MechanicAdamW([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], lr=1.0)
    start = params[0].detach().clone()
    for t in range(STEPS):
        give(params, gradients(params, t))
        opt.step()
    assert torch.equal(params[0], start)
    assert opt.scale > 0


# What S does in the long run


SIZE = 8.0


def row(**numbers):
    names = formulas.LogRow.__dataclass_fields__
    return formulas.LogRow(**{name: float(numbers.get(name, 0)) for name in names})


def constants(**numbers):
    return formulas.LogConstants(**{**LOG_TUNING, "tunes_scale": 1.0, "factor": 1.0, **numbers})


def sums(h, gg=1.0, xx=1.0, uu=1.0):
    return formulas.ScaleSums(h, 0.0, gg, xx, uu, SIZE)


def model(power, loss):
    return formulas.WholeModel(power, SIZE, loss)


def start(by_loss=None):
    """The S at which a run starts whose sums are 1 and whose loss/(‖g‖·‖u‖) is this."""
    by_norms = LOG_TUNING["norm_share"] / 2  # the cube root of SIZE
    return by_norms if by_loss is None else (LOG_TUNING["anchor_share"] * by_loss * by_norms) ** 0.5


@pytest.mark.parametrize("glitch", [1e160, -1e160, 1e100, math.inf, math.nan])
def test_one_huge_h_leaves_s_able_to_move(glitch):
    c, one = constants(), row(scale=1.0, learns=1, informed=100, factor=1)
    h = itertools.cycle([-1.0, 1.0])
    for _ in range(100):
        formulas.log_tune_row(sums(next(h)), model(1.0, 0.0), one, c)
    formulas.log_tune_row(sums(glitch), model(1.0, 0.0), one, c)
    before = one.scale
    for _ in range(100):
        formulas.log_tune_row(sums(-1.0), model(1.0, 0.0), one, c)
    assert before * 1.2 < one.scale < math.inf


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_million_steps_leave_s_finite(sign):
    c, one = constants(), row(scale=1.0, learns=1, factor=1)
    for _ in range(1_000_000):
        formulas.log_tune_row(sums(sign), model(1.0, 0.0), one, c)
    assert 1e-30 < one.scale < 1e30


def test_s_stays_below_a_multiple_of_what_the_loss_allowed():
    c, one = constants(), row()
    for _ in range(10_000):
        formulas.log_tune_row(sums(-1.0), model(2.0, 1.0), one, c)
    assert one.scale == pytest.approx(LOG_TUNING["ceiling"] * start(by_loss=0.5))


def started(spike=1.0, loss=0.0, peak=1.0):
    """A row after 10 steps up to this peak; in the seventh gradient and update were this large."""
    one = row()
    for t in range(10):
        size = (spike if t == 6 else 1.0) ** 2
        c = constants(factor=peak * (t + 1) / 10)
        formulas.log_tune_row(sums(-1.0, gg=size, uu=size), model(size, loss), one, c)
    return one


@pytest.mark.parametrize("loss", [0.0, 0.5])
def test_a_spike_while_s_is_estimated_costs_little(loss):
    calm, shaken = started(loss=loss), started(100.0, loss)
    assert calm.scale / 3 < shaken.scale <= calm.scale


def test_a_peak_below_1_is_made_up_for_when_the_lr_falls():
    low, full = started(peak=1e-3), started()
    assert low.scale == full.scale
    for one, peak in ((low, 1e-3), (full, 1.0)):
        formulas.log_tune_row(sums(-1.0), model(1.0, 0.0), one, constants(factor=0.9 * peak))
    assert 1e-3 * low.scale == pytest.approx(full.scale, rel=1e-12)


@pytest.mark.parametrize(("gg", "rises"), [(1.0, True), (1e-4, False)])
def test_the_ceiling_by_the_loss_rises_where_updates_shrink_beside_gradients(gg, rises):
    c, one = constants(), started(loss=0.5)
    ceiling = LOG_TUNING["ceiling"] * start(by_loss=0.5)
    for _ in range(10_000):
        formulas.log_tune_row(sums(-1.0, gg=gg, uu=1e-4), model(1.0, 0.0), one, c)
    assert one.scale == pytest.approx(100 * ceiling if rises else ceiling)


def test_the_ceiling_rises_where_updates_shrink():
    c, shrinking, same = constants(), started(), started()
    for t in range(10_000):
        formulas.log_tune_row(sums(-1.0, uu=1 / (t + 1)), model(1.0, 0.0), shrinking, c)
        formulas.log_tune_row(sums(-1.0), model(1.0, 0.0), same, c)
    ceiling = LOG_TUNING["norm_ceiling"] * start()
    assert same.scale == pytest.approx(ceiling)
    assert 90 * ceiling < shrinking.scale < 110 * ceiling


def test_the_ceiling_stops_the_growth_of_s_and_does_not_lower_it():
    c, one = constants(), started()
    one.scale = before = 10.0
    formulas.log_tune_row(sums(-1.0), model(1.0, 0.0), one, c)
    assert one.scale == before


def beside_a_still_group(implementation):
    """A training with a group of large weights more, whose lr is 0."""
    params = [*make_weights(), torch.nn.Parameter(torch.full((3000,), 50.0))]
    groups = lambda ps: [{"params": ps[:-1]}, {"params": ps[-1:], "lr": 0.0}]  # noqa: E731
    return Training(implementation, params=params, groups=groups, variant=RUNNING, s_init=None)


def test_s_learns_from_the_groups_that_it_moves(implementation):
    alone = Training(implementation, variant=RUNNING, s_init=None).run(STEPS)
    one = beside_a_still_group(implementation).run(STEPS)
    assert torch.equal(one.opt.scale, alone.opt.scale)
    assert_same(one.x, [*alone.x, torch.full((3000,), 50.0)])
    one.opt.param_groups[1]["lr"] = one.group["lr"]
    one.run(FEW)
    assert (one.x[-1] != 50).all()


def test_released_gradients_of_a_still_group_do_not_count():
    one, released = (beside_a_still_group("auto") for _ in range(2))
    released.opt.release_gradients()
    for t in range(STEPS):
        one.step(gradients(one.params, t))
        products = zip(released.params, gradients(released.params, t), strict=True)
        sum((p * g).sum() for p, g in products).backward()
        released.opt.step()
    torch.testing.assert_close(released.opt.scale, one.opt.scale, rtol=1e-6, atol=0)
    assert torch.equal(released.x[-1], torch.full((3000,), 50.0))


# Saved and copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_copy_goes_on_to_the_bit(implementation, way, dtype):
    one = Training(implementation, dtype=dtype, variant=RUNNING, s_init=None).run(STEPS)
    other = Training(implementation, dtype=dtype, seed=1, variant=RUNNING, s_init=None)
    if way == "state_dict":
        other.load(copy.deepcopy(one.saved()), one.t)
    else:
        move = copy.deepcopy if way == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        other.params, other.opt = move((one.params, one.opt))
        other.t = one.t
    one.run(FEW), other.run(FEW)
    assert_same(one.x, other.x)
    assert torch.equal(one.opt.scale, other.opt.scale)


def test_a_checkpoint_of_an_exact_form_goes_on_with_its_scale():
    exact = Training("reference", dtype=torch.bfloat16).run(STEPS)
    saved = copy.deepcopy(exact.saved())
    one = Training("reference", dtype=torch.bfloat16, seed=1, variant=RUNNING).load(saved, STEPS)
    assert torch.equal(one.opt.scale, exact.opt.scale)
    assert_same(one.x, exact.x)
    one.run(FEW)
    assert "delta" not in one.opt.state[one.params[0]]
    assert one.opt.scale != exact.opt.scale


def test_a_checkpoint_of_the_running_form_does_not_fit_an_exact_one():
    saved = Training("reference", variant=RUNNING).run(FEW).saved()
    exact = Training("reference", seed=1)
    before = exact.snapshot()
    with pytest.raises(ValueError, match="variant='running', got 'annealed'"):
        exact.opt.load_state_dict(saved["optimizer"])
    assert_same(exact.snapshot(), before)


def test_a_frozen_scale_stays_and_a_reset_one_starts_anew():
    one = Training("reference", variant=RUNNING, s_init=None).run(STEPS)
    one.opt.freeze_scale()
    scale, x = one.opt.scale, one.x
    one.run(FEW)
    assert torch.equal(one.opt.scale, scale)
    assert not torch.equal(one.x[0], x[0])
    one.opt.freeze_scale(False)
    one.opt.reset_scale()
    assert one.opt.scale == 0
    assert one.opt.scale_source == ""
    one.run(STEPS)
    assert one.opt.scale > 0
    with torch.no_grad():
        assert all(torch.equal(one.opt.state[p]["x_ref"], p) is False for p in one.params)


def test_a_warm_up_by_epochs_does_not_pin_s():
    """Its lr stands still for longer than S is held, at a thousandth of its peak."""
    params = make_weights()
    opt = MechanicSGD(params, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: 1e-3 if t < 20 else min(1.0, t // 20 / 5)
    )
    for t in range(120):
        give(params, gradients(params, t))
        opt.step()
        if t == 12:
            early = opt.scale
        schedule.step()
    assert opt.scale > early / 4


def test_s_shrinks_as_the_lr_rises_above_its_known_peak():
    params = make_weights()
    opt = MechanicSGD(params, lr=1e-6)
    rates = []
    for t in range(STEPS):
        opt.param_groups[0]["lr"] = 1e-6 * 2**t
        give(params, gradients(params, t))
        opt.step()
        rates.append(opt.learned_lr()[0])
    assert max(rates[2:]) < 4 * min(rates[2:])


def test_a_checkpoint_of_bfloat16_weights_fits_float32_ones(implementation):
    low = Training(implementation, dtype=torch.bfloat16, variant=RUNNING).run(FEW)
    wide = Training(implementation, variant=RUNNING)
    wide.opt.load_state_dict(copy.deepcopy(low.opt.state_dict()))
    wide.group["lr"] = 0.0
    before = wide.x
    wide.run(1)
    assert_same(wide.x, before)
    assert all("x_low" not in wide.opt.state[p] for p in wide.params)


def test_a_reset_takes_frozen_weights_along():
    one = Training("reference", variant=RUNNING).run(STEPS)
    one.params[0].requires_grad_(False)
    one.opt.reset_scale()
    assert all(torch.equal(one.opt.state[p]["x_ref"], p) for p in one.params)


def test_a_plain_optimizer_needs_a_learned_scale():
    params = make_weights()
    opt = MechanicAdamW(params, lr=1.0, scale_per="parameter")
    with pytest.raises(ValueError, match="needs a learned scale"):
        opt.to_base()
    params[0].requires_grad_(False)
    for t in range(FEW):
        give(params[1:], gradients(params[1:], t))
        opt.step()
    assert opt.scale_source == "norms"
    rates = [group["lr"] for group in opt.to_base().param_groups]
    assert rates[0] == pytest.approx(sum(rates[1:]) / 2)
    assert opt.learned_lr()[0] == pytest.approx(sum(rates) / 3)


@pytest.mark.parametrize("lr", [math.inf, math.nan, torch.tensor(math.inf)])
def test_an_lr_that_is_not_finite_changes_nothing(implementation, lr):
    one, other = (Training(implementation, variant=RUNNING, s_init=None) for _ in range(2))
    one.run(STEPS), other.run(STEPS)
    before = one.snapshot()
    usual, one.group["lr"] = one.group["lr"], lr
    with pytest.raises(
        ValueError,
        match=r"lr of param group 0 must be a finite number of 0 or more and of 1e.30 or",
    ):
        one.run(1)
    one.group["lr"] = usual
    assert_same(one.snapshot(), before)
    one.run(FEW), other.run(FEW)
    assert_same(one.x, other.x)
    assert one.opt.scale == other.opt.scale


def test_weights_that_are_not_finite_teach_nothing(implementation):
    one = Training(implementation, "sgd", variant=RUNNING, s_init=None).run(STEPS)
    scale, grads = one.opt.scale, gradients(one.params, STEPS)
    with torch.no_grad():
        one.params[0][0] = math.nan
    one.step([torch.ones_like(g) for g in grads])
    assert one.opt.scale == scale
    assert one.opt.nonfinite_steps == 1
    with torch.no_grad():
        one.params[0][0] = 0.0
    one.step(grads)
    assert one.opt.scale != scale
    assert all(p.isfinite().all() for p in one.params)


# The loss


class Wrapped(torch.nn.Module):
    """Return what transformers' models return."""

    def __init__(self, as_dict):
        super().__init__()
        self.net, self.as_dict = SmallNet(), as_dict

    def forward(self, z, target):
        loss = (self.net(z) - target).square().mean()
        if self.as_dict:
            return {"loss": loss}
        return type("Output", (), {"loss": loss})()


def train(give_loss, steps=STEPS):
    model = Wrapped(give_loss == "watch a dict")
    opt = MechanicAdamW(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0) if give_loss == "scaler" else None
    handle = opt.watch(model) if give_loss.startswith("watch") else None
    for t in range(steps):

        def closure(t=t):
            opt.zero_grad()
            found = model(*batch(t))
            loss = found["loss"] if isinstance(found, dict) else found.loss
            (scaler.scale(loss) if scaler else loss).backward()
            return loss

        if give_loss == "closure":
            opt.step(closure)
            continue
        loss = closure()
        if give_loss == "step":
            opt.step(loss=loss)
        elif give_loss == "observe":
            opt.observe(loss)
            opt.step()
        elif give_loss == "scaler":
            scaler.step(opt, loss=loss)
            scaler.update()
        elif give_loss == "a float":
            opt.step(loss=loss.item())
        else:
            opt.step()
    if handle:
        handle.remove()
    return opt.scale, opt.scale_source


@pytest.mark.parametrize(
    "way", ["observe", "closure", "watch", "watch a dict", "scaler", "a float"]
)
def test_the_loss_comes_on_every_way(way):
    scale, source = train("step")
    assert source == "loss"
    torch.testing.assert_close(train(way)[0], scale, rtol=1e-6, atol=0)
    assert train("not at all")[1] == "norms"


def test_losses_between_two_steps_are_averaged():
    halves, whole = (MechanicSGD([torch.nn.Parameter(torch.ones(3))], lr=1.0) for _ in range(2))
    for opt in (halves, whole):
        opt.param_groups[0]["params"][0].grad = torch.ones(3)
    for loss in (1.0, torch.tensor([3.0])):
        halves.observe(loss)
    halves.step()
    whole.step(loss=2)
    assert halves.scale == whole.scale > 0


def test_a_closure_may_return_what_is_no_loss():
    weight = torch.nn.Parameter(torch.ones(3))
    opt = MechanicSGD([weight], lr=1.0)
    weight.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="the closure's loss is not observed: the loss must be"):
        assert opt.step(lambda: (1, 2)) == (1, 2)
    assert opt.scale_source == "norms"


def test_a_copy_of_a_watched_model_is_not_watched():
    model = Wrapped(as_dict=False)
    opt = MechanicAdamW(model.parameters(), lr=1.0)
    opt.watch(model)
    copied = copy.deepcopy(model)
    for other in (copied, pickle.loads(pickle.dumps(model))):
        other(*batch(0)).loss.backward()
    assert opt.run_state()[2].tolist() == [0.0, 0.0]
    model(*batch(0)).loss.backward()
    assert opt.run_state()[2][1] == 1
    opt.load_state_dict(opt.state_dict())
    with torch.inference_mode():
        opt.learned_lr()
    opt.step(loss=numpy.float32(2.0))
    assert opt.scale_source == "loss"


BAD = (torch.ones(2), torch.empty(0), "1", None, torch.ones(1) * 1j, True, torch.tensor(True))


@pytest.mark.parametrize("bad", BAD)
def test_a_loss_that_is_not_a_number_changes_nothing(bad):
    one = Training("reference", variant=RUNNING).run(FEW)
    give(one.params, gradients(one.params, FEW))
    before, x = one.snapshot(), one.x
    with pytest.raises(ValueError, match="the loss must be one real number, got"):
        one.opt.observe(bad)
    if bad is not None:
        with pytest.raises(ValueError, match="the loss must be one real number, got"):
            one.opt.step(loss=bad)
    assert_same(one.snapshot(), before)
    assert_same(one.x, x)


def test_the_exact_forms_need_no_loss():
    one, other = (Training("reference") for _ in range(2))
    one.run(FEW)
    for t in range(FEW):
        give(other.params, gradients(other.params, t))
        other.opt.step(loss=1.0)
    assert_same(one.x, other.x)


def test_beside_the_oracle_the_first_step_leaves_the_weights():
    both = beside("reference", "sgd", "norms", lr=1.0)
    give_arrays(both.params, noisy_gradients(both.oracle.x, 1))
    before = [p.detach().clone() for p in both.params]
    both.opt.step()
    assert_same(before, [p.detach() for p in both.params])
