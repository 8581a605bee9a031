"""Training runs that a checkpoint or a copy must carry over; as a program, the fresh process.

python tests/runs.py FOLDER loads each checkpoint of the folder and goes on from there.
"""

import sys
from pathlib import Path

import torch
from cases import (
    GENERAL,
    OPTIONS,
    QUICK,
    STEPS,
    make_weights,
    set_gradients,
    values,
)

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize

schedulers = torch.optim.lr_scheduler


class Run:
    """Weights, an optimizer, perhaps a schedule."""

    def __init__(self, make, dtype=torch.float32, schedule=None, seed=0, **options):
        self.params = make_weights(dtype=dtype, seed=seed)
        self.opt = make(self.params, **QUICK, **options)
        self.schedule = schedule and schedule(self.opt)

    def advance(self, first, steps):
        for t in range(first, first + steps):
            set_gradients(self.params, t)
            self.opt.step()
            if self.schedule:
                self.schedule.step()

    def saved(self):
        return {
            "weights": values(self.params),
            "optimizer": self.opt.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else {},
        }

    def load(self, saved):
        with torch.no_grad():
            for p, x in zip(self.params, saved["weights"], strict=True):
                p.copy_(x)
        self.opt.load_state_dict(saved["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(saved["schedule"])


class AddedGroup(Run):
    """Has a second group from the middle on."""

    def __init__(self, make, fresh=False, seed=0, **options):
        super().__init__(make, seed=seed, **options)
        if fresh:
            self.add()

    def add(self):
        more = make_weights([(7,), (2, 3)], seed=3)
        self.params += more
        self.opt.add_param_group({"params": more, "lr": 0.5})

    def advance(self, first, steps):
        if first == 0:
            super().advance(0, steps // 2)
            self.add()
            first, steps = steps // 2, steps - steps // 2
        super().advance(first, steps)


class Freezing(Run):
    """One weight is frozen, another gets no gradient, and the scale is frozen too."""

    def advance(self, first, steps):
        if first == 0:
            super().advance(0, steps)
            self.opt.freeze_scale()
        self.params[0].requires_grad_(False)
        for t in range(first, first + steps):
            set_gradients(self.params[2:], t)
            self.params[0].grad = self.params[1].grad = None
            self.opt.step()


class EmptyGroup(Run):
    """A group without weights, as trainers make that split off the biases."""

    def __init__(self, make, seed=0, **options):
        self.params = make_weights(seed=seed)
        groups = [{"params": []}, {"params": self.params, "lr": 0.5}]
        self.opt, self.schedule = make(groups, **QUICK, **options), None


def one_cycle(opt):
    return schedulers.OneCycleLR(opt, 2.0, total_steps=2 * STEPS + 1)


def warm_up_and_cosine(opt):
    parts = [schedulers.LinearLR(opt, 0.1, total_iters=4), schedulers.CosineAnnealingLR(opt, STEPS)]
    return schedulers.SequentialLR(opt, parts, [4])


RADAM = mechanize(torch.optim.RAdam)
# Name → how to make the run anew, in whatever process.
RUNS = {
    "adamw": lambda **o: Run(MechanicAdamW, **o),
    "adamw reference": lambda **o: Run(MechanicAdamW, backend="reference", **o),
    "adamw float64": lambda **o: Run(MechanicAdamW, torch.float64, **o),
    "adamw bfloat16": lambda **o: Run(MechanicAdamW, torch.bfloat16, **o),
    "adamw float16": lambda **o: Run(MechanicAdamW, torch.float16, **o),
    "adamw narrow": lambda **o: Run(MechanicAdamW, torch.bfloat16, narrow_state=True, **o),
    "adamw narrow delta": lambda **o: Run(MechanicAdamW, torch.bfloat16, narrow_delta=True, **o),
    "sgd": lambda **o: Run(MechanicSGD, **OPTIONS["sgd"], **o),
    "sgd without momentum": lambda **o: Run(MechanicSGD, lr=0.05, **o),
    "lion bfloat16": lambda **o: Run(MechanicLion, torch.bfloat16, **o),
    "one cycle": lambda **o: Run(MechanicAdamW, schedule=one_cycle, **o),
    "warm-up, cosine": lambda **o: Run(MechanicAdamW, schedule=warm_up_and_cosine, **o),
    "tensor lr": lambda **o: Run(
        MechanicAdamW, lr=torch.tensor(1.0), schedule=warm_up_and_cosine, **o
    ),
    "added group": lambda **o: AddedGroup(MechanicAdamW, **o),
    "added group, scale=group": lambda **o: AddedGroup(MechanicAdamW, scale="group", **o),
    "added group, scale=parameter": lambda **o: AddedGroup(MechanicAdamW, scale="parameter", **o),
    "empty group": lambda **o: EmptyGroup(MechanicAdamW, **o),
    "freezing": lambda **o: Freezing(MechanicAdamW, **o),
    "other tuner": lambda **o: Run(MechanicAdamW, variant="paper", tuner_betas=(0.9, 0.99), **o),
    "general adamw": lambda **o: Run(GENERAL["adamw"], **o),
    "general bfloat16": lambda **o: Run(GENERAL["adamw"], torch.bfloat16, **o),
    "general added group": lambda **o: AddedGroup(GENERAL["adamw"], **o),
    "general narrow delta": lambda **o: Run(GENERAL["adamw"], narrow_delta=True, **o),
    "general freezing": lambda **o: Freezing(GENERAL["adamw"], **o),
    "amsgrad": lambda **o: Run(MechanicAdamW, amsgrad=True, **o),
    "radam": lambda **o: Run(RADAM, schedule=one_cycle, **o),
    "adagrad": lambda **o: Run(mechanize(torch.optim.Adagrad), **o),
    "adafactor": lambda **o: Run(mechanize(torch.optim.Adafactor), **o),
}


def start_anew(name, seed):
    """The run as a fresh process makes it, with weights that only a checkpoint can put right."""
    late = {"fresh": True} if "added group" in name else {}
    return RUNS[name](seed=seed, **late)


def resume_all(folder):
    torch.set_num_threads(1)
    for name in RUNS:
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        run = start_anew(name, seed=1)
        run.load(saved)
        run.advance(STEPS, STEPS)
        torch.save(run.saved(), folder / f"{name} resumed.pt")


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
