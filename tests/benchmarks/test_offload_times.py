"""benchmarks.offload: a miniature is measured, and the rival computes what torch's AdamW does."""

import threading

import pytest
import torch

from mechanic_fused.plan import StepPlan


@pytest.fixture(scope="module")
def offload():
    from benchmarks import offload

    return offload


@pytest.fixture
def size(offload):
    return offload.Size(64, 3)


def test_a_miniature_is_measured_and_printed_again(offload, capsys, tmp_path):
    out = tmp_path / "offload.csv"
    offload.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr().out
    for name in offload.arms(torch.device("cpu")):
        assert f"| {name} " in printed
    offload.main(["--report", "--out", str(out)])
    assert capsys.readouterr().out == printed


def test_no_step_is_hidden_without_release(offload, size):
    training = offload.Training(size, 4, offload.ARMS[offload.OFFLOAD], torch.device("cpu"))
    training.step()
    assert offload.hidden(training) == 0


def test_steps_are_hidden_where_gradients_are_released(offload, size, monkeypatch):
    training = offload.Training(size, 4, offload.ARMS[offload.RELEASED], torch.device("cpu"))
    training.step()
    stepped = threading.Event()
    step_bucket, backward = StepPlan.step_bucket, training.backward

    def told(plan, bucket):
        step_bucket(plan, bucket)
        stepped.set()

    def backward_that_outlasts_a_step():
        stepped.clear()
        backward()
        assert stepped.wait(60)

    monkeypatch.setattr(StepPlan, "step_bucket", told)
    training.backward = backward_that_outlasts_a_step
    assert 0 < offload.hidden(training) <= 1


def test_the_rival_takes_the_steps_of_adamw(offload):
    weights = []
    for name in (offload.SCHEME, offload.TORCH):
        training = offload.Training(offload.Size(16, 2), 4, offload.ARMS[name], torch.device("cpu"))
        training.x.fill_(0.5)
        for _ in range(3):
            training.step()
        weights.append(training.weights)
    for p, q in zip(*weights, strict=True):
        assert torch.equal(p, q)
