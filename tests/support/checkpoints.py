"""Small checkpoints of every public form: ``python tests/support/checkpoints.py DIR`` writes them.

tests/core/checkpoints_0_1.tar.xz holds what 0.1 wrote, under its option names; a later
release adds an archive of its own.

cases_*.pt (torch.load with weights_only=True): {name: {"weights", "state_dict", "options",
"gradients", "lrs", "expected"}}. ``options``: {"class": a name in mechanic_fused, or a torch.optim
base for mechanize(); "mechanize": arguments of mechanize() or None; "kwargs";
"groups": [{"weights": indices, further options}]}. ``expected``: {"weights": (5, elements),
"scale": (5, scales)} after each of five further steps of the optimizer that was saved; a row holds
all weights, flattened.

pickled_NAME.pt is torch.save(opt). dcp/ and dcp_flat/ are torch.distributed.checkpoint directories
of {"model", "optim"}. tuners.pt and tuners_beside.pt hold state dicts of mechanic_fused.tuners.

Written in torch's legacy format: about 100 bytes a tensor instead of a kilobyte.
"""

import copy
import math
import shutil
import sys
import warnings
from pathlib import Path

import torch

import mechanic_fused
from mechanic_fused import mechanize, tuners

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(3, 5), (), (7,)]
GROUPS = [{"weights": [0, 1]}, {"weights": [2], "weight_decay": 0.0}]
BEFORE, AFTER = 12, 5
LRS = [
    min(1.0, (t + 1) / 4) * 0.5 * (1 + math.cos(math.pi * t / 18)) for t in range(BEFORE + AFTER)
]


def case(cls, dtype=F32, mechanize=None, groups=GROUPS, prepare=None, steps=BEFORE, **kwargs):
    return {
        "class": cls, "dtype": dtype, "mechanize": mechanize, "groups": groups,
        "kwargs": {"lr": 1.0, "backend": "reference", **kwargs}, "prepare": prepare, "steps": steps,
    }  # fmt: skip


BASES = {
    "adamw": ("MechanicAdamW", {"weight_decay": 0.1}),
    "adam": ("MechanicAdam", {"weight_decay": 0.05}),
    "sgd": ("MechanicSGD", {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05}),
    "lion": ("MechanicLion", {"weight_decay": 0.1}),
}
NAMES = {F32: "float32", BF16: "bfloat16"}


def freeze(opt):
    opt.freeze_scale()


def cases():
    bases, options, fallback = {}, {}, {}
    for dtype, short in NAMES.items():
        for base, (cls, kwargs) in BASES.items():
            bases[f"{base} {short}"] = case(cls, dtype, **kwargs)
    bases["adamw cpp float32"] = case("MechanicAdamW", weight_decay=0.1, backend="cpp")
    bases["sgd cpp bfloat16"] = case(
        "MechanicSGD", BF16, momentum=0.9, nesterov=True, backend="cpp"
    )
    bases["sgd plain float32"] = case("MechanicSGD")
    adamw, decay = "MechanicAdamW", {"weight_decay": 0.1}
    for dtype, short in NAMES.items():
        for scale in ("group", "parameter"):
            options[f"scale_per={scale} {short}"] = case(adamw, dtype, scale_per=scale, **decay)
        options[f"delta_dtype {short}"] = case(adamw, dtype, delta_dtype=BF16, **decay)
    options["state_dtype adamw"] = case(adamw, BF16, state_dtype="param", **decay)
    options["state_dtype sgd"] = case("MechanicSGD", BF16, state_dtype="param", momentum=0.9)
    options["state_dtype delta_dtype"] = case(
        "MechanicLion", BF16, state_dtype="param", delta_dtype=BF16
    )
    options["variant=annealed"] = case(adamw, variant="annealed", s_decay=0.1, **decay)
    for variant in ("optax", "paper", "pytorch"):
        options[f"variant={variant}"] = case(adamw, variant=variant, s_init=1e-3, **decay)
    options["tuner numbers"] = case(
        "MechanicSGD",
        momentum=0.9,
        s_decay=0.05,
        tuner_betas=(0.9, 0.99),
        s_init=1e-3,
        tuner_eps=1e-6,
    )
    options["frozen"] = case(adamw, prepare=freeze, **decay)
    options["frozen scale_per=parameter"] = case(
        "MechanicLion", prepare=freeze, scale_per="parameter"
    )
    options["max_grad_norm"] = case(adamw, max_grad_norm=0.5, **decay)
    options["no step taken"] = case(adamw, steps=0, **decay)
    for dtype, short in NAMES.items():
        fallback[f"radam {short}"] = case("RAdam", dtype, mechanize={"s_decay": 0.02})
    fallback["radam scale_per=group"] = case("RAdam", mechanize={"scale_per": "group"})
    fallback["amsgrad"] = case("MechanicAdamW", amsgrad=True, **decay)
    fallback["mechanize AdamW"] = case(
        "AdamW",
        mechanize={
            "s_decay": 0.0,
            "betas": (0.9, 0.999),
            "s_init": 1e-3,
            "eps": 1e-6,
            "variant": "optax",
        },
    )
    return {"bases": bases, "options": options, "fallback": fallback}


