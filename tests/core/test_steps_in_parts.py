"""Engines that call step() once for each part of the weights: those calls are one step.

DeepSpeed's ZeRO does so, with one param group or one flat piece after the other; the real one is in
tests/integrations/test_deepspeed.py.
"""

import pytest
import torch
from support.cases import assert_near, assert_same, make_weights, values

from mechanic_fused import MechanicAdamW, MechanicSGD

SHAPES = ((5, 4), (7,), (3, 2, 2), (9,))
STEPS = 25


def made(cls=MechanicAdamW, **options):
    params = make_weights(SHAPES)
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}]
    return params, cls(groups, lr=1.0, **options)


def give(params, t):
    for i, p in enumerate(params):
        rng = torch.Generator().manual_seed(100 * t + i)
        p.grad = p.detach() + 0.1 * torch.randn(p.shape, generator=rng)


def whole(steps=STEPS, **options):
    params, opt = made(**options)
    for t in range(steps):
        give(params, t)
        opt.observe(torch.tensor(5.0 / (1 + t)))
        opt.step()
    return params, opt


def step_by_groups(opt):
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("reads", [1, 4, STEPS])
def test_groups_one_after_the_other_are_one_step(reads, backend):
    expected, alike = whole(backend=backend)
    params, opt = made(backend=backend)
    for t in range(STEPS):
        give(params, t)
        opt.observe(torch.tensor(5.0 / (1 + t)))
        step_by_groups(opt)
        if t % reads == 0:
            opt.scale  # noqa: B018 reading it ends a step
    assert_near([opt.scale], [alike.scale], 1e-12)
    assert_near(values(params), values(expected), 1e-6)
    assert opt._tuner.counters[0, 0] == STEPS
    assert_near([opt.grad_norm], [alike.grad_norm], 1e-12)


def test_they_follow_one_schedule():
    def scheduled(step):
        params, opt = made()
        for t in range(STEPS):
            for group in opt.param_groups:
                group["lr"] = min(1.0, (t + 1) / 5) * (1 - t / STEPS)
            give(params, t)
            step(opt)
        return params, opt

    expected, alike = scheduled(lambda opt: opt.step())
    params, opt = scheduled(step_by_groups)
    assert_near([opt.scale], [alike.scale], 1e-12)
    assert_near(values(params), values(expected), 1e-6)


def test_a_peak_that_grows_counts_once():
    def grown(step):
        params, opt = made()
        for t in range(STEPS):
            if t == 15:
                for group in opt.param_groups:
                    group["lr"] = 3.0
            give(params, t)
            step(opt)
        return opt

    assert_near([grown(step_by_groups).scale], [grown(lambda opt: opt.step()).scale], 1e-12)


class Pieces:
    """Flat pieces that take the weights' place, with padding behind them."""

    def __init__(self, opt, groups, pad=0.0):
        self.opt, self.weights = opt, groups
        self.flat = []
        for params in groups:
            flat = torch.cat([p.detach().reshape(-1) for p in params] + [torch.full((3,), pad)])
            self.flat.append(torch.nn.Parameter(flat))
        for group in opt.param_groups:
            group["params"] = []

    def step(self):
        for i, (params, flat) in enumerate(zip(self.weights, self.flat, strict=True)):
            gradient = [p.grad.reshape(-1) for p in params]
            flat.grad = torch.cat([*gradient, torch.zeros(3)])
            self.opt.param_groups[i]["params"] = [flat]
            self.opt.step()
            self.opt.param_groups[i]["params"] = []
            first = 0
            for p in params:
                p.data.copy_(flat.detach()[first : first + p.numel()].view(p.shape))
                first += p.numel()


def test_flat_pieces_with_padding_are_the_weights():
    expected, alike = whole()
    params, opt = made()
    pieces = Pieces(opt, [params[:2], params[2:]])
    for t in range(STEPS):
        give(params, t)
        opt.observe(torch.tensor(5.0 / (1 + t)))
        pieces.step()
    assert_near([opt.scale], [alike.scale], 1e-12)
    assert_near(values(params), values(expected), 1e-6)


def test_a_step_that_is_never_read_goes_on_from_a_checkpoint():
    def half(opt, params, first, last):
        for t in range(first, last):
            give(params, t)
            step_by_groups(opt)

    expected, alike = made()
    half(alike, expected, 0, STEPS)
    params, opt = made()
    half(opt, params, 0, 12)
    saved = opt.state_dict()
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}]
    other = MechanicAdamW(groups, lr=1.0)
    other.load_state_dict(saved)
    half(other, params, 12, STEPS)
    assert_same([other.scale], [alike.scale])
    assert_same(values(params), values(expected))


def test_the_log_has_a_line_a_step():
    from mechanic_fused import mechanize

    lines = []
    cls = mechanize(torch.optim.RAdam, log_func=lines.append, log_every=1)
    params = make_weights(SHAPES)
    opt = cls([{"params": params[:2]}, {"params": params[2:]}], lr=1.0)
    for t in range(4):
        give(params, t)
        step_by_groups(opt)
    opt.scale  # noqa: B018
    assert [line["iter_count"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm needs all gradients at once"),
        ({"variant": "optax"}, "the exact forms need all weights at once"),
    ],
)
def test_what_needs_all_weights_at_once_is_refused(options, expected):
    params, opt = made(MechanicSGD, **options)
    give(params, 0)
    with pytest.raises(ValueError, match=expected):
        step_by_groups(opt)


def test_a_group_that_is_dropped_for_good_is_no_part():
    params, opt = made(max_grad_norm=1.0)
    for t in range(6):
        give(params, t)
        opt.step()
        if t == 2:
            del opt.param_groups[1]
    assert opt._tuner.counters[0, 0] == 5
    opt.scale  # noqa: B018
    assert opt._tuner.counters[0, 0] == 6


@pytest.mark.parametrize("how", ["replace_parameter", "by hand"])
def test_a_weight_in_the_place_of_another_is_no_piece(how):
    params = make_weights(((3,), (5, 2)))
    opt = MechanicSGD(params, lr=1.0)
    give(params, 0)
    opt.step()
    new = torch.nn.Parameter(torch.ones(7))
    if how == "by hand":
        opt.param_groups[0]["params"][0] = new
    else:
        opt.replace_parameter(params[0], new, torch.full((7,), -1))
    weights = [new, params[1]]
    give(weights, 1)
    opt.step()
    assert opt._run.pending is None
    assert opt._tuner.counters[0, 0] == 2
    assert opt._plan.given is None
