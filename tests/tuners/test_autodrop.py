"""AutoDrop's angles, rules and average beside oracles written apart; when it measures anew."""

import math

import numpy as np
import pytest
import torch
from support.cases import SIZES, SUM_RTOL, assert_same, make_weights, set_gradients, values
from support.schedulers import ALWAYS, NEVER, Tuned, drift, sgd

from mechanic_fused.tuners import AutoDrop
from mechanic_fused.tuners.autodrop import smooth

SATURATED = {0.06: 118.2, 0.03: 103.3, 0.01: 94.3, 0.001: 90.4}
DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "float64": [torch.float64],
    "mixed": [torch.bfloat16, torch.float64, torch.float32],
}
VERSIONS = (1, 2)

of_dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
of_versions = pytest.mark.parametrize("version", VERSIONS)


def mixed_weights(dtypes):
    weights = make_weights([*((size,) for size in SIZES), (5, 13)], torch.float64)
    return [
        torch.nn.Parameter(p.detach().to(dtypes[i % len(dtypes)])) for i, p in enumerate(weights)
    ]


def unit(p):
    """Return the unit roundoff of the arithmetic on a weight."""
    return 2.0**-53 if p.dtype is torch.float64 else 2.0**-24


def flat(params):
    return np.concatenate([p.detach().double().numpy().ravel() for p in params])


def units(params):
    return np.concatenate([np.full(p.numel(), unit(p)) for p in params])


def assert_angles(found, positions, slack):
    """Compare angles between displacements with those computed in float64.

    Args:
        found: the angles in degrees.
        positions: rows of numbers that are exact.
        slack: how far each number of a row may be off where the tuner has it.
    """
    assert len(found) == len(positions) - 2
    for i, angle in enumerate(found, 2):
        before, after = positions[i - 1] - positions[i - 2], positions[i] - positions[i - 1]
        norms = [np.linalg.norm(before), np.linalg.norm(after)]
        cosine = before @ after / (norms[0] * norms[1])
        # A vector that is off by a part r of its length has turned by asin(r) <= r·π/2.
        off = [np.linalg.norm(slack[i - 1] + slack[i - 2]), np.linalg.norm(slack[i] + slack[i - 1])]
        turned = sum(o / n for o, n in zip(off, norms, strict=True)) * math.pi / 2
        bound = math.degrees(turned + SUM_RTOL / math.sqrt(1 - cosine**2))
        assert bound < 0.1  # or the comparison would say little
        assert abs(angle - math.degrees(math.acos(cosine))) <= bound


@of_dtypes
def test_angles_of_version_2_are_those_of_all_weights_kept(backend, dtypes):
    params, k, windows = mixed_weights(dtypes), 3, 6
    sched = AutoDrop(sgd(params), k=k, window=1, threshold=NEVER[2], backend=backend)
    kept = []
    for t in range(k * windows):
        drift(params, t)
        kept.append(flat(params))
        sched.step()
        assert (sched.angle is None) == (t + 1 < 3 * k)
        assert len(sched.smoothed) == max(0, (t + 1) // k - 2)
    sums = [np.sum(kept[i : i + k], 0) for i in range(0, len(kept), k)]
    # A sum of k numbers is off by (k − 1) roundings of it, a difference by one of its own.
    sizes = [np.sum(np.abs(kept[i : i + k]), 0) for i in range(0, len(kept), k)]
    assert_angles(sched.smoothed, sums, [k * units(params) * size for size in sizes])


@of_dtypes
def test_angles_of_version_1_are_of_the_first_step_of_each_epoch(backend, dtypes):
    params, k = mixed_weights(dtypes), 4
    sched = AutoDrop(sgd(params), k=k, version=1, threshold=NEVER[1], backend=backend)
    kept, found = [], []
    for t in range(6 * k):
        drift(params, t)
        sched.step()
        if t % k == 0:
            kept.append(flat(params))
            found += [sched.angle] if len(kept) > 2 else []
            assert (sched.angle is None) == (len(kept) < 3)
    assert_angles(found, kept, [units(params) * np.abs(x) for x in kept])


@pytest.mark.parametrize("lr", SATURATED)
def test_saturation_angle_of_the_noisy_quadratic(lr):
    """SGD on ½(x − ζ)ᵀA(x − ζ), ζ normal and new at each step, from the stationary distribution."""
    a = torch.arange(1, 201, dtype=torch.float64) / 10
    cosine = -lr / 2 * float((a**3 / (2 - lr * a)).sum() / (a**2 / (2 - lr * a)).sum())
    expected = math.degrees(math.acos(cosine))
    assert abs(expected - SATURATED[lr]) < 0.06  # of its last digit
    rng = torch.Generator().manual_seed(1)
    spread = (lr * a / (2 - lr * a)).sqrt()
    x = torch.nn.Parameter(spread * torch.randn(200, generator=rng, dtype=torch.float64))
    opt = sgd([x], lr)
    sched = AutoDrop(opt, k=1, threshold=NEVER[2])
    cosines = []
    for _ in range(3000):
        x.grad = a * (x.detach() - torch.randn(200, generator=rng, dtype=torch.float64))
        opt.step()
        sched.step()
        if sched.angle is not None:
            cosines.append(math.cos(math.radians(sched.angle)))
    assert len(cosines) == 2998 and sched.drops == []
    assert abs(math.degrees(math.acos(np.mean(cosines))) - expected) < 0.5


# Runs beside oracles in plain Python


def noise_of(steps, size=20):
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(0)).double()


