"""AutoDrop in use: resumed, beside schedules and Mechanic, with changed weights, on ranks."""

import copy
import io
import math

import pytest
import torch
from autodrop_runs import ALWAYS, NEVER, drift
from cases import SUM_RTOL, assert_same, make_weights, run, set_gradients, values

from mechanic_fused.tuners import AutoDrop
from mechanic_fused.tuners.trajectory import smooth


def saved_and_loaded(tree):
    """Through a file, as torch.load has it by default."""
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# A run that stops within a window after a drop, or within an average.
RESUMED = {
    1: {"k": 2, "threshold": 40.0, "threshold_max": 60.0, "extra": 6, "factor": 0.7},
    2: {"k": 3, "threshold": 3.0, "window": 4, "factor": 0.9},
}


@pytest.mark.parametrize("version", RESUMED)
@pytest.mark.parametrize("stop", [0, 1, 3, 44, 59])
def test_a_resumed_run_goes_on_to_the_same_bits(backend, version, stop):
    def start(weights):
        params = [torch.nn.Parameter(x.clone()) for x in weights]
        opt = torch.optim.SGD(params, lr=0.1)
        return params, opt, AutoDrop(opt, version=version, backend=backend, **RESUMED[version])

    def go_on(params, opt, sched, first, steps):
        for t in range(first, first + steps):
            run(opt, params, 1, t)
            sched.step()

    params, opt, sched = start(
        [p.detach() for p in make_weights(dtype=torch.float32)]
        + [p.detach() for p in make_weights(dtype=torch.bfloat16, seed=1)]
    )
    go_on(params, opt, sched, 0, stop)
    saved = saved_and_loaded([opt.state_dict(), sched.state_dict()])
    others = start(values(params))
    others[1].load_state_dict(saved[0])
    others[2].load_state_dict(saved[1])
    if stop > 3:
        progress = saved[1]
        assert progress["count"] and progress["drops"]
    go_on(params, opt, sched, stop, 60)
    go_on(*others, stop, 60)
    assert len(sched.drops) > 1
    assert_same(values(others[0]), values(params))
    assert_same(others[2].state_dict(), sched.state_dict())
    assert_same(others[1].state_dict(), opt.state_dict())


@pytest.mark.parametrize("version", RESUMED)
def test_a_state_of_another_run_is_refused_before_anything_changes(version):
    def made(shapes=((3,), (5, 13)), **changes):
        params = make_weights(shapes)
        opt = torch.optim.SGD(params, lr=0.1)
        sched = AutoDrop(opt, **{**RESUMED[version], "version": version, **changes})
        for t in range(20):
            run(opt, params, 1, t)
            sched.step()
        return sched

    sched = made()
    before = copy.deepcopy(sched.state_dict())
    other = 3 - version
    wrong = [
        (made(k=5).state_dict(), f"k must .* expected {sched.k}, got 5"),
        (made([(3,)]).state_dict(), r"expected \[\(3,\), \(5, 13\)\], got \[\(3,\)\]"),
        (made([(3,), (13, 5)]).state_dict(), r"expected .*\(5, 13\)\], got .*\(13, 5\)\]"),
        ({**before, "version": other}, f"version must .* expected {version}, got {other}"),
        ({k: v for k, v in before.items() if k != "drops"}, "must have drops"),
    ]
    for state, said in wrong:
        with pytest.raises(ValueError, match=said):
            sched.load_state_dict(state)
        assert_same(sched.state_dict(), before)


def test_an_added_group_starts_the_measuring_anew():
    params = make_weights()
    opt = torch.optim.SGD(params[:2], lr=0.1)
    sched = AutoDrop(opt, k=2, window=2, threshold=NEVER[2])
    for t in range(9):
        drift(params, t)
        sched.step()
    assert sched.angle is not None and sched._progress.count == 1
    opt.add_param_group({"params": params[2:]})
    check_like_new(sched, params, lambda: None)


