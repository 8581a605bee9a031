"""Train one small language model with every tuner of the package, and plot them together.

    python examples/compare_tuners.py                  # a few minutes
    python examples/compare_tuners.py --methods GeN "AutoDrop on AdamW" --steps 1000

One seed and a short run: it shows how to use each tuner and what its learning rate does, not which
is best. docs/tuners/README.md has figures over tasks and seeds.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch loads OpenMP: a thread that waits by spinning slows down a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from char_model import CharModel, load_text, random_batch, validation_loss
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from mechanic_fused import MechanicAdamW, tuners

BATCH = 16
CONTEXT = 32
VALIDATION = 40_000
"""Characters of validation text: the whole text would take longer than the training."""


class Method(NamedTuple):
    """An optimizer, its schedulers or tuner, and how they take a step together.

    Args:
        optimizer: weights → optimizer.
        schedulers: (optimizer, model, steps) → a list of whatever changes its learning rate.
        call: they step "after" the optimizer or "before" it; or the optimizer takes a "closure".
        clips: whether gradients may be clipped; a line search needs the gradients of the loss.
    """

    optimizer: Callable[[list], Optimizer]
    schedulers: Callable[[Optimizer, CharModel, int], list]
    call: str = "after"
    clips: bool = True


def nothing(*_: Any) -> list:
    return []


def cosine(opt: Optimizer, _: CharModel, steps: int) -> list:
    return [CosineAnnealingLR(opt, steps)]


def momentum(weights: list) -> Optimizer:
    return SGD(weights, lr=0.3, momentum=0.9)


METHODS = {
    "AdamW 1e-2, cosine": Method(lambda w: AdamW(w, lr=1e-2), cosine),
    "AdamW 1e-2, constant": Method(lambda w: AdamW(w, lr=1e-2), nothing),
    "Mechanic AdamW, cosine": Method(lambda w: MechanicAdamW(w, lr=1.0), cosine, "closure"),
    # Windows of one step: otherwise a run this short would end before the first drop.
    "AutoDrop on AdamW": Method(
        lambda w: AdamW(w, lr=1e-2), lambda opt, *_: [tuners.AutoDrop(opt, k=1)]
    ),
    "GeN": Method(lambda w: AdamW(w, lr=1e-3), lambda o, m, _: [tuners.GeN(o, m)], "before"),
    "LRTuner": Method(
        lambda w: AdamW(w, lr=1e-3), lambda o, m, n: [tuners.LRTuner(o, m, steps=n)], "before"
    ),
    "LQA": Method(lambda w: SGD(w, lr=1e-2), lambda o, m, _: [tuners.LQA(o, m)], "before"),
    "SGD 0.3, cosine": Method(momentum, cosine),
    "Flatter, faster": Method(
        momentum, lambda o, m, n: [*cosine(o, m, n), tuners.FlatterFaster(o)]
    ),
    "CGQ": Method(lambda w: tuners.CGQ(w, lr=0.1), nothing, "closure", clips=False),
    "extrapolated SGD": Method(
        lambda w: tuners.ExtrapolatedSGD(w, lr=0.3, momentum=0.9), cosine, "closure"
    ),
    "AdaRem": Method(lambda w: tuners.AdaRem(w, lr=0.4), cosine, "closure"),
    # For objectives without noise: every step uses the same batch.
    "AutoGD, one batch": Method(lambda w: tuners.AutoGD(w), nothing, "closure", clips=False),
}


class Run:
    """One training run and its curves."""

    def __init__(self, name: str, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.name, self.steps = name, steps
        self.batches = torch.Generator().manual_seed(seed)
        self.text = load_text()
        self.model = CharModel(len(self.text.vocabulary), context=CONTEXT)
        self.method = METHODS[name]
        self.optimizer = self.method.optimizer(list(self.model.parameters()))
        self.schedulers = self.method.schedulers(self.optimizer, self.model, steps)
        self.fixed = self.batch() if "one batch" in name else None
        self.rates: list[float] = []
        self.validation: list[tuple[int, float]] = []

    def batch(self) -> torch.Tensor:
        return random_batch(self.text.train, BATCH, self.model.context, self.batches)

    def rate(self) -> float:
        """Return the learning rate of the next step."""
        if isinstance(self.optimizer, MechanicAdamW):
            return self.optimizer.learned_lr()[0]
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        batch = self.batch() if self.fixed is None else self.fixed

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.model.loss(batch)
            # Line searches also call it without gradients.
            if loss.requires_grad:
                loss.backward()
                if self.method.clips:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            return loss

        if self.method.call == "closure":
            self.optimizer.step(closure)
        else:
            closure()
            if self.method.call == "before":
                # A different batch from the gradient's, drawn only if the tuner needs one.
                other = self.batch() if self.schedulers[0].due else batch
                self.schedulers[0].step(lambda: self.model.loss(other))
            self.optimizer.step()
        if self.method.call != "before":
            for scheduler in self.schedulers:
                scheduler.step()

    def train(self) -> None:
        interval = 0.2 if sys.stderr.isatty() else 10
        for t in tqdm(range(1, self.steps + 1), desc=self.name, mininterval=interval):
            self.rates.append(self.rate())
            self.step()
            if t % max(1, self.steps // 10) == 0:
                loss = validation_loss(self.model, self.text.validation[:VALIDATION])
                self.validation.append((t, loss))


def draw(runs: list[Run], path: Path) -> None:
    """Plot the validation losses and the learning rates over the steps."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, without a display
    import matplotlib.pyplot as plt

    figure, (losses, rates) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    colours = plt.cm.tab20.colors
    for i, run in enumerate(runs):
        look = {"color": colours[i % len(colours)], "lw": 1.6, "ls": "-" if i % 2 else "--"}
        losses.plot(*zip(*run.validation, strict=True), **look)
        label = f"{run.name}: {run.validation[-1][1]:.2f}"
        rates.plot(range(1, run.steps + 1), [max(r, 1e-12) for r in run.rates], **look, label=label)
    final = sorted(run.validation[-1][1] for run in runs)
    losses.set_ylim(final[0] - 0.1, max(final[0] + 1.5, final[len(final) // 2] + 0.5))
    losses.set_ylabel("validation loss (nats a character)")
    rates.set_ylabel("learning rate")
    rates.set_yscale("log")
    rates.set_ylim(bottom=1e-5)
    for axes in (losses, rates):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, title="final validation loss")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    # A model this small does not gain from more than two threads.
    threads = min(2, os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=threads, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/compare_tuners.png"))
    arguments = parser.parse_args()
    for name in ("steps", "threads"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    runs = [Run(name, arguments.steps, arguments.seed) for name in arguments.methods]
    for run in runs:
        run.train()
    print(f"\n{'method':<24}  {'largest lr':>10}  {'validation loss':>15}")
    for run in sorted(runs, key=lambda run: run.validation[-1][1]):
        print(f"{run.name:<24}  {max(run.rates):>10.1e}  {run.validation[-1][1]:>15.3f}")
    draw(runs, arguments.out)
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