def follow(noise, lr, **options):
    """Train x on ½Σa(x − ζ)² with AutoDrop; return it and the weights."""
    size = noise.shape[1]
    a = torch.arange(1, size + 1, dtype=torch.float64) / size
    x = torch.nn.Parameter(torch.full((size,), 5.0, dtype=torch.float64))
    opt = sgd([x], lr)
    sched = AutoDrop(opt, **options)
    for row in noise:
        x.grad = a * (x.detach() - row)
        opt.step()
        sched.step()
    return sched, x


def descend(x, row, lr):
    return [
        v - lr * (i + 1) / len(x) * (v - r) for i, (v, r) in enumerate(zip(x, row, strict=True))
    ]


def minus(a, b):
    return [p - q for p, q in zip(a, b, strict=True)]


def angle_of(a, b):
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return math.degrees(math.acos(dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))))


def plain_version_2(noise, lr, k, m, factor, threshold, min_lr):
    """Return the steps of the drops and the last lr; windows have means, not sums."""
    x, means, shifts, buffer, drops = [5.0] * len(noise[0]), [], [], [], []
    total, last = [0.0] * len(x), None
    for step, row in enumerate(noise, 1):
        x = descend(x, row, lr)
        total = [t + v for t, v in zip(total, x, strict=True)]
        if step % k:
            continue
        means.append([t / k for t in total])
        total = [0.0] * len(x)
        if len(means) > 1:
            shifts.append(minus(means[-1], means[-2]))
        if len(shifts) < 2:
            continue
        buffer.append(angle_of(shifts[-1], shifts[-2]))
        if len(buffer) < m:
            continue
        mean = sum(buffer) / m
        sigma = min(math.sqrt(sum((b - mean) ** 2 for b in buffer) / m), m / 2)
        bell = [math.exp(-((m - 1 - i) ** 2) / (2 * sigma**2)) for i in range(m)]
        level = sum(w * b for w, b in zip(bell, buffer, strict=True)) / sum(bell)
        buffer = buffer[1:]
        if last is not None and level - last < threshold:
            lr, buffer, last = max(min_lr, factor * lr), [], None
            drops.append(step)
        else:
            last = level
    return drops, lr


def test_version_2_drops_where_a_plain_oracle_does():
    noise, rule = noise_of(1200), {"k": 3, "factor": 0.8, "threshold": 0.1, "min_lr": 0.06}
    sched, _ = follow(noise, 0.4, window=5, **rule)
    drops, last = plain_version_2(noise.tolist(), 0.4, m=5, **rule)
    assert len(drops) > 9 and last == rule["min_lr"]
    assert [step for step, _ in sched.drops] == drops
    assert sched.get_last_lr() == [last]
    products = [product for _, product in sched.drops]
    expected = 0.8 ** np.arange(1, len(drops) + 1)
    np.testing.assert_allclose(products, expected, rtol=len(drops) * 2.0**-52)


def plain_version_1(noise, lr, k, factor, threshold, threshold_max, extra, min_lr):
    """Return the steps of the drops, the last lr and θ, and the weights."""
    x, kept, angles, averaged, drops = [5.0] * len(noise[0]), [], [], [], []
    armed = False
    for step, row in enumerate(noise, 1):
        x = descend(x, row, lr)
        if step % k != 1 % k:
            continue
        kept.append(x)
        if len(kept) > 2:
            angles.append(angle_of(minus(kept[-1], kept[-2]), minus(kept[-2], kept[-3])))
        if len(angles) > 1 and abs(angles[-1] - angles[-2]) < threshold:
            armed = True
        if not armed:
            continue
        averaged.append(x)
        if len(averaged) == extra:
            threshold = min(threshold_max, threshold / factor)
            lr = max(min_lr, factor * lr)
            columns = zip(*averaged, strict=True)
            parts = extra * (extra + 1) / 2
            x = [sum((n + 1) * v for n, v in enumerate(column)) / parts for column in columns]
            averaged, armed = [], False
            drops.append(step)
    return drops, lr, threshold, x


