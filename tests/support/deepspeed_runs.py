"""Runs of DeepSpeed itself on the CPU with gloo, beside a plain loop in one process."""

import logging
import os
import traceback
import warnings

import torch
import torch.distributed as dist

from mechanic_fused import MechanicAdamW

STEPS = 30
ROWS = 16

CASES = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 1, one group": {"stage": 1, "groups": 1},
    "stage 3, pieces": {"stage": 3, "sub_group_size": 40},
    "stage 3, pieces, one group": {"stage": 3, "sub_group_size": 40, "groups": 1},
    "stage 1, bfloat16": {"stage": 1, "dtype": "bf16"},
    "stage 2, bfloat16": {"stage": 2, "dtype": "bf16"},
    "stage 3, bfloat16, pieces": {"stage": 3, "dtype": "bf16", "sub_group_size": 40},
    "stage 2, float16": {"stage": 2, "dtype": "fp16"},
    "stage 2, offloaded": {"stage": 2, "offload": True},
    "stage 3, offloaded, pieces": {"stage": 3, "offload": True, "sub_group_size": 40},
    "stage 2, clipped": {"stage": 2, "clip": 0.5},
    "stage 1, state of 16 bits": {"stage": 1, "of_optimizer": {"optim_bits": 16}},
    "stage 0, with the loss": {"stage": 0, "observed": True},
    "stage 1, with the loss": {"stage": 1, "observed": True},
    "stage 3, pieces, with the loss": {"stage": 3, "sub_group_size": 40, "observed": True},
}
"""Name → what is other than float32, two param groups, one piece, on the device, unclipped."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def made_model(dtype):
    torch.manual_seed(0)
    layers = (torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return torch.nn.Sequential(*layers).to(dtype)


def groups_of(model, count):
    """Return the param groups that a Trainer makes: with weight decay, and without."""
    if count == 1:
        return list(model.parameters())
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def batch(t, dtype, rank=0, ranks=1):
    rng = torch.Generator().manual_seed(t)
    x = torch.randn(ROWS, 8, generator=rng)
    y = x[:, :2].sum(1, keepdim=True)
    return x[rank::ranks].to(dtype), y[rank::ranks].to(dtype)


def loss_of(model, t, dtype, rank=0, ranks=1):
    x, y = batch(t, dtype, rank, ranks)
    return ((model(x) - y) ** 2).mean()


def single(
    stage,
    groups=2,
    dtype="fp32",
    clip=None,
    steps=STEPS,
    observed=False,
    of_optimizer=None,
    **_,
):
    """Return S after each step, and the weights, of a plain loop: 16-bit ones with low bits."""
    dtype = DTYPES[dtype]
    model = made_model(dtype)
    opt = MechanicAdamW(groups_of(model, groups), lr=1.0, **(of_optimizer or {}))
    scales = []
    for t in range(steps):
        loss = loss_of(model, t, dtype)
        opt.zero_grad()
        loss.backward()
        if observed:
            opt.observe(loss)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        scales.append(opt.scale.item())
    return scales, [p.detach().float() for p in model.parameters()]


def config(
    stage,
    ranks,
    dtype="fp32",
    sub_group_size=10**12,
    offload=False,
    clip=None,
    universal=False,
    **_,
):
    zero = {"stage": stage, "sub_group_size": sub_group_size}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    found = {
        "train_micro_batch_size_per_gpu": ROWS // ranks,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "gradient_clipping": clip or 0.0,
        "steps_per_print": 10**9,
    }
    if universal:
        found["checkpoint"] = {"load_universal": True}
    if dtype != "fp32":
        found[dtype] = {"enabled": True}
    if dtype == "fp16":
        found["fp16"]["initial_scale_power"] = 4
    return found


def engine_of(rank, ranks, options, group=True):
    import deepspeed

    dtype = DTYPES[options.get("dtype", "fp32")]
    model = made_model(torch.float32)
    sharded = options["stage"] > 0
    given = {"reduce_group": dist.group.WORLD} if sharded and group else {}
    given |= options.get("of_optimizer", {})
    if options.get("observed"):
        given["loss_group"] = dist.group.WORLD
    opt = MechanicAdamW(groups_of(model, options.get("groups", 2)), lr=1.0, **given)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=opt, config=config(ranks=ranks, **options)
    )
    return engine, opt, dtype


def weights_of(engine, stage):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return [p.detach().float().clone() for p in engine.module.parameters()]


def train(engine, opt, dtype, rank, ranks, first=0, last=STEPS, observed=False):
    scales = []
    for t in range(first, last):
        loss = loss_of(engine, t, dtype, rank, ranks)
        if observed:
            opt.observe(loss)
        engine.backward(loss)
        engine.step()
        if t % 3 == 0 or t + 1 == last:  # reading S ends a step
            scales.append((t, opt.scale.item()))
    return scales


def set_up(rank, ranks, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        DS_IGNORE_CUDA_DETECTION="1",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")


def run_cases(rank, ranks, port, folder):
    """Train every case, and save what each has come to."""
    set_up(rank, ranks, port)
    found = {}
    for name, options in CASES.items():
        try:
            engine, opt, dtype = engine_of(rank, ranks, options)
            observed = options.get("observed", False)
            scales = train(engine, opt, dtype, rank, ranks, observed=observed)
            found[name] = (scales, weights_of(engine, options["stage"]))
            assert opt.scale_source == ("loss" if observed else "norms")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{ranks}-{rank}.pt")


def tag_of(name):
    return name.replace(" ", "-").replace(",", "")


RESUMED = ("stage 0", "stage 1", "stage 2, bfloat16", "stage 3, pieces", "stage 2, offloaded")


def run_resumed(rank, ranks, port, folder):
    """Train, beside a run that is saved in the middle and goes on from there in a new engine."""
    set_up(rank, ranks, port)
    found = {}
    for name in RESUMED:
        options = CASES[name]
        try:
            engine, opt, dtype = engine_of(rank, ranks, options)
            train(engine, opt, dtype, rank, ranks)
            straight = (opt.scale.item(), weights_of(engine, options["stage"]))
            engine, opt, dtype = engine_of(rank, ranks, options)
            train(engine, opt, dtype, rank, ranks, last=STEPS // 2)
            engine.save_checkpoint(folder, tag=tag_of(name))
            engine, opt, dtype = engine_of(rank, ranks, options)
            engine.load_checkpoint(folder, tag=tag_of(name))
            train(engine, opt, dtype, rank, ranks, first=STEPS // 2)
            found[name] = (straight, (opt.scale.item(), weights_of(engine, options["stage"])))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/resumed-{ranks}-{rank}.pt")


def run_without_group(rank, ranks, port, folder):
    """Train as who has not read that ranks need a group, and save the error."""
    set_up(rank, ranks, port)
    engine, opt, dtype = engine_of(rank, ranks, CASES["stage 1"], group=False)
    before = weights_of(engine, 1)
    try:
        train(engine, opt, dtype, rank, ranks)
        found = "nothing was raised"
    except ValueError as error:
        found = str(error)
    moved = any(not torch.equal(a, b) for a, b in zip(before, weights_of(engine, 1), strict=True))
    torch.save((found, moved), f"{folder}/without-{rank}.pt")


UNIVERSAL = (
    *("stage 1", "stage 2", "stage 3", "stage 3, pieces, one group"),
    "stage 1, state of 16 bits",
)


def run_saved(rank, ranks, port, folder):
    """Train half way, and save."""
    set_up(rank, ranks, port)
    for name in UNIVERSAL:
        engine, opt, dtype = engine_of(rank, ranks, CASES[name])
        train(engine, opt, dtype, rank, ranks, last=STEPS // 2)
        engine.save_checkpoint(folder, tag=tag_of(name))


def run_from_universal(rank, ranks, port, folder, by_deepspeed=False):
    """Go on from a universal checkpoint of another number of ranks.

    Args:
        by_deepspeed: load it without our function; what is warned of is saved then.
    """
    from mechanic_fused.integrations.deepspeed import load_universal

    set_up(rank, ranks, port)
    found = {}
    for name in UNIVERSAL:
        try:
            universal = {**CASES[name], "universal": True}
            engine, opt, dtype = engine_of(rank, ranks, universal)
            tag = f"{tag_of(name)}-universal"
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                if by_deepspeed:
                    engine.load_checkpoint(folder, tag=tag)
                else:
                    load_universal(engine, folder, tag)
                scales = train(engine, opt, dtype, rank, ranks, first=STEPS // 2)
            lost = [str(w.message) for w in warned if "no x_ref" in str(w.message)]
            found[name] = (scales, weights_of(engine, CASES[name]["stage"]), lost)
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, f"{folder}/universal-{ranks}-{rank}.pt")
