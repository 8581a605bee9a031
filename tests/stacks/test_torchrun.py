"""A plain script under torchrun with DDP: learns, and goes on after SIGKILL to the bit."""

import pytest
import torch
from cases import assert_same
from tiny import LEARNED, TinyModel, finish, kill_once, loss_of, start
from train_script import STEPS

# Killed well after the first checkpoint and well before the end.
WAIT = STEPS - 2


def torchrun(ranks):
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")


def run(folder, ranks, wait=0):
    return start("train_script.py", folder, wait, launcher=torchrun(ranks))


def ends(folder, ranks):
    return [torch.load(folder / f"end {rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_killed_in_mid_run_goes_on_to_the_bit(tmp_path, ranks):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    checkpoint = cut / "run.pt"
    finish(run(whole, ranks))
    kill_once(run(cut, ranks, WAIT), checkpoint.exists)
    assert torch.load(checkpoint, weights_only=True)["steps"] < WAIT
    assert not list(cut.glob("end*"))
    finish(run(cut, ranks))

    expected = ends(whole, ranks)
    assert_same(ends(cut, ranks), expected)
    assert_same(expected, [expected[0]] * ranks)
    model = TinyModel()
    before = loss_of(model)
    model.load_state_dict(expected[0]["weights"])
    assert loss_of(model) <= LEARNED * before
