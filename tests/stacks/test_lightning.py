"""Lightning: learns, clips, resumes from its own checkpoints to the bit."""

import pytest
import torch
from cases import assert_same, differs
from tiny import BATCH, LEARNED, Chains, TinyModel, import_stack, loss_of

from mechanic_fused import MechanicAdamW

pytestmark = [
    # What Lightning itself does with torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

# In epochs, each of EXAMPLES / BATCH = 8 steps.
SAVED_AT, END, LONG = 1, 2, 10
STEPS_AN_EPOCH = 8
CLIP = 0.1


@pytest.fixture(scope="module")
def lightning():
    return import_stack("lightning")


@pytest.fixture(scope="module")
def module(lightning):
    """The class of a LightningModule around the tiny model."""

    class Module(lightning.LightningModule):
        def __init__(self, number=0, **options):
            super().__init__()
            self.model = TinyModel(number)
            self.options = {"lr": 1.0, "s_init": 0.01, "weight_decay": 0.1, **options}

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            opt = MechanicAdamW(self.parameters(), **self.options)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)
            return {
                "optimizer": opt,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    return Module


@pytest.fixture
def trainer(lightning, tmp_path):
    def make(epochs, **options):
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            **{**quiet, **options},
        )

    return make


def loader():
    """The same batches in every epoch: Lightning saves no state of a sampler."""
    return torch.utils.data.DataLoader(Chains(), BATCH)


def saved(trainer, module):
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
    }


def test_lightning_learns_from_the_default_start(trainer, module):
    run = module(s_init=None)
    before = loss_of(run.model)
    trainer(LONG).fit(run, loader())
    assert loss_of(run.model) <= LEARNED * before


def test_lightning_takes_the_steps_of_a_plain_loop(trainer, module):
    """It always passes a closure, and one that does more than evaluate the loss."""
    run, twin = module(), TinyModel()
    trainer(1).fit(run, loader())
    opt = MechanicAdamW(twin.parameters(), **run.options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)
    for batch in loader():
        opt.zero_grad()
        twin(**batch)["loss"].backward()
        opt.step()
        schedule.step()
    assert_same(run.model.state_dict(), twin.state_dict())


OPTIONS = {
    "plain": {},
    "clipped": {"gradient_clip_val": CLIP},
    "two passes a step": {"accumulate_grad_batches": 2},
    "bfloat16 autocast": {"precision": "bf16-mixed"},
    "bfloat16 weights": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_lightning_goes_on_from_a_checkpoint_to_the_bit(trainer, module, tmp_path, options):
    options = OPTIONS[options]
    whole, first, rest = module(), module(), module(1)
    straight = trainer(END, **options)
    straight.fit(whole, loader())
    start = trainer(SAVED_AT, **options)
    start.fit(first, loader())
    start.save_checkpoint(tmp_path / "run.ckpt")
    middle = start.optimizers[0].scale
    end = trainer(END, **options)
    end.fit(rest, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert_same(saved(end, rest), saved(straight, whole))
    assert differs(end.optimizers[0].scale, middle)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "plain"])
def test_each_option_reaches_the_weights(trainer, module, options):
    """Or the test above would show nothing."""
    plain, run = module(), module()
    trainer(1).fit(plain, loader())
    trainer(1, **OPTIONS[options]).fit(run, loader())
    assert differs(run.state_dict(), plain.state_dict())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_checkpoint_of_mid_epoch_goes_on_to_the_bit(lightning, trainer, module, tmp_path):
    """With batches that are all the same: Lightning begins an epoch's data anew."""
    rows = [list(range(BATCH))] * STEPS_AN_EPOCH
    batches = torch.utils.data.DataLoader(Chains(), batch_sampler=rows)

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == STEPS_AN_EPOCH + 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, rest = module(), module(1)
    straight, end = trainer(END, callbacks=[Keep()]), trainer(END)
    straight.fit(whole, batches)
    end.fit(rest, batches, ckpt_path=tmp_path / "middle.ckpt")
    assert_same(saved(end, rest), saved(straight, whole))
