"""The learned rate in the logs of the real stacks, and optimizers by name in their registries."""

import argparse
import ast
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.stacks import import_stack
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mechanic_fused import MechanicAdamW, MechanicMuon, integrations, mechanize

pytestmark = [
    pytest.mark.stacks,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def trainer_of(folder, optimizer_cls_and_kwargs, callbacks=(), **arguments):
    """Return a Trainer of a small model, which reports and saves nothing."""
    transformers = import_stack("transformers")
    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    row = torch.arange(8)
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return transformers.Trainer(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)),
        transformers.TrainingArguments(folder, **quiet, **arguments),
        train_dataset=[{"input_ids": row, "labels": row}] * 32,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        callbacks=list(callbacks),
    )


def test_the_trainer_logs_the_learned_rate_beside_the_loss(tmp_path):
    transformers = import_stack("transformers")
    seen = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    made = MechanicAdamW, {"lr": 1.0}
    trainer = trainer_of(tmp_path, made, [Tracker()], max_steps=6, logging_steps=2)
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
    """In a process of its own, for the stand-in by which it may have to import timm."""
    if importlib.util.find_spec("timm") is None:
        import_stack("timm")
    script = Path(__file__).with_name("timm_by_name.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert found["names"][1] == "mechanicadamw" and found["is ours"]
    assert found["decay"] == [0.0, 0.05]
    assert found["scale"] > 0
    assert found["registered"] == ["mechanicradam"] and found["is made"]


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


def name_and_decay(optimizer):
    """Return the name of the class, and the weight decay of the first param group."""
    return type(optimizer).__name__, optimizer.param_groups[0]["weight_decay"]


def test_the_trainer_makes_muon_by_its_factory(tmp_path):
    made = integrations.MuonFactory, {"lr": 1.0, "weight_decay": 0.1}
    trainer = trainer_of(tmp_path, made, max_steps=2)
    trainer.train()
    [opt] = integrations.unwrapped(trainer.optimizer)
    assert name_and_decay(opt) == ("MechanicMuon", 0.1)
    assert opt.scale > 0 and len(opt.param_groups) == 2


def test_axolotl_loads_the_plugin(tmp_path):
    """Its manager, its plugin's base class, and a Trainer; its own trainers ask for more."""
    import_stack("axolotl")
    base = import_stack("axolotl.integrations.base")
    pydantic, transformers = import_stack("pydantic"), import_stack("transformers")
    manager = base.PluginManager.get_instance()
    manager.register("mechanic_fused.integrations.axolotl.MechanicPlugin")
    [path] = manager.get_input_args()
    module, _, name = path.rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    assert issubclass(schema, pydantic.BaseModel)
    given = {"optimizer": "MechanicLion", "betas": (0.9, 0.98)}
    cfg = schema(mechanic=given)
    model = nn.Linear(2, 1)
    arguments = transformers.TrainingArguments(
        tmp_path, weight_decay=0.2, use_cpu=True, report_to=[]
    )
    trainer = transformers.Trainer(model, arguments)
    manager.post_trainer_create(cfg, trainer)
    opt = trainer.create_optimizer()
    assert name_and_decay(opt) == ("MechanicLion", 0.2)
    assert opt.param_groups[0]["betas"] == (0.9, 0.98)
    with pytest.raises(ValueError, match=r"mechanic\.optimizer must be one of"):
        manager.post_trainer_create(schema(mechanic={"optimizer": "AdamW"}), trainer)


def test_llamafactory_finds_the_plugin():
    import_stack("llamafactory")
    integrations.register_llamafactory()
    path = integrations.llamafactory_plugin().__module__
    assert path.startswith("llamafactory.v1.plugins.trainer_plugins")
    plugin = integrations.llamafactory_plugin()("mechanic")
    opt = plugin(nn.Linear(2, 1), {"name": "mechanic", "weight_decay": 0.3})
    assert name_and_decay(opt) == ("MechanicAdamW", 0.3)
    muon = plugin(nn.Linear(2, 1), {"name": "mechanic", "optimizer": "MechanicMuon"})
    assert name_and_decay(muon)[0] == "MechanicMuon"
    with pytest.raises(ValueError, match="the optimizer must be one of"):
        plugin(nn.Linear(2, 1), {"name": "mechanic", "optimizer": "AdamW"})


PARSERS = {
    "SD_SCRIPTS": "library/train_util.py",
    "MUSUBI_TUNER": "src/musubi_tuner/training/trainer_base.py",
}
"""Checkout, by the variable that names its folder, and where it makes optimizers from arguments."""


@pytest.mark.parametrize("variable", PARSERS)
def test_the_scripts_make_them_from_their_arguments(variable):
    """The function itself, without the imports of its file. No package of theirs is on PyPI."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not name a checkout")
    tree = ast.parse(Path(folder, PARSERS[variable]).read_text())
    [function] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "get_optimizer"
    ]
    names = {"ast": ast, "importlib": importlib, "torch": torch}
    names["logger"] = logging.getLogger("scripts")
    exec(compile(ast.Module([function], []), variable, "exec"), names)
    args = argparse.Namespace(
        optimizer_type="mechanic_fused.MechanicAdamW",
        optimizer_args=["weight_decay=0.01", "betas=(0.9,0.95)"],
        learning_rate=1.0,
        use_8bit_adam=False,
        use_lion_optimizer=False,
        fused_backward_pass=False,
    )
    model = nn.Linear(2, 1)
    own = (None,) if function.args.args[0].arg == "self" else ()
    name, _, opt, *_ = names["get_optimizer"](*own, args, list(model.parameters()))
    assert name == "mechanic_fused.optimizers.MechanicAdamW"
    assert name_and_decay(opt) == ("MechanicAdamW", 0.01)
    model(torch.ones(3, 2)).sum().backward()
    opt.step()
    assert opt.scale > 0


def test_param_groups_show_d_as_prodigys_do():
    model = nn.Linear(2, 1)
    opt = MechanicAdamW(model.parameters(), lr=1.0)
    integrations.show_d(opt)
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(3, 2)).sum().backward()
        opt.step()
    group = opt.param_groups[0]
    assert group["d"] * group["lr"] == opt.learned_lr()[0] > 0
    # Loaders look in a checkpoint for every key of a live group.
    saved = opt.state_dict()
    assert saved["param_groups"][0]["d"] == opt.learned_lr()[0]
    assert "d" not in opt.to_base().param_groups[0]
    model.zero_grad()
    again = MechanicAdamW(model.parameters(), lr=1.0)
    integrations.show_d(again)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    loaded = get_optimizer_state_dict(model, opt, options=flat)
    set_optimizer_state_dict(model, again, loaded, options=flat)
    assert again.param_groups[0]["d"] * 1.0 == opt.learned_lr()[0]


def test_a_base_with_a_d_of_its_own_keeps_it():
    class WithD(torch.optim.SGD):
        def __init__(self, params, lr=1.0, d=0.5):
            super().__init__(params, lr=lr)
            self.defaults["d"] = d
            for group in self.param_groups:
                group["d"] = d

    opt = mechanize(WithD)(nn.Linear(2, 1).parameters(), lr=1.0)
    with pytest.raises(ValueError, match='must have no "d"'):
        integrations.show_d(opt)
    assert opt.param_groups[0]["d"] == 0.5
