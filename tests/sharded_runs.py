"""Runs that are saved by torch.distributed.checkpoint under one layout and go on under another.

The functions run on every rank of a pool, or in one process that has no others.
"""

import torch
import torch.distributed.checkpoint as dcp
from layouts import CHANGES, LAYOUTS, full_weights, model, optimizer, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

FORMS = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
}
PLAIN = ("full", "broadcast")
"""The forms that one torch.save of rank 0 holds."""


def make(layout, base, dtype, **options):
    net = model(dtype)
    needed = {}
    if layout != "single":
        net, needed = LAYOUTS[layout](net)
    opt = optimizer(base, layout, net.parameters(), **needed, **options)
    return net, opt


def save(layout, base, folder, form, steps, dtype=torch.float32, **options):
    """Train, save, and return whole weights."""
    net, opt = make(layout, base, dtype, **options)
    train(net, opt, 0, steps)
    chosen = StateDictOptions(**{k: v for k, v in FORMS[form].items() if "broadcast" not in k})
    state = {
        "net": get_model_state_dict(net, options=chosen),
        "opt": get_optimizer_state_dict(net, opt, options=chosen),
    }
    if form not in PLAIN:
        dcp.save(state, checkpoint_id=folder)
    elif torch.distributed.get_rank() == 0:
        torch.save(state, f"{folder}/state.pt")
    torch.distributed.barrier()
    return full_weights(net)


def resume(layout, base, folder, form, first, steps, dtype=torch.float32, **options):
    """Load what ``save`` has left, train on, and return weights, S and the state's dtypes."""
    net, opt = make(layout, base, dtype, **options)
    chosen = StateDictOptions(**FORMS[form])
    if form in PLAIN:
        # With a broadcast only rank 0 reads the file.
        reads = form != "broadcast" or torch.distributed.get_rank() == 0
        state = torch.load(f"{folder}/state.pt") if reads else {"net": {}, "opt": {}}
    else:
        state = {
            "net": get_model_state_dict(net, options=chosen),
            "opt": get_optimizer_state_dict(net, opt, options=chosen),
        }
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(net, state["net"], options=chosen)
    set_optimizer_state_dict(net, opt, state["opt"], options=chosen)
    train(net, opt, first, steps)
    kinds = {name: value.dtype for name, value in opt.state[next(net.parameters())].items()}
    return {
        "weights": full_weights(net),
        "scale": opt.scale,
        "nonfinite": opt.nonfinite_steps,
        "dtypes": kinds,
    }


def look_before_the_first_step(layout, base, steps):
    """Ask for the optimizer's state, which makes torch take a dry step, then train."""
    net, opt = make(layout, base, torch.float32)
    get_optimizer_state_dict(net, opt)
    kinds = sorted(opt.state[next(net.parameters())])
    train(net, opt, 0, steps, change=CHANGES[None])
    return {
        "weights": full_weights(net),
        "scale": opt.scale,
        "nonfinite": opt.nonfinite_steps,
        "names": kinds,
    }
