"""AutoDrop: its angles, its rule and its average, against oracles written apart."""

import math

import numpy as np
import pytest
import torch
from autodrop_runs import ALWAYS, NEVER, drift
from cases import SIZES, SUM_RTOL, make_weights

from mechanic_fused.tuners import AutoDrop

SATURATED = {0.06: 118.2, 0.03: 103.3, 0.01: 94.3, 0.001: 90.4}
DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "float64": [torch.float64],
    "mixed": [torch.bfloat16, torch.float64, torch.float32],
}


def mixed_weights(dtypes, seed=0):
    shapes = [(size,) for size in SIZES] + [(5, 13)]
    weights = make_weights(shapes, torch.float64, seed)
    return [
        torch.nn.Parameter(p.detach().to(dtypes[i % len(dtypes)])) for i, p in enumerate(weights)
    ]


def flat(params):
    return np.concatenate([p.detach().double().numpy().ravel() for p in params])


def units(params):
    """The unit roundoff of the arithmetic on each element."""
    rows = [np.full(p.numel(), 2.0**-53 if p.dtype is torch.float64 else 2.0**-24) for p in params]
    return np.concatenate(rows)


def angles_of(positions, slack):
    """Angles of displacements in float64, and how far each may be off, in degrees.

    Args:
        positions: rows of numbers that are exact.
        slack: how far each number of a row may be off where we have it.
    """
    found = []
    for i in range(2, len(positions)):
        before, after = positions[i - 1] - positions[i - 2], positions[i] - positions[i - 1]
        norms = [np.linalg.norm(before), np.linalg.norm(after)]
        cosine = before @ after / (norms[0] * norms[1])
        # A vector that is off by a part r of its length has turned by asin(r) <= r·π/2.
        off = [np.linalg.norm(slack[i - 1] + slack[i - 2]), np.linalg.norm(slack[i] + slack[i - 1])]
        turned = sum(o / n for o, n in zip(off, norms, strict=True)) * math.pi / 2
        bound = turned + SUM_RTOL / math.sqrt(1 - cosine**2)
        found.append((math.degrees(math.acos(cosine)), math.degrees(bound)))
    return found


def assert_angles(actual, expected):
    assert len(actual) == len(expected)
    for angle, (exact, bound) in zip(actual, expected, strict=True):
        assert bound < 0.1  # or the comparison would say little
        assert abs(angle - exact) <= bound


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_angles_of_version_2_are_those_of_all_weights_kept(backend, dtypes):
    params, k, windows = mixed_weights(dtypes), 3, 6
    sched = AutoDrop(torch.optim.SGD(params), k=k, window=1, threshold=-360.0, backend=backend)
    kept, found = [], []
    for t in range(k * windows):
        drift(params, t)
        kept.append(flat(params))
        sched.step()
        assert (sched.angle is None) == (t + 1 < 3 * k)
        if (t + 1) % k == 0 and sched.angle is not None:
            found.append(sched.angle)
    sums = [np.sum(kept[i : i + k], 0) for i in range(0, len(kept), k)]
    # A sum of k numbers is off by (k − 1) roundings of it, a difference by one of its own.
    sizes = [np.sum(np.abs(kept[i : i + k]), 0) for i in range(0, len(kept), k)]
    assert_angles(found, angles_of(sums, [k * units(params) * size for size in sizes]))
    assert sched.smoothed == found


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_angles_of_version_1_are_of_the_first_step_of_each_epoch(backend, dtypes):
    params, k = mixed_weights(dtypes), 4
    sched = AutoDrop(torch.optim.SGD(params), k=k, version=1, threshold=NEVER[1], backend=backend)
    kept, found = [], []
    for t in range(6 * k):
        drift(params, t)
        sched.step()
        if t % k == 0:
            kept.append(flat(params))
            found += [sched.angle] if len(kept) > 2 else []
            assert (sched.angle is None) == (len(kept) < 3)
    assert_angles(found, angles_of(kept, [units(params) * np.abs(x) for x in kept]))


@pytest.mark.parametrize("lr", SATURATED)
def test_saturation_angle_of_the_noisy_quadratic(lr):
    """Single steps of SGD on ½(x − ζ)ᵀA(x − ζ), ζ normal and new at each step, from the stationary
    distribution."""
    a = torch.arange(1, 201, dtype=torch.float64) / 10
    expected = math.degrees(
        math.acos(-lr / 2 * float((a**3 / (2 - lr * a)).sum() / (a**2 / (2 - lr * a)).sum()))
    )
    assert abs(expected - SATURATED[lr]) < 0.06  # of its last digit
    rng = torch.Generator().manual_seed(1)
    spread = (lr * a / (2 - lr * a)).sqrt()
    x = torch.nn.Parameter(spread * torch.randn(200, generator=rng, dtype=torch.float64))
    opt = torch.optim.SGD([x], lr=lr)
    sched = AutoDrop(opt, k=1, threshold=NEVER[2])
    cosines = []
    for _ in range(3000):
        x.grad = a * (x.detach() - torch.randn(200, generator=rng, dtype=torch.float64))
        opt.step()
        sched.step()
        if sched.angle is not None:
            cosines.append(math.cos(math.radians(sched.angle)))
    assert len(cosines) == 2998
    assert abs(math.degrees(math.acos(np.mean(cosines))) - expected) < 0.5
    assert sched.drops == []


def noise_of(steps, size, seed=0):
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(seed)).double()


