"""The reference and a backend in lockstep: the same weights and gradients, compared op by op."""

import functools

import torch

from mechanic_fused.backends import formulas, layout, reference
from mechanic_fused.kept_blocks import keep

from .cases import EXACT, FEW, FUSED, QUICK, RUNNING, SUM_RTOL, assert_same, assert_within, noise
from .kernels import Kernels


class Lockstep:
    """Steps the reference on the CPU and a backend where it runs, and compares all they write.

    Args:
        kernels: the backend.
        monkeypatch: by which the two exchange sums.
        variant: of the tuner, unless the options of the twins name one.

    Only sums may differ, since backends add in other orders. So in each step the sums must agree
    within a derived tolerance; then the backend goes on with the reference's, must tune alike, and
    all that follows must be equal to the bit.

    Attributes:
        recorded: the reference's sums in the last step and its tuner's rows before it was tuned;
            None if it was not.
    """

    def __init__(self, kernels, monkeypatch, variant=EXACT):
        self.kernels, self.variant = kernels, variant
        name = "log_tune" if variant == RUNNING else "tune"
        self._tune = getattr(kernels.ops, name)
        self._expected = []
        self.recorded = None
        self._distance = 0.0
        self._rtol = SUM_RTOL
        record = functools.partial(self._record, getattr(reference, name))
        monkeypatch.setattr(reference, name, record)
        monkeypatch.setattr(kernels.ops, name, self._compare)

    def twins(self, base, make, groups=list, **options):
        """Return an optimizer and its weights twice: the reference's, the backend's.

        Args:
            make: () → tensors on the CPU; each twin makes its own.
            groups: weights → what the optimizer is given.
        """
        reference_kernels = Kernels("reference", reference, "cpu")
        options = {"variant": self.variant, **options}
        return [
            optimizer(kernels, base, make, groups, **options)
            for kernels in (reference_kernels, self.kernels)
        ]

    def run(self, base, make, steps=FEW, gradient=None, **options):
        """Step twins in lockstep; return them."""
        pairs = self.twins(base, make, **options)
        for t in range(steps):
            self.step(pairs, t, gradient or random_gradient)
        opt, _ = pairs[1]
        assert distance(opt) > 0
        return pairs

    def step(self, pairs, t, gradient):
        (opt, params), (other, others) = pairs
        self.recorded = None
        self._distance = distance(opt)
        self._rtol = max(self.kernels.sum_rtol(p.dtype) for p in params)
        in_float64 = isinstance(opt, torch.optim.Adam) and params[0].dtype is torch.float64
        if in_float64 and self.variant == RUNNING:  # x and u are off by as much
            self._rtol += 4 * self.kernels.adam64_rtol
        for of_one in pairs:
            give_gradients(of_one[1], t, gradient)
            of_one[0].step()
        assert not self._expected
        actual, expected = written(other, others), written(opt, params)
        if in_float64:
            for own, of_reference in zip(actual, expected, strict=True):
                assert own.keys() == of_reference.keys()
                for name, value in of_reference.items():
                    largest = float(value.abs().max()) if value.numel() else 0.0
                    assert_within(own[name], value, self.kernels.adam64_rtol * largest)
        else:
            assert_same(actual, expected)

    def _record(self, tune, sums, tuner):
        before = sums.clone()
        self.recorded = before, tuner.state.clone()
        tune(sums, tuner)
        self._expected.append((before, tuner.state.clone()))

    def _compare(self, sums, tuner):
        if not self._expected:  # GradScaler skips this step, which the reference saw on the host
            self._tune(sums, tuner)
            return
        expected_sums, expected = self._expected.pop()
        assert_sums_agree(sums.cpu(), expected_sums, self._distance, self._rtol)
        sums.copy_(expected_sums)
        self._tune(sums, tuner)
        torch.testing.assert_close(tuner.state.cpu(), expected, rtol=SUM_RTOL, atol=0)
        tuner.state.copy_(expected)


