"""What tests of LineProbe have in common, and what their ranks run."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mechanic_fused.tuners import LineProbe

MULTIPLES = (-1.0, 0.0, 0.5, 1.0, 2.0)


def batch(t):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(t))


def losses_of_ranks():
    """Each rank's loss is of its own target, its number."""
    weight = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(3)
    target = float(torch.distributed.get_rank())
    return LineProbe(opt)(lambda: (weight - target).square().sum(), (0, 1))


def fully_sharded():
    """Losses of a probe and of training under fully_shard, and those of the plain model."""
    losses, steps = trained(sharded=True, probed=3)
    expected, _ = trained(sharded=False, probed=1)
    _, undisturbed = trained(sharded=False, probed=0)
    return losses, expected, steps, undisturbed


def trained(sharded, probed):
    """What the first probe found, and the loss of each of three steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    z = torch.randn(8, 4)
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of():
        return (model(z) - 1).square().mean()

    found, steps = [], []
    for t in range(3):
        opt.zero_grad()
        loss = loss_of()
        loss.backward()
        if t < probed:
            found.append(LineProbe(opt, model)(loss_of, (0, 1, 2)))
        opt.step()
        steps.append(float(loss.detach()))
    return found[:1], steps
