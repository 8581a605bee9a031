"""Make optimizers by timm's factory; where no torchvision is, a stand-in is what timm imports.

timm's images need torchvision, its optimizers do not, but `import timm` imports both.
"""

import importlib.util
import json
import sys
from unittest import mock

import torch
from torch import nn

from mechanic_fused import MechanicAdamW, MechanicMuon, integrations, mechanize, muon_groups

if importlib.util.find_spec("torchvision") is None:
    parts = ("", ".transforms", ".transforms.functional", ".ops.misc", ".datasets", ".models")
    for part in (*parts, ".ops", ".models.feature_extraction"):
        sys.modules["torchvision" + part] = mock.MagicMock()

import timm.optim


def network():
    return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))


def main():
    names = integrations.register_timm()
    model = network()
    opt = timm.optim.create_optimizer_v2(model, opt="mechanicadamw", lr=1.0, weight_decay=0.05)
    model(torch.ones(2, 8)).sum().backward()
    opt.step()
    made = mechanize(torch.optim.RAdam)
    registered = integrations.register_timm([made])
    muon = timm.optim.create_optimizer_v2(
        model, opt="mechanicmuon", lr=1.0, param_group_fn=muon_groups
    )
    other = timm.optim.create_optimizer_v2(model, opt=registered[0], lr=1.0)
    found = {
        "names": names,
        "is ours": isinstance(opt, MechanicAdamW) and isinstance(muon, MechanicMuon),
        "decay": [group["weight_decay"] for group in opt.param_groups],
        "scale": opt.scale.item(),
        "registered": registered,
        "is made": isinstance(other, made),
    }
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
