"""A loop in plain PyTorch learns in float16, and evaluates averaged weights in between."""

import pytest
import torch
from support.cases import assert_same, build, differs, values
from support.chain_model import LEARNED, ChainModel, batch, loss_of
from support.stacks import Recipe, plain_loop

STEPS, LONG = 12, 72


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])
def test_float16_autocast_learns_through_overflows_and_resumes_to_the_bit(tmp_path, fused):
    """The loss scale is far too large at first, so the first steps are skipped."""
    options = {"lr": 1.0, "fused": fused, "s_init": 0.01}
    large, half = 2.0**24, torch.float16
    recipe = Recipe(LONG, clip=1.0, passes=2, autocast=half, loss_scale=large, options=options)
    model = ChainModel()
    before = loss_of(model)
    whole = plain_loop(tmp_path, model, recipe)
    assert loss_of(model) <= LEARNED * before
    assert whole["scaler"]["scale"] < large
    assert_same(plain_loop(tmp_path, ChainModel(seed=1), recipe, resume=True), whole)


# Ways to swap averaged weights in for an evaluation, and the run's weights back


def copied(model, weights):
    with torch.no_grad():
        for p, x in zip(model.parameters(), weights, strict=True):
            p.copy_(x)


def loaded(model, weights):
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))


def through_data(model, weights):
    for p, x in zip(model.parameters(), weights, strict=True):
        p.data.copy_(x)


def exchanged(model, weights):
    for p, x in zip(model.parameters(), weights, strict=True):
        p.data = x


def by_one_vector(model, weights):
    vector = torch.nn.utils.parameters_to_vector(weights)
    torch.nn.utils.vector_to_parameters(vector, model.parameters())


def averaged_run(implementation, swap):
    """Train, keep an exponential average and, given a swap, evaluate it after every step."""
    model = ChainModel()
    opt = build(implementation, "adamw", model.parameters(), s_init=0.01)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
    for t in range(STEPS):
        opt.zero_grad()
        model(**batch(t))["loss"].backward()
        opt.step()
        average.update_parameters(model)
        if swap:
            kept = values(model.parameters())
            swap(model, values(average.module.parameters()))
            assert loss_of(model) == loss_of(average.module)
            swap(model, kept)
    assert differs(values(average.module.parameters()), values(model.parameters()))
    return [*values(model.parameters()), opt.state_dict(), *values(average.module.parameters())]


@pytest.mark.parametrize("swap", [copied, loaded, through_data, exchanged, by_one_vector])
def test_evaluating_an_average_changes_no_bit_of_the_run(implementation, swap):
    assert_same(averaged_run(implementation, swap), averaged_run(implementation, None))
