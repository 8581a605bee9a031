"""Train the character model with its weights sharded over ranks by FSDP2, and save with DCP.

    torchrun --nproc-per-node 2 examples/fsdp2.py                        # about a minute
    torchrun --nproc-per-node 2 examples/fsdp2.py --checkpoint out/a     # run again to resume
    torchrun --nproc-per-node 4 examples/fsdp2.py --checkpoint out/a     # also on more ranks

Without torchrun there is one rank. Each rank uses one GPU, or the ranks share the CPU's cores. The
optimizer needs no option for sharding.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from char_model import CharModel, load_text, random_batch, validation_loss
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR

from mechanic_fused import MechanicAdamW

BATCH = 16  # of all ranks together


class Training:
    """A run that torch.distributed.checkpoint can save and load."""

    def __init__(self, vocabulary: int, steps: int, device: torch.device):
        torch.manual_seed(0)  # all ranks start from the same weights and keep their shards
        self.model = CharModel(vocabulary).to(device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = MechanicAdamW(self.model.parameters(), lr=1.0)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=steps)
        self.step = 0

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        rest = {"scheduler": self.scheduler.state_dict(), "step": self.step}
        return {"model": model, "optimizer": optimizer, **rest}

    def load_state_dict(self, state: dict) -> None:
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    def save(self, folder: Path) -> None:
        dcp.save({"training": self}, checkpoint_id=str(folder / f"step-{self.step}"))


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint: its .metadata is written last."""
    complete = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text = load_text()
    characters, validation = text.train.to(device), text.validation.to(device)
    run = Training(len(text.vocabulary), arguments.steps, device)
    found = latest(arguments.checkpoint) if arguments.checkpoint else None
    if found:
        dcp.load({"training": run}, checkpoint_id=str(found))
    if rank == 0:
        print(
            f"{ranks} ranks on {device.type}, {run.optimizer.implementation}; from step {run.step}"
        )
    while run.step < arguments.steps:
        # The batch of a rank depends only on the step, so a resumed run sees the same batches.
        seed = torch.Generator().manual_seed(run.step * ranks + rank)
        batch = random_batch(characters, BATCH // ranks, run.model.context, seed)
        loss = run.model.loss(batch)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step(loss=loss)
        rate = run.optimizer.learned_lr()[0]  # on a GPU this read waits for the device
        run.scheduler.step()
        run.step += 1
        if run.step % arguments.every == 0 or run.step == arguments.steps:
            held_out = validation_loss(run.model, validation)
            if rank == 0:
                print(f"step {run.step:5}  validation loss {held_out:.3f}  learned lr {rate:.2e}")
            if arguments.checkpoint:
                run.save(arguments.checkpoint)
    # All ranks have computed the scale from the same sums.
    scales = [None] * ranks
    dist.all_gather_object(scales, run.optimizer.scale.item())
    if rank == 0:
        same = "identical on" if len(set(scales)) == 1 else "different on"
        print(f"scale {scales[0]:.17g}, {same} {ranks} ranks")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save here, or resume")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.every < 1:
        parser.error("--steps and --every must be 1 or more")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    if BATCH % int(os.environ["WORLD_SIZE"]):
        parser.error(f"the number of ranks must divide the batch of {BATCH}")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(arguments, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
