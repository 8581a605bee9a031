"""The spellings of 0.1 are accepted with a warning, and mean the same to the bit."""

import copy

import pytest
import torch
from support.cases import FEW, RADAM, Training, assert_same, make_weights

from mechanic_fused import MechanicAdam, MechanicAdamW, MechanicLion, MechanicSGD, mechanize

# Old keyword and value, then those of today.
RENAMED = [
    ("scale", "global", "scale_per", "model"),
    ("scale", "group", "scale_per", "group"),
    ("scale", "parameter", "scale_per", "parameter"),
    ("variant", "scaled", "variant", "annealed"),
    ("narrow_state", True, "state_dtype", "param"),
    ("narrow_state", False, "state_dtype", None),
    ("narrow_delta", True, "delta_dtype", torch.bfloat16),
    ("narrow_delta", False, "delta_dtype", None),
]
OF_CLASS = [row for row in RENAMED if row[0] in ("scale", "variant")]
DEPRECATED = "is deprecated and will be removed in the next release: use"
CLASSES = [MechanicAdamW, MechanicAdam, MechanicSGD, MechanicLion, RADAM]


def check_warning(warnings, row):
    (warning,) = warnings
    old, value, new, today = row
    assert str(warning.message) == f"{old}={value!r} {DEPRECATED} {new}={today!r}"
    assert warning.filename == __file__  # Python hides it where it is not of the user's own line


def trained(make, **options):
    one = Training(
        make,
        dtype=torch.bfloat16,
        groups=lambda params: [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}],
        **options,
    )
    return one.run(FEW).snapshot()


@pytest.mark.parametrize("row", RENAMED, ids=str)
@pytest.mark.parametrize("make", CLASSES)
def test_an_old_keyword_warns_and_steps_as_the_new_one(make, row):
    old, value, new, today = row
    with pytest.warns(DeprecationWarning, match=DEPRECATED) as warnings:
        make(make_weights(), **{old: value})
    check_warning(warnings, row)
    with pytest.warns(DeprecationWarning, match=DEPRECATED):
        found = trained(make, **{old: value})
    assert_same(found, trained(make, **{new: today}))


@pytest.mark.parametrize("row", OF_CLASS, ids=str)
def test_an_old_keyword_of_mechanize_makes_the_same_class(row):
    old, value, new, today = row
    with pytest.warns(DeprecationWarning, match=DEPRECATED) as warnings:
        made = mechanize(torch.optim.RAdam, **{old: value})
    check_warning(warnings, row)
    assert made is mechanize(torch.optim.RAdam, **{new: today})


@pytest.mark.parametrize("row", [row for row in RENAMED if row[0] != row[2]], ids=str)
@pytest.mark.parametrize("make", CLASSES)
def test_both_keywords_together_are_refused(make, row):
    old, value, new, today = row
    text = f"{old} is the former name of {new}: expected one of them, got both"
    both = {old: value, new: today}
    with pytest.raises(TypeError, match=text):
        make(make_weights(), **both)
    if row in OF_CLASS:
        with pytest.raises(TypeError, match=text):
            mechanize(torch.optim.RAdam, **both)


@pytest.mark.parametrize("name", ["narrow_state", "narrow_delta"])
@pytest.mark.parametrize("value", [1, None, "bfloat16", torch.bfloat16])
def test_an_old_switch_is_still_no_more_than_a_switch(name, value):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
        MechanicAdamW(make_weights(), **{name: value})


def test_the_old_name_of_the_implementation_warns():
    opt = MechanicAdamW(make_weights())
    with pytest.warns(
        DeprecationWarning, match=r"opt\.road .* use opt\.implementation"
    ) as warnings:
        assert opt.road == opt.implementation
    assert warnings[0].filename == __file__


def test_old_entries_of_groups_are_taken_over_silently():
    """Checkpoints hold them; writing them has never been an option."""
    one, other = Training(MechanicAdamW).run(FEW), Training(MechanicAdamW, seed=1)
    saved = copy.deepcopy(one.saved())
    (group,) = saved["optimizer"]["param_groups"]
    names = {"mechanic_state": "mechanic", "max_peak_lr": "rate", "tune_scale": "learning"}
    for new, old in names.items():
        group[old] = group.pop(new)
    group["variant"] = "scaled"
    other.load(saved, FEW)
    assert_same(other.snapshot(), one.snapshot())
    assert_same(other.run(FEW).x, one.run(FEW).x)
    other.opt.add_param_group({"params": make_weights(seed=2), "variant": "scaled"})
    assert other.opt.param_groups[1]["variant"] == "annealed"