@pytest.mark.parametrize("change", ["dtype", "place", "frozen"])
def test_changed_weights_start_the_measuring_anew(change):
    params = make_weights()
    sched = AutoDrop(torch.optim.SGD(params, lr=0.1), k=2, window=2, threshold=NEVER[2])

    def alter():
        if change == "frozen":
            params[0].requires_grad_(False)
        else:
            dtype = torch.bfloat16 if change == "dtype" else torch.float32
            params[0].data = params[0].detach().clone().to(dtype)

    for t in range(9):
        drift(params, t)
        sched.step()
    check_like_new(sched, params, alter)


def check_like_new(sched, params, alter):
    alter()
    fresh = AutoDrop(sched.optimizer, k=2, window=2, threshold=NEVER[2])
    past = len(sched.smoothed)
    for t in range(20, 33):
        drift(params, t)
        sched.step()
        fresh.step()
        assert sched.angle == fresh.angle
    assert fresh.angle is not None and len(fresh.smoothed) > 1
    assert sched.smoothed[past:] == fresh.smoothed


@pytest.mark.parametrize("version", [1, 2])
def test_standing_still_and_nan_give_no_angle(version, backend):
    params = make_weights()
    options = {"window": 2} if version == 2 else {"extra": 100, "threshold": ALWAYS}
    sched = AutoDrop(
        torch.optim.SGD(params, lr=0.1), k=1, version=version, backend=backend, **options
    )
    if version == 2:
        sched._progress.threshold = NEVER[2]
    angles = []
    for t in range(16):
        kept = values(params)
        if t == 10:
            params[0].data[0] = math.nan
        elif t not in (5, 6):
            drift(params, t)
        sched.step()
        if t == 10:
            with torch.no_grad():
                for p, x in zip(params, kept, strict=True):
                    p.copy_(x)
        angles.append(sched.angle)
        if version == 1 and t in (10, 11):
            assert not sched._progress.armed
    assert all(math.isfinite(angle) for angle in angles[2:])
    # None is new at a step whose displacement, or the one before, is 0 or not finite.
    same = [t for t in range(3, 16) if angles[t] == angles[t - 1]]
    assert same == [5, 6, 7, 10, 11, 12]
    assert all(map(math.isfinite, sched.smoothed))
    if version == 1:
        assert sched._progress.armed
        assert all(t.isfinite().all() for t in sched.state_dict()["vectors"]["sum"])


def test_smoothing_has_the_newest_angle_at_its_centre():
    assert smooth([80.0] * 10) == 80.0
    # σ² = 2/3 of the population, so an angle of age d weighs exp(−3d²/4).
    near, far = math.exp(-0.75), math.exp(-3)
    expected = (far * 1.0 + near * 2.0 + 3.0) / (far + near + 1)
    assert smooth([1.0, 2.0, 3.0]) == pytest.approx(expected, rel=1e-14)
    # A spread beyond half the window counts as that.
    assert smooth([0.0, 180.0]) == pytest.approx(180 / (1 + math.exp(-0.5)), rel=1e-14)
    # A spread that is all but 0: far angles weigh nothing, and nothing overflows.
    assert smooth([90.0] * 9 + [math.nextafter(90.0, 91.0)]) == math.nextafter(90.0, 91.0)


REFUSED = [
    ({"version": 3}, "version must be 1 or 2, got 3"),
    ({"version": 1}, "version 1 needs k"),
    ({"k": 0}, "k must be an integer of 1 or more, got 0"),
    ({"k": 2.5}, "k must be an integer of 1 or more, got 2.5"),
    ({"window": True}, "window must be an integer of 1 or more, got True"),
    ({"version": 1, "k": 3, "extra": 0}, "extra must be an integer of 1 or more, got 0"),
    ({"version": 1, "k": 3, "window": 3}, "window must be None in version 1, .* got 3"),
    ({"extra": 20}, "extra must be None in version 2, .* got 20"),
    ({"threshold_max": 2.0}, "threshold_max must be None in version 2, .* got 2.0"),
    ({"factor": 1.0}, r"factor must lie in \(0, 1\), got 1.0"),
    ({"min_lr": -1.0}, "min_lr must be a finite number of 0 or more, got -1.0"),
    ({"threshold": math.nan}, "threshold must be a finite number, got nan"),
    ({"backend": "tpu"}, "backend must be .* got 'tpu'"),
    ({"beside": [object()]}, "beside must have schedulers of the same optimizer, got object"),
]


