"""What tests share: the table of bases, a problem to train on, comparisons and tolerances."""

import copy
from typing import Any, NamedTuple

import pytest
import torch

from mechanic_fused import (
    Lion,
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicSGD,
    backends,
    mechanize,
)

PLAIN = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "lion": Lion}
FUSED = {"sgd": MechanicSGD, "adam": MechanicAdam, "adamw": MechanicAdamW, "lion": MechanicLion}
# Only the exact classes are fused: a subclass takes the fallback, with the same arithmetic.
PlainSGD, PlainAdam, PlainAdamW, PlainLion = (
    type(f"Plain{base.__name__}", (base,), {"__module__": __name__}) for base in PLAIN.values()
)
FALLBACK = {
    "sgd": mechanize(PlainSGD),
    "adam": mechanize(PlainAdam),
    "adamw": mechanize(PlainAdamW),
    "lion": mechanize(PlainLion),
}
RADAM = mechanize(torch.optim.RAdam)
# The backends of the CPU, and the fallback.
IMPLEMENTATIONS = ("reference", "cpp", "fallback")


class Case(NamedTuple):
    """A base and options for it: a row of CASES."""

    base: str
    options: dict[str, Any]


LR = {"sgd": 0.05, "adam": 1.0, "adamw": 1.0, "lion": 0.5}
L2 = DECAY = {"weight_decay": 0.1}
MOMENTUM = {"momentum": 0.9}
BETAS = {"betas": (0.8, 0.95)}


def case(base, **options):
    return Case(base, {"lr": LR[base], **options})


# The one table of bases and options. A name says what its row has; weight decay comes along where
# the row is to read and write all that its kernel can.
CASES = {
    "sgd": case("sgd"),
    "sgd l2": case("sgd", **L2),
    "momentum": case("sgd", **MOMENTUM),
    "dampening": case("sgd", **MOMENTUM, dampening=0.3, **L2),
    "nesterov": case("sgd", **MOMENTUM, nesterov=True, **L2),
    "sgd maximize": case("sgd", **MOMENTUM, **L2, maximize=True),
    "adam": case("adam"),
    "adam l2": case("adam", lr=0.7, **BETAS, eps=1e-6, **L2),
    "adam decoupled": case("adam", **DECAY, decoupled_weight_decay=True),
    "adamw": case("adamw", **DECAY),
    "adamw without decay": case("adamw", weight_decay=0.0),
    "adamw betas": case("adamw", **BETAS, eps=1e-6, **DECAY),
    "adamw maximize": case("adamw", **DECAY, maximize=True),
    "lion": case("lion"),
    "lion decay": case("lion", **BETAS, **DECAY),
    "lion maximize": case("lion", **DECAY, maximize=True),
}
# A row for each base that uses every stream of memory of its kernel, and its options.
FULL = ("dampening", "adam l2", "adamw", "lion decay")
OPTIONS = {CASES[name].base: CASES[name].options for name in FULL}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDTHS = (torch.float32, torch.bfloat16)  # as wide as the arithmetic, and narrower
# The dtype of the weights → that of the arithmetic.
WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in DTYPES}
SCALE_PER = ("model", "group", "parameter")

# A start from which the weights move visibly within STEPS steps, at the rates of LR.
QUICK = {"s_init": 0.1}
FEW = 5  # steps after which the tuner has left its start
STEPS = 20
LONG = 40  # steps after which most of the loss is gone
LEARNED = 0.5  # what is left, at most, of a loss that has been learned from
LOST = 1e-30  # a scale at which S·Δ is lost beside x: the weights stay where they are
TINY_EPS = 1e-300  # an ε of the tuner that is lost beside everything that it is added to
# The exact form that is not one of the published packages.
EXACT = "annealed"
RUNNING = "running"
# Nothing; one; less than, across and beyond a vector, a block of 1,024 and a chunk of 16,384.
SIZES = (0, 1, 3, 63, 1025, 65537)
SHAPES = ((3,), (5, 13), (1025,))
# Sums of float64 in another order: a few hundred roundings of 1e-16 at most.
SUM_RTOL = 1e-12


def skip_unless_available(name):
    row = next(row for row in backends.table() if row.name == name)
    if not row.available:
        pytest.skip(row.why)