@pytest.mark.parametrize(("k", "steps"), [(1, 150), (3, 401)])
def test_version_1_drops_and_averages_where_a_plain_oracle_does(k, steps):
    noise = noise_of(steps)
    rule = {"k": k, "factor": 0.5, "threshold": 3.0, "threshold_max": 10.0, "extra": 4}
    sched, x = follow(noise, 0.4, version=1, min_lr=0.03, **rule)
    drops, last, threshold, expected = plain_version_1(noise.tolist(), 0.4, min_lr=0.03, **rule)
    assert len(drops) > 4 and last == 0.03 and threshold == 10.0
    assert [step for step, _ in sched.drops] == drops
    assert sched.get_last_lr() == [last] and sched.threshold == threshold
    # Steps contract; each makes a few roundings of numbers below 5.
    atol = steps * 8 * 2.0**-53 * 5
    np.testing.assert_allclose(x.detach().numpy(), expected, rtol=0, atol=atol)


@of_dtypes
def test_version_1_replaces_weights_by_their_average_once(backend, dtypes):
    params, extra, kept = mixed_weights(dtypes), 3, []
    options = {"version": 1, "threshold": ALWAYS, "extra": extra, "backend": backend}
    sched = AutoDrop(sgd(params), k=1, **options)
    for t in range(6):  # the fourth has the second angle, and arms
        drift(params, t)
        kept.append([p.detach().double() for p in params])
        versions = [p._version for p in params]
        sched.step()
    assert [step for step, _ in sched.drops] == [6]
    assert all(p._version > before for p, before in zip(params, versions, strict=True))
    for i, p in enumerate(params):
        parts = [(n + 1) * row[i] / 6 for n, row in enumerate(kept[-extra:])]
        # Products, sums and a quotient in the dtype of the arithmetic, then one rounding.
        off = 2 * extra * unit(p) * sum(part.abs() for part in parts)
        off += torch.finfo(p.dtype).eps * sum(parts).abs()
        assert ((p.detach().double() - sum(parts)).abs() <= off).all()


def test_smoothing_is_centred_on_the_newest_angle():
    assert smooth([80.0] * 10) == 80.0
    # σ² = 2/3 of the population, so an angle of age d weighs exp(−3d²/4).
    near, far = math.exp(-0.75), math.exp(-3)
    expected = (far * 1.0 + near * 2.0 + 3.0) / (far + near + 1)
    assert smooth([1.0, 2.0, 3.0]) == pytest.approx(expected, rel=1e-14)
    # A spread beyond half the window counts as that.
    assert smooth([0.0, 180.0]) == pytest.approx(180 / (1 + math.exp(-0.5)), rel=1e-14)
    # A spread that is all but 0: far angles weigh nothing, and nothing overflows.
    assert smooth([90.0] * 9 + [math.nextafter(90.0, 91.0)]) == math.nextafter(90.0, 91.0)


# When it measures, and when anew


