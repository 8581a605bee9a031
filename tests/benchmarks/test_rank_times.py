"""Sharded steps and peak memory are measured on miniatures; their collectives are counted."""

import os

import pytest

OURS = "MechanicAdamW wd=0.01"


@pytest.fixture
def distributed():
    from benchmarks import distributed

    return distributed


@pytest.fixture
def memory():
    from benchmarks import memory

    return memory


def counted(rows, suffix):
    row = next(row for row in rows if row["optimizer"] == OURS + suffix)
    assert row["median_s"] > 0 and 0 <= row["share"] < 1
    return row["collectives"], row["collective_bytes"]


def test_a_step_over_fsdp2_reduces_once_and_once_more_to_clip(distributed, ranks):
    """One row of sums and one of what ranks disagree about, of 6 float64 each; (2,) to clip."""
    rows = ranks(2).run("benchmark_ranks.measure", "1000x1000", "fsdp2")[0]
    assert counted(rows, "") == (1, 96)
    assert counted(rows, ", max_grad_norm=1000") == (2, 96 + 16)
    assert counted(rows, ", plain local tensors") == (0, 0)
    torchs = next(row for row in rows if row["optimizer"] == "torch AdamW fused, wd=0.01")
    assert torchs["collectives"] == 0
    assert "| 1000x1000 | fsdp2  |" in distributed.rank_table(rows)


@pytest.mark.slow
def test_a_step_over_two_meshes_reduces_once_for_each(run_program, tmp_path):
    """Over dp the rows of matrices and of vectors together, over tp that of matrices."""
    from benchmarks._harness.records import Record

    out = tmp_path / "ranks.csv"
    options = ["--quick", "--cases", "35M", "--layouts", "fsdp2,fsdp2xtp", "--out", out]
    assert "the figures mean nothing" in run_program("distributed", *options)
    rows = [row for row in Record.load(out).rows if row["layout"] == "fsdp2xtp"]
    assert counted(rows, "") == (2, 3 * 96)
    assert counted(rows, ", max_grad_norm=1000") == (4, 3 * (96 + 16))


@pytest.mark.parametrize(
    ("program", "option", "message"),
    [
        ("distributed", ["--cases", "36M"], "got 36M"),
        ("distributed", ["--layouts", "fsdp2,ddp"], "got ddp"),
        ("distributed", ["--rounds", "2"], "3 or more, got 2"),
        ("memory", ["--depth", "0"], "--depth: must be 1 or more, got 0"),
        ("memory", ["--rounds", "2"], "3 or more, got 2"),
    ],
)
def test_bad_options_are_refused(request, capsys, program, option, message):
    with pytest.raises(SystemExit):
        request.getfixturevalue(program).parse(option)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["OURS", "TORCH"])
def test_released_gradients_do_not_count_at_the_peak(memory, name):
    size = memory.Size(width=128, depth=6)
    kept, released = (
        memory.memory(size, getattr(memory, name), flag, "cpu")["allocated_bytes"]
        for flag in (False, True)
    )
    assert kept >= size.predicted(released=False)
    # Two gradients and all activations, before and after each ReLU: half of what is kept.
    activations = 2 * 4 * memory.BATCH * size.width * size.depth
    assert size.predicted(True) <= released <= 2 * size.predicted(True) + activations < kept


def test_memory_and_times_are_written(memory, monkeypatch, capsys, tmp_path):
    from benchmarks._harness.records import Record

    # A new process is tested below; the eight of a run would take too long here.
    monkeypatch.setattr(memory, "in_new_process", lambda call, *given: call(*given))
    out = tmp_path / "memory.csv"
    memory.main(["--quick", "--out", str(out)])
    rows = Record.load(out).rows
    assert [row["released"] for row in rows if "released" in row] == [False, True] * 4
    times = [row for row in rows if "median_s" in row]
    assert len(times) == 2 and all(row["released_median_s"] > 0 for row in times)
    assert "the figures mean nothing" in capsys.readouterr().out


def test_a_new_process_returns_its_result(memory):
    assert memory.in_new_process(os.getpid) != os.getpid()
