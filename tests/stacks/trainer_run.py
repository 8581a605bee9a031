"""A run of the Hugging Face Trainer; as a program, one that is to be killed or goes on after that.

python tests/stacks/trainer_run.py FOLDER WAIT goes on from FOLDER's last checkpoint, if any. With
WAIT > 0 it stops before that step's end and waits to be killed.
"""

import sys
import time
from pathlib import Path

import torch
import transformers
from tiny import BATCH, Chains, TinyModel
from transformers.trainer_utils import get_last_checkpoint

from mechanic_fused import MechanicAdamW

STEPS, SAVED_AT, WARM_UP = 8, 4, 2
DECAY = 0.1


class Wait(transformers.TrainerCallback):
    """Holds the run at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            time.sleep(600)


def make_trainer(folder, model, optimizer=None, steps=STEPS, wait=0, **options):
    """A Trainer with its default schedule: warm-up, then linearly to 0."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_strategy="steps",
        save_steps=SAVED_AT,
        warmup_steps=WARM_UP,
        weight_decay=DECAY,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Chains(),
        optimizer_cls_and_kwargs=optimizer or (MechanicAdamW, {"lr": 1.0, "s_init": 0.01}),
        callbacks=[Wait(wait)] if wait else None,
    )


def saved(trainer):
    """All that the end of a run consists of; the Trainer's optimizer is wrapped by then."""
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
    }


def main():
    torch.set_num_threads(1)
    folder, wait = Path(sys.argv[1]), int(sys.argv[2])
    checkpoint = get_last_checkpoint(str(folder)) if folder.exists() else None
    # A run that goes on starts from other weights: only the checkpoint can put them right.
    trainer = make_trainer(folder, TinyModel(1 if checkpoint else 0), wait=wait)
    trainer.train(resume_from_checkpoint=checkpoint)
    torch.save(saved(trainer), folder / "end.pt")


if __name__ == "__main__":
    main()
