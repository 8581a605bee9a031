"""The spellings of 0.1 are accepted with a warning, and mean the same to the bit."""

import copy

import pytest
import torch
from support.cases import FEW, Training, assert_same, make_weights

from mechanic_fused import MechanicAdam, MechanicAdamW, MechanicLion, MechanicSGD, mechanize

# Old keyword and value, today's, and the texts that the warning must hold.
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
TEXT = "{}={!r} is deprecated and will be removed in the next release: use {}={!r}"
CLASSES = {
    "adamw": MechanicAdamW,
    "adam": MechanicAdam,
    "sgd": MechanicSGD,
    "lion": MechanicLion,
    "radam": mechanize(torch.optim.RAdam),
}


def check_warning(warnings, row):
    (warning,) = warnings
    assert str(warning.message) == TEXT.format(*row)
    assert warning.filename == __file__


def two_groups(params):
    return [{"params": params[:1]}, {"params": params[1:]}]


def training(make, **options):
    return Training(make, dtype=torch.bfloat16, groups=two_groups, **options)


@pytest.mark.parametrize("row", RENAMED, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_an_old_keyword_warns_and_steps_alike(name, row):
    old, value, new, today = row
    made = []

    def make(*args, **options):
        made.append(CLASSES[name](*args, **options))
        return made[0]

    with pytest.warns(DeprecationWarning) as warnings:
        opt = CLASSES[name](make_weights(), **{old: value})
    check_warning(warnings, row)
    with pytest.warns(DeprecationWarning):
        one = training(CLASSES[name], **{old: value})
    assert_same(one.run(FEW).snapshot(), training(CLASSES[name], **{new: today}).run(FEW).snapshot())
