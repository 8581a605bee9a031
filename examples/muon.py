"""Train the demo's model with Muon for its matrices, AdamW for the rest, and no learning rate.

    python examples/muon.py                # a minute or two
    python examples/muon.py --steps 500

It prints which weights each of the two steps, the losses, and the one scale that both learn.
"""

import argparse

import torch
from char_model import CharModel, load_text, random_batch, validation_loss
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from mechanic_fused import MechanicMuon, muon_groups

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    text = load_text()
    torch.manual_seed(chosen.seed)
    model = CharModel(len(text.vocabulary))
    groups = muon_groups(model)
    print(groups)
    opt = MechanicMuon(groups, max_grad_norm=1.0)
    warmup = max(1, chosen.steps // 20)
    schedule = SequentialLR(
        opt,
        [
            LinearLR(opt, start_factor=0.01, total_iters=warmup),
            CosineAnnealingLR(opt, T_max=chosen.steps - warmup),
        ],
        milestones=[warmup],
    )
    batches = torch.Generator().manual_seed(chosen.seed)
    for _ in tqdm(range(chosen.steps), unit="step"):
        loss = model.loss(random_batch(text.train, BATCH, model.context, batches))
        loss.backward()
        opt.step(loss=loss)
        schedule.step()
        opt.zero_grad()
    print(
        f"S {float(opt.scale):.3g}, validation loss {validation_loss(model, text.validation):.3f}"
    )


if __name__ == "__main__":
    main()