@pytest.mark.parametrize("options, said", REFUSED)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AutoDrop(torch.optim.SGD(make_weights()), **options)


def test_defaults_are_those_of_each_version():
    opt = torch.optim.SGD(make_weights())
    first, second = AutoDrop(opt, k=391, version=1), AutoDrop(opt)
    names = ("k", "factor", "threshold", "min_lr")
    assert [getattr(first, n) for n in names] == [391, 0.2, 0.01, 1e-4]
    assert (first.extra, first.threshold_max) == (20, 1.0)
    assert [getattr(second, n) for n in names] == [64, 0.95, 0.1, 0.0]
    assert second.window == 10


def test_weights_that_cannot_be_worked_on_are_refused():
    sched = AutoDrop(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]))
    with pytest.raises(ValueError, match="weights must be real"):
        sched.step()
    frozen = AutoDrop(torch.optim.SGD([torch.nn.Parameter(torch.ones(2), requires_grad=False)]))
    with pytest.raises(ValueError, match="got none"):
        frozen.step()


def angles_of_a_part(kind, version):
    """On every rank: angles of weights of which it holds a part. Alone: of whole weights."""
    from torch.distributed.tensor import Shard, distribute_tensor

    size = torch.distributed.get_world_size() if kind != "whole" else 1
    rank = torch.distributed.get_rank() if size > 1 else 0
    mesh = torch.distributed.init_device_mesh("cpu", (size,)) if kind == "dtensor" else None
    whole = [torch.zeros(6, 2), torch.zeros(5)]
    parts = [x.chunk(size)[rank].clone() for x in whole]
    if kind == "dtensor":
        parts = [distribute_tensor(x, mesh, [Shard(0)]) for x in whole]
    params = [torch.nn.Parameter(x) for x in parts]
    group = torch.distributed.group.WORLD if kind == "plain" else None
    opt = torch.optim.SGD(params, lr=1.0)
    options = {"k": 2, "version": version, "reduce_group": group, "threshold": NEVER[version]}
    sched = AutoDrop(opt, **options)
    angles = []
    for t in range(14):
        if t == 9:
            saved, sched = copy.deepcopy(sched.state_dict()), AutoDrop(opt, **options)
            sched.load_state_dict(saved)
        rng = torch.Generator().manual_seed(t)
        for p, x in zip(params, whole, strict=True):
            move = torch.randn(x.shape, generator=rng) + 1
            mine = p.to_local() if kind == "dtensor" else p
            mine.detach().add_(move.chunk(size)[rank])
        sched.step()
        angles.append(sched.angle)
    return angles


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "dtensor"])
def test_ranks_find_the_angle_of_the_whole(ranks, kind, version):
    expected = angles_of_a_part("whole", version)
    for found in ranks(2).run("test_autodrop_use.angles_of_a_part", kind, version):
        assert [a is None for a in found] == [a is None for a in expected]
        for a, b in zip(found, expected, strict=True):
            assert a == b or a == pytest.approx(b, rel=SUM_RTOL)


def test_gradients_and_state_of_the_optimizer_are_not_touched():
    params = make_weights()
    opt = torch.optim.AdamW(params)
    sched = AutoDrop(opt, k=1)
    set_gradients(params, 0)
    opt.step()
    before = copy.deepcopy([opt.state_dict(), [p.grad for p in params], values(params)])
    sched.step()
    assert_same([opt.state_dict(), [p.grad for p in params], values(params)], before)


@pytest.mark.parametrize("version", [1, 2])
def test_the_host_reads_once_in_k_steps(monkeypatch, version):
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, real=real: (reads.append(step), real(t))[1]
        )
    params = make_weights()
    sched = AutoDrop(torch.optim.SGD(params), k=4, version=version, threshold=NEVER[version])
    for step in range(1, 21):
        drift(params, step)
        sched.step()
    steps = [t for t in reads if t > 4]
    # The first step makes tables; the first position gives no displacement yet.
    assert steps == ([5, 9, 13, 17] if version == 1 else [8, 12, 16, 20])
