"""A plain training script with DDP: saves a checkpoint every few steps, and resumes after a kill.

torchrun --nproc-per-node N tests/distributed/train_script.py FOLDER [KILLED_AT]: each rank kills
itself before step KILLED_AT.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from support.chain_model import ChainModel, batch
from torch.nn.parallel import DistributedDataParallel

from mechanic_fused import MechanicAdamW

STEPS, SAVED_EVERY = 12, 3


def save(path, contents):
    """Write the whole checkpoint or none: a kill in between leaves the one before."""
    torch.save(contents, f"{path}.part")
    os.replace(f"{path}.part", path)


def train(folder, killed_at=None):
    rank, world = dist.get_rank(), dist.get_world_size()
    path = folder / "run.pt"
    # A run that resumes starts from other weights: only the checkpoint can put them right.
    model = ChainModel(seed=int(path.exists()))
    opt = MechanicAdamW(model.parameters(), lr=1.0, s_init=0.05, weight_decay=0.1)
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
        if t == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        opt.zero_grad()
        # Each rank takes examples of its own.
        replica(**batch(world * t + rank))["loss"].backward()
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


def main(folder, killed_at=None):
    torch.set_num_threads(1)
    # A rank that waits in vain for the others fails soon.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    train(folder, killed_at)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
