"""CGQ against its formula in NumPy, its line search, and that a search leaves no traces."""

import copy
import math

import numpy
import pytest
import torch
from cases import (
    FEW,
    STEPS,
    SUM_RTOL,
    assert_same,
    assert_within,
    differs,
    loss_of,
    make_weights,
    noise,
    snapshot,
    ulp,
    values,
)

from mechanic_fused.tuners.cgq import CGQ, drawn, line_search, minimizer, polak_ribiere

OPTIONS = {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.02, "probability": 0.5}
TRIAL, BOUND = 0.02, 0.5
NUMPY = {torch.float64: numpy.float64, torch.float32: numpy.float32}
# A step is 8 roundings of numbers no larger than the largest among x, g and p; momentum adds up to
# 1/(1 − 0.9) of them, and the quadratic shrinks what earlier steps have left.
ROUNDINGS = 8 / (1 - 0.9)


def slopes_of(x, t):
    """½Σd(x − o)² + ⟨n, x⟩ in float64, and its gradient in x's dtype."""
    i = torch.arange(x.numel()).reshape(x.shape)
    d, o = 1 + i % 5, i.double().cos()
    n = 0.3 * noise(x, torch.Generator().manual_seed(t))
    away = x.detach().double() - o
    return float((d * away**2).sum() / 2 + (n * x.detach().double()).sum()), d * away + n


class Closure:
    """The quadratic of step t, as torch's LBFGS would call it."""

    def __init__(self, params, lost=()):
        self.params, self.t, self.lost = params, 0, lost
        self.calls = []
        self.seen = []

    def __call__(self):
        self.calls.append((self.t, torch.is_grad_enabled()))
        self.seen.append(values(self.params))
        found = [slopes_of(p, self.t) for p in self.params]
        for p, (_, g) in zip(self.params, found, strict=True):
            p.grad = g.to(p.dtype) if torch.is_grad_enabled() else None
        loss = sum(loss for loss, _ in found)
        # Of the losses without gradients only.
        lost = self.t in self.lost and not torch.is_grad_enabled()
        return torch.tensor(math.nan if lost else loss, dtype=torch.float64)

    def searches(self):
        return [(t, False) in self.calls for t in range(self.t)]


def train(opt, params, steps=STEPS, first=0, **options):
    closure = Closure(params, **options)
    for closure.t in range(first, first + steps):
        opt.step(closure)
    closure.t += 1
    return closure


def trained(backend="auto", dtype=torch.float64, steps=STEPS, **options):
    params = make_weights(dtype=dtype)
    opt = CGQ(params, **{**OPTIONS, **options}, backend=backend)
    return params, opt, train(opt, params, steps)


def oracle(dtype, searches, errors=None, lr=0.02, momentum=0.7, weight_decay=0.02):
    """Weights, lr and momentum after steps in plain arithmetic of one dtype.

    The quadratic's first fit is exact, so a search always takes it: two more losses.

    Args:
        searches: of each step, whether it is a search.
        errors: draws relative errors of the losses.
    """
    kind = NUMPY[dtype]
    xs = [p.detach().numpy().astype(kind) for p in make_weights(dtype=dtype)]
    bufs = [numpy.zeros_like(x) for x in xs]
    last, largest = None, 0.0

    def at(points, t):
        found = [slopes_of(torch.from_numpy(x), t) for x in points]
        off = 1 + SUM_RTOL * errors.choice([-1, 1]) if errors else 1
        return sum(f for f, _ in found) * off, [g.numpy().astype(kind) for _, g in found]

    def dot(a, b):
        return sum(float(u.ravel() @ v.ravel()) for u, v in zip(wide(a), wide(b), strict=True))

    def wide(vector):
        return [v.astype(numpy.float64) for v in vector]

    for t, search in enumerate(searches):
        here, gs = at(xs, t)
        beta, step = momentum, lr
        if search and last is not None:
            beta = min(
                0.8,
                max(
                    0.0,
                    dot(gs, wide([a - b for a, b in zip(wide(gs), wide(last), strict=True)]))
                    / dot(last, last),
                ),
            )
            momentum = (momentum + beta) / 2
        pairs = zip(bufs, gs, xs, strict=True)
        bufs = [kind(beta) * b + (g + kind(weight_decay) * x) for b, g, x in pairs]
        if search:
            last = gs
            slope = -dot(gs, bufs)
            there, _ = at([x - kind(TRIAL) * p for x, p in zip(xs, bufs, strict=True)], t)
            a = (there - here - slope * TRIAL) / TRIAL**2
            step = min(BOUND, -slope / (2 * a))
            lr = (lr + step) / 2
        xs = [x - kind(step) * p for x, p in zip(xs, bufs, strict=True)]
        largest = max([largest, *(abs(v).max() for v in xs + gs + bufs)])
    return [torch.from_numpy(x) for x in xs], lr, momentum, torch.tensor(largest, dtype=dtype)


