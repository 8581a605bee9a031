"""Training stacks with one interface: each trains the same model, and saves and resumes by itself.

A stack is a function of a folder, a model and a Recipe that returns the state at the end. It saves
after SAVED_AT steps; with ``resume`` it starts from what it has saved in that folder.
"""

import importlib
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mechanic_fused import MechanicAdamW

from .chain_model import BATCH, EXAMPLES, Chains, batch

MARKS = [
    pytest.mark.stacks,
    # Lightning's own.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
"""Of all tests that use these stacks."""

STEPS, SAVED_AT, WARM_UP = 8, 4, 2
DECAY = 0.1

# A stack must not ask the network for anything.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def import_stack(name):
    """Return the module; or skip with the reason, in a whole file too, and fail in its verb."""
    os.environ.update(OFFLINE)
    if importlib.util.find_spec(name) is None:
        reason = f"{name} is not installed"
        if os.environ.get("MECHANIC_STACKS"):
            pytest.fail(reason)
        pytest.skip(reason, allow_module_level=True)
    return importlib.import_module(name)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: of the optimizer; the schedule ends there.
        clip: the bound of the gradients' norm, or None.
        passes: backward passes per step.
        autocast: the dtype in which to run the model, or None.
        loss_scale: the initial factor of a GradScaler, or None; for the plain loop.
        observed: whether the optimizer is given the losses; for the plain loop.
        options: of the optimizer.
    """

    steps: int = STEPS
    clip: float | None = None
    passes: int = 1
    autocast: torch.dtype | None = None
    loss_scale: float | None = None
    observed: bool = False
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 1.0, "s_init": 0.01})


def state_of(**parts):
    """Return what a run must end with, and a checkpoint of the plain loop consists of."""
    return {name: part.state_dict() for name, part in parts.items()}


def make_optimizer(model, recipe):
    """Return an optimizer that spares biases and norms the decay, as the Trainer's does."""
    weights = list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
    ]
    return MechanicAdamW(groups, **recipe.options)


def make_schedule(opt, recipe):
    """Return the Trainer's default: warm-up, then linearly to 0."""

    def factor(t):
        return t / WARM_UP if t < WARM_UP else (recipe.steps - t) / (recipe.steps - WARM_UP)

    return torch.optim.lr_scheduler.LambdaLR(opt, factor)


def loader(**options):
    return torch.utils.data.DataLoader(Chains(), BATCH, **options)


def plain_loop(folder, model, recipe, resume=False):
    opt = make_optimizer(model, recipe)
    schedule = make_schedule(opt, recipe)
    scaler = torch.amp.GradScaler(
        "cpu", recipe.loss_scale or 1.0, enabled=recipe.loss_scale is not None
    )
    run = {"model": model, "optimizer": opt, "schedule": schedule, "scaler": scaler}
    first = 0
    if resume:
        saved = torch.load(folder / "run.pt", weights_only=True)
        for name, part in run.items():
            part.load_state_dict(saved[name])
        first = SAVED_AT
    for t in range(first, recipe.steps):
        if t == SAVED_AT:
            torch.save(state_of(**run), folder / "run.pt")
        opt.zero_grad()
        for i in range(t * recipe.passes, (t + 1) * recipe.passes):
            with torch.autocast("cpu", recipe.autocast, enabled=recipe.autocast is not None):
                loss = model(**batch(i))["loss"] / recipe.passes
            scaler.scale(loss).backward()
            if recipe.observed:
                opt.observe(loss * recipe.passes)
        if recipe.clip:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        scaler.step(opt)
        scaler.update()
        schedule.step()
    return state_of(**run)


def accelerate_loop(folder, model, recipe, resume=False, loader=loader, **options):
    """The loop of Accelerate's guide.

    Args:
        loader: makes one; by default of Chains in order.
        options: of Accelerator.
    """
    accelerate = import_stack("accelerate")
    # The settings are the process's: those of the last Accelerator would hold.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=recipe.passes,
        mixed_precision="bf16" if recipe.autocast else "no",
        **options,
    )
    opt = make_optimizer(model, recipe)
    model, opt, data, schedule = accelerator.prepare(
        model, opt, loader(), make_schedule(opt, recipe)
    )
    steps = 0
    if resume:
        accelerator.load_state(folder / "state")
        steps = SAVED_AT
    while steps < recipe.steps:
        for examples in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(**examples)["loss"])
                if recipe.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                opt.step()
                schedule.step()
                opt.zero_grad()
            steps += accelerator.sync_gradients
        if steps == SAVED_AT:
            accelerator.save_state(folder / "state")
    return state_of(model=model, optimizer=opt, schedule=schedule)


def lightning_trainer(folder, model, recipe, resume=False, loader=loader, **options):
    """Lightning's Trainer.

    Args:
        loader: makes one; by default of Chains in order, since Lightning saves no sampler's state.
        options: of the Trainer; ``callbacks`` replaces the one that saves at an epoch's end.
    """
    lightning = import_stack("lightning")
    path = folder / "run.ckpt"

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, examples, _):
            return self.model(**examples)["loss"]

        def configure_optimizers(self):
            opt = make_optimizer(model, recipe)
            schedule = {"scheduler": make_schedule(opt, recipe), "interval": "step"}
            return {"optimizer": opt, "lr_scheduler": schedule}

    class Save(lightning.Callback):
        def on_train_epoch_end(self, trainer, _):
            if trainer.global_step == SAVED_AT:
                trainer.save_checkpoint(path)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=recipe.steps * recipe.passes * BATCH // EXAMPLES,
        accelerator="cpu",
        default_root_dir=folder,
        gradient_clip_val=recipe.clip,
        accumulate_grad_batches=recipe.passes,
        **{"precision": "bf16-mixed" if recipe.autocast else None, "callbacks": Save(), **options},
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(Module(), loader(), ckpt_path=path if resume else None)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    return state_of(model=model, optimizer=trainer.optimizers[0], schedule=schedule)


def hugging_face_trainer(folder, model, recipe, resume=False, callbacks=None, prepare=None):
    """The Trainer of transformers.

    Args:
        prepare: called with the Trainer before it trains, or None.
    """
    transformers = import_stack("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=recipe.passes,
        max_grad_norm=recipe.clip or 0.0,
        bf16=recipe.autocast is not None,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=SAVED_AT,
        warmup_steps=WARM_UP,
        weight_decay=DECAY,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Chains(),
        optimizer_cls_and_kwargs=(MechanicAdamW, recipe.options),
        callbacks=callbacks,
    )
    if prepare is not None:
        prepare(trainer)
    checkpoint = str(folder / f"checkpoint-{SAVED_AT}")
    trainer.train(resume_from_checkpoint=checkpoint if resume else None)
    return state_of(model=trainer.model, optimizer=trainer.optimizer, schedule=trainer.lr_scheduler)


STACKS = {
    "plain loop": plain_loop,
    "accelerate": accelerate_loop,
    "lightning": lightning_trainer,
    "trainer": hugging_face_trainer,
}
