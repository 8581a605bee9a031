"""A checkpoint that does not fit is refused with the entry's name, and nothing has changed.

Every entry of every weight and of the tuner is cut, reshaped, cast, swapped for another, made NaN,
deprived of its storage or replaced by another kind of object. A change that torch's own AdamW takes
as well (a dropped entry, other numbers) may load; then steps must go on.
"""

import copy
import itertools

import pytest
import torch
from support.cases import values
from support.tensors import WithoutStorage, freed
from torch.utils._pytree import tree_leaves

from mechanic_fused import MechanicAdamW, MechanicSGD, mechanize
from mechanic_fused.tuners import AdaRem

SHAPES = ((6, 4), (7,), ())
WITH_CODES = ((32, 128), (7,), ())


REFUSED = {
    "another shape": lambda t: torch.zeros(3, 3),
    "one element too many": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "a dimension more": lambda t: t[None],
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "booleans": lambda t: t.bool(),
    "a list": lambda t: t.tolist() if t.dim() else [float(t)],
    "a string": lambda t: "tensor",
    "sparse": lambda t: torch.zeros_like(t).to_sparse(),
    "meta": lambda t: t.to("meta"),
    "without storage": WithoutStorage,
    "freed": freed,
}
REFUSED_SCALES = {
    "below 0": lambda t: -1 - t,
    "one NaN": lambda t: torch.cat([t[:-1], t[-1:] * torch.nan]),
    "one infinity": lambda t: torch.cat([t[:-1], t[-1:] + torch.inf]),
    "too large": lambda t: t + 1e36,
    "of twice as many blocks": lambda t: torch.cat([t, t, t], 1),
    "bfloat16": lambda t: t.bfloat16(),
}
REFUSED_COUNTS = {
    "two counts": lambda t: torch.zeros(2),
    "a negative count": lambda t: -1 - t,
    "a count that is NaN": lambda t: t * torch.nan,
    "an infinite count": lambda t: t + torch.inf,
    "a string": lambda t: "3",
    "without storage": WithoutStorage,
}
REFUSED_ROWS = {
    "cut": lambda t: t[:, :-1],
    "doubled": lambda t: torch.cat([t, t], 1),
    "a dimension more": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "no rows": lambda t: t[:0],
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "integers": lambda t: t.long(),
    "NaN": lambda t: t * torch.nan,
    "one infinity": lambda t: torch.cat([t[:, :-1], t[:, -1:] + torch.inf], 1),
    "a list": lambda t: t.tolist(),
    "without storage": WithoutStorage,
}
MAKERS = {
    "AdamW": lambda ps: MechanicAdamW(ps, lr=1.0),
    "SGD": lambda ps: MechanicSGD(ps, lr=1.0, momentum=0.9),
    "bfloat16": lambda ps: MechanicAdamW(ps, lr=1.0),
    "annealed": lambda ps: MechanicAdamW(ps, lr=1.0, variant="annealed"),
    "8 bits": lambda ps: MechanicAdamW(ps, lr=1.0, optim_bits=8),
    "annealed, 8 bits": lambda ps: MechanicAdamW(ps, lr=1.0, variant="annealed", optim_bits=8),
    "16 bits": lambda ps: MechanicSGD(ps, lr=1.0, momentum=0.9, optim_bits=16),
    "a scale a group": lambda ps: MechanicAdamW(ps, lr=1.0, scale_per="group"),
    "a scale a weight": lambda ps: MechanicAdamW(ps, lr=1.0, scale_per="parameter"),
    "RAdam": lambda ps: mechanize(torch.optim.RAdam)(ps, lr=1.0),
    "AdaRem": lambda ps: AdaRem(ps, lr=0.1),
}


def _trained(name, steps):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    shapes = WITH_CODES if name.endswith("bits") else SHAPES
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    opt = MAKERS[name](weights)
    _step(weights, opt, steps)
    return weights, opt


def _step(weights, opt, steps=1):
    for _ in range(steps):
        for p in weights:
            p.grad = p.detach() - 1
        opt.step()