def worst(found, expected):
    return max(
        float((a.detach().double() - b.double()).abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def spread(searches, **options):
    """The oracle, and how far from it ours may be in weights, lr and momentum.

    Twice what losses that are off by the rounding of their sums make of the same steps, and the
    roundings of the steps themselves.
    """
    *expected, largest = oracle(torch.float64, searches, **options)
    off = [
        oracle(torch.float64, searches, numpy.random.default_rng(i), **options) for i in range(8)
    ]
    weights = 2 * max(worst(xs, expected[0]) for xs, *_ in off)
    rates = [2 * max(abs(found[i] - expected[i]) for found in off) for i in (1, 2)]
    return expected, [weights + STEPS * ROUNDINGS * ulp(largest), *rates]


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_follows_the_formula(backend, weight_decay):
    params, opt, closure = trained(backend, weight_decay=weight_decay)
    searches = closure.searches()
    assert any(searches) and not all(searches)
    (expected, lr, momentum), atol = spread(searches, weight_decay=weight_decay)
    for p, x in zip(params, expected, strict=True):
        assert_within(p, x, atol[0])
    group = opt.param_groups[0]
    assert group["lr"] == pytest.approx(lr, rel=0, abs=atol[1])
    assert group["momentum"] == pytest.approx(momentum, rel=0, abs=atol[2])


def test_one_search_more_or_less_would_show():
    searches = trained()[2].searches()
    (expected, *_), atol = spread(searches)
    searches[STEPS // 2] = not searches[STEPS // 2]
    assert worst(oracle(torch.float64, searches)[0], expected) > atol[0]


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_float32_is_as_near_as_plain_arithmetic(backend, probability):
    params, _, closure = trained(backend, torch.float32, probability=probability)
    searches = closure.searches()
    assert any(searches) == (probability > 0)
    expected, *_ = oracle(torch.float64, searches)
    plain, _, _, largest = oracle(torch.float32, searches)
    assert worst(params, expected) <= 2 * worst(plain, expected) + ulp(largest)


def test_finds_the_minimizer_along_the_gradient_of_a_quadratic(backend):
    a = torch.linspace(0.5, 3, 200, dtype=torch.float64)
    start = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    opt = CGQ([weight], lr=0.01, probability=1.0, bound=10.0, backend=backend)

    def closure():
        opt.zero_grad()
        loss = (a * weight**2).sum() / 2
        if loss.requires_grad:
            loss.backward()
        return loss

    opt.step(closure)
    p = a * start
    curvature = p.dot(a * p)
    best = float(p.dot(p) / curvature)
    # The parabola's a is a difference of losses over trial²/2: their rounding grows by this.
    loss = float((a * start**2).sum() / 2)
    rtol = SUM_RTOL * loss / float(curvature * TRIAL**2 / 2)
    found = 2 * opt.param_groups[0]["lr"] - 0.01
    assert found == pytest.approx(best, rel=rtol)
    assert_within(weight, start - best * p, rtol * best * float(p.abs().max()))
    # Steepest descent with exact steps: the next gradient is at right angles to the last.
    assert float((a * weight.detach()).dot(p)) == pytest.approx(0, abs=rtol * float(p.dot(p)))


def test_a_step_is_no_longer_than_the_bound(backend):
    params = make_weights(dtype=torch.float64)
    opt = CGQ(params, lr=0.1, probability=1.0, bound=0.05, backend=backend)
    train(opt, params, 1)
    assert opt.param_groups[0]["lr"] == (0.1 + 0.05) / 2


def test_backends_agree_to_the_bit_between_searches(cpp):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        found = [trained(name, dtype, probability=0.0)[1] for name in (cpp, "reference")]
        assert_same(snapshot(found[0]), snapshot(found[1]))


def test_bfloat16_weights_keep_a_wide_buffer(backend):
    start = loss_of(make_weights(dtype=torch.bfloat16))
    params, opt, closure = trained(backend, torch.bfloat16)
    assert any(closure.searches())
    assert loss_of(params) < start
    for p in params:
        assert {name: v.dtype for name, v in opt.state[p].items()} == {
            "momentum_buffer": torch.float32,
            "last_gradient": torch.bfloat16,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_bit_and_to_the_same_draws(backend, dtype):
    _, opt, whole = trained(backend, dtype)
    half, first, _ = trained(backend, dtype, FEW)
    resumed = [torch.nn.Parameter(x) for x in values(half)]
    second = CGQ(resumed, lr=1.0, seed=5, backend=backend)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rest = train(second, resumed, STEPS - FEW, first=FEW)
    assert_same(snapshot(second), snapshot(opt))
    assert rest.calls == [call for call in whole.calls if call[0] >= FEW]


def test_a_copy_goes_on_alike(backend):
    params, opt, _ = trained(backend, steps=FEW)
    other = copy.deepcopy(opt)
    train(opt, params, FEW, first=FEW)
    train(other, other.param_groups[0]["params"], FEW, first=FEW)
    assert_same(snapshot(other), snapshot(opt))


def test_searches_are_drawn_with_their_probability_by_the_seed():
    one = [drawn(0, i) for i in range(4000)]
    assert one == [drawn(0, i) for i in range(4000)]
    assert one != [drawn(1, i) for i in range(4000)]
    # Five standard deviations of a share of 4,000 draws.
    for share in (0.1, 0.5):
        found = sum(x < share for x in one) / len(one)
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / len(one)))
    assert all(trained(probability=1.0, steps=FEW)[2].searches())
    assert not any(trained(probability=0.0, steps=FEW)[2].searches())
    assert trained()[2].searches() != trained(seed=1)[2].searches()


def test_a_search_calls_the_closure_once_with_gradients_and_twice_without(backend):
    closure = trained(backend, probability=1.0, steps=2)[2]
    assert closure.calls == [(t, grads) for t in range(2) for grads in (True, False, False)]


def test_losses_that_are_not_finite_keep_the_lr(backend):
    params, other = make_weights(), make_weights()
    opt = CGQ(params, lr=0.02, momentum=0.7, probability=1.0, backend=backend)
    plain = CGQ(other, lr=0.02, momentum=0.7, probability=0.0, backend=backend)
    # The first search has no g_last, so its β is the momentum: a plain step.
    lost = train(opt, params, 1, lost=(0,))
    train(plain, other, 1)
    assert len(lost.calls) == 2
    assert opt.param_groups[0]["lr"] == 0.02
    assert opt.param_groups[0]["momentum"] == 0.7
    assert_same(values(params), values(other))


def test_an_lr_of_zero_after_a_refused_search_leaves_the_weights_to_the_bit(backend):
    for dtype in (torch.float32, torch.bfloat16):
        params = make_weights(dtype=dtype)
        opt = CGQ(params, lr=0.0, probability=1.0, backend=backend)
        closure = train(opt, params, 1, lost=(0,))
        assert differs(closure.seen[1], closure.seen[0])
        assert_same(values(params), values(make_weights(dtype=dtype)))


def test_an_error_in_a_search_leaves_weights_and_generators_to_the_bit(backend):
    params = make_weights()
    opt = CGQ(params, lr=0.02, probability=1.0, backend=backend)
    inner, after = Closure(params), []

    def closure():
        if not torch.is_grad_enabled():
            raise RuntimeError("the loss could not be had")
        torch.rand(3)
        after.append(torch.get_rng_state())
        return inner()

    with pytest.raises(RuntimeError, match="could not be had"):
        opt.step(closure)
    assert_same(values(params), values(make_weights()))
    assert torch.equal(torch.get_rng_state(), after[0])
    assert all(p.grad is not None for p in params)


def test_a_search_moves_neither_generators_nor_buffers_and_sees_one_mask():
    def make(probability):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        )
        opt = CGQ(model.parameters(), lr=0.0, probability=probability, model=model)
        return model, opt

    draws, counts = [], []

    def train_once(model, opt):
        z = torch.ones(6, 4).cumsum(0)

        def closure():
            opt.zero_grad()
            draws.append(torch.rand(3))
            counts.append(int(model[1].num_batches_tracked))
            loss = model(z).square().mean()
            if loss.requires_grad:
                loss.backward()
            return loss

        torch.manual_seed(1)
        opt.step(closure)
        return torch.get_rng_state()

    searching, plain = make(1.0), make(0.0)
    after = train_once(*searching)
    # All of the search see the buffers as the call with gradients left them.
    assert counts == [0, *[1] * (len(counts) - 1)]
    assert len(draws) > 2
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert torch.equal(after, train_once(*plain))
    buffers = [dict(model.named_buffers()) for model in (searching[0], plain[0])]
    assert_same(*buffers)


def test_a_weight_without_gradient_stays(backend):
    params, opt, closure = trained(backend, steps=FEW)
    before = copy.deepcopy(opt.state[params[1]]), params[1].detach().clone()
    moving = params[0].detach().clone()

    def partly():
        loss = closure()
        params[1].grad = None
        return loss

    for probability in (0.0, 1.0):
        opt.param_groups[0]["probability"] = probability
        opt.step(partly)
    assert_same((opt.state[params[1]], params[1].detach()), before)
    assert not torch.equal(params[0], moving)


def test_groups_share_what_is_learned_and_have_decays_of_their_own(backend):
    whole = trained(backend)[1]
    params = make_weights(dtype=torch.float64)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    split = CGQ(groups, **OPTIONS, backend=backend)
    train(split, params)
    for group in split.param_groups:
        assert group["lr"] == whole.param_groups[0]["lr"]
        assert group["momentum"] == whole.param_groups[0]["momentum"]
    assert_same(values(params), values(whole.param_groups[0]["params"]))

    params = make_weights(dtype=torch.float64)
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}]
    mixed = CGQ(groups, **{**OPTIONS, "probability": 0.0}, backend=backend)
    train(mixed, params)
    free, _, _, largest = oracle(torch.float64, [False] * STEPS, weight_decay=0.0)
    decayed, *_ = oracle(torch.float64, [False] * STEPS)
    for p, x in zip(params, [*free[:1], *decayed[1:]], strict=True):
        assert_within(p, x, STEPS * ROUNDINGS * ulp(largest))


