"""Train a small language model without choosing a learning rate.

    python examples/char_lm.py                      # one to two minutes
    python examples/char_lm.py --compare            # also AdamW at five rates: six times as long
    python examples/char_lm.py --checkpoint out/a   # save during training; run again to resume

It prints the validation loss and a sample of text from the model, and plots the losses and the
learned learning rate.
"""

import argparse
import os
import pickle
import signal
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

# Read when torch loads OpenMP: a thread that waits by spinning slows down a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from char_model import CharModel, Text, generate, load_text, random_batch, validation_loss
from char_picture import draw
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from mechanic_fused import MechanicAdamW

BATCH = 16
PROMPT = "The value of "
ADAMW_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def make_optimizer(model: CharModel, lr: float | None) -> torch.optim.Optimizer:
    """Return Mechanic, or plain AdamW at a chosen learning rate."""
    if lr is None:
        return MechanicAdamW(model.parameters(), lr=1.0)  # not tuned: lr is always 1.0
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


class Run:
    """One training run and everything needed to resume it."""

    def __init__(self, text: Text, steps: int, seed: int, lr: float | None = None):
        torch.manual_seed(seed)  # the weights
        self.batches = torch.Generator().manual_seed(seed)
        self.text, self.steps, self.lr = text, steps, lr
        self.name = "MechanicAdamW" if lr is None else f"AdamW lr={lr:g}"
        self.settings = {
            "optimizer": self.name,
            "steps": steps,
            "seed": seed,
            "characters": len(text.train) + len(text.validation),
        }
        self.model = CharModel(len(text.vocabulary))
        self.optimizer = make_optimizer(self.model, lr)
        # The schedule rises from 0 to 1 and falls back to 0; Mechanic learns its height.
        warmup = max(1, steps // 20)
        self.scheduler = SequentialLR(
            self.optimizer,
            [
                LinearLR(self.optimizer, start_factor=0.01, total_iters=warmup),
                CosineAnnealingLR(self.optimizer, T_max=max(1, steps - warmup)),
            ],
            milestones=[warmup],
        )
        self.step = 0
        self.history: list[tuple[int, float, float, float]] = []  # step, loss, learning rate, scale
        self.validation: list[tuple[int, float]] = []  # step, loss

    def train_step(self) -> None:
        batch = random_batch(self.text.train, BATCH, self.model.context, self.batches)
        loss = self.model.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.lr is None:
            self.optimizer.step(loss=loss)  # from which the learning rate starts
        else:
            self.optimizer.step()
        self.step += 1
        # On a GPU each read would wait for the device, so this only happens every few steps.
        if self.step % max(1, self.steps // 400) == 0:
            self.history.append((self.step, loss.item(), *self.rate_and_scale()))
        self.scheduler.step()

    def rate_and_scale(self) -> tuple[float, float]:
        """Return the learning rate of this step, including the schedule, and the scale alone."""
        if self.lr is None:
            return self.optimizer.learned_lr()[0], self.optimizer.scale.item()
        return self.scheduler.get_last_lr()[0], self.lr

    def validate(self) -> None:
        self.validation.append((self.step, validation_loss(self.model, self.text.validation)))

    def peak_rate(self) -> float:
        return max(rate for _, _, rate, _ in self.history)

    def save(self, path: Path) -> None:
        checkpoint = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches.get_state(),
            "step": self.step,
            "history": self.history,
            "validation": self.validation,
        }
        # Replacing is atomic: a complete checkpoint exists whenever the program dies.
        unfinished = path.with_suffix(".tmp")
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        try:
            checkpoint = torch.load(path, weights_only=True)
            settings = checkpoint["settings"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, OSError):
            sys.exit(f"{path} is not a checkpoint of this example: use another folder")
        for name, value in self.settings.items():
            if settings.get(name) != value:
                sys.exit(
                    f"{path} was written with {name} = {settings.get(name)}, this run has {value}: "
                    "use the same settings, or another folder"
                )
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.batches.set_state(checkpoint["batches"])
        self.step = checkpoint["step"]
        self.history, self.validation = checkpoint["history"], checkpoint["validation"]


def watch_for_interrupt() -> threading.Event:
    """Let the current step finish after Ctrl-C; a second Ctrl-C stops immediately."""
    asked = threading.Event()

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    return asked


def train(run: Run, folder: Path | None, interrupted: threading.Event) -> None:
    """Train to the last step, resuming from the checkpoint in `folder` if there is one."""
    checkpoint = folder / f"{run.name.replace(' ', '_')}.pt" if folder else None
    if checkpoint and checkpoint.exists():
        run.load(checkpoint)
        print(f"{checkpoint}: resumed after step {run.step} of {run.steps}")
    interval = max(10, run.steps // 20)
    refresh = 0.2 if sys.stderr.isatty() else 10  # seconds; less often in a log file
    with tqdm(total=run.steps, initial=run.step, desc=run.name, mininterval=refresh) as bar:
        while run.step < run.steps and not interrupted.is_set():
            run.train_step()
            if run.step % interval == 0 or run.step == run.steps:
                run.validate()
                if checkpoint:
                    run.save(checkpoint)
            if run.history:
                _, loss, rate, _ = run.history[-1]
                bar.set_postfix_str(f"loss {loss:.2f}, lr {rate:.1e}", refresh=False)
            bar.update()
    if run.step < run.steps:
        stop(run, checkpoint)


def stop(run: Run, checkpoint: Path | None) -> None:
    """Save and exit after Ctrl-C."""
    if checkpoint:
        run.save(checkpoint)
        message = f"{checkpoint} is saved: run the same command to resume"
    else:
        message = "nothing was saved (use --checkpoint DIR)"
    print(f"\nStopped after step {run.step} of {run.steps}; {message}.")
    sys.exit(130)  # the exit status of a program ended by Ctrl-C


def print_sample(run: Run, seed: int) -> None:
    """Print text generated by the model."""
    generator = torch.Generator().manual_seed(seed)
    tokens = generate(run.model, run.text.encode(PROMPT), 300, generator)
    print("\nThe model writes:\n")
    print(textwrap.indent(run.text.decode(tokens), "    "))


def print_table(runs: list[Run]) -> None:
    print(f"\n{'optimizer':<14}  {'peak learning rate':>18}  {'validation loss':>15}")
    for run in runs:
        name, loss = run.name.split()[0], run.validation[-1][1]
        print(f"{name:<14}  {run.peak_rate():>18.1e}  {loss:>15.3f}")
    best = min(runs[1:], key=lambda run: run.validation[-1][1])
    if best in (runs[1], runs[-1]):
        print("AdamW is best at the edge of the grid: a wider grid might find a better rate.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    # A model this small does not gain from more than two threads.
    threads = min(2, os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=threads, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("out/char_lm.png"), help="the picture (%(default)s)"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save here, or resume")
    parser.add_argument("--compare", action="store_true", help="also AdamW at a grid of rates")
    arguments = parser.parse_args()
    for name in ("steps", "threads"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    if arguments.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out must end in .png, .pdf or .svg, got {arguments.out}")
    # Report a bad folder before the training, not after it.
    for folder in filter(None, (arguments.out.parent, arguments.checkpoint)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            sys.exit(f"cannot write in the folder {folder}: {error.strerror}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    text = load_text()
    rates = [None, *ADAMW_GRID] if arguments.compare else [None]
    runs = [Run(text, arguments.steps, arguments.seed, lr) for lr in rates]
    mechanic = runs[0]
    print(f"{len(text.train):,} characters of Python's own documentation to learn from")
    print(f"{mechanic.name}, {mechanic.optimizer.implementation}; no learning rate given")
    interrupted = watch_for_interrupt()
    for run in runs:
        train(run, arguments.checkpoint, interrupted)
    print_sample(mechanic, arguments.seed)
    print(f"\nvalidation loss {mechanic.validation[-1][1]:.3f} nats a character")
    print(f"learned learning rate {mechanic.peak_rate():.1e} at its peak")
    if arguments.compare:
        print_table(runs)
    draw(runs, arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
