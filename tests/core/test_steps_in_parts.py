"""Engines that call step() once for each part of the weights: those calls are one step.

DeepSpeed's ZeRO does so, with one param group or one flat piece after the other; the real one is in
tests/integrations/test_deepspeed.py.
"""

import weakref

import pytest
import torch
from support.cases import assert_near, assert_same, make_weights, values

from mechanic_fused import MechanicAdamW, MechanicSGD, mechanize

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


class Whole:
    """The optimizer as it is."""

    def __init__(self, opt, params):
        self.opt = opt

    def step(self):
        self.opt.step()


class Pieces:
    """Flat pieces that take the weights' place, with padding behind them, as under ZeRO-1."""

    def __init__(self, opt, params):
        self.opt, self.weights, self.flat = opt, [params[:2], params[2:]], []
        for group, of_group in zip(opt.param_groups, self.weights, strict=True):
            for p in of_group:
                p._hp_mapping = None
            parts = [*(p.detach().reshape(-1) for p in of_group), torch.zeros(3)]
            self.flat.append(torch.nn.Parameter(torch.cat(parts)))
            self.take(group, self.flat[-1])

    def take(self, group, flat):
        group["params"] = [flat]

    def step_group(self, i):
        groups = self.opt.param_groups
        self.opt.param_groups = [groups[i]]
        self.opt.step()
        self.opt.param_groups = groups

    def step(self):
        for i, (params, flat) in enumerate(zip(self.weights, self.flat, strict=True)):
            flat.grad = torch.cat([*(p.grad.reshape(-1) for p in params), torch.zeros(3)])
            self.step_group(i)
            first = 0
            for p in params:
                p.data.copy_(flat.detach()[first : first + p.numel()].view(p.shape))
                first += p.numel()


class LonePieces(Pieces):
    """As under ZeRO-3: a piece is in its group only while it is stepped."""

    def take(self, group, flat):
        group["params"] = []

    def step_group(self, i):
        self.opt.param_groups[i]["params"] = [self.flat[i]]
        self.opt.step()
        self.opt.param_groups[i]["params"] = []


BY_PARTS = (Pieces, LonePieces)


def trained(how, reads=STEPS, before=lambda t, opt: None, first=0, **options):
    """Return the weights and the optimizer after STEPS steps."""
    params, opt = made(**options)
    engine = how(opt, params)
    for t in range(first, STEPS):
        before(t, opt)
        give(params, t)
        opt.observe(torch.tensor(5.0 / (1 + t)))
        engine.step()
        if t % reads == 0:
            opt.scale  # noqa: B018 reading it ends a step
    return params, opt


def assert_alike(one, other):
    (params, opt), (others, alike) = one, other
    assert_near([opt.scale], [alike.scale], 1e-12)
    assert_near([opt.grad_norm], [alike.grad_norm], 1e-12)
    assert_near(values(params), values(others), 1e-6)
    assert opt._tuner.counters[0, 0] == alike._tuner.counters[0, 0] == STEPS


@pytest.mark.parametrize("how", BY_PARTS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("reads", [1, 4, STEPS])
def test_parts_one_after_the_other_are_one_step(reads, backend, how):
    found = trained(how, reads, backend=backend)
    assert_alike(found, trained(Whole, backend=backend))


@pytest.mark.parametrize("how", BY_PARTS)
def test_they_follow_one_schedule(how):
    def scheduled(t, opt):
        for group in opt.param_groups:
            group["lr"] = min(1.0, (t + 1) / 5) * (1 - t / STEPS)

    assert_alike(trained(how, before=scheduled), trained(Whole, before=scheduled))


def test_a_peak_that_grows_counts_once():
    def grown(t, opt):
        if t == 15:
            for group in opt.param_groups:
                group["lr"] = 3.0

    assert_alike(trained(Pieces, before=grown), trained(Whole, before=grown))


def test_a_step_that_is_never_read_goes_on_from_a_checkpoint():
    expected, alike = trained(Pieces)
    params, opt = made()
    engine = Pieces(opt, params)
    for t in range(STEPS):
        if t == 12:
            saved = opt.state_dict()
            _, engine.opt = made()
            for p in engine.opt._given:
                p._hp_mapping = None
            for group, flat in zip(engine.opt.param_groups, engine.flat, strict=True):
                group["params"] = [flat]
            engine.opt.load_state_dict(saved)
        give(params, t)
        engine.opt.observe(torch.tensor(5.0 / (1 + t)))
        engine.step()
    assert_same([engine.opt.scale], [alike.scale])
    assert_same(values(params), values(expected))


def test_the_log_has_a_line_a_step():
    lines = []
    cls = mechanize(torch.optim.RAdam, log_func=lines.append, log_every=1)
    _, opt = trained(Pieces, cls=cls)
    opt.scale  # noqa: B018
    assert [line["iter_count"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm needs all gradients at once"),
        ({"variant": "optax"}, "the exact forms need all weights at once"),
    ],
)
def test_what_needs_all_weights_at_once_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        trained(Pieces, cls=MechanicSGD, **options)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"variant": "annealed"}, {}])
def test_groups_that_users_train_by_turns_are_steps_of_their_own(options):
    params, opt = made(**options)
    groups = opt.param_groups
    for t in range(6):
        opt.param_groups = groups[t // 3 :][:1]
        give(params, t)
        opt.step()
    assert opt._tuner.counters[0, 0] == 6


def test_weights_that_are_dropped_are_not_kept():
    params = make_weights(SHAPES)
    opt = MechanicAdamW([{"params": [p]} for p in params], lr=1.0)
    dropped = []
    for t in range(3):
        give(params, t)
        opt.step()
        opt.param_groups.pop()
        last = params.pop()
        opt.state.pop(last)
        dropped.append(weakref.ref(last))
        del last
    give(params, 3)
    opt.step()
    assert [ref() for ref in dropped] == [None] * 3


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