def test_an_added_group_takes_over_what_has_been_learned(backend):
    params, opt, _ = trained(backend)
    more = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt.add_param_group({"params": [more]})
    for name in ("lr", "momentum", "draws"):
        assert opt.param_groups[1][name] == opt.param_groups[0][name]
    train(opt, [*params, more], 2, first=STEPS)
    assert not torch.equal(more, torch.ones_like(more))
    with pytest.raises(ValueError, match="^lr must be the same in all param groups, got"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 7.0})
    assert len(opt.param_groups) == 2


def test_lrs_that_have_come_apart_are_refused_before_anything_changes(backend):
    params = make_weights()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = CGQ(groups, **OPTIONS, backend=backend)
    opt.param_groups[1]["lr"] = 0.5
    closure, before = Closure(params), snapshot(opt)
    with pytest.raises(ValueError, match=r"lr must be the same .* got \[0.02, 0.5\]"):
        opt.step(closure)
    assert_same(snapshot(opt), before)
    assert not closure.calls


def test_a_missing_closure_and_missing_gradients_are_named(backend):
    _, opt, _ = trained(backend, steps=FEW)
    opt.zero_grad()
    before = snapshot(opt)
    with pytest.raises(ValueError, match="CGQ needs a closure .* got None"):
        opt.step()
    with pytest.raises(ValueError, match="expected gradients"):
        opt.step(lambda: torch.tensor(1.0))
    assert_same(snapshot(opt), before)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1.0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("probability", 1.5),
        ("trial", 0.0),
        ("bound", float("inf")),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*got {value}"):
        CGQ(make_weights(), **{**OPTIONS, name: value})