def _changes(saved):
    """Return what each change is called and a function that makes it in a copy."""
    for key, entries in saved["state"].items():
        for name in entries:
            # What a base of the fallback keeps is its own affair.
            table = REFUSED_COUNTS if name == "step" else REFUSED
            for how, change in table.items():
                shape = tuple(entries[name].shape)
                if name == "x_low" and how == "integers":
                    continue
                yield f"{name} of weight {key}, {shape}: {how}", (key, name, change)
            for how, change in REFUSED_SCALES.items():
                if name.endswith("_scale"):
                    yield f"{name} of weight {key}: {how}", (key, name, change)
    for how, change in REFUSED_ROWS.items():
        if "mechanic_state" in saved["param_groups"][0]:
            yield f"mechanic_state: {how}", (None, "mechanic_state", change)


def _changed(saved, where, name, change):
    changed = copy.deepcopy(saved)
    entries = changed["param_groups"][0] if where is None else changed["state"][where]
    entries[name] = change(entries[name])
    return changed


def _everything(weights, opt):
    """Return copies of all that a load could change."""
    state = {i: dict(opt.state[p]) for i, p in enumerate(weights)}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return copy.deepcopy((values(weights), state, groups))


def _assert_equal(left, right):
    pairs = zip(tree_leaves(left), tree_leaves(right), strict=True)
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", MAKERS)
def test_an_entry_that_cannot_be_is_refused_and_nothing_changes(name):
    saved = _trained(name, 12)[1].state_dict()
    weights, opt = _trained(name, 3)
    before = _everything(weights, opt)
    tried = 0
    for what, (where, entry, change) in _changes(saved):
        if name == "RAdam" and entry not in ("x_ref", "mechanic_state"):
            continue
        changed = _changed(saved, where, entry, change)
        named = entry if where is not None else "state|scales"
        with pytest.raises(ValueError, match=named):  # noqa: PT012, to say what was loaded
            opt.load_state_dict(changed)
            pytest.fail(f"loaded: {what}")
        _assert_equal(_everything(weights, opt), before)
        tried += 1
    assert tried > 40
    _step(weights, opt)
    assert all(p.isfinite().all() for p in weights)


def test_an_error_names_the_weight_and_the_entry():
    model = torch.nn.Linear(3, 2)
    opt = MechanicAdamW(model.named_parameters(), lr=1.0)
    _step(list(model.parameters()), opt)
    saved = opt.state_dict()
    saved["state"][1]["exp_avg_sq"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"exp_avg_sq of 'bias', of shape \(2,\), must have its shape, got \(5,\)"
    ):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("name", ["AdamW", "annealed", "8 bits"])
def test_a_checkpoint_with_dropped_or_swapped_entries_loads_or_is_refused(name):
    """Swaps of entries of one shape are other numbers, and a missing entry starts anew."""
    saved = _trained(name, 12)[1].state_dict()
    for key, entries in saved["state"].items():
        for first, second in itertools.product(entries, repeat=2):
            weights, opt = _trained(name, 3)
            before = _everything(weights, opt)
            changed = copy.deepcopy(saved)
            if first == second:
                del changed["state"][key][first]
            else:
                changed["state"][key][first] = entries[second].clone()
            try:
                opt.load_state_dict(changed)
            except ValueError:
                _assert_equal(_everything(weights, opt), before)
            _step(weights, opt, 3)
            # torch's AdamW takes a second moment below 0 as well, and makes NaN of it.
            finite = all(p.isfinite().all() for p in weights)
            assert finite or first == "exp_avg_sq", (key, first, second)


def test_a_checkpoint_of_other_groups_is_refused_by_their_sizes():
    """to_base() makes a param group for each weight where each weight has a scale."""
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    opt = MechanicAdamW(weights, lr=1.0, scale_per="parameter", s_init=0.1)
    _step(weights, opt)
    with pytest.raises(ValueError, match=r"expected \[3\], got \[1, 1, 1\]"):
        opt.load_state_dict(opt.to_base().state_dict())
