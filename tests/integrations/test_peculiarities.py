"""What single training stacks do beside the contract, and what docs/frameworks.md says of them."""

import itertools
import os
import signal

import pytest
import torch
from support.cases import assert_same
from support.chain_model import BATCH, ChainModel
from support.ranks import forkserver
from support.stacks import (
    DECAY,
    MARKS,
    SAVED_AT,
    STEPS,
    Recipe,
    accelerate_loop,
    hugging_face_trainer,
    import_stack,
    lightning_trainer,
    loader,
    make_accelerator,
)

pytestmark = MARKS

SECONDS = 120


# Accelerate


def test_accelerate_resumes_shuffled_batches_if_the_sampler_is_seedable(tmp_path):
    accelerate = import_stack("accelerate")
    loading = accelerate.utils.DataLoaderConfiguration(use_seedable_sampler=True)
    ends = []
    for seed, resume in ((0, False), (1, True)):
        accelerator = make_accelerator(dataloader_config=loading)
        run = (tmp_path, ChainModel(seed), Recipe(), resume, accelerator, loader(shuffle=True))
        ends.append(accelerate_loop(*run).state())
    assert_same(*ends)


def test_accelerate_tunes_s_only_when_the_gradients_are_whole(tmp_path):
    scales = []
    recipe = Recipe(passes=2)
    accelerate_loop(
        tmp_path, ChainModel(), recipe, watch=lambda opt: scales.append(float(opt.scale))
    )
    moved = [one != other for one, other in itertools.pairwise(scales)]
    # Δ is 0 in the first step, whose lr is 0, and in the next one, so they say nothing.
    assert moved == [i % 2 == 1 and i > 4 for i in range(1, len(scales))]


# Lightning


def test_lightning_resumes_bfloat16_weights_to_the_bit(tmp_path):
    whole = lightning_trainer(tmp_path, ChainModel(), Recipe(), precision="bf16-true")
    resumed = lightning_trainer(tmp_path, ChainModel(1), Recipe(), True, precision="bf16-true")
    assert whole.model.head.weight.dtype is torch.bfloat16
    assert_same(whole.state(), resumed.state())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_lightning_resumes_in_the_middle_of_an_epoch_to_the_bit(tmp_path):
    """With batches that are all the same: Lightning begins an epoch's data anew."""

    class Save(import_stack("lightning").Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == SAVED_AT + 1:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    same = torch.utils.data.DataLoader(loader().dataset, batch_sampler=[range(BATCH)] * SAVED_AT)
    whole = lightning_trainer(tmp_path, ChainModel(), Recipe(), data=same, callbacks=[Save()])
    resumed = lightning_trainer(tmp_path, ChainModel(1), Recipe(), True, data=same)
    assert_same(whole.state(), resumed.state())


# The Trainer of transformers


def trainer_callback(**methods):
    return [type("Callback", (import_stack("transformers").TrainerCallback,), methods)()]


def test_the_trainers_groups_share_one_scale(tmp_path):
    groups = hugging_face_trainer(tmp_path, ChainModel(), Recipe()).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [DECAY, 0.0]
    assert all(group["params"] for group in groups)
    assert groups[0]["mechanic_state"] is groups[1]["mechanic_state"]


def test_a_callback_of_the_trainer_reads_the_learned_lr(tmp_path):
    """Within Accelerate's wrapper, as docs/frameworks.md shows."""
    learned = []

    def on_step_end(self, args, state, control, optimizer, **_):
        learned.append(optimizer.optimizer.learned_lr())

    callbacks = trainer_callback(on_step_end=on_step_end)
    run = hugging_face_trainer(tmp_path, ChainModel(), Recipe(), callbacks=callbacks)
    assert len(learned) == STEPS
    assert all(len(lrs) == 2 and min(lrs) >= 0 for lrs in learned)
    assert learned[-1] == run.optimizer.optimizer.learned_lr()
    assert max(map(max, learned)) > 0


def train_and_die(folder):
    """Train by the Trainer; SIGKILL between the checkpoint and the end."""
    # As many as in the test's own process: torch's products depend on the number of threads.
    torch.set_num_threads(1)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == SAVED_AT + 2:
            os.kill(os.getpid(), signal.SIGKILL)

    callbacks = trainer_callback(on_step_end=on_step_end)
    hugging_face_trainer(folder, ChainModel(), Recipe(), callbacks=callbacks)


def test_a_killed_run_of_the_trainer_resumes_to_the_bit(tmp_path):
    whole = hugging_face_trainer(tmp_path / "whole", ChainModel(), Recipe())
    process = forkserver().Process(target=train_and_die, args=(tmp_path / "killed",))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL
    resumed = hugging_face_trainer(tmp_path / "killed", ChainModel(1), Recipe(), resume=True)
    assert_same(whole.state(), resumed.state())
