"""The learned rate in the logs of the real stacks, and optimizers by name in their registries."""

import pytest
import torch
from support.stacks import import_stack
from torch import nn

from mechanic_fused import MechanicAdamW, MechanicMuon, integrations, mechanize

pytestmark = [
    pytest.mark.stacks,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def optional(name):
    """A stack that make does not install: timm needs a torchvision that fits torch's build."""
    return pytest.importorskip(name, exc_type=ImportError)


def test_the_trainer_logs_the_learned_rate_beside_the_loss(tmp_path):
    transformers = import_stack("transformers")
    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    row = torch.arange(8)
    options = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    seen = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(tmp_path, max_steps=6, logging_steps=2, **options),
        train_dataset=[{"input_ids": row, "labels": row}] * 32,
        optimizer_cls_and_kwargs=(MechanicAdamW, {"lr": 1.0}),
        callbacks=[Tracker()],
    )
    integrations.log_learned_rates(trainer)
    trainer.train()
    [opt] = integrations.unwrapped(trainer.optimizer)
    logged = [entry for entry in seen if "loss" in entry]
    assert len(logged) == 3
    assert all(entry["effective_lr"] > 0 for entry in logged)
    assert logged[-1]["mechanic/scale"] == opt.scale.item()
    kept = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["effective_lr"] for entry in kept] == [e["effective_lr"] for e in logged]


def test_lightning_logs_the_learned_rate(tmp_path):
    lightning = import_stack("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch, _):
            return (self.layer(batch) ** 2).mean()

        def configure_optimizers(self):
            return MechanicAdamW(self.parameters(), lr=1.0)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_steps=6,
        log_every_n_steps=2,
        accelerator="cpu",
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[integrations.lightning_callback()],
        **quiet,
    )
    rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=4))
    logged = trainer.callback_metrics
    assert logged["effective_lr"] > 0
    assert logged["effective_lr"] == pytest.approx(float(logged["mechanic/scale"]), rel=1e-6)


def test_timm_makes_them_by_name():
    timm = optional("timm")
    names = integrations.register_timm()
    assert names[1] == "mechanicadamw"
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    opt = timm.optim.create_optimizer_v2(model, opt="mechanicadamw", lr=1.0, weight_decay=0.05)
    assert isinstance(opt, MechanicAdamW)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.05]
    model(torch.ones(2, 3)).sum().backward()
    opt.step()
    assert opt.scale > 0
    made = mechanize(torch.optim.RAdam)
    assert integrations.register_timm([made]) == ["mechanicradam"]
    assert isinstance(timm.optim.create_optimizer_v2(model, opt="mechanicradam", lr=1.0), made)


def test_muon_is_found_inside_wrappers():
    accelerate = import_stack("accelerate")
    model = nn.Linear(3, 4)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "use_muon": False}]
    opt = MechanicMuon(groups)
    wrapped = accelerate.Accelerator(cpu=True).prepare(opt)
    assert integrations.unwrapped(wrapped) == [opt]
    assert list(integrations.learned_rates([wrapped])) == [
        *("effective_lr", "effective_lr/1", "mechanic/scale", "mechanic/grad_norm"),
    ]