def test_a_fit_that_overshoots_is_made_once_more_with_what_it_found():
    seen = []

    def quartic(t):
        seen.append(t)
        return 5 - t + 50 * t**4

    found = line_search(quartic, 5.0, -1.0, TRIAL, BOUND)
    # All but straight near 0, so that the first fit leads to the bound.
    assert seen[:2] == [TRIAL, BOUND]
    assert len(seen) == 3
    assert found == seen[2]
    # The least-squares solution of t²·a + t·b + c by its normal equations, in units of the trial.
    rows = numpy.array([[0, 0, 1], [1, 1, 1], [625, 25, 1], [0, 1, 0]], dtype=float)
    known = [0, quartic(TRIAL) - 5, quartic(BOUND) - 5, -TRIAL]
    a, b, _ = numpy.linalg.solve(rows.T @ rows, rows.T @ known)
    # The equations' condition number is the square of the rows' own.
    rtol = numpy.finfo(float).eps * numpy.linalg.cond(rows) ** 2
    assert found == pytest.approx(-b / (2 * a) * TRIAL, rel=rtol)


@pytest.mark.parametrize(
    "rises, slope",
    [
        ([-0.03], -1.0),  # bent downwards
        ([0.01], 1.0),  # uphill
        ([0.01], 0.0),
        ([math.nan], -1.0),
        ([math.inf], -1.0),
        ([0.01], math.nan),
    ],
)
def test_an_unfit_parabola_has_no_minimizer(rises, slope):
    assert minimizer([0.02], rises, slope, 1.0) is None


