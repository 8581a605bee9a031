"""Which optimizers can be bases: a run of each on the digits, mechanized, and beside a grid.

python -m benchmarks.bases [--quick] [--out FILE]

Every class of torch.optim, our own, and the most used ones of pytorch-optimizer, timm,
schedulefree, torchao and bitsandbytes, where those are installed. Each trains a perceptron on the
digits for 500 steps in the running form, with its own defaults and lr 1 (its recipe's schedule),
and resumes from the middle; without Mechanic it trains with each of five learning rates. All on one
seed: a table of what works, not of how well.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

import mechanic_fused
from mechanic_fused import mechanize

from ._harness import options, records, tables
from ._harness.records import Record, Row
from ._harness.tables import shown
from .convergence.schedules import schedule
from .convergence.tasks import TASKS

TASK = TASKS["digits_mlp"]
SEED = 0
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

OURS = ("Lion", "Muon")

OF_PYTORCH_OPTIMIZER = (
    *("AdaBelief", "AdaBound", "AdamP", "Adan", "AdEMAMix", "ADOPT", "CAME", "DiffGrad"),
    *("Lamb", "LaProp", "LARS", "MADGRAD", "MARS", "Muon", "NovoGrad", "Prodigy"),
    *("QHAdam", "Ranger", "Ranger21", "ScheduleFreeAdamW", "SGDP", "Shampoo", "SOAP"),
    *("SophiaH", "StableAdamW", "Tiger", "Yogi"),
)

OTHERS = {
    "pytorch-optimizer": ("pytorch_optimizer", OF_PYTORCH_OPTIMIZER),
    "timm": (
        "timm.optim",
        (
            *("Adafactor", "AdafactorBigVision", "AdamP", "Adan", "Adopt", "Kron", "LaProp"),
            *("Lamb", "Lars", "Lion", "MADGRAD", "Mars", "NAdamLegacy", "NvNovoGrad", "SGDP"),
        ),
    ),
    "schedulefree": (
        "schedulefree",
        ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"),
    ),
    "torchao": ("torchao.optim", ("AdamW8bit", "AdamW4bit", "AdamWFp8")),
    "bitsandbytes": (
        "bitsandbytes.optim",
        ("AdamW8bit", "AdamW32bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit"),
    ),
}
"""Package → its module and the names of its optimizers."""


def bases() -> dict[str, type[torch.optim.Optimizer]]:
    """Return name → class."""
    found: dict[str, Any] = {}
    for name, kind in sorted(vars(torch.optim).items()):
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
            found[f"torch {name}"] = kind
    del found["torch Optimizer"]
    found.update({f"mechanic_fused {name}": getattr(mechanic_fused, name) for name in OURS})
    for package, (module, names) in OTHERS.items():
        try:
            loaded = importlib.import_module(module)
        except ImportError:  # not installed, or without what it needs, as timm without torchvision
            continue
        others = {name: getattr(loaded, name, None) for name in names}
        found.update({f"{package} {k}": v for k, v in others.items() if v is not None})
    return found


MATRICES_ALONE = ("torch Muon", "pytorch-optimizer Muon")
"""Bases that step weights of two dimensions; the others rest."""

Make = Callable[[list[torch.nn.Parameter]], Any]


class Training:
    """A problem, an optimizer over its weights, and how far they have come."""

    def __init__(self, name: str, make: Make, steps: int) -> None:
        self.problem: Any = TASK.build(SEED)
        weights = self.problem.weights()
        if name in MATRICES_ALONE:
            weights = [w for w in weights if w.dim() == 2]
        if name == "mechanic_fused Muon":
            weights = list(mechanic_fused.muon_groups(self.problem.model))
        self.opt = make(weights)
        if hasattr(self.opt, "train"):
            self.opt.train()
        self.schedule = schedule(self.opt, TASK, steps)

    def run(self, steps: int) -> float:
        """Train further; return the accuracy."""
        given = mechanic_fused.is_mechanized(self.opt)
        for _ in range(steps):
            loss = self.problem.loss(self.problem.batch())
            self.opt.zero_grad()
            loss.backward()
            self.opt.step(**({"loss": loss.detach()} if given else {}))
            self.schedule.step()
        return self.problem.scores(self.problem.model)["accuracy"]


def resumes(name: str, make: Make, steps: int, expected: list[Any]) -> bool:
    """Return whether a run that is saved in the middle has the weights of one that is not."""
    first, second = Training(name, make, steps), Training(name, make, steps)
    first.run(steps // 2)
    second.problem.model.load_state_dict(copy.deepcopy(first.problem.model.state_dict()))
    # By way of a file: states of torchao cannot be copied.
    file = io.BytesIO()
    torch.save(first.opt.state_dict(), file)
    file.seek(0)
    second.opt.load_state_dict(torch.load(file, weights_only=False))
    second.schedule.load_state_dict(copy.deepcopy(first.schedule.state_dict()))
    second.problem.generator.set_state(first.problem.generator.get_state())
    second.problem.order = first.problem.order
    second.run(steps - steps // 2)
    return all(map(torch.equal, second.problem.weights(), expected))


def measure(name: str, base: type[Any], steps: int) -> Row:
    """Return the row of a base."""
    row: Row = {"base": name}
    options = {"lr": 1.0} if "lr" in inspect.signature(base).parameters else {}

    def make(weights: Any) -> Any:
        return mechanize(base)(weights, **options)

    try:
        run = Training(name, make, steps)
        row["how"] = run.opt.implementation.partition(" ")[0].rstrip(":")
        row["accuracy"] = run.run(steps)
        row["scale"] = float(run.opt.scale.max())
        row["resumes"] = resumes(name, make, steps, run.problem.weights())
    except Exception as error:  # a base of another package may raise anything
        row["why"] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    found = []
    for lr in RATES if options else ():
        try:
            found.append(Training(name, lambda w, lr=lr: base(w, lr=lr), steps).run(steps))
        except Exception as error:
            row.setdefault("why", " ".join(f"alone, {type(error).__name__}: {error}".split())[:160])
    if found:
        row["best of five rates"] = max(found)
    return row


def table(rows: list[Row]) -> str:
    """Return the rows as a table."""
    headers = ["base", "update", "accuracy, %", "best of five rates, %", "learned S"]
    headers += ["resumes to the bit", "why not"]
    lines = [
        [
            row["base"],
            row.get("how", ""),
            shown(100 * row["accuracy"], 3) if "accuracy" in row else "–",
            shown(100 * row["best of five rates"], 3) if "best of five rates" in row else "–",
            shown(row["scale"], 2) if "scale" in row else "",
            {True: "yes", False: "no", None: ""}[row.get("resumes")],
            row.get("why", ""),
        ]
        for row in rows
    ]
    return tables.table(headers, lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.parser("bases", __doc__, "bases.csv")
    parser.add_argument("--quick", action="store_true", help="ten steps of three bases")
    return parser.parse_args(arguments)


def run(chosen: argparse.Namespace) -> Record:
    """Measure, and write the file."""
    torch.set_num_threads(1)
    record = Record(
        {
            **records.environment(miniature=chosen.quick),
            "method": f"a perceptron on the digits, {10 if chosen.quick else TASK.steps} steps, "
            "one seed, one thread",
        }
    )
    found = bases()
    names = ["torch SGD", "torch AdamW", "torch RAdam"] if chosen.quick else list(found)
    for name in tqdm(names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record.rows.append(measure(name, found[name], 10 if chosen.quick else TASK.steps))
        record.save(chosen.out)
    return record


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    record = Record.load(chosen.out) if chosen.report else run(chosen)
    print(tables.heading(record), table(record.rows), sep="\n\n")


if __name__ == "__main__":
    main()
