"""Write small checkpoints with the release that is installed, for core/test_old_checkpoints.py.

    python tests/support/write_checkpoints.py tests/core/checkpoints_1_0

Run it when a release is made, and add the folder to the test. Each run is saved after BEFORE steps
and goes on for AFTER more, taken by the very optimizer that was saved; their results are stored
beside the checkpoint, and later releases must come to the same bits.

Files are in torch's legacy format, of about 100 bytes a tensor instead of a kilobyte, and zipped.
"""

import copy
import gzip
import inspect
import math
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import mechanic_fused
from mechanic_fused import mechanize, tuners

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": F32, "bfloat16": BF16}
SHAPES = [(3, 5), (), (7,)]
BEFORE, AFTER = 12, 3
LRS = [min(1, (t + 1) / 4) * 0.5 * (1 + math.cos(math.pi * t / 18)) for t in range(BEFORE + AFTER)]
GROUPS = [{"weights": [0, 1]}, {"weights": [2], "weight_decay": 0.0}]


def case(cls, dtype=F32, mechanize=None, frozen=False, steps=BEFORE, **options):
    """Return what makes a run: a class of ours, or one of torch's for mechanize(), and options."""
    return {
        "class": cls,
        "dtype": dtype,
        "mechanize": mechanize,
        "frozen": frozen,
        "steps": steps,
        "options": {"lr": 1.0, "backend": "reference", **options},
    }


def cases():
    adamw, decay, momentum = "MechanicAdamW", {"weight_decay": 0.1}, {"momentum": 0.9}
    found = {
        "adamw cpp": case(adamw, **decay, backend="cpp"),
        "sgd cpp bfloat16": case("MechanicSGD", BF16, **momentum, nesterov=True, backend="cpp"),
        "sgd plain": case("MechanicSGD"),
        "state_dtype adamw": case(adamw, BF16, state_dtype="param", **decay),
        "state_dtype sgd": case("MechanicSGD", BF16, state_dtype="param", **momentum),
        "both narrow": case("MechanicLion", BF16, state_dtype="param", delta_dtype=BF16),
        "variant annealed": case(adamw, variant="annealed", s_decay=0.1, **decay),
        "tuner numbers": case(
            "MechanicSGD", s_decay=0.05, tuner_betas=(0.9, 0.99), s_init=1e-3, tuner_eps=1e-6
        ),
        "frozen": case(adamw, frozen=True, **decay),
        "frozen, scale_per=parameter": case("MechanicLion", frozen=True, scale_per="parameter"),
        "max_grad_norm": case(adamw, max_grad_norm=0.5, **decay),
        "no step taken": case(adamw, steps=0, **decay),
        "radam, scale_per=group": case("RAdam", mechanize={"scale_per": "group"}),
        "amsgrad": case(adamw, amsgrad=True, **decay),
        "mechanize AdamW": case(
            "AdamW", mechanize={"s_decay": 0.0, "betas": (0.9, 0.999), "s_init": 1e-3, "eps": 1e-6}
        ),
    }
    for variant in ("optax", "paper", "pytorch"):
        found[f"variant {variant}"] = case(adamw, variant=variant, s_init=1e-3, **decay)
    for name, dtype in DTYPES.items():
        sgd = {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05}
        found[f"adamw {name}"] = case(adamw, dtype, **decay)
        found[f"adam {name}"] = case("MechanicAdam", dtype, weight_decay=0.05)
        found[f"sgd {name}"] = case("MechanicSGD", dtype, **sgd)
        found[f"lion {name}"] = case("MechanicLion", dtype, **decay)
        found[f"radam {name}"] = case("RAdam", dtype, mechanize={"s_decay": 0.02})
        found[f"delta_dtype {name}"] = case(adamw, dtype, delta_dtype=BF16, **decay)
        for scale_per in ("group", "parameter"):
            found[f"scale_per={scale_per} {name}"] = case(
                adamw, dtype, scale_per=scale_per, **decay
            )
    return found


PICKLED = {
    "adamw": case("MechanicAdamW", weight_decay=0.1),
    "radam": case("RAdam", mechanize={"s_decay": 0.02}),
}
DCP = {
    "dcp": ("MechanicAdamW", {"weight_decay": 0.1}),
    "dcp_flattened": ("MechanicSGD", {"momentum": 0.9, "scale_per": "group"}),
}


