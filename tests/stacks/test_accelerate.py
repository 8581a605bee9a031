"""Accelerate: prepare, accumulate, clip, save_state and load_state, to the bit."""

import pytest
import torch
from cases import assert_same, differs
from tiny import BATCH, LEARNED, Chains, TinyModel, import_stack, loss_of

from mechanic_fused import MechanicAdamW

# In epochs, each of EXAMPLES / BATCH = 8 batches.
SAVED_AT, END, LONG = 1, 2, 10
# The gradient's norm is above it as long as there is something to learn.
CLIP = 0.1


@pytest.fixture
def accelerator():
    """Makes an Accelerator. Its settings are the process's: those of the last one hold."""
    accelerate = import_stack("accelerate")

    def make(**options):
        reset()
        # Of this sampler save_state notes where it is.
        loading = accelerate.utils.DataLoaderConfiguration(use_seedable_sampler=True)
        return accelerate.Accelerator(cpu=True, dataloader_config=loading, **options)

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    yield make
    reset()


class Run:
    """A training loop as Accelerate's guide has it."""

    def __init__(self, accelerator, number=0, clip=None, **options):
        model = TinyModel(number)
        options = {"s_init": 0.01, "weight_decay": 0.1, **options}
        opt = MechanicAdamW(model.parameters(), lr=1.0, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)
        loader = torch.utils.data.DataLoader(Chains(), BATCH, shuffle=True)
        self.accelerator, self.clip = accelerator, clip
        self.model, self.opt, self.loader, self.schedule = accelerator.prepare(
            model, opt, loader, schedule
        )
        self.scales = []

    def advance(self, epochs):
        for _ in range(epochs):
            for batch in self.loader:
                self.step(batch)

    def step(self, batch):
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(**batch)["loss"])
            if self.clip and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
            self.opt.step()
            self.schedule.step()
            self.opt.zero_grad()
        self.scales.append(float(self.opt.optimizer.scale))

    def saved(self):
        return {
            "weights": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
        }


def test_a_prepared_optimizer_learns_from_the_default_start(accelerator):
    run = Run(accelerator(), s_init=None)
    before = loss_of(run.model)
    run.advance(LONG)
    assert loss_of(run.model) <= LEARNED * before


def test_preparing_changes_no_bit(accelerator):
    """prepare() sends the state dict through load_state_dict before there is any state."""
    run = Run(accelerator())
    run.advance(1)
    model = TinyModel()
    opt = MechanicAdamW(model.parameters(), lr=1.0, s_init=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)
    for batch in Run(accelerator()).loader:
        opt.zero_grad()
        model(**batch)["loss"].backward()
        opt.step()
        schedule.step()
    assert_same(run.opt.state_dict(), opt.state_dict())
    assert_same(run.model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}],
    ids=["plain", "two passes a step", "bfloat16 autocast"],
)
@pytest.mark.parametrize("clip", [None, CLIP], ids=["", "clipped"])
def test_load_state_goes_on_to_the_bit(accelerator, tmp_path, options, clip):
    run = Run(accelerator(**options), clip=clip)
    run.advance(SAVED_AT)
    middle = float(run.opt.optimizer.scale)
    run.accelerator.save_state(tmp_path)
    run.advance(END - SAVED_AT)

    other = Run(accelerator(**options), number=1, clip=clip)
    other.accelerator.load_state(tmp_path)
    assert float(other.opt.optimizer.scale) == middle
    other.advance(END - SAVED_AT)
    assert_same(other.saved(), run.saved())
    assert float(other.opt.optimizer.scale) != middle


@pytest.mark.parametrize(
    ("options", "clip"),
    [({}, CLIP), ({"gradient_accumulation_steps": 2}, None), ({"mixed_precision": "bf16"}, None)],
    ids=["clipped", "two passes a step", "bfloat16 autocast"],
)
def test_each_option_reaches_the_weights(accelerator, options, clip):
    """Or the test above would show nothing."""
    found = []
    for run in (lambda: Run(accelerator()), lambda: Run(accelerator(**options), clip=clip)):
        run = run()
        run.advance(1)
        found.append(run.saved()["weights"])
    assert differs(*found)


def test_scale_moves_only_when_gradients_are_whole(accelerator):
    run = Run(accelerator(gradient_accumulation_steps=2))
    run.advance(1)
    passes = len(run.scales)
    moved = [run.scales[i] != run.scales[i - 1] for i in range(1, passes)]
    # At the first of them Δ is 0 and says nothing.
    assert moved == [i % 2 == 1 and i > 1 for i in range(1, passes)]
