"""What tests share: optimizers on every road, gradients for them, how far results may differ."""

import copy

import torch

from mechanic_fused import (
    Lion,
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicSGD,
    mechanize,
)


# Only the exact classes are fused: a subclass takes the general road with the same arithmetic.
class PlainSGD(torch.optim.SGD):
    pass


class PlainAdam(torch.optim.Adam):
    pass


class PlainAdamW(torch.optim.AdamW):
    pass


class PlainLion(Lion):
    pass


FUSED = {"sgd": MechanicSGD, "adam": MechanicAdam, "adamw": MechanicAdamW, "lion": MechanicLion}
GENERAL = {
    "sgd": mechanize(PlainSGD),
    "adam": mechanize(PlainAdam),
    "adamw": mechanize(PlainAdamW),
    "lion": mechanize(PlainLion),
}
PLAIN = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "lion": Lion,
}
ROADS = ("reference", "cpp", "general")

# Options under which each base does all that it can: its state, its weight decay.
OPTIONS = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02},
    "adam": {"lr": 1.0, "weight_decay": 0.02},
    "adamw": {"lr": 1.0, "weight_decay": 0.02},
    "lion": {"lr": 0.5, "weight_decay": 0.02},
}

# A start from which the weights move visibly within STEPS steps.
QUICK = {"s_init": 0.1}
STEPS = 20
# A scale at which S·Δ is lost beside x: the weights stay where they are.
LOST = 1e-30
# An ε of the tuner that is lost beside all that it is added to.
TINY_EPS = 1e-300
# Enough steps for the tuner to have left its start.
FEW = 5
# Enough for most of the loss to be gone.
LONG = 40

# What is left of a loss that has been learned from, at most.
LEARNED = 0.5

SCALES = ("global", "group", "parameter")
NARROW_TOO = (torch.float32, torch.bfloat16)

# Nothing; one; less than, across and beyond a vector, a block of 1,024 and a chunk of 16,384.
SIZES = (0, 1, 3, 63, 1025, 65537)
SHAPES = ((3,), (5, 13), (1025,))

WIDE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# Sums of float64 in another order: a few hundred roundings of 1e-16 at most.
SUM_RTOL = 1e-12


def build(road, base, params, **options):
    """An optimizer of ours on a road: a backend's name, or "general"."""
    if road == "general":
        return GENERAL[base](params, **options)
    return FUSED[base](params, backend=road, **options)


def make_weights(shapes=SHAPES, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(x.to(dtype)) for x in weights]


def noise(p, rng):
    return torch.randn(p.shape, generator=rng, dtype=torch.float64)


def gradients(params, t):
    """Of ½Σd(x − o)² with noise, the same at every call with the same x and t."""
    rng = torch.Generator().manual_seed(t)
    found = []
    for p in params:
        i = torch.arange(p.numel()).reshape(p.shape)
        g = (1 + i % 5) * (p.detach().double() - i.double().cos()) + 0.3 * noise(p, rng)
        found.append(g.to(p.dtype))
    return found


def set_gradients(params, t):
    for p, g in zip(params, gradients(params, t), strict=True):
        p.grad = g


def loss_of(params):
    """The ½Σd(x − o)² that `gradients` descends, without its noise."""
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


def values(params):
    return [p.detach().clone() for p in params]


def snapshot(opt, params=()):
    """All that a step may change, copied: weights, state and param groups."""
    own = [p for group in opt.param_groups for p in group["params"]]
    return copy.deepcopy(
        {"weights": values([*own, *params]), "optimizer": opt.state_dict()},
    )


def leaves(tree, path=""):
    """(path, leaf) of a nest of dicts, lists and tuples."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        yield f"{path}.length", len(tree)
        for i, value in enumerate(tree):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, tree


def assert_same(actual, expected):
    """The same nest of the same values: tensors to the bit, with their dtypes and strides."""
    actual, expected = dict(leaves(actual)), dict(leaves(expected))
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


def double(p):
    """A copy in float64."""
    return p.detach().clone().double()


def differs(one, other):
    try:
        assert_same(one, other)
    except AssertionError:
        return True
    return False


def ulp(*tensors):
    """The spacing of numbers of this dtype at the largest magnitude among the tensors."""
    size = max([float(t.detach().abs().max()) for t in tensors if t.numel()], default=0.0)
    return torch.finfo(tensors[0].dtype).eps * size


def assert_within(actual, expected, atol):
    """Elementwise, in float64."""
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=0, atol=atol
    )


def scale_of(opt, p):
    """S of the scale that p belongs to."""
    for group, scales in zip(opt.param_groups, opt.group_scales(), strict=True):
        for i, other in enumerate(group["params"]):
            if other is p:
                return scales[i] if len(scales) > 1 else scales[0]
    raise LookupError("the weight is in no group")


def move(opt, p):
    """S·Δ of a weight as it stands, in float64: where it is beside its reference."""
    return scale_of(opt, p) * opt.state[p]["delta"].double()


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
    """Inputs and targets of step t for SmallNet."""
    rng = torch.Generator().manual_seed(t)
    z = torch.randn(8, 4, generator=rng)
    return z, torch.sin(z)


def train_net(model, opt, steps=STEPS, first=0, forward=None):
    losses = []
    for t in range(first, first + steps):
        z, y = batch(t)
        loss = ((model if forward is None else forward)(z) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses
