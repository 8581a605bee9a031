"""benchmarks.offload: a miniature is measured, and the rival computes what torch's AdamW does."""

import pytest
import torch


@pytest.fixture(scope="module")
def offload():
    from benchmarks import offload

    return offload


def test_a_miniature_is_measured_and_printed_again(offload, capsys, tmp_path):
    out = tmp_path / "offload.csv"
    offload.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr().out
    for name in offload.arms(torch.device("cpu")):
        assert f"| {name} " in printed
    offload.main(["--report", "--out", str(out)])
    assert capsys.readouterr().out == printed


def test_steps_are_hidden_where_gradients_are_released(offload):
    size = offload.Size(64, 3)
    shares = {}
    for name in (offload.OFFLOAD, offload.RELEASED):
        training = offload.Training(size, 4, offload.ARMS[name], torch.device("cpu"))
        training.step()
        shares[name] = offload.hidden(training)
    assert shares[offload.OFFLOAD] == 0
    assert 0 < shares[offload.RELEASED] <= 1


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