def noise(seed, dtype, steps):
    """Lists of gradients, one a step; all of them views of one tensor."""
    made = torch.Generator().manual_seed(seed)
    sizes = [math.prod(shape) for shape in SHAPES]
    drift = torch.randn(sum(sizes), generator=made, dtype=torch.float64)
    all_of = 0.3 * drift + 0.1 * torch.randn(steps, sum(sizes), generator=made, dtype=torch.float64)
    all_of = all_of.to(dtype)
    return [
        [part.view(shape) for part, shape in zip(row.split(sizes), SHAPES, strict=True)]
        for row in all_of
    ]


def start_weights(dtype):
    made = torch.Generator().manual_seed(5)
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in SHAPES]


def build(options, weights):
    """The optimizer of a case over these weights."""
    groups = []
    for group in options["groups"]:
        known = {k: v for k, v in group.items() if k != "weights"}
        if "weight_decay" in known and "weight_decay" not in options["kwargs"]:
            known.pop("weight_decay")
        groups.append({"params": [weights[i] for i in group["weights"]], **known})
    # The form that 0.1 had where none was named.
    named = "variant" in (options["mechanize"] or ())
    own = options["kwargs"] if named else {"variant": "annealed", **options["kwargs"]}
    if options["mechanize"] is None:
        return getattr(mechanic_fused, options["class"])(groups, **own)
    base = getattr(torch.optim, options["class"])
    return mechanize(base, **options["mechanize"])(groups, **own)


def take_steps(opt, weights, gradients, lrs):
    """Take steps; return the weights and the scale after each."""
    after, scales = [], []
    for grads, lr in zip(gradients, lrs, strict=True):
        for group in opt.param_groups:
            group["lr"] = lr
        for p, g in zip(weights, grads, strict=True):
            p.grad = None if g is None else g.clone()
        opt.step()
        after.append(flat(weights))
        scales.append(opt.scale.clone())
    if not after:
        return {}
    return {"weights": torch.stack(after), "scale": torch.stack(scales)}


def flat(weights):
    """All elements of the weights in one row."""
    return torch.cat([p.detach().reshape(-1) for p in weights])


def packed(lists):
    """The same lists of lists of tensors, as views of one tensor."""
    row = torch.cat([t.reshape(-1) for row in lists for t in row])
    parts = iter(row.split([t.numel() for row in lists for t in row]))
    return [[next(parts).view(t.shape) for t in row] for row in lists]


def save(what, path):
    torch.save(what, path, _use_new_zipfile_serialization=False)


