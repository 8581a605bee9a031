"""Every implementation agrees with the oracle, where the authors' packages have no answer."""

import itertools

import numpy as np
import pytest
import torch
from support.beside_oracle import Beside, give_arrays, noisy_gradients
from support.cases import CASES, FULL, SCALE_PER, STEPS


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        *itertools.product(CASES, ["annealed"]),
        *itertools.product(FULL, ["optax", "paper", "pytorch"]),
    ],
)
def test_each_base_and_variant_agrees_with_the_oracle(backend, case, variant):
    base, options = CASES[case]
    Beside(backend, base, variant=variant, **options).run()


@pytest.mark.parametrize("tensor", [False, True], ids=["", "tensor lr"])
@pytest.mark.parametrize("scale_per", ["model", "parameter"])
@pytest.mark.parametrize("variant", ["annealed", "optax"])
def test_a_schedule_anneals_the_scale_of_one_variant(implementation, variant, scale_per, tensor):
    """Up from a tenth, then down to 0: s moves by lr/(peak lr) of its update, or by all of it."""

    def factor(t):
        return min((t + 1) / 10, max(0.0, (STEPS - t) / 10), 1.0)

    lr = torch.tensor(2.0, dtype=torch.float64) if tensor else 2.0
    both = Beside(implementation, lr=lr, variant=variant, scale_per=scale_per)
    schedule = torch.optim.lr_scheduler.LambdaLR(both.opt, factor)
    for t in range(1, STEPS + 1):
        both.step(t, lr_factor=factor(t - 1))
        schedule.step()
    at_rest = both.opt.scale
    for t in range(STEPS + 1, STEPS + 4):
        give_arrays(both.params, noisy_gradients(both.oracle.x, t))
        both.opt.step()
    assert torch.equal(at_rest, both.opt.scale) == (variant == "annealed")


def test_the_tuner_gets_its_options(backend):
    options = {"s_init": 0.02, "s_decay": 0.5, "tuner_eps": 1e-2, "tuner_betas": (0.5, 0.95)}
    Beside(backend, **options).run()


@pytest.mark.parametrize("scale_per", SCALE_PER)
@pytest.mark.parametrize("case", FULL)
def test_groups_and_scales_agree_with_the_oracle(implementation, case, scale_per):
    base, options = CASES[case]
    other = {"momentum": 0.0} if base == "sgd" else {"betas": (0.7, 0.9)}

    def groups(weights):
        return [
            {"params": weights[:1], "weight_decay": 0.2},
            {"params": weights[1:], "lr": 0.5 * options["lr"], **other},
        ]

    both = Beside(implementation, base, groups=groups, scale_per=scale_per, **options)
    assert both.opt.scale.shape == both.oracle.scale.shape
    both.run()


# Step → the weights without a gradient at it. At step 6 none has one.
ABSENT = {1: {2}, 2: {2}, 5: {0, 3}, 6: {0, 1, 2, 3}, 7: {1}, 11: {0, 1, 2}}


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
@pytest.mark.parametrize("case", ["sgd", "dampening", "adamw betas", "lion decay"])
def test_gradients_may_come_and_go(implementation, case, scale_per):
    def edit(t, grads):
        return [None if i in ABSENT.get(t, ()) else g for i, g in enumerate(grads)]

    base, options = CASES[case]
    Beside(implementation, base, scale_per=scale_per, **options).run(edit)


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
@pytest.mark.parametrize("at", [{1: np.nan}, {5: np.nan, 6: np.inf, 12: -np.inf}])
@pytest.mark.parametrize("case", ["dampening", "adamw betas", "lion decay"])
def test_a_nonfinite_gradient_costs_its_own_element_and_step(implementation, case, at, scale_per):
    base, options = CASES[case]
    both = Beside(implementation, base, scale_per=scale_per, **options)
    scales = {}

    def edit(t, grads):
        scales[t] = both.opt.scale
        if t in at:
            grads[3][[0, 4097]] = at[t]
        return grads

    both.run(edit)
    assert int(both.opt.nonfinite_steps) == both.oracle.nonfinite_steps == len(at)
    row = 3 if scale_per == "parameter" else 0
    for t in at:
        assert scales[t + 1][row] == scales[t][row]
        assert scale_per == "model" or t == 1 or (scales[t + 1] != scales[t])[:row].all()


def test_zero_gradients_change_nothing_at_the_start_and_are_a_step_later(implementation):
    def edit(t, grads):
        if t < 4:
            return [-np.zeros_like(g) if t == 2 else np.zeros_like(g) for g in grads]
        return [np.zeros_like(g) for g in grads] if t == 9 else grads

    Beside(implementation, weight_decay=0.1).run(edit)