def accepted(options):
    """Return options under the names that the release knows: in 0.1 they had others."""
    options = dict(options)
    if "scale_per" in inspect.signature(mechanize).parameters:
        return options
    for name, old in (("scale_per", "scale"), ("state_dtype", "narrow_state")):
        if name in options:
            value = options.pop(name)
            options[old] = value if old == "scale" else True
    if options.pop("delta_dtype", None):
        options["narrow_delta"] = True
    if options.get("variant") == "annealed":
        options["variant"] = "scaled"
    return options


def build(spec, weights):
    """Return the optimizer of a case over these weights."""
    options = accepted(spec["options"])
    groups = []
    for group in GROUPS:
        own = {k: v for k, v in group.items() if k != "weights" and k in options}
        groups.append({"params": [weights[i] for i in group["weights"]], **own})
    if spec["mechanize"] is None:
        return getattr(mechanic_fused, spec["class"])(groups, **options)
    base = getattr(torch.optim, spec["class"])
    return mechanize(base, **accepted(spec["mechanize"]))(groups, **options)


def start_weights(dtype):
    rng = torch.Generator().manual_seed(5)
    made = [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [torch.nn.Parameter(x) for x in made]


def gradients(shapes, dtype, first, steps):
    """Return lists of gradients with a drift: the same for every case."""
    rng = torch.Generator().manual_seed(3)
    sizes = [math.prod(shape) for shape in shapes]
    drift = torch.randn(sum(sizes), generator=rng, dtype=torch.float64)
    rows = torch.randn(BEFORE + AFTER, sum(sizes), generator=rng, dtype=torch.float64)
    rows = (0.3 * drift + 0.1 * rows).to(dtype)[first : first + steps]
    return [
        [part.view(shape) for part, shape in zip(row.split(sizes), shapes, strict=True)]
        for row in rows
    ]


def walk(opt, weights, first, steps):
    """Take steps number `first` …; return weights (steps, elements) and scale after each."""
    after, scales = [], []
    shapes = [p.shape for p in weights]
    made = gradients(shapes, weights[0].dtype, first, steps)
    for lr, grads in zip(LRS[first : first + steps], made, strict=True):
        for group in opt.param_groups:
            group["lr"] = lr
        for p, g in zip(weights, grads, strict=True):
            p.grad = g.clone()
        opt.step()
        after.append(flat(weights))
        scales.append(opt.scale.clone())
    return {"weights": torch.stack(after), "scale": torch.stack(scales)} if after else {}


def flat(weights):
    return torch.cat([p.detach().reshape(-1) for p in weights])


def save(what, path):
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        torch.save(what, file, _use_new_zipfile_serialization=False)


def load(path, weights_only=True):
    with gzip.open(path) as file:
        return torch.load(file, weights_only=weights_only)


def taken(spec):
    """Return the optimizer of a case, and its weights, after the steps before the checkpoint."""
    weights = start_weights(spec["dtype"])
    opt = build(spec, weights)
    walk(opt, weights, 0, spec["steps"])
    if spec["frozen"]:
        opt.freeze_scale()
    return opt, weights


def write_cases(where):
    saved = {}
    for name, spec in cases().items():
        opt, weights = taken(spec)
        state, start = copy.deepcopy(opt.state_dict()), flat(weights)
        saved[name] = {
            "spec": spec,
            "weights": start,
            "state_dict": state,
            "expected": walk(opt, weights, BEFORE, AFTER),
        }
    save(saved, where / "cases.pt.gz")


def write_pickles(where):
    expected = {}
    for name, spec in PICKLED.items():
        opt, weights = taken(spec)
        opt.zero_grad(set_to_none=True)
        save(opt, where / f"pickled_{name}.pt.gz")
        expected[name] = walk(opt, weights, BEFORE, AFTER)
    save(expected, where / "pickled_expected.pt.gz")


# torch.distributed.checkpoint


def dcp_model():
    model = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 6).view(2, 3))
    return model


def dcp_optimizer(name, model):
    cls, options = DCP[name]
    options = accepted({"lr": 1.0, "backend": "reference", **options})
    return getattr(mechanic_fused, cls)(model.parameters(), **options)


def dcp_options(name):
    return StateDictOptions(flatten_optimizer_state_dict=name == "dcp_flattened")