CHANGES = {
    "dtype": lambda opt, p, _: setattr(p, "data", p.detach().bfloat16()),
    "memory": lambda opt, p, _: setattr(p, "data", p.detach().clone()),
    "frozen": lambda opt, p, _: p.requires_grad_(False),
    "added group": lambda opt, _, other: opt.add_param_group({"params": [other]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_measured_anew(change):
    *params, other = make_weights()
    opt = sgd(params)
    options = {"k": 2, "window": 2, "threshold": NEVER[2]}
    sched = AutoDrop(opt, **options)
    for t in range(9):
        drift(params, t)
        sched.step()
    assert sched.angle is not None and sched.state_dict()["count"] == 1
    past = list(sched.smoothed)
    CHANGES[change](opt, params[0], other)
    fresh = AutoDrop(opt, **options)
    for t in range(20, 33):
        drift([*params, other], t)
        sched.step()
        fresh.step()
        assert sched.angle == fresh.angle
    assert fresh.angle is not None and len(fresh.smoothed) > 1
    assert sched.smoothed == past + fresh.smoothed


@of_versions
def test_standing_still_and_nan_give_no_angle(version, backend):
    params = make_weights()
    options = {1: {"extra": 100, "threshold": ALWAYS}, 2: {"window": 2, "threshold": NEVER[2]}}
    sched = AutoDrop(sgd(params), k=1, version=version, backend=backend, **options[version])
    angles, armed = [], []
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
        armed.append(sched.state_dict()["armed"])
    assert all(math.isfinite(angle) for angle in angles[2:])
    # None is new at a step whose displacement, or the one before, is 0 or not finite.
    same = [t for t in range(3, 16) if angles[t] == angles[t - 1]]
    assert same == [5, 6, 7, 10, 11, 12]
    assert all(map(math.isfinite, sched.smoothed))
    assert not any(armed[10:12]) and armed[-1] == (version == 1)
    if version == 1:
        assert all(t.isfinite().all() for t in sched.state_dict()["vectors"]["sum"])


@of_versions
def test_the_host_reads_once_in_k_steps(monkeypatch, version):
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, real=real: (reads.append(step), real(t))[1]
        )
    params = make_weights()
    sched = AutoDrop(sgd(params), k=4, version=version, threshold=NEVER[version])
    for step in range(1, 21):
        drift(params, step)
        sched.step()
    # The first step makes tables; the first position gives no displacement yet.
    expected = {1: [5, 9, 13, 17], 2: [8, 12, 16, 20]}
    assert [t for t in reads if t > 4] == expected[version]


def test_gradients_and_state_of_the_optimizer_are_not_touched():
    params = make_weights()
    opt = torch.optim.AdamW(params)
    set_gradients(params, 0)
    opt.step()

    def everything():
        return [opt.state_dict(), [p.grad.clone() for p in params], values(params)]

    before = everything()
    AutoDrop(opt, k=1).step()
    assert_same(everything(), before)


def test_defaults_are_those_of_each_version():
    opt = sgd(make_weights())
    first, second = AutoDrop(opt, k=391, version=1), AutoDrop(opt)
    names = ("k", "factor", "threshold", "min_lr", "window", "extra", "threshold_max")
    assert [getattr(first, n) for n in names] == [391, 0.2, 0.01, 1e-4, 0, 20, 1.0]
    assert [getattr(second, n) for n in names] == [64, 0.95, 0.1, 0.0, 10, 0, math.inf]


@of_versions
def test_a_state_of_other_weights_is_refused_before_anything_changes(version):
    name = f"AutoDrop {version}"
    run = Tuned(name, make_weights(((3,), (5, 13)))).steps(20)
    before = run.snapshot()
    for shapes, got in ((((3,),), r"\[\(3,\)\]"), (((3,), (13, 5)), r".*\(13, 5\)\]")):
        state = Tuned(name, make_weights(shapes)).steps(20).tuner.state_dict()
        with pytest.raises(ValueError, match=rf"expected \[\(3,\), \(5, 13\)\], got {got}"):
            run.tuner.load_state_dict(state)
        assert_same(run.snapshot(), before)


def test_weights_that_cannot_be_measured_are_refused():
    sched = AutoDrop(sgd([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]))
    with pytest.raises(ValueError, match="weights must be real"):
        sched.step()
    frozen = AutoDrop(sgd([torch.nn.Parameter(torch.ones(2), requires_grad=False)]))
    with pytest.raises(ValueError, match="got none"):
        frozen.step()


# Ranks


def angles(kind, version):
    """Return the angles of weights of which this rank holds a shard, or of whole ones."""
    from torch.distributed.tensor import Shard, distribute_tensor

    size = torch.distributed.get_world_size() if kind != "whole" else 1
    rank = torch.distributed.get_rank() if size > 1 else 0
    group = torch.distributed.group.WORLD if kind == "plain" else None
    whole = [torch.zeros(6, 2), torch.zeros(5)]
    shards = [x.chunk(size)[rank].clone() for x in whole]
    if kind == "dtensor":
        mesh = torch.distributed.init_device_mesh("cpu", (size,))
        shards = [distribute_tensor(x, mesh, [Shard(0)]) for x in whole]
    params = [torch.nn.Parameter(x) for x in shards]
    options = {"k": 2, "version": version, "reduce_group": group, "threshold": NEVER[version]}
    sched = AutoDrop(sgd(params), **options)
    found = []
    for t in range(14):
        if t == 9:
            saved, sched = sched.state_dict(), AutoDrop(sched.optimizer, **options)
            sched.load_state_dict(saved)
        rng = torch.Generator().manual_seed(t)
        for p, x in zip(params, whole, strict=True):
            move = torch.randn(x.shape, generator=rng) + 1
            own = p.to_local() if kind == "dtensor" else p
            own.detach().add_(move.chunk(size)[rank])
        sched.step()
        found.append(sched.angle)
    return found


@of_versions
@pytest.mark.parametrize("kind", ["plain", "dtensor"])
def test_ranks_find_the_angle_of_the_whole(ranks, kind, version):
    expected = angles("whole", version)
    for found in ranks(2).run("test_autodrop.angles", kind, version):
        assert [a is None for a in found] == [a is None for a in expected]
        for a, b in zip(found, expected, strict=True):
            assert a == b or a == pytest.approx(b, rel=SUM_RTOL)
