"""Every backend, and the oracle itself, against the definition's numbers and the authors' packages;
then every backend against the oracle where the packages have no answer."""

import functools
import json

import mechanic_pytorch
import numpy as np
import pytest
import record_optax
import torch
from oracle import Oracle

from mechanic_fused import (
    Lion,
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicSGD,
    backends,
    mechanize,
)

# The table is printed with seven digits.
TABLE_RTOL = 1e-6
# The same float64 arithmetic in another order; measured 1e-15 on Σs.
PACKAGE_RTOL = 1e-12
# optax recomputes Δ as (x − x_ref)/(S + ε): at S = 1e-6 its ε of 1e-14 costs 1e-8 a step.
OPTAX_RTOL = 1e-7
# float64 against float64 over 20 steps: a few hundred roundings, sums in another order.
FLOAT64_RTOL = 1e-12
# A backend may err at most twice as much as the plainest numpy program of the same width.
WIDTH_FACTOR = 2
# One rounding of a float32 coefficient (lr, a bias correction) shifts every u, and so Σs, by this.
FLOAT32_ROUNDING = 2.0**-24
# Weights of size 1 must go at least this far, or a comparison of them shows nothing.
MOVED = 0.05
STEPS = 20
PACKAGE_STEPS = 200

OURS = {
    "sgd": MechanicSGD,
    "adam": MechanicAdam,
    "adamw": MechanicAdamW,
    "lion": MechanicLion,
}
# Only the exact classes are fused: a subclass takes the general road with the same arithmetic.
GENERAL = {
    name: mechanize(type(f"My{base.__name__}", (base,), {}))
    for name, base in {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
        "lion": Lion,
    }.items()
}


class OracleRun:
    """The oracle behind the few names of an optimizer that these tests use."""

    def __init__(self, params, **options):
        self.params = list(params)
        self.oracle = Oracle([p.detach().numpy() for p in self.params], **options)

    def step(self):
        self.oracle.step([None if p.grad is None else p.grad.numpy() for p in self.params])
        with torch.no_grad():
            for p, x in zip(self.params, self.oracle.x, strict=True):
                p.copy_(torch.from_numpy(x))

    @property
    def scale(self):
        return torch.from_numpy(self.oracle.scale)


def skip_unless_available(name):
    row = next(row for row in backends.table() if row.name == name)
    if not row.available:
        pytest.skip(row.why)


@pytest.fixture(autouse=True)
def one_thread():
    """Waiting for a second core of a busy machine would take longer than these small sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    skip_unless_available(request.param)
    return request.param


@pytest.fixture(params=["oracle", "reference", "cpp"])
def build(request):
    """build(base, params, **options) → an optimizer: the oracle or one of our backends."""
    if request.param == "oracle":
        return lambda base, params, **options: OracleRun(params, base=base, **options)
    skip_unless_available(request.param)
    return lambda base, params, **options: OURS[base](params, backend=request.param, **options)


@pytest.fixture(params=["reference", "cpp", "general"])
def on_road(request):
    """on_road(base, params, **options) → an optimizer of ours on a backend or the general road."""
    if request.param == "general":
        return lambda base, params, **options: GENERAL[base](params, **options)
    skip_unless_available(request.param)
    return lambda base, params, **options: OURS[base](params, backend=request.param, **options)


def parameters(weights, dtype=torch.float64):
    return [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in weights]


def set_gradients(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)


def arrays(params):
    return [p.detach().double().numpy() for p in params]


# The table of the definition: Σs after step t on f = ½Σd(x−o)².
COLUMNS = (
    ("paper", "sgd", 0.01),
    ("paper", "adam", 0.01),
    ("optax", "sgd", 0.01),
    ("optax", "adam", 0.01),
    ("pytorch", "sgd", 0.01),
    ("pytorch", "sgd", 0.0),
)
TABLE = """
     1  0             0             1.000000e-06  1.000000e-06  9.814815e-07  9.814815e-07
     2  1.000000e-08  1.000000e-08  1.000000e-06  1.000000e-06  9.914815e-07  9.914815e-07
     3  1.795347e-08  1.795347e-08  1.346510e-06  1.346511e-06  1.331515e-06  1.331515e-06
     5  4.131528e-08  4.131528e-08  2.401776e-06  2.401779e-06  2.632947e-06  2.632947e-06
    10  2.346038e-07  2.346038e-07  1.021713e-05  1.021727e-05  1.414581e-05  1.414581e-05
    20  4.696857e-06  4.696769e-06  1.594481e-04  1.594640e-04  2.780260e-04  2.780258e-04
    40  1.013640e-03  1.003426e-03  2.675277e-02  1.988959e-02  5.284357e-02  5.283799e-02
    60  1.795242e-01  1.763340e-02  2.631734e-01  2.109991e-02  2.801506e-01  2.803900e-01
