"""Weights that are placed on ranks by hand, and runs of them through distributed checkpoints."""

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

PLACEMENTS = {
    "Shard(0)": (Shard(0),),
    "Shard(1)": (Shard(1),),
    "replicas": (Replicate(),),
    "hsdp": (Replicate(), Shard(0)),
    "rows and columns": (Shard(0), Shard(1)),
    "Shard(0) twice": (Shard(0), Shard(0)),
}
"""Layout → placements on a mesh of all ranks, or of two by half as many."""


def placing(layout, least_dim=0):
    """Return what places whole tensors on the ranks.

    Args:
        layout: a key of PLACEMENTS, or None to leave them whole.
        least_dim: tensors of fewer dimensions are replicated.
    """
    if not layout:
        return lambda x: x
    placements = PLACEMENTS[layout]
    world = distributed.get_world_size()
    sizes = (world,) if len(placements) == 1 else (2, world // 2)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])

    def place(x):
        chosen = placements if x.dim() >= least_dim else [Replicate()] * len(placements)
        return distribute_tensor(x, mesh, chosen, src_data_rank=None)

    return place


def _weights_and_state(run):
    return {"weights": dict(enumerate(run.params)), "opt": run.opt.state_dict()["state"]}


def save(run, folder):
    """Save the ``params`` of a run and its ``opt``."""
    dcp.save(_weights_and_state(run), checkpoint_id=folder)
    if distributed.get_rank() == 0:
        torch.save(run.opt.state_dict()["param_groups"], f"{folder}/groups.pt")
    distributed.barrier()


def load(run, folder):
    """Load what was saved into a run that has taken a step."""
    found = _weights_and_state(run)
    dcp.load(found, checkpoint_id=folder)
    groups = torch.load(f"{folder}/groups.pt")
    run.opt.load_state_dict({"state": found["opt"], "param_groups": groups})
