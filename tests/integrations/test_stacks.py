"""What every training stack must do with an optimizer of ours: the contract."""

import pytest
import torch
from support.cases import assert_same, differs
from support.chain_model import LEARNED, ChainModel, loss_of
from support.stacks import (
    MARKS,
    STACKS,
    Recipe,
    import_stack,
    lightning_trainer,
    plain_loop,
)

pytestmark = MARKS

LONG = 80

RECIPES = {
    "plain": Recipe(),
    # The gradient's norm is above the bound as long as there is something to learn.
    "clipped": Recipe(clip=0.1),
    "two passes": Recipe(passes=2),
    "bfloat16 autocast": Recipe(autocast=torch.bfloat16),
    "all": Recipe(clip=0.1, passes=2, autocast=torch.bfloat16),
}


@pytest.fixture(params=STACKS)
def train(request, tmp_path):
    """train(model, recipe, resume=False) → the state at the end."""
    return lambda *run: STACKS[request.param](tmp_path, *run)


@pytest.fixture(params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


@pytest.mark.parametrize("train", ["accelerate", "lightning", "trainer"], indirect=True)
def test_a_stack_takes_the_steps_of_a_plain_loop(train, recipe, tmp_path):
    """With its schedule, its clipping, its accumulation and its autocast."""
    found, expected = train(ChainModel(), recipe), plain_loop(tmp_path, ChainModel(), recipe)
    for name in ("model", "optimizer"):
        assert_same(found[name], expected[name])


def test_a_stack_resumes_from_its_own_checkpoint_to_the_bit(train, recipe):
    whole = train(ChainModel(), recipe)
    # Other weights: only the checkpoint can put them right.
    assert_same(train(ChainModel(seed=1), recipe, True), whole)


def test_a_stack_learns_from_the_default_start(train):
    model = ChainModel()
    before = loss_of(model)
    train(model, Recipe(steps=LONG, options={"lr": 1.0}))
    assert loss_of(model) <= LEARNED * before


def test_every_recipe_leads_to_other_weights(tmp_path):
    """Or the tests above would not show that a stack follows it."""
    ends = [plain_loop(tmp_path, ChainModel(), recipe)["model"] for recipe in RECIPES.values()]
    assert all(differs(one, other) for i, one in enumerate(ends) for other in ends[:i])


def test_lightning_gives_the_loss(tmp_path):
    """It steps with a closure, which returns the loss."""
    seen = []

    class Read(import_stack("lightning").Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.optimizers[0].scale_source)

    recipe = Recipe(options={"lr": 1.0})
    lightning_trainer(tmp_path, ChainModel(), recipe, callbacks=Read())
    # At first the warm-up has an lr of 0.
    assert set(seen) == {"", "loss"} and seen[-1] == "loss"
