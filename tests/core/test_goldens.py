"""Every backend, and the oracle itself, against published numbers and the authors' packages."""

import functools
import json

import mechanic_pytorch
import numpy as np
import pytest
import torch
from support import record_optax
from support.beside_oracle import arrays, give_arrays, parameters
from support.cases import FUSED, skip_unless_available, write
from support.oracle import Oracle

from mechanic_fused import mechanize

# The table is printed with seven digits.
TABLE_RTOL = 1e-6
# The same float64 arithmetic in another order; measured 1e-15 on Σs.
PACKAGE_RTOL = 1e-12
# optax recomputes Δ as (x − x_ref)/(S + ε): at S = 1e-6 its ε of 1e-14 costs 1e-8 a step.
OPTAX_RTOL = 1e-7
PACKAGE_STEPS = 200


class OracleRun:
    """The oracle behind the few names of an optimizer that these tests use."""

    def __init__(self, params, **options):
        self.params = list(params)
        self.oracle = Oracle([p.detach().numpy() for p in self.params], **options)

    def step(self):
        self.oracle.step([None if p.grad is None else p.grad.numpy() for p in self.params])
        write(self.params, map(torch.from_numpy, self.oracle.x))

    @property
    def scale(self):
        return torch.from_numpy(self.oracle.scale)


@pytest.fixture(params=["oracle", "reference", "cpp"])
def build(request):
    """build(base, params, **options) → an optimizer: the oracle's, or ours on a backend."""
    if request.param == "oracle":
        return lambda base, params, **options: OracleRun(params, base=base, **options)
    skip_unless_available(request.param)
    return lambda base, params, **options: FUSED[base](params, backend=request.param, **options)


# From the definition: Σs after step t on f = ½Σd(x−o)².
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
def test_the_scale_follows_the_table_of_the_definition(build, variant, base, s_decay):
    rows = np.array([line.split() for line in TABLE.strip().splitlines()], dtype=float)
    steps, expected = rows[:, 0], rows[:, 1 + COLUMNS.index((variant, base, s_decay))]
    d, o = np.array([1.0, 4.0, 10.0]), np.array([1.0, -1.0, 0.5])
    params = parameters([[0.3, 0.2, -0.4]])
    lr = {"sgd": 0.01, "adam": 1.0}[base]
    opt = build(base, params, lr=lr, variant=variant, s_decay=s_decay)
    seen = []
    for t in range(1, int(steps[-1]) + 1):
        give_arrays(params, [d * (x - o) for x in arrays(params)])
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
    """Return Σs after each step, and the weights after the last, of a small tanh network."""
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
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "l2": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 1.0, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 1.0, "weight_decay": 0.05}),
    "nadam": (torch.optim.NAdam, {"lr": 1.0}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1}),
}


@functools.cache
def package_run(case):
    torch_base, options = PACKAGE_CASES[case]
    package = mechanic_pytorch.mechanize(torch_base, s_decay=0.0, store_delta=True)
    return train_network(
        lambda params: package(params, **options), scale_of=lambda opt: opt.state["_mechanic"]["s"]
    )


def check_package_run(make, case):
    ours, theirs = train_network(make), package_run(case)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=PACKAGE_RTOL, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=PACKAGE_RTOL, atol=PACKAGE_RTOL)


@pytest.mark.parametrize("case", ["sgd", "momentum", "l2", "adam", "adamw"])
def test_two_hundred_steps_are_those_of_mechanic_pytorch(build, case, float64_by_default):
    options = {**PACKAGE_CASES[case][1], "variant": "pytorch", "s_decay": 0.0}
    base = case if case in FUSED else "sgd"
    check_package_run(lambda params: build(base, params, **options), case)


@pytest.mark.parametrize("case", ["sgd", "nadam", "rmsprop"])
def test_a_mechanized_base_steps_as_that_of_mechanic_pytorch(case, float64_by_default):
    base, options = PACKAGE_CASES[case]
    made = mechanize(base, s_decay=0.0, variant="pytorch")
    check_package_run(lambda params: made(params, **options), case)


@pytest.mark.parametrize("case", record_optax.CASES)
def test_a_recorded_run_of_optax_is_repeated(build, case):
    golden = json.loads(record_optax.GOLDEN.read_text())[case]
    assert golden["options"] == record_optax.CASES[case]
    base = case if case in FUSED else "sgd"
    params = parameters(record_optax.start())
    opt = build(base, params, tuner_eps=record_optax.EPS, variant="optax", **golden["options"])
    for t in range(1, record_optax.STEPS + 1):
        give_arrays(params, record_optax.gradient(arrays(params), t))
        opt.step()
        seen = float(opt.scale.sum())
        np.testing.assert_allclose(seen, golden["scale"][t - 1], rtol=OPTAX_RTOL, err_msg=f"{t=}")
        if t in record_optax.X_AT:
            x = np.concatenate([x.ravel() for x in arrays(params)])
            np.testing.assert_allclose(x, golden["x"][str(t)], rtol=OPTAX_RTOL, atol=OPTAX_RTOL)
