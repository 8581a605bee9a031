"""The recipe of docs/stacks/deepspeed.md for Accelerate; prints S and the losses as JSON.

Argument: the stage of ZeRO, or nothing for Accelerate alone.
"""

import json
import os
import sys

os.environ.update(
    DS_ACCELERATOR="cpu",
    DS_IGNORE_CUDA_DETECTION="1",
    ACCELERATE_USE_CPU="true",
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="1",
    MASTER_ADDR="127.0.0.1",
)

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from support.deepspeed_runs import ROWS, STEPS, groups_of, loss_of, made_model

from mechanic_fused import MechanicAdamW
from mechanic_fused.integrations import unwrapped


def main():
    stage = int(sys.argv[1]) if sys.argv[1:] else None
    torch.set_num_threads(1)
    plugin, options = None, {"lr": 1.0}
    if stage is not None:
        config = {
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 0.0,
        }
        plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)  # begins torch.distributed
    if stage:
        options["reduce_group"] = torch.distributed.group.WORLD
    model = made_model(torch.float32)
    model, opt = accelerator.prepare(model, MechanicAdamW(groups_of(model, 2), **options))
    losses = []
    for t in range(STEPS):
        loss = loss_of(model, t, torch.float32)
        accelerator.backward(loss)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    [found] = unwrapped(opt)
    print("RESULT", json.dumps({"scale": found.scale.item(), "losses": losses}))


if __name__ == "__main__":
    main()
