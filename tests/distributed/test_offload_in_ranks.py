"""State on the host under several ranks: as without offload, or refused."""

import pytest
import torch
from support.cases import assert_same, make_weights, set_gradients, snapshot
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mechanic_fused import MechanicAdamW

STEPS = 6


def train(**options):
    """Take steps with the loss of this rank; return weights, state and groups."""
    rank = distributed.get_rank()
    params = make_weights(seed=0 if "loss_group" in options else rank)
    opt = MechanicAdamW(params, lr=1.0, **options)
    for t in range(STEPS):
        set_gradients(params, t)
        opt.step(loss=1.0 + rank)
    return snapshot(opt)


def replicas_and_shards():
    world = distributed.group.WORLD
    for groups in ({"loss_group": world}, {"reduce_group": world}):
        assert_same(*(train(offload=offload, **groups) for offload in (True, False)))


def test_replicas_and_plain_shards_have_the_bits_of_the_ordinary_step(ranks):
    ranks(2).run(replicas_and_shards)


def refused():
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"got a DTensor weight .*CPUOffloadPolicy"):
        MechanicAdamW([p], offload=True)


def test_a_dtensor_is_refused(ranks):
    ranks(2).run(refused)
