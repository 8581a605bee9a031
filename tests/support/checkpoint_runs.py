"""Runs that a checkpoint or a copy must carry on; as a program, the fresh process.

python tests/support/checkpoint_runs.py FOLDER loads each checkpoint of the folder and goes on.
"""

import sys
from functools import partial
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.cases import FALLBACK, OPTIONS, RADAM, STEPS, Training, make_weights

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize

schedulers = torch.optim.lr_scheduler


class AddedGroup(Training):
    """Has a second group from step STEPS / 2 on."""

    def run(self, steps=STEPS):
        for _ in range(steps):
            if self.t == STEPS // 2:
                self.add()
            super().run(1)
        return self

    def add(self):
        more = make_weights([(7,), (2, 3)], seed=3)
        self.params += more
        self.opt.add_param_group({"params": more, "lr": 0.5})

    def load(self, saved, t):
        if t > STEPS // 2:
            self.add()
        return super().load(saved, t)


class Freezing(Training):
    """From step STEPS on, a weight and the scale are frozen, and another weight has no gradient."""

    def run(self, steps=STEPS):
        for _ in range(steps):
            if self.t < STEPS:
                super().run(1)
                self.opt.freeze_scale(self.t == STEPS)
                continue
            self.params[0].requires_grad_(False)
            self.params[0].grad = self.params[1].grad = None
            super().run(1, self.params[2:])
        return self


def with_empty_group(params):
    """Return groups of which one is empty, as of trainers that split off the biases."""
    return [{"params": []}, {"params": params, "lr": 0.5}]


def one_cycle(opt):
    return schedulers.OneCycleLR(opt, 2.0, total_steps=2 * STEPS + 1)


def warm_up_and_cosine(opt):
    parts = [schedulers.LinearLR(opt, 0.1, total_iters=4), schedulers.CosineAnnealingLR(opt, STEPS)]
    return schedulers.SequentialLR(opt, parts, [4])


def rising(opt):
    """Return a schedule under which the peak lr is known only when it is reached."""
    return schedulers.LambdaLR(opt, lambda t: 1 + t / 10)


def warm_restarts(opt):
    return schedulers.CosineAnnealingWarmRestarts(opt, 7)


def cyclic(opt):
    return schedulers.CyclicLR(opt, 0.1, 1.0, step_size_up=7, cycle_momentum=False)


def tensor_lr(schedule=warm_up_and_cosine, **options):
    return Training(MechanicAdamW, lr=torch.tensor(1.0), schedule=schedule, **options)


adamw = partial(Training, MechanicAdamW)
added = partial(AddedGroup, MechanicAdamW)
fallback = partial(Training, FALLBACK["adamw"])
BFLOAT16 = {"dtype": torch.bfloat16}
# Name → how to make the run anew, in whatever process; takes a seed of the weights.
RUNS = {
    "adamw": adamw,
    "adamw reference": partial(adamw, backend="reference"),
    "adamw float64": partial(adamw, dtype=torch.float64),
    "adamw bfloat16": partial(adamw, **BFLOAT16),
    "adamw float16": partial(adamw, dtype=torch.float16),
    "adamw narrow state": partial(adamw, **BFLOAT16, state_dtype="param"),
    "adamw narrow delta": partial(adamw, **BFLOAT16, delta_dtype=torch.bfloat16),
    "sgd": partial(Training, MechanicSGD, **OPTIONS["sgd"]),
    "sgd without momentum": partial(Training, MechanicSGD, lr=0.05),
    "lion bfloat16": partial(Training, MechanicLion, **BFLOAT16),
    "one cycle": partial(adamw, schedule=one_cycle),
    "warm-up, cosine": partial(adamw, schedule=warm_up_and_cosine),
    "rising": partial(adamw, schedule=rising, s_init=None),
    "warm restarts": partial(adamw, schedule=warm_restarts, s_init=None),
    "cyclic": partial(adamw, schedule=cyclic, s_init=None),
    "tensor lr": tensor_lr,
    "tensor lr, rising": partial(tensor_lr, schedule=rising, s_init=None),
    "tensor lr, cyclic": partial(tensor_lr, schedule=cyclic, s_init=None),
    "added group": added,
    "added group, scale_per=group": partial(added, scale_per="group"),
    "added group, scale_per=parameter": partial(added, scale_per="parameter"),
    "empty group": partial(adamw, groups=with_empty_group),
    "freezing": partial(Freezing, MechanicAdamW),
    "other tuner": partial(adamw, variant="paper", tuner_betas=(0.9, 0.99)),
    "fallback": fallback,
    "fallback bfloat16": partial(fallback, **BFLOAT16),
    "fallback added group": partial(AddedGroup, FALLBACK["adamw"]),
    "fallback narrow delta": partial(fallback, delta_dtype=torch.bfloat16),
    "fallback freezing": partial(Freezing, FALLBACK["adamw"]),
    "amsgrad": partial(adamw, amsgrad=True),
    "radam": partial(Training, RADAM, schedule=one_cycle),
    "adagrad": partial(Training, mechanize(torch.optim.Adagrad)),
    "adafactor": partial(Training, mechanize(torch.optim.Adafactor)),
}


def resume_all(folder):
    torch.set_num_threads(1)
    for name, make in RUNS.items():
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        run = make(seed=1).load(saved, STEPS).run()
        torch.save(run.saved(), folder / f"{name} resumed.pt")


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