def follow(noise, lr, **options):
    """Train x on ½Σa(x − ζ)² with AutoDrop; return it, the optimizer and the weights."""
    size = noise.shape[1]
    a = torch.arange(1, size + 1, dtype=torch.float64) / size
    x = torch.nn.Parameter(torch.full((size,), 5.0, dtype=torch.float64))
    opt = torch.optim.SGD([x], lr=lr)
    sched = AutoDrop(opt, **options)
    for row in noise:
        x.grad = a * (x.detach() - row)
        opt.step()
        sched.step()
    return sched, opt, x


def plain_angle(a, b):
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return math.degrees(math.acos(dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))))


def plain_version_2(noise, lr, k, m, factor, threshold, min_lr):
    """tuners.md's version 2 in plain Python; returns the steps of the drops and the last lr."""
    size = len(noise[0])
    x, means, shifts, buffer, drops = [5.0] * size, [], [], [], []
    total, last = [0.0] * size, None
    for step, row in enumerate(noise, 1):
        x = [x[i] - lr * (i + 1) / size * (x[i] - row[i]) for i in range(size)]
        total = [total[i] + x[i] for i in range(size)]
        if step % k:
            continue
        means.append([t / k for t in total])
        total = [0.0] * size
        if len(means) > 1:
            shifts.append([p - q for p, q in zip(means[-1], means[-2], strict=True)])
        if len(shifts) < 2:
            continue
        buffer.append(plain_angle(shifts[-1], shifts[-2]))
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
    noise, lr = noise_of(1200, 20), 0.4
    rule = {"k": 3, "factor": 0.8, "threshold": 0.1, "min_lr": 0.06}
    sched, opt, _ = follow(noise, lr, window=5, **rule)
    drops, last = plain_version_2(noise.tolist(), lr, m=5, **rule)
    assert len(drops) > 9 and last == rule["min_lr"]
    assert [step for step, _ in sched.drops] == drops
    assert [opt.param_groups[0]["lr"]] == sched.get_last_lr() == [last]
    np.testing.assert_allclose(
        [reached for _, reached in sched.drops],
        0.8 ** np.arange(1, len(drops) + 1),
        rtol=len(drops) * 2.0**-52,
    )


def plain_version_1(noise, lr, k, factor, threshold, threshold_max, extra, min_lr):
    """tuners.md's version 1 in plain Python; returns drops, lr, θ and the weights."""
    size = len(noise[0])
    x, kept, angles, drops = [5.0] * size, [], [], []
    armed, averaged = False, []
    for step, row in enumerate(noise, 1):
        x = [x[i] - lr * (i + 1) / size * (x[i] - row[i]) for i in range(size)]
        if step % k != 1 % k:
            continue
        kept.append(x)
        if len(kept) > 2:
            shifts = [[p - q for p, q in zip(kept[i], kept[i - 1], strict=True)] for i in (-1, -2)]
            angles.append(plain_angle(*shifts))
        if len(angles) > 1 and abs(angles[-1] - angles[-2]) < threshold:
            armed = True
        if not armed:
            continue
        averaged.append(x)
        if len(averaged) == extra:
            threshold = min(threshold_max, threshold / factor)
            lr = max(min_lr, factor * lr)
            parts = extra * (extra + 1) / 2
            x = [sum((n + 1) * averaged[n][i] for n in range(extra)) / parts for i in range(size)]
            averaged, armed = [], False
            drops.append(step)
    return drops, lr, threshold, x


@pytest.mark.parametrize("k, steps", [(1, 150), (3, 401)])
def test_version_1_drops_and_averages_where_a_plain_oracle_does(k, steps):
    noise, lr = noise_of(steps, 20), 0.4
    rule = {"k": k, "factor": 0.5, "threshold": 3.0, "threshold_max": 10.0, "extra": 4}
    sched, opt, x = follow(noise, lr, version=1, min_lr=0.03, **rule)
    drops, last, threshold, expected = plain_version_1(noise.tolist(), lr, min_lr=0.03, **rule)
    assert len(drops) > 4 and last == 0.03 and threshold == 10.0
    assert [step for step, _ in sched.drops] == drops
    assert opt.param_groups[0]["lr"] == last and sched.threshold == threshold
    # Steps contract; each makes a few roundings of numbers below 5.
    atol = steps * 8 * 2.0**-53 * 5
    np.testing.assert_allclose(x.detach().numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_version_1_replaces_weights_by_their_average_once(backend, dtypes):
    params, extra = mixed_weights(dtypes), 3
    sched = AutoDrop(
        torch.optim.SGD(params, lr=1.0),
        k=1,
        version=1,
        threshold=ALWAYS,
        extra=extra,
        backend=backend,
    )
    kept = []
    versions = [p._version for p in params]
    for t in range(6):  # the fourth has the second angle, and arms
        drift(params, t)
        kept.append([p.detach().double() for p in params])
        versions = [p._version for p in params]
        sched.step()
    assert [step for step, _ in sched.drops] == [6]
    assert all(p._version > before for p, before in zip(params, versions, strict=True))
    for i, p in enumerate(params):
        parts = [(n + 1) * row[i] / 6 for n, row in enumerate(kept[-extra:])]
        expected = sum(parts)
        # Products, sums and a quotient in the dtype of the arithmetic, then one rounding.
        wide = 2.0**-53 if p.dtype is torch.float64 else 2.0**-24
        off = 2 * extra * wide * sum(part.abs() for part in parts)
        off += torch.finfo(p.dtype).eps * expected.abs()
        assert ((p.detach().double() - expected).abs() <= off).all()