"""


@pytest.mark.parametrize(("variant", "base", "s_decay"), COLUMNS)
def test_table_of_the_definition(build, variant, base, s_decay):
    rows = np.array([line.split() for line in TABLE.strip().splitlines()], dtype=float)
    steps, expected = rows[:, 0], rows[:, 1 + COLUMNS.index((variant, base, s_decay))]
    d, o = np.array([1.0, 4.0, 10.0]), np.array([1.0, -1.0, 0.5])
    params = parameters([[0.3, 0.2, -0.4]])
    lr = {"sgd": 0.01, "adam": 1.0}[base]
    opt = build(base, params, lr=lr, variant=variant, s_decay=s_decay)
    seen = []
    for t in range(1, int(steps[-1]) + 1):
        set_gradients(params, [d * (x - o) for x in arrays(params)])
        opt.step()
        if t in steps:
            seen.append(float(opt.scale.sum()))
    np.testing.assert_allclose(seen, expected, rtol=TABLE_RTOL, atol=0)


@pytest.fixture
def float64_by_default():
    """mechanic_pytorch makes its tuner's state in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def train_network(make, scale_of=lambda opt: opt.scale):
    """Σs after each step and the weights after the last: a small tanh network on small batches."""
    rng = torch.Generator().manual_seed(0)
    z, noise = torch.randn(64, 5, generator=rng), torch.randn(64, 2, generator=rng)
    y = torch.stack([z[:, 0] * z[:, 1], z[:, 2].sin()], dim=1) + 0.1 * noise
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=rng)
    opt = make(model.parameters())
    scale = []
    for t in range(PACKAGE_STEPS):
        rows = slice(8 * (t % 8), 8 * (t % 8) + 8)
        loss = (model(z[rows]) - y[rows]).square().mean()
        for p in model.parameters():
            p.grad = None
        loss.backward()
        opt.step()
        scale.append(float(scale_of(opt).sum()))
    return np.array(scale), torch.cat([p.detach().ravel() for p in model.parameters()])


PACKAGE_CASES = {
    "sgd": ("sgd", torch.optim.SGD, {"lr": 0.1}),
    "momentum": ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "l2": ("sgd", torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "adam": ("adam", torch.optim.Adam, {"lr": 1.0, "weight_decay": 0.01}),
    "adamw": ("adamw", torch.optim.AdamW, {"lr": 1.0, "weight_decay": 0.05}),
}


def train_with_package(torch_base, options):
    package = mechanic_pytorch.mechanize(torch_base, s_decay=0.0, store_delta=True)
    return train_network(
        lambda params: package(params, **options),
        scale_of=lambda opt: opt.state["_mechanic"]["s"],
    )


def assert_same_run(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=PACKAGE_RTOL, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=PACKAGE_RTOL, atol=PACKAGE_RTOL)


@functools.cache
def package_run(case):
    _, torch_base, options = PACKAGE_CASES[case]
    return train_with_package(torch_base, options)


@pytest.mark.parametrize("case", PACKAGE_CASES)
def test_two_hundred_steps_of_mechanic_pytorch(build, case, float64_by_default):
    base, _, options = PACKAGE_CASES[case]
    ours = train_network(
        lambda params: build(base, params, variant="pytorch", s_decay=0.0, **options)
    )
    assert_same_run(ours, package_run(case))


@pytest.mark.parametrize(
    ("torch_base", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.NAdam, {"lr": 1.0}),
        (torch.optim.RMSprop, {"lr": 0.1}),
    ],
)
def test_mechanize_any_base_is_mechanic_pytorch(torch_base, options, float64_by_default):
    make = mechanize(torch_base, s_decay=0.0, variant="pytorch")
    ours = train_network(lambda params: make(params, **options))
    assert_same_run(ours, train_with_package(torch_base, options))


