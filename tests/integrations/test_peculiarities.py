"""What single training stacks do beside the contract, and what docs/stacks says of them."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from support.cases import assert_same, differs
from support.chain_model import BATCH, ChainModel
from support.ranks import forkserver
from support.stacks import (
    MARKS,
    SAVED_AT,
    STEPS,
    Recipe,
    accelerate_loop,
    hugging_face_trainer,
    import_stack,
    lightning_trainer,
    loader,
    plain_loop,
)

from mechanic_fused.integrations import observe_losses

pytestmark = MARKS

SECONDS = 120


def assert_resumes(train, folder, **options):
    whole = train(folder, ChainModel(), Recipe(), **options)
    assert_same(train(folder, ChainModel(seed=1), Recipe(), True, **options), whole)


def test_accelerate_resumes_shuffled_batches_if_the_sampler_is_seedable(tmp_path):
    configuration = import_stack("accelerate").utils.DataLoaderConfiguration
    assert_resumes(
        accelerate_loop,
        tmp_path,
        loader=lambda: loader(shuffle=True),
        dataloader_config=configuration(use_seedable_sampler=True),
    )


def test_lightning_resumes_bfloat16_weights_to_the_bit(tmp_path):
    assert_resumes(lightning_trainer, tmp_path, precision="bf16-true")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_lightning_resumes_in_the_middle_of_an_epoch_to_the_bit(tmp_path):
    """With batches that are all the same: Lightning begins an epoch's data anew."""

    class Save(import_stack("lightning").Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == SAVED_AT + 1:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    def same_batches():
        rows = [range(BATCH)] * SAVED_AT
        return torch.utils.data.DataLoader(loader().dataset, batch_sampler=rows)

    assert_resumes(lightning_trainer, tmp_path, loader=same_batches, callbacks=Save())


def at_the_end_of_each_step(act):
    """Return a callback of the Trainer that calls ``act(step, optimizer)``."""

    class Callback(import_stack("transformers").TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            # Within Accelerate's wrapper.
            act(state.global_step, optimizer.optimizer)

    return [Callback()]


def test_a_callback_of_the_trainer_reads_the_lr_that_all_groups_have_learned(tmp_path):
    learned = []
    read = at_the_end_of_each_step(lambda step, opt: learned.append((opt.scale, opt.learned_lr())))
    recipe = Recipe(options={"lr": 1.0})
    end = hugging_face_trainer(tmp_path, ChainModel(), recipe, callbacks=read)
    assert len(learned) == STEPS
    for scale, lrs in learned:
        assert len(lrs) == len(end["optimizer"]["param_groups"]) == 2
        assert lrs[0] == lrs[1] <= scale
    assert learned[-1][0] != learned[0][0]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_trainer_gives_whole_losses(tmp_path, passes):
    recipe = Recipe(passes=passes, observed=True, options={"lr": 1.0})
    found = hugging_face_trainer(tmp_path, ChainModel(), recipe, prepare=observe_losses)
    expected = plain_loop(tmp_path, ChainModel(), recipe)
    assert_same(found["optimizer"], expected["optimizer"])
    without = plain_loop(tmp_path, ChainModel(), replace(recipe, observed=False))
    assert differs(found["model"], without["model"])


def kill(step, opt):
    if step == SAVED_AT + 2:
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder):
    # As many as in the test's own process: torch's products depend on the number of threads.
    torch.set_num_threads(1)
    callbacks = at_the_end_of_each_step(kill)
    hugging_face_trainer(folder, ChainModel(), Recipe(), callbacks=callbacks)


def test_a_killed_run_of_the_trainer_resumes_to_the_bit(tmp_path):
    whole = hugging_face_trainer(tmp_path / "whole", ChainModel(), Recipe())
    process = forkserver().Process(target=train_and_die, args=(tmp_path / "killed",))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL
    resumed = hugging_face_trainer(tmp_path / "killed", ChainModel(seed=1), Recipe(), resume=True)
    assert_same(resumed, whole)