def test_a_loss_that_never_falls_is_given_up_after_three():
    seen = []

    def jump(t):
        seen.append(t)
        return 1 + t

    assert line_search(jump, 1.0, -1.0, TRIAL, BOUND) is None
    assert len(seen) == 3


def test_conjugacy_is_clamped_and_absent_without_a_last_gradient():
    assert polak_ribiere(4.0, 3.0, 2.0) == 0.5
    assert polak_ribiere(4.0, 5.0, 2.0) == 0.0
    assert polak_ribiere(4.0, -5.0, 2.0) == 0.8
    assert polak_ribiere(4.0, 0.0, 0.0) is None
    assert polak_ribiere(math.nan, 1.0, 1.0) is None
    assert polak_ribiere(math.inf, 1.0, 1.0) is None


def averaged():
    """Ranks with losses of their own and one average gradient, as data parallel training has it."""
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    opt = CGQ([weight], **OPTIONS)
    spread_out = torch.distributed.is_initialized()
    targets = [torch.distributed.get_rank()] if spread_out else [0, 1]
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        losses = [(1 + target) * (weight - 5 * target).square().sum() / 2 for target in targets]
        loss = torch.stack(losses).mean()
        if loss.requires_grad:
            loss.backward()
            if spread_out:
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= torch.distributed.get_world_size()
        return loss

    for _ in range(STEPS):
        opt.step(closure)
    return weight.detach(), opt.param_groups[0]["lr"], calls


def test_ranks_with_losses_of_their_own_decide_alike(ranks):
    first, second = ranks(2).run("test_cgq.averaged")
    assert_same(first, second)
    weight, lr, calls = averaged()
    assert first[2] == calls
    # One sum of two numbers in another order: none.
    assert first[1] == lr
    assert torch.equal(first[0], weight)


def sharded(probability):
    """Weights that lie over the ranks, or whole ones; what they are after steps, whole."""
    params = make_weights(((4,), (6, 3)), torch.float64)
    if spread_out := torch.distributed.is_initialized():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        params = [
            torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params
        ]

    def whole(p):
        return p.detach().full_tensor() if spread_out else p.detach()

    opt = CGQ(params, **{**OPTIONS, "probability": probability})
    step = 0

    def closure():
        found = [slopes_of(whole(p), step) for p in params]
        for p, (_, g) in zip(params, found, strict=True):
            grad = distribute_tensor(g, mesh, [Shard(0)]) if spread_out else g
            p.grad = grad if torch.is_grad_enabled() else None
        return torch.tensor(sum(loss for loss, _ in found), dtype=torch.float64)

    for step in range(FEW):  # noqa: B007  the closure reads it
        opt.step(closure)
    return [whole(p).clone() for p in params], opt.param_groups[0]["lr"]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_sharded_weights_step_as_whole_ones(ranks, probability):
    found = ranks(2).run("test_cgq.sharded", probability)
    assert_same(found[0], found[1])
    expected, lr = sharded(probability)
    if not probability:
        assert_same(found[0], (expected, lr))
        return
    # The slope is added in another order; this leaves room for what the parabola makes of it.
    for p, x in zip(found[0][0], expected, strict=True):
        torch.testing.assert_close(p, x, rtol=SUM_RTOL, atol=SUM_RTOL * FEW * float(x.abs().max()))
    assert found[0][1] == pytest.approx(lr, rel=SUM_RTOL * FEW)


def test_an_error_in_a_search_leaves_the_vectors_as_they_were():
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    opt = CGQ([weight], lr=0.01, probability=1.0)
    fails = False

    def closure():
        opt.zero_grad()
        loss = (weight**2).sum()
        if loss.requires_grad:
            loss.backward()
        elif fails:
            raise RuntimeError("out of memory")
        return loss

    opt.step(closure)
    before = {name: t.clone() for name, t in opt.state[weight].items()}
    fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure)
    assert all(torch.equal(opt.state[weight][name], t) for name, t in before.items())