@pytest.mark.parametrize("case", record_optax.CASES)
def test_recorded_optax_run(build, case):
    golden = json.loads(record_optax.GOLDEN.read_text())[case]
    assert golden["options"] == record_optax.CASES[case]
    base = case if case in OURS else "sgd"
    params = parameters(record_optax.start())
    opt = build(base, params, tuner_eps=record_optax.EPS, variant="optax", **golden["options"])
    for t in range(1, record_optax.STEPS + 1):
        set_gradients(params, record_optax.gradient(arrays(params), t))
        opt.step()
        seen = float(opt.scale.sum())
        np.testing.assert_allclose(seen, golden["scale"][t - 1], rtol=OPTAX_RTOL, err_msg=f"{t=}")
        if t in record_optax.X_AT:
            x = np.concatenate([x.ravel() for x in arrays(params)])
            np.testing.assert_allclose(x, golden["x"][str(t)], rtol=OPTAX_RTOL, atol=OPTAX_RTOL)


# The last is one chunk of 4,096 and a remainder.
SHAPES = ((1,), (7,), (5, 13), (4099,))

CASES = {
    "sgd": ("sgd", {"lr": 0.05}),
    "dampened": (
        "sgd",
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    ),
    "nesterov": ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "maximize": ("sgd", {"lr": 0.05, "momentum": 0.9, "maximize": True, "weight_decay": 0.05}),
    "adam": ("adam", {"lr": 1.0, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}),
    "adamw": ("adamw", {"lr": 1.0, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}),
    "adamw maximize": ("adamw", {"lr": 1.0, "maximize": True, "weight_decay": 0.05}),
    "lion": ("lion", {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.05}),
}
# A start at which the weights move within 20 steps, and a λ that shows.
TUNER = {"s_init": 1e-2, "s_decay": 0.1}


def start_weights():
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape) for shape in SHAPES]


def noisy_gradients(weights, t, sign=1.0):
    """Of ½Σd(x − o)² with its noise at step t; `sign` = −1 for those who maximize."""
    rng = np.random.default_rng([2, t])
    out = []
    for x in weights:
        i = np.arange(x.size).reshape(x.shape)
        out.append(sign * ((1 + i % 5) * (x - np.cos(i)) + 0.3 * rng.standard_normal(x.shape)))
    return out