def write_dcp(where):
    expected = {}
    for name in DCP:
        model = dcp_model()
        opt = dcp_optimizer(name, model)
        walk(opt, [model.weight], 0, BEFORE)
        opt.zero_grad(set_to_none=True)
        weights, state = get_state_dict(model, opt, options=dcp_options(name))
        dcp.save({"model": weights, "optim": state}, checkpoint_id=where / name, no_dist=True)
        expected[name] = walk(opt, [model.weight], BEFORE, AFTER)
    save(expected, where / "dcp_expected.pt.gz")


# The other tuners: optimizers of their own, and those beside a plain SGD

OPTIMIZERS = {
    "AdaRem": {"lr": 0.1, "weight_decay": 0.01},
    "CGQ": {"lr": 0.02, "momentum": 0.8, "probability": 0.4, "seed": 3},
    "ExtrapolatedSGD": {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.01},
    "AutoGD": {"lr": 0.3},
}
BESIDE = {
    "AutoDrop": lambda opt: tuners.AutoDrop(opt, k=2, window=2, backend="reference"),
    "AutoDrop 1": lambda opt: tuners.AutoDrop(
        opt, k=2, version=1, extra=2, threshold=90.0, backend="reference"
    ),
    "GeN": lambda opt: tuners.GeN(opt, every=3, backend="reference"),
    "FlatterFaster": tuners.FlatterFaster,
}


def loss_of(weights):
    return sum(((k + 1) * (w.double() - 0.5) ** 2).sum() for k, w in enumerate(weights))


def walk_optimizer(opt, weights, steps):
    def closure():
        opt.zero_grad()
        loss = loss_of(weights)
        if loss.requires_grad:
            loss.backward()
        return loss

    after, lrs = [], []
    for _ in range(steps):
        opt.step(closure)
        after.append(flat(weights))
        lrs.append(float(opt.param_groups[0]["lr"]))
    return {"weights": torch.stack(after), "numbers": lrs}


def walk_beside(name, opt, tuner, weights, steps):
    after, numbers = [], []
    for t in range(steps):
        opt.zero_grad()
        loss_of(weights).backward()
        if name == "GeN":
            tuner.step(lambda: loss_of(weights))
            opt.step()
        else:
            opt.step()
            if name == "FlatterFaster":
                opt.param_groups[0]["lr"] = 0.02 * (1 + t) / (2 + t)
            tuner.step()
        after.append(flat(weights))
        numbers += [float(opt.param_groups[0][key]) for key in ("lr", "momentum")]
    return {"weights": torch.stack(after), "numbers": numbers}


def plain_sgd(weights):
    return torch.optim.SGD(weights, lr=0.02, momentum=0.9)


def write_tuners(where):
    saved = {}
    for name, options in OPTIMIZERS.items():
        for dtype_name, dtype in DTYPES.items():
            weights = start_weights(dtype)
            opt = getattr(tuners, name)(weights, backend="reference", **options)
            walk_optimizer(opt, weights, 7)
            opt.zero_grad(set_to_none=True)
            state, start = copy.deepcopy(opt.state_dict()), flat(weights)
            saved[f"{name} {dtype_name}"] = {
                "name": name,
                "weights": start,
                "state_dict": state,
                "expected": walk_optimizer(opt, weights, AFTER),
            }
    beside = {}
    for name, make in BESIDE.items():
        weights = start_weights(F32)
        opt = plain_sgd(weights)
        tuner = make(opt)
        walk_beside(name, opt, tuner, weights, 7)
        opt.zero_grad(set_to_none=True)
        states = copy.deepcopy({"optimizer": opt.state_dict(), "state_dict": tuner.state_dict()})
        start = flat(weights)
        expected = walk_beside(name, opt, tuner, weights, 8)
        beside[name] = {"weights": start, **states, "expected": expected}
    save({"optimizers": saved, "beside": beside}, where / "tuners.pt.gz")


def machine():
    """Return what the bits of sums depend on, beside this package."""
    return {"torch": str(torch.__version__), "cpu": torch.backends.cpu.get_cpu_capability()}


def main():
    where = Path(sys.argv[1])
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # of torch.distributed, which is not used
    for write in (write_cases, write_pickles, write_dcp, write_tuners):
        write(where)
    save({"release": mechanic_fused.__version__, **machine()}, where / "written_with.pt.gz")


if __name__ == "__main__":
    main()