def distance(opt):
    """Return ‖Δ‖, or in the running form ‖x − x_ref‖, of elements that count eightfold so much."""
    moves = [
        state["delta"].double() if "delta" in state else displacement(opt, p, state)
        for p, state in opt.state.items()
        if "delta" in state or "x_ref" in state  # not of a weight that has been frozen since
    ]
    # Of an infinite weight, or of a frozen one that a checkpoint with x_ref in part was loaded for:
    # a gradient there would make the sum infinite or NaN, too, and such sums must be equal.
    moves = [torch.where(move.isfinite(), move, 0.0) for move in moves]
    return float(sum(move.square().sum() for move in moves)) ** 0.5


def displacement(opt, p, state):
    """Return x − x_ref; of an x_ref kept in part, the kept elements' x − x_ref times eight."""
    x, x_ref = joined(p, state), state["x_ref"].double()
    if x.shape == x_ref.shape:
        return x - x_ref
    buckets = opt._plan.buckets
    phases = [b.phases[i] for b in buckets for i, q in enumerate(b.parameters) if q is p]
    if not phases:  # frozen
        return torch.zeros((), dtype=torch.float64)
    [phase] = phases
    return layout.REFERENCE_EVERY * (keep(x, p.detach(), phase) - x_ref)


def joined(p, state):
    """Return a weight of the running form with its low bits, float64."""
    x = p.detach()
    return (formulas.join(x, state["x_low"]) if "x_low" in state else x).double()


def assert_sums_agree(sums, expected, distance, rtol):
    """Compare to an error relative to Σ|gΔ| ≤ ‖g‖‖Δ‖ and Σ|xΔ| ≤ ‖x‖‖Δ‖: the products cancel."""
    gg, xx = expected[:, layout.GG], expected[:, layout.XX]
    finite = expected.isfinite()
    assert sums.isfinite().equal(finite)
    columns = {"gd": gg.sqrt() * distance, "xd": xx.sqrt() * distance, "gg": gg, "xx": xx}
    columns |= {"uu": expected[:, layout.UU], "count": torch.zeros_like(gg)}
    sizes = [columns[name] for name in layout.SUMS]
    allowed = rtol * torch.stack(sizes, dim=1)
    # Where a norm is not finite the bound may be NaN; equal sums agree under any bound.
    agree = (sums == expected) | ((sums - expected).abs() <= allowed)
    assert agree[finite].all(), f"{sums} for {expected}"


def optimizer(kernels, base, make, groups=list, **options):
    """Return an optimizer of a backend over weights of these values, and the weights."""
    params = [torch.nn.Parameter(moved(x, kernels.device)) for x in make()]
    options = {**QUICK, "variant": EXACT, **options}
    return FUSED[base](groups(params), backend=kernels.name, **options), params


def drawn(dtype, sizes):
    """Return a function that makes tensors of these sizes."""

    def make():
        rng = torch.Generator().manual_seed(0)
        return [torch.randn(n, generator=rng, dtype=torch.float64).to(dtype) for n in sizes]

    return make


@functools.lru_cache(maxsize=256)
def _random_numbers(shape, t, i):
    rng = torch.Generator().manual_seed(1000 * t + i)
    return noise(torch.empty(shape, device="meta"), rng) + 0.5


def random_gradient(p, t, i):
    """Not a function of x, so that a difference in x cannot hide behind one in g."""
    return _random_numbers(p.shape, t, i).to(p.dtype, copy=True)


def give_gradients(params, t, gradient=random_gradient):
    """Set the gradients of step t.

    Args:
        gradient: (weight, t, its index) → its gradient on the CPU, or None.
    """
    for i, p in enumerate(params):
        p.grad = moved(gradient(p, t, i), p.device.type)


def storage_of(x):
    """Return all numbers of a tensor's storage, also those beside the tensor."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def moved(x, device):
    """Return x on a device, at the same place of a storage of the same size and contents."""
    if x is None or x.device.type == device:
        return x
    return storage_of(x).to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def written(opt, params):
    """Return all that ops write of the weights, on the CPU; not the tuner's state."""
    found = [{**opt.state.get(p, {}), "x": p.detach()} for p in params]
    return [{name: moved(value, "cpu") for name, value in entries.items()} for entries in found]


def copied(opt, params):
    """Return a copy of all that ops write, the tuner's state included."""
    found = [{name: x.clone() for name, x in e.items()} for e in written(opt, params)]
    return [*found, *(group["mechanic_state"].cpu().clone() for group in opt.param_groups)]