def assert_agrees(opt, params, oracle):
    np.testing.assert_allclose(opt.scale.numpy(), oracle.scale, rtol=FLOAT64_RTOL, atol=0)
    for ours, x in zip(arrays(params), oracle.x, strict=True):
        np.testing.assert_allclose(ours, x, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


def walk_with_oracle(opt, params, oracle, edit=lambda t, gradients: gradients, sign=1.0):
    """STEPS steps of both on the gradients at the oracle's weights as `edit` changes them, compared
    after each."""
    first = [x.copy() for x in oracle.x]
    for t in range(1, STEPS + 1):
        gradients = edit(t, noisy_gradients(oracle.x, t, sign))
        set_gradients(params, gradients)
        opt.step()
        oracle.step(gradients)
        assert_agrees(opt, params, oracle)
    assert min(np.abs(x - x0).max() for x, x0 in zip(oracle.x, first, strict=True)) > MOVED


@pytest.mark.parametrize("variant", ["optax", "paper", "pytorch"])
@pytest.mark.parametrize("case", CASES)
def test_each_base_and_variant_is_the_oracle(backend, case, variant):
    base, options = CASES[case]
    options = {**options, **TUNER, "variant": variant}
    params = parameters(start_weights())
    opt = OURS[base](params, backend=backend, **options)
    sign = -1.0 if options.get("maximize") else 1.0
    walk_with_oracle(opt, params, Oracle(start_weights(), base, **options), sign=sign)


def test_tuner_options_reach_the_tuner(backend):
    options = {
        "lr": 1.0,
        "s_init": 0.02,
        "s_decay": 0.5,
        "tuner_eps": 1e-2,
        "tuner_betas": (0.5, 0.95),
    }
    params = parameters(start_weights())
    opt = MechanicAdamW(params, backend=backend, **options)
    walk_with_oracle(opt, params, Oracle(start_weights(), "adamw", **options))


@pytest.mark.parametrize("scale", ["global", "group", "parameter"])
def test_groups_and_scales_are_the_oracle(on_road, scale):
    def groups(weights):
        return [
            {"params": weights[:1], "lr": 1.0, "weight_decay": 0.1},
            {"params": weights[1:], "lr": 0.5, "betas": (0.7, 0.9)},
        ]

    params = parameters(start_weights())
    opt = on_road("adamw", groups(params), scale=scale, **TUNER)
    oracle = Oracle(groups(start_weights()), "adamw", scale=scale, **TUNER)
    assert opt.scale.shape == oracle.scale.shape
    walk_with_oracle(opt, params, oracle)


# Step → the weights without a gradient at it. At step 6 none has one.
ABSENT = {1: {2}, 2: {2}, 5: {0, 3}, 6: {0, 1, 2, 3}, 7: {1}, 11: {0, 1, 2}}


@pytest.mark.parametrize("scale", ["global", "parameter"])
@pytest.mark.parametrize("case", ["sgd", "dampened", "adamw", "lion"])
def test_gradients_that_come_and_go(on_road, case, scale):
    def edit(t, gradients):
        return [None if i in ABSENT.get(t, ()) else g for i, g in enumerate(gradients)]

    base, options = CASES[case]
    options = {**options, **TUNER, "scale": scale}
    params = parameters(start_weights())
    opt = on_road(base, params, **options)
    walk_with_oracle(opt, params, Oracle(start_weights(), base, **options), edit)


@pytest.mark.parametrize("scale", ["global", "parameter"])
@pytest.mark.parametrize("at", [{1: np.nan}, {5: np.nan, 6: np.inf, 12: -np.inf}])
@pytest.mark.parametrize("case", ["dampened", "adamw", "lion"])
def test_nonfinite_gradients_cost_their_own_element_and_step(on_road, case, at, scale):
    scales = {}

    def edit(t, gradients):
        scales[t] = opt.scale.clone()
        if t in at:
            gradients[3][[0, 4097]] = at[t]
        return gradients

    base, options = CASES[case]
    options = {**options, **TUNER, "scale": scale}
    params = parameters(start_weights())
    opt = on_road(base, params, **options)
    oracle = Oracle(start_weights(), base, **options)
    walk_with_oracle(opt, params, oracle, edit)
    assert int(opt.nonfinite_steps) == oracle.nonfinite_steps == len(at)
    row = 3 if scale == "parameter" else 0
    for t in at:
        assert scales[t + 1][row] == scales[t][row]
        assert scale == "global" or t == 1 or (scales[t + 1] != scales[t])[:row].all()


def test_zero_gradients_change_nothing_at_the_start_and_are_a_step_later(on_road):
    first_informative, zero_again = 4, 9

    def edit(t, gradients):
        if t < first_informative:
            return [-np.zeros_like(g) if t == 2 else np.zeros_like(g) for g in gradients]
        return [np.zeros_like(g) for g in gradients] if t == zero_again else gradients

    options = {"lr": 1.0, "weight_decay": 0.05, **TUNER}
    params = parameters(start_weights())
    opt = on_road("adamw", params, **options)
    walk_with_oracle(opt, params, Oracle(start_weights(), "adamw", **options), edit)


def rounding(dtype):
    """numpy in, rounded to `dtype`, numpy of the same width out: bfloat16 is none of numpy's."""
    return lambda x: torch.from_numpy(x).to(dtype).to(torch.from_numpy(x).dtype).numpy()


def assert_width(opt, params, base, options, dtype, size=1.0):
    """STEPS steps of ours, of the oracle, and of the oracle's formulas in plain float32, all three
    from the same rounded gradients and the weights that ours wrote.

    S and Δ of ours may err WIDTH_FACTOR times as much as plain's, and each of our weights must be
    the rounding of a number that near the exact one.
    """
    store = rounding(dtype)
    weights = [store(x) for x in start_weights()]
    exact = Oracle(weights, base, round_x=store, **options)
    plain = Oracle(weights, base, round_x=store, dtype=np.float32, **options)
    s_errors, delta_errors, plain_x_error = [], [], 0.0
    for t in range(1, STEPS + 1):
        gradients = [store(size * g) for g in noisy_gradients(exact.x, t)]
        set_gradients(params, gradients)
        opt.step()
        exact.step(gradients)
        plain.step(gradients)
        scales = np.concatenate([opt.scale.numpy(), plain.scale])
        s_errors.append(np.abs(scales / exact.scale - 1))
        delta = np.concatenate([d.ravel() for d in exact.delta])
        ours = np.concatenate([opt.state[p]["delta"].double().numpy().ravel() for p in params])
        plains = np.concatenate([d.ravel() for d in plain.delta])
        delta_errors.append(
            [np.linalg.norm(d - delta) / np.linalg.norm(delta) for d in (ours, plains)]
        )
        targets = [exact.unrounded(i) for i in range(len(params))]
        for i, target in enumerate(targets):
            plain_x_error = max(plain_x_error, np.abs(plain.unrounded(i) - target).max())
        margin = WIDTH_FACTOR * plain_x_error
        for i, (x, target) in enumerate(zip(arrays(params), targets, strict=True)):
            assert (store(target - margin) <= x).all()
            assert (x <= store(target + margin)).all()
            # The next step starts from what the model saw: a tie rounded otherwise is no error.
            exact.x[i], plain.x[i] = x.copy(), x.astype(np.float32)
    for errors in s_errors, delta_errors:
        ours, plains = np.max(errors, axis=0)
        assert ours <= WIDTH_FACTOR * plains + FLOAT32_ROUNDING
    assert max(np.abs(x - x0).max() for x, x0 in zip(exact.x, weights, strict=True)) > MOVED


WIDTHS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("case", ["dampened", "nesterov", "adam", "adamw", "lion"])
def test_narrow_weights_err_no_more_than_plain_float32(backend, case, dtype):
    base, options = CASES[case]
    options = {**options, **TUNER}
    params = parameters(start_weights(), dtype)
    opt = OURS[base](params, backend=backend, **options)
    assert_width(opt, params, base, options, dtype)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_of_float32_gradients_neither_overflow_nor_vanish(backend, size):
    options = {"lr": 0.05 / size, "tuner_eps": 1e-40, "s_init": 1e-2, "s_decay": 1.0}
    params = parameters(start_weights(), torch.float32)
    opt = MechanicSGD(params, backend=backend, **options)
    assert_width(opt, params, "sgd", options, torch.float32, size)
