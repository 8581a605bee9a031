"""A plain training script for torchrun: DDP, a checkpoint every few steps, goes on after a kill.

torchrun --nproc-per-node N tests/stacks/train_script.py FOLDER WAIT: with WAIT > 0 the run stops
before that step and waits to be killed.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import BATCH, TinyModel, batch
from torch.nn.parallel import DistributedDataParallel

from mechanic_fused import MechanicAdamW

STEPS, SAVED_EVERY = 12, 3


def save(path, contents):
    """Write the whole checkpoint or none: a kill in between leaves the one before."""
    torch.save(contents, f"{path}.part")
    os.replace(f"{path}.part", path)


def train(folder, wait):
    rank, world = dist.get_rank(), dist.get_world_size()
    path = folder / "run.pt"
    # A run that goes on starts from other weights: only the checkpoint can put them right.
    model = TinyModel(1 if path.exists() else 0)
    opt = MechanicAdamW(model.parameters(), lr=1.0, s_init=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 2 * STEPS)
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["steps"]
        model.load_state_dict(saved["weights"])
        opt.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    replica = DistributedDataParallel(model)
    for t in range(first, STEPS):
        if t == wait > 0:
            time.sleep(600)
        opt.zero_grad()
        # Each rank takes the examples of its own.
        replica(**batch(world * t + rank, BATCH))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        contents = {
            "steps": t + 1,
            "weights": model.state_dict(),
            "optimizer": opt.state_dict(),
            "schedule": schedule.state_dict(),
        }
        if rank == 0 and (t + 1) % SAVED_EVERY == 0:
            save(path, contents)
    save(folder / f"end {rank}.pt", contents)


def main():
    torch.set_num_threads(1)
    # A rank that waits in vain for the others fails soon.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    train(folder, int(sys.argv[2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