def make_case(spec, gradients):
    weights = [torch.nn.Parameter(w) for w in start_weights(spec["dtype"])]
    opt = build(spec, weights)
    steps = spec["steps"]
    take_steps(opt, weights, gradients[:steps], LRS[:steps])
    if spec["prepare"]:
        spec["prepare"](opt)
    further = gradients[BEFORE:]
    saved = {
        "weights": [w.detach().clone() for w in weights],
        "state_dict": copy.deepcopy(opt.state_dict()),
        "options": {k: copy.deepcopy(spec[k]) for k in ("class", "mechanize", "kwargs", "groups")},
        "gradients": further,
        "lrs": LRS[BEFORE:],
    }
    saved["expected"] = take_steps(opt, weights, further, LRS[BEFORE:])
    return saved


def make_pickles(where, gradients):
    specs = {
        "adamw": case("MechanicAdamW", weight_decay=0.1),
        "radam": case("RAdam", mechanize={"s_decay": 0.02}),
    }
    expected = {}
    for name, spec in specs.items():
        weights = [torch.nn.Parameter(w) for w in start_weights(F32)]
        opt = build(spec, weights)
        take_steps(opt, weights, gradients[:BEFORE], LRS[:BEFORE])
        opt.zero_grad(set_to_none=True)
        save(opt, where / f"pickled_{name}.pt")
        further = gradients[BEFORE:]
        found = take_steps(opt, weights, further, LRS[BEFORE:])
        expected[name] = {"gradients": further, "lrs": LRS[BEFORE:], "expected": found}
    save(expected, where / "pickled_expected.pt")


DCP = {
    "dcp": ("MechanicAdamW", {"lr": 1.0, "weight_decay": 0.1, "backend": "reference"}),
    "dcp_flat": (
        "MechanicSGD",
        {"lr": 1.0, "momentum": 0.9, "backend": "reference", "scale_per": "group"},
    ),
}


def dcp_model(name):
    model = torch.nn.Linear(3, 2, bias=name == "dcp")
    made = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=made))
    return model


def dcp_optimizer(name, model):
    cls, kwargs = DCP[name]
    return getattr(mechanic_fused, cls)(model.parameters(), variant="annealed", **kwargs)


