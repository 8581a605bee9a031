"""Hugging Face's Trainer: learns, and goes on from its checkpoints to the bit, also when killed."""

import json

import pytest
import torch
from cases import assert_same, differs
from tiny import LEARNED, TinyModel, finish, import_stack, kill_once, loss_of, start

from mechanic_fused import MechanicAdamW

LONG = 80


@pytest.fixture(scope="module")
def runs():
    import_stack("accelerate")
    import_stack("transformers")
    import trainer_run

    return trainer_run


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """An uninterrupted run: its folder, its end."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trainer")
    trainer = runs.make_trainer(folder, TinyModel())
    trainer.train()
    return folder, runs.saved(trainer)


def test_trainer_learns_from_the_default_start(runs, tmp_path):
    model = TinyModel()
    before = loss_of(model)
    trainer = runs.make_trainer(tmp_path, model, (MechanicAdamW, {"lr": 1.0}), steps=LONG)
    trainer.train()
    assert loss_of(model) <= LEARNED * before


def test_trainer_gives_groups_with_and_without_decay_one_scale(runs, whole):
    groups = whole[1]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [runs.DECAY, 0.0]
    assert all(group["params"] for group in groups)
    assert groups[0]["mechanic"] is groups[1]["mechanic"]


def test_the_default_schedule_moves_lr_between_0_and_1(runs, tmp_path):
    rates = []

    class Watch(runs.transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer = runs.make_trainer(tmp_path, TinyModel())
    trainer.add_callback(Watch())
    trainer.train()
    falling = [left / (runs.STEPS - runs.WARM_UP) for left in range(6, 0, -1)]
    assert rates == [[lr, lr] for lr in (0.0, 0.5, *falling)]
    # The warm-up begins with lr = 0: nothing is learned from that step, and nothing is lost.
    assert loss_of(trainer.model) < loss_of(TinyModel())


def test_trainer_goes_on_from_a_checkpoint_to_the_bit(runs, whole):
    folder, expected = whole
    trainer = runs.make_trainer(folder, TinyModel(1))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{runs.SAVED_AT}"))
    assert_same(runs.saved(trainer), expected)
    checkpoint = folder / f"checkpoint-{runs.SAVED_AT}" / "optimizer.pt"
    middle = torch.load(checkpoint, weights_only=True)
    assert differs(
        middle["param_groups"][0]["mechanic"], trainer.optimizer.param_groups[0]["mechanic"]
    )


def test_trainer_accumulates_and_clips_and_resumes(runs, tmp_path):
    """bfloat16 autocast, two passes a step, the norm clipped to less than it is."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "bf16": True}
    straight = runs.make_trainer(tmp_path, TinyModel(), **options)
    straight.train()
    trainer = runs.make_trainer(tmp_path, TinyModel(1), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{runs.SAVED_AT}"))
    assert_same(runs.saved(trainer), runs.saved(straight))
    plain = runs.make_trainer(tmp_path, TinyModel())
    plain.train()
    assert differs(runs.saved(plain)["weights"], runs.saved(straight)["weights"])


def is_complete(checkpoint):
    """Whether the Trainer has written the last file of a checkpoint to its end."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 0
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def test_trainer_killed_in_mid_run_goes_on_to_the_bit(runs, whole, tmp_path):
    folder = tmp_path / "killed"
    checkpoint = folder / f"checkpoint-{runs.SAVED_AT}"
    killed = start("trainer_run.py", folder, runs.SAVED_AT + 2)
    kill_once(killed, lambda: is_complete(checkpoint))
    assert not (folder / "end.pt").exists()

    finish(start("trainer_run.py", folder, 0))
    assert_same(torch.load(folder / "end.pt", weights_only=True), whole[1])
