"""The recipe of docs/stacks/deepspeed.md for the Trainer; prints S and the losses as JSON.

Argument: the stage of ZeRO, or nothing for the Trainer alone.
"""

import json
import os
import sys
import tempfile

os.environ.update(
    DS_ACCELERATOR="cpu",
    DS_IGNORE_CUDA_DETECTION="1",
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="1",
    MASTER_ADDR="127.0.0.1",
    HF_HUB_OFFLINE="1",
)

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from mechanic_fused import MechanicAdamW


def main():
    stage = int(sys.argv[1]) if sys.argv[1:] else None
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    undropped = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **undropped))
    rows = [(torch.arange(16) + i) % 32 for i in range(64)]
    config = {
        "zero_optimization": {"stage": stage, "sub_group_size": 1000},
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }
    args = TrainingArguments(
        tempfile.mkdtemp(),
        deepspeed=None if stage is None else config,  # begins torch.distributed
        use_cpu=True,
        max_steps=30,
        warmup_steps=3,
        weight_decay=0.1,
        per_device_train_batch_size=8,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    options = {"lr": 1.0}
    if stage is not None:
        options["reduce_group"] = torch.distributed.group.WORLD
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=(MechanicAdamW, options),
    )
    trainer.train()
    opt = trainer.optimizer
    while not isinstance(opt, MechanicAdamW):
        opt = opt.optimizer
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("RESULT", json.dumps({"scale": opt.scale.item(), "losses": losses}))


if __name__ == "__main__":
    main()