def build(implementation, base, params, **options):
    """Return an optimizer of ours: by a backend's name, by the fallback, or of a given class.

    It is of the exact form unless the options or the class name a variant.
    """
    if getattr(implementation, "_class_options", {}).get("variant") is None:
        options.setdefault("variant", EXACT)
    if callable(implementation):
        return implementation(params, **options)
    if implementation == "fallback":
        return FALLBACK[base](params, **options)
    return FUSED[base](params, backend=implementation, **options)


# The problem


def make_weights(shapes=SHAPES, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(x.to(dtype)) for x in weights]


def noise(p, rng):
    return torch.randn(p.shape, generator=rng, dtype=torch.float64)


def gradients(params, t):
    """Return those of ½Σd(x − o)² with noise: the same at every call with the same x and t."""
    rng = torch.Generator().manual_seed(t)
    found = []
    for p in params:
        i = torch.arange(p.numel()).reshape(p.shape)
        g = (1 + i % 5) * (p.detach().double() - i.double().cos()) + 0.3 * noise(p, rng)
        found.append(g.to(p.dtype))
    return found


def give(params, grads):
    """Set gradients; None takes one away."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def set_gradients(params, t):
    give(params, gradients(params, t))


def loss_of(params):
    """Return the ½Σd(x − o)² that `gradients` descends, without its noise."""
    total = 0.0
    for p in params:
        i = torch.arange(p.numel()).reshape(p.shape)
        total += float(((1 + i % 5) * (p.detach().double() - i.double().cos()) ** 2).sum()) / 2
    return total


def run(opt, params, steps=STEPS, first=0):
    """Take steps number `first` … on the quadratic."""
    for t in range(first, first + steps):
        set_gradients(params, t)
        opt.step()


class Training:
    """Weights, an optimizer over them, perhaps a schedule, and the steps taken on the quadratic.

    Args:
        implementation: as for `build`.
        base: a key of FUSED.
        params: the weights; None makes them of `shapes`, `dtype` and `seed`.
        groups: weights → what the optimizer is given.
        schedule: optimizer → a scheduler, stepped after each step.
        options: of the optimizer; QUICK and LR unless given.
    """

    def __init__(
        self,
        implementation="auto",
        base="adamw",
        params=None,
        *,
        shapes=SHAPES,
        dtype=torch.float32,
        seed=0,
        groups=list,
        schedule=None,
        **options,
    ):
        self.params = make_weights(shapes, dtype, seed) if params is None else list(params)
        options = {**QUICK, "lr": LR[base], **options}
        self.opt = build(implementation, base, groups(self.params), **options)
        self.schedule = schedule and schedule(self.opt)
        self.t = 0

    def run(self, steps=STEPS, *parts):
        """Take further steps, with gradients for each of these lists of weights or for all."""
        for _ in range(steps):
            for part in parts or (self.params,):
                set_gradients(part, self.t)
            self._step()
        return self

    def step(self, grads):
        """Take a step with these gradients."""
        give(self.params, grads)
        self._step()
        return self

    def _step(self):
        self.opt.step()
        if self.schedule:
            self.schedule.step()
        self.t += 1

    def step_on_zeros(self):
        return self.step([torch.zeros_like(p) for p in self.params])

    @property
    def x(self):
        return values(self.params)

    @property
    def loss(self):
        return loss_of(self.params)

    @property
    def group(self):
        return self.opt.param_groups[0]

    def states(self, name):
        return [self.opt.state[p][name] for p in self.params]

    def snapshot(self):
        return snapshot(self.opt)

    def saved(self):
        """Return what a checkpoint holds."""
        schedule = self.schedule.state_dict() if self.schedule else {}
        return {"weights": self.x, "optimizer": self.opt.state_dict(), "schedule": schedule}

    def load(self, saved, t):
        """Go on from a checkpoint of `saved`, made after t steps."""
        write(self.params, saved["weights"])
        self.opt.load_state_dict(saved["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(saved["schedule"])
        self.t = t
        return self


def sum_of_updates(base, training, steps=STEPS, change=None, schedule=None, **options):
    """Step a training whose weights stay where they are beside the plain base; sum its updates.

    Args:
        base: the plain optimizer; its weights are put back after each step.
        training: has an S at which S·Δ is lost; it is frozen.
        steps: how many.
        change: called with each optimizer and t before step t.
        schedule: as that of the training.
        options: of the base.

    Returns:
        A float64 tensor for each weight: what its Δ should be.
    """
    training.opt.freeze_scale()
    start = training.x
    alone = copies(training.params)
    plain = base(alone, **options)
    scheduler = schedule and schedule(plain)
    total = [torch.zeros_like(x, dtype=torch.float64) for x in start]
    for t in range(steps):
        for opt in (training.opt, plain):
            if change:
                change(opt, t)
        grads = gradients(start, t)
        training.step(grads)
        give(alone, values(grads))
        plain.step()
        if scheduler:
            scheduler.step()
        for p, x, u in zip(alone, start, total, strict=True):
            u += p.detach() - x
            p.data.copy_(x)
    assert_same(training.x, start)
    return total


def write(params, xs):
    """Write to the weights as loaders do."""
    with torch.no_grad():
        for p, x in zip(params, xs, strict=True):
            p.copy_(x)


def copies(params):
    """Return weights of their own with the same values."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