def make_dcp(where):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    expected = {}
    for name in DCP:
        model = dcp_model(name)
        weights = list(model.parameters())
        opt = dcp_optimizer(name, model)
        made = torch.Generator().manual_seed(11)
        gradients = [
            [0.3 + 0.1 * torch.randn(p.shape, generator=made) for p in weights]
            for _ in range(BEFORE + AFTER)
        ]
        take_steps(opt, weights, gradients[:BEFORE], LRS[:BEFORE])
        opt.zero_grad(set_to_none=True)
        how = StateDictOptions(flatten_optimizer_state_dict=name == "dcp_flat")
        model_state, state = get_state_dict(model, opt, options=how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(
                {"model": model_state, "optim": state}, checkpoint_id=where / name, no_dist=True
            )
        further = packed(gradients[BEFORE:])
        found = take_steps(opt, weights, further, LRS[BEFORE:])
        expected[name] = {
            "gradients": further,
            "lrs": LRS[BEFORE:],
            "expected": found,
        }
    save(expected, where / "dcp_expected.pt")


TUNERS = {
    "AdaRem": {"lr": 0.1, "weight_decay": 0.01},
    "CGQ": {"lr": 0.02, "momentum": 0.8, "probability": 0.4, "seed": 3},
    "ExtrapolatedSGD": {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.01},
    "AutoGD": {"lr": 0.3},
}


def tuner_closure(opt, weights):
    def closure():
        opt.zero_grad()
        loss = sum(((k + 1) * (w.double() - 0.5) ** 2).sum() for k, w in enumerate(weights))
        if loss.requires_grad:
            loss.backward()
        return loss

    return closure


def tuner_steps(opt, weights, steps):
    closure, after, rates = tuner_closure(opt, weights), [], []
    for _ in range(steps):
        with torch.enable_grad():
            opt.step(closure)
        after.append(flat(weights))
        rates.append(float(opt.param_groups[0]["lr"]))
    return {"weights": torch.stack(after), "numbers": rates}


def make_tuners(where):
    cases = {}
    for name, kwargs in TUNERS.items():
        for dtype, short in NAMES.items():
            weights = [torch.nn.Parameter(w) for w in start_weights(dtype)]
            opt = getattr(tuners, name)(weights, backend="reference", **kwargs)
            tuner_steps(opt, weights, 7)
            opt.zero_grad(set_to_none=True)
            cases[f"{name} {short}"] = {
                "weights": [w.detach().clone() for w in weights],
                "state_dict": copy.deepcopy(opt.state_dict()),
                "options": {"class": name, "kwargs": {"backend": "reference", **kwargs}},
                "expected": tuner_steps(opt, weights, 5),
            }
    save(cases, where / "tuners.pt")
    # Schedulers of a plain SGD.
    beside = {}
    for name in ("AutoDrop", "AutoDrop 1", "GeN", "FlatterFaster"):
        weights = [torch.nn.Parameter(w) for w in start_weights(F32)]
        opt = torch.optim.SGD(weights, lr=0.02, momentum=0.9)
        tuner = beside_tuner(name, opt)
        beside_steps(name, opt, tuner, weights, 7)
        opt.zero_grad(set_to_none=True)
        beside[name] = {
            "weights": [w.detach().clone() for w in weights],
            "optimizer": copy.deepcopy(opt.state_dict()),
            "state_dict": copy.deepcopy(tuner.state_dict()),
            "expected": beside_steps(name, opt, tuner, weights, 8),
        }
    save(beside, where / "tuners_beside.pt")


def beside_tuner(name, opt):
    if name == "AutoDrop":
        return tuners.AutoDrop(opt, k=2, window=2, backend="reference")
    if name == "AutoDrop 1":
        return tuners.AutoDrop(opt, k=2, version=1, extra=2, threshold=90.0, backend="reference")
    if name == "GeN":
        return tuners.GeN(opt, every=3, backend="reference")
    return tuners.FlatterFaster(opt)


def beside_steps(name, opt, tuner, weights, steps):
    closure, after, rates = tuner_closure(opt, weights), [], []
    for t in range(steps):
        closure()
        if name == "GeN":
            tuner.step(
                lambda: sum((k + 1) * (w - 0.5).square().sum() for k, w in enumerate(weights))
            )
            opt.step()
        else:
            opt.step()
            if name == "FlatterFaster":
                opt.param_groups[0]["lr"] = 0.02 * (1 + t) / (2 + t)
            tuner.step()
        after.append(flat(weights))
        rates += [float(opt.param_groups[0]["lr"]), float(opt.param_groups[0]["momentum"])]
    return {"weights": torch.stack(after), "numbers": rates}


def main():
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    if where.exists():
        shutil.rmtree(where)
    where.mkdir(parents=True)
    gradients = {dtype: packed(noise(3, dtype, BEFORE + AFTER)[BEFORE:]) for dtype in NAMES}
    gradients = {d: noise(3, d, BEFORE + AFTER)[:BEFORE] + kept for d, kept in gradients.items()}
    for file, specs in cases().items():
        save(
            {n: make_case(s, gradients[s["dtype"]]) for n, s in specs.items()},
            where / f"cases_{file}.pt",
        )
    make_pickles(where, gradients[F32])
    make_dcp(where)
    make_tuners(where)
    total = 0
    for path in sorted(where.rglob("*")):
        if path.is_file():
            total += path.stat().st_size
            print(f"{path.stat().st_size:8}  {path.relative_to(where)}")
    print(f"{total:8}  in all, by {mechanic_fused.__file__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