class SmallNet(torch.nn.Module):
    """Two layers, a tied weight, a buffer: a model as people have them."""

    def __init__(self, seed=0):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("unit", torch.ones(4))
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=rng))

    def forward(self, z):
        return self.second(torch.tanh(self.first(z))) * self.unit


def batch(t):
    """Return inputs and targets of step t for SmallNet."""
    rng = torch.Generator().manual_seed(t)
    z = torch.randn(8, 4, generator=rng)
    return z, torch.sin(z)


def net_loss(model, t):
    z, y = batch(t)
    return (model(z) - y).square().mean()


def train_net(model, opt, steps=STEPS, first=0):
    """Take steps number `first` …; return the losses."""
    losses = []
    for t in range(first, first + steps):
        opt.zero_grad()
        loss = net_loss(model, t)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


# Comparisons


def values(params):
    return [p.detach().clone() for p in params]


def snapshot(opt, params=()):
    """Copy all that a step may change: weights, state and param groups."""
    own = [p for group in opt.param_groups for p in group["params"]]
    return copy.deepcopy({"weights": values([*own, *params]), "optimizer": opt.state_dict()})


def leaves(tree, path=""):
    """Yield (path, leaf) of a nest of dicts, lists and tuples."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        yield f"{path}.length", len(tree)
        for i, value in enumerate(tree):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, tree


def assert_same(first, *others):
    """Check that nests hold the same values: tensors to the bit, with their dtypes and strides."""
    expected = dict(leaves(first))
    for other in others:
        actual = dict(leaves(other))
        assert actual.keys() == expected.keys()
        for path, value in expected.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(
                    actual[path],
                    value,
                    rtol=0,
                    atol=0,
                    equal_nan=True,
                    check_stride=True,
                    msg=lambda text, path=path: f"{path}: {text}",
                )
            else:
                assert actual[path] == value, path


def differs(one, other):
    try:
        assert_same(one, other)
    except AssertionError:
        return True
    return False


def ulp(*tensors):
    """Return the spacing of numbers of this dtype at the largest magnitude among the tensors."""
    size = max([float(t.detach().abs().max()) for t in tensors if t.numel()], default=0.0)
    return torch.finfo(tensors[0].dtype).eps * size


def assert_within(actual, expected, atol):
    """Compare elementwise, in float64."""
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=0, atol=atol
    )


def assert_near(actual, expected, rtol):
    """Compare lists of tensors, to rtol of the largest element of each."""
    for own, other in zip(actual, expected, strict=True):
        assert_within(own, other, rtol * float(other.detach().abs().max()))


def double(p):
    """Return a copy in float64."""
    return p.detach().clone().double()


def scale_of(opt, p):
    """Return S of the scale that p belongs to."""
    for group, scales in zip(opt.param_groups, opt.group_scales(), strict=True):
        for i, other in enumerate(group["params"]):
            if other is p:
                return scales[i] if len(scales) > 1 else scales[0]
    raise LookupError("the weight is in no group")


def move(opt, p):
    """Return S·Δ of a weight as it stands, in float64: where it is beside its reference."""
    return scale_of(opt, p) * opt.state[p]["delta"].double()
