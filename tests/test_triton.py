"""Triton against the reference on the CPU: the same bits of x, Δ and state, the same sums.

On a GPU the tests run there. Without one they run in Triton's interpreter, which must be chosen
before the kernels are defined: `test_in_the_interpreter` starts a process of its own for them.

A step is compared verb by verb. Sums differ in their last bits, since they add in another order; so
once they have been compared both go on with the reference's, and all that follows must be equal.
"""

import os
import subprocess
import sys

import pytest
import torch
from cases import FEW, FUSED, QUICK, SUM_RTOL, assert_same, noise

from mechanic_fused import backends, bucket, reference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

on_kernels = [
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()),
        reason="there is no GPU; test_in_the_interpreter runs it",
    ),
    # Of the interpreter's numpy, which says so where it makes a NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
on_gpu = [
    pytest.mark.gpu,
    # What torch says of its own prototypes: sync debug mode, a refused capture, the profiler.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="there is no GPU"),
]

CASES = {
    "sgd": ("sgd", {"lr": 0.05}),
    "sgd l2": ("sgd", {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": ("sgd", {"lr": 0.05, "momentum": 0.9}),
    "dampening": ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": ("adam", {"lr": 1.0}),
    "adam l2": ("adam", {"lr": 0.7, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": ("adamw", {"lr": 1.0, "weight_decay": 0.1}),
    "adamw maximize": ("adamw", {"lr": 1.0, "weight_decay": 0.1, "maximize": True}),
    "lion": ("lion", {"lr": 0.5}),
    "lion decay": ("lion", {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.1}),
}
FULL = ("dampening", "adam l2", "adamw", "lion decay")  # every stream of every kernel
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)

# Nothing; one; less than, across and beyond a thread's share, a block and a chunk.
SIZES = (0, 1, 3, 63, 1025, 5003, bucket.CHUNK + 129)
FEWER = (0, 3, 1025, 4100)
# The interpreter takes milliseconds a block, whatever its size: fewer and larger ones.
INTERPRETED_THREADS = 512
# A power by repeated squaring errs by 2⁻⁵³/(1 − β), relative to 1 − βᵗ, beside the libraries' pow;
# a coefficient in float32 hides it, one in float64 shows it in each of up to 20 updates of size 1.
POWER_RTOL = 20 * 2.0**-53 / (1 - 0.999)
# Neighbours of a misaligned weight: a kernel that writes too far would write here.
GUARD = 7.0
FAR = 1 << 33


@pytest.fixture
def kernels(monkeypatch):
    """The Triton backend's module."""
    module = backends.MODULES["triton"]()
    if INTERPRETED:
        monkeypatch.setattr(module.storage, "THREADS", INTERPRETED_THREADS)
        interpreted = type(module.storage.read)
        prepare_and_call = interpreted.__call__

        def call(self, *args, **kwargs):
            # The interpreter prepares the whole language anew for each call of a function, which
            # for one of ours the kernel has done: half of the time of these tests.
            if self.fn.__module__.startswith("triton."):
                return prepare_and_call(self, *args, **kwargs)
            return self.rewrite()(*args, **kwargs)

        monkeypatch.setattr(interpreted, "__call__", call)
    return module


@pytest.fixture
def lockstep(kernels, monkeypatch):
    """Gives a function that steps twins and compares them: sums, the tuner's state, then the rest.

    Each step's sums and tuner must be the reference's; then both go on with the reference's.
    """
    tune_reference, tune_triton = reference.tune, kernels.tune
    recorded = []
    delta_norm = 0.0

    def record(sums, tuner):
        before = sums.clone()
        tune_reference(sums, tuner)
        recorded.append((before, tuner.state.clone()))

    def compare(sums, tuner):
        expected_sums, expected = recorded.pop()
        assert_sums_agree(sums.cpu(), expected_sums, delta_norm)
        sums.copy_(expected_sums)
        tune_triton(sums, tuner)
        torch.testing.assert_close(tuner.state.cpu(), expected, rtol=SUM_RTOL, atol=0)
        tuner.state.copy_(expected)

    def run(pairs, steps=FEW, gradient=random_gradient, rtol=0.0):
        nonlocal delta_norm
        (one, one_params), (two, two_params) = pairs
        for t in range(steps):
            deltas = [state["delta"].double() for state in one.state.values()]
            delta_norm = float(sum(delta.square().sum() for delta in deltas)) ** 0.5
            advance(pairs, t, gradient)
            actual, expected = written(two, two_params), written(one, one_params)
            if rtol == 0:
                assert_same(actual, expected)
            else:
                torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, equal_nan=True)
        assert sum(float(one.state[p]["delta"].abs().sum()) for p in one_params) > 0

    monkeypatch.setattr(reference, "tune", record)
    monkeypatch.setattr(kernels, "tune", compare)
    return run


def assert_sums_agree(sums, expected, delta_norm):
    """To an error relative to Σ|gΔ| ≤ ‖g‖‖Δ‖, since the products cancel."""
    gg, xx = expected[:, 2], expected[:, 3]
    sizes = torch.stack([gg.sqrt() * delta_norm, xx.sqrt() * delta_norm, gg, xx], dim=1)
    finite = expected.isfinite()
    assert (sums.isfinite() == finite).all()
    allowed = SUM_RTOL * sizes
    assert ((sums - expected).abs() <= allowed)[finite].all(), f"{sums} for {expected}"


def of_sizes(dtype, sizes=SIZES):
    def make():
        rng = torch.Generator().manual_seed(0)
        return [torch.randn(n, generator=rng, dtype=torch.float64).to(dtype) for n in sizes]

    return make


def twins(base, make, groups=lambda params: params, **options):
    """The same optimizer twice: the reference on the CPU, then Triton where it runs."""
    pairs = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        params = [torch.nn.Parameter(x.to(device)) for x in make()]
        pairs.append((FUSED[base](groups(params), backend=backend, **QUICK, **options), params))
    return pairs


def random_gradient(p, t, i):
    """Not a function of x, so that a difference in x would not hide behind one in g."""
    rng = torch.Generator().manual_seed(1000 * t + i)
    return (noise(p, rng) + 0.5).to(p.dtype)


def put(p, g):
    """Set a gradient on p's device, with its storage offset kept."""
    if g is not None and g.device != p.device:
        base = g._base if g._base is not None else g
        g = base.to(p.device).as_strided(g.shape, g.stride(), g.storage_offset())
    p.grad = g


def written(opt, params):
    """All that kernels write of the weights, on the CPU; the tuner's is compared elsewhere."""
    return [
        {
            **{name: value.cpu() for name, value in opt.state.get(p, {}).items()},
            "x": p.detach().cpu(),
        }
        for p in params
    ]


def advance(pairs, t, gradient=random_gradient):
    for opt, params in pairs:
        for i, p in enumerate(params):
            put(p, gradient(p, t, i))
        opt.step()


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.parametrize(
    "selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)]
)  # fmt: skip
def test_in_the_interpreter(selection):
    command = [sys.executable, "-m", "pytest", "-q", "-m", selection, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


class TestAgainstReference:
    pytestmark = on_kernels

    @pytest.mark.parametrize("case", CASES)
    def test_every_base_gives_the_bits_of_the_reference(self, lockstep, case):
        base, options = CASES[case]
        lockstep(twins(base, of_sizes(torch.float32), **options))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", FULL)
    def test_16_bit_weights(self, lockstep, case, dtype):
        base, options = CASES[case]
        lockstep(twins(base, of_sizes(dtype, FEWER), **options))

    @pytest.mark.parametrize("case", FULL)
    def test_float64_weights(self, lockstep, case):
        base, options = CASES[case]
        pairs = twins(base, of_sizes(torch.float64, FEWER), **options)
        lockstep(pairs, rtol=POWER_RTOL if base.startswith("adam") else 0.0)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES)
    def test_every_base_and_dtype_over_many_steps(self, lockstep, case, dtype):
        base, options = CASES[case]
        powers = dtype is torch.float64 and base.startswith("adam")
        pairs = twins(base, of_sizes(dtype), **options)
        lockstep(pairs, 20, rtol=POWER_RTOL if powers else 0.0)

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    @pytest.mark.parametrize("case", ["adamw", "lion decay"])
    def test_narrow_state(self, lockstep, case, dtype):
        base, options = CASES[case]
        lockstep(twins(base, of_sizes(dtype, FEWER), narrow_state=True, **options))

    @pytest.mark.slow
    def test_many_weights_beside_a_large_one(self, lockstep):
        sizes = [1 + i % 17 for i in range(40)] + [bucket.CHUNK, 2 * bucket.CHUNK + 1]
        lockstep(twins("adamw", of_sizes(torch.float32, sizes)), 3)

    @pytest.mark.parametrize("offset", [1, 4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_misaligned_weights_and_gradients(self, lockstep, dtype, offset):
        def cut(room):
            return room[offset : len(room) - offset]

        def gradient(p, t, i):
            room = torch.full((p.numel() + 2 * offset,), GUARD, dtype=dtype)
            cut(room).copy_(random_gradient(p, t, i))
            return cut(room)

        rooms = []
        pairs = twins("adamw", of_sizes(dtype, FEWER), weight_decay=0.1)
        for _, params in pairs:
            for p in params:
                room = torch.full((p.numel() + 2 * offset,), GUARD, dtype=dtype, device=p.device)
                cut(room).copy_(p.detach())
                rooms.append(room)
                p.data = cut(room)
        lockstep(pairs, gradient=gradient)
        for room in rooms:
            assert (room[:offset] == GUARD).all() and (room[-offset:] == GUARD).all()

    def test_layouts(self, lockstep):
        def make():
            x = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
            channels_last = x.contiguous(memory_format=torch.channels_last)
            transposed = x.clone().transpose(0, 1)
            return [transposed, channels_last, x.permute(2, 0, 3, 1), x[0, 0, 0, 0].clone()]

        lockstep(twins("adamw", make, weight_decay=0.1))

    @pytest.mark.parametrize("scale", ["global", "group", "parameter"])
    def test_scales(self, lockstep, scale):
        def groups(params):
            # The second group's weights have no elements: nobody folds its sums but one program.
            return [
                {"params": params[:3], "lr": 1.0, "weight_decay": 0.1},
                {"params": params[3:4], "lr": 2.0},
                {"params": params[4:], "lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-6},
            ]

        make = of_sizes(torch.float32, (5, 1025, 4100, 0, 3, 0, bucket.CHUNK + 1))
        pairs = twins("adamw", make, groups, scale=scale)
        lockstep(pairs)
        tables = pairs[1][0]._plan.buckets[0].handle
        assert not tables.tickets.any()

    @pytest.mark.parametrize("variant", ["optax", "paper", "pytorch"])
    @pytest.mark.parametrize("betas", [(0.5,), tuple(1 - 0.5**i for i in range(1, 10))], ids=len)
    def test_tuner_variants_and_betas(self, lockstep, variant, betas):
        options = {"variant": variant, "tuner_betas": betas, "s_decay": 0.1, "tuner_eps": 1e-4}
        make = of_sizes(torch.float32, (1025,) * 3)
        lockstep(twins("sgd", make, lr=0.05, scale="parameter", **options))

    @pytest.mark.parametrize("case", FULL)
    def test_gradients_that_come_and_go(self, lockstep, case):
        def gradient(p, t, i):
            return None if (t + i) % 3 == 0 else random_gradient(p, t, i)

        base, options = CASES[case]
        lockstep(twins(base, of_sizes(torch.float32, FEWER), **options), gradient=gradient)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", FULL)
    def test_elements_that_are_not_finite(self, lockstep, case, dtype):
        bad = {1: torch.nan, 3: torch.inf, 4: -torch.inf}

        def gradient(p, t, i):
            g = random_gradient(p, t, i)
            if t in bad:
                g[:: 1 + i] = bad[t]
            return g

        base, options = CASES[case]
        pairs = twins(base, of_sizes(dtype, FEWER), **options)
        lockstep(pairs, gradient=gradient)
        for opt, params in pairs:
            assert opt.nonfinite_steps == len(bad)
            assert all(p.isfinite().all() for p in params)

    @pytest.mark.parametrize("size", [1e20, 1e-25])
    def test_squares_neither_overflow_nor_vanish(self, lockstep, size):
        def gradient(p, t, i):
            return size * random_gradient(p, t, i)

        lockstep(twins("adam", of_sizes(torch.float32, FEWER)), gradient=gradient)

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    def test_every_16_bit_weight_and_gradient_is_read_and_rounded_alike(self, lockstep, dtype):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = torch.where(every.isfinite(), every, torch.zeros((), dtype=dtype))

        def gradient(p, t, i):
            return (every if i == 0 else every.flip(0)).clone()

        # Opposite orders: Δ of every exponent meets weights of every exponent.
        pairs = twins("sgd", lambda: [finite.clone(), finite.clone()], lr=1.0)
        lockstep(pairs, 2, gradient)


class TestVerbs:
    pytestmark = on_kernels

    @pytest.fixture
    def run(self, kernels):
        """Gives an optimizer after one step, its weights, and its only bucket with gradients."""

        def start(dtype=torch.float32, base="adamw", **options):
            (_, (opt, params)) = twins(base, of_sizes(dtype, FEWER), **options)
            for t in range(2):
                advance([(opt, params)], t)
            (found,) = opt._plan.buckets
            assert found.gather()
            found.load([list(row) for row in found.hyper_rows], {}, None, None)
            return opt, params, found

        return start

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_measure_has_the_bits_of_apply(self, kernels, run, dtype):
        opt, _, found = run(dtype)
        kernels.prepare(found)
        kernels.apply(found, opt._tuner)
        after_apply = found.sums.clone()
        found.sums[:, [1, 3]] = torch.nan
        kernels.measure(found)
        assert_same(found.sums, after_apply)

    def test_found_inf_stops_every_verb(self, kernels, run):
        opt, params, found = run()
        found.found_inf = torch.ones(1, device=DEVICE)
        opt._tuner.found_inf = found.found_inf
        before = written(opt, params), found.sums.clone(), opt._tuner.state.clone()
        kernels.prepare(found)
        kernels.accumulate(found)
        kernels.tune(found.sums, opt._tuner)
        kernels.apply(found, opt._tuner)
        assert_same((written(opt, params), found.sums, opt._tuner.state), before)
        found.found_inf.zero_()
        kernels.accumulate(found)
        kernels.tune(found.sums, opt._tuner)
        kernels.apply(found, opt._tuner)
        assert (found.sums != before[1]).any() and (opt._tuner.state != before[2]).any()

    def test_grad_scale_divides_the_gradients(self, kernels, run):
        results = []
        for scale in (None, 1024.0):
            opt, params, found = run()
            if scale:
                for g in found.grads:
                    g.mul_(scale)  # a power of two, so that the division is exact
                found.grad_scale = torch.full((), scale, device=DEVICE)
            kernels.prepare(found)
            kernels.accumulate(found)
            results.append((written(opt, params), found.sums.cpu()))
        assert_same(results[1], results[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_elements_beyond_the_range_of_int32(self, kernels, run, dtype):
        """Addresses are lowered and offsets raised by as much: the elements are where they were."""
        results = []
        for far in (0, FAR):
            opt, params, found = run(dtype)
            kernels.prepare(found)
            tables = found.handle
            tables.chunks[:, 1] += far
            for name, size in (("gradient", dtype), ("weight", dtype), ("x_ref", dtype)):
                tables.tensors[:, bucket.TENSOR.index(name)] -= far * size.itemsize
            for name in ("delta", "state0", "state1"):
                tables.tensors[:, bucket.TENSOR.index(name)] -= far * 4
            kernels.accumulate(found)
            kernels.apply(found, opt._tuner)
            results.append((written(opt, params), found.sums.cpu()))
        assert_same(results[1], results[0])

    def test_a_run_repeats_to_the_bit(self, kernels):
        found = []
        for _ in range(2):
            (_, (opt, params)) = twins("adamw", of_sizes(torch.float32), scale="parameter")
            for t in range(2):
                advance([(opt, params)], t)
            found.append([*written(opt, params), opt.scale.cpu()])
        assert_same(found[1], found[0])


class TestOnGpu:
    pytestmark = on_gpu

    def model(self, **options):
        make = of_sizes(torch.float32, (5, 1025, 70000))
        params = [torch.nn.Parameter(x.cuda()) for x in make()]
        opt = FUSED["adamw"](params, lr=1.0, weight_decay=0.1, backend="triton", **QUICK, **options)
        for p in params:
            p.grad = torch.zeros_like(p)
        return opt, params

    def refill(self, params, t):
        for i, p in enumerate(params):
            p.grad.copy_(random_gradient(p, t, i))

    @pytest.mark.filterwarnings("ignore:.*Synchronization debug mode:UserWarning")
    def test_a_step_never_waits_for_the_device(self):
        opt, params = self.model()
        gradients = [
            [random_gradient(p, t, i).cuda() for i, p in enumerate(params)] for t in range(9)
        ]
        for t, step in enumerate(gradients):
            for p, g in zip(params, step, strict=True):
                p.grad = g  # another address at each step
            torch.cuda.set_sync_debug_mode("error" if t >= 2 else "default")
            try:
                opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_a_captured_step_replays_to_the_bits_of_an_eager_one(self):
        (graphed, params), (eager, eager_params) = self.model(), self.model()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for t in range(3):
                self.refill(params, t)
                graphed.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed.step()
        for t in range(3, 8):
            self.refill(params, t)
            graph.replay()
            if t == 5:
                # A step outside the graph with gradients elsewhere, then replays go on.
                kept = [p.grad for p in params]
                for i, p in enumerate(params):
                    p.grad = random_gradient(p, 100, i).cuda()
                graphed.step()
                for p, g in zip(params, kept, strict=True):
                    p.grad = g
        for t in (0, 1, 2, 3, 4, 5, 100, 6, 7):
            self.refill(eager_params, t)
            eager.step()
        assert_same(written(graphed, params), written(eager, eager_params))
        assert torch.equal(graphed.scale, eager.scale)

    @pytest.mark.filterwarnings("ignore:.*The CUDA Graph is empty:UserWarning")
    def test_a_capture_with_changed_hyperparameters_is_refused(self):
        opt, params = self.model()
        for t in range(3):
            self.refill(params, t)
            opt.step()
        opt.param_groups[0]["lr"] = 0.5
        with pytest.raises(RuntimeError, match="refresh_hyperparameters"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                opt.step()

    def test_a_tensor_lr_stays_on_the_device(self):
        (opt, params), (other, other_params) = self.model(), self.model()
        opt.param_groups[0]["lr"] = torch.ones((), device="cuda")
        for t in range(4):
            opt.param_groups[0]["lr"].fill_(1.0 + t)
            other.param_groups[0]["lr"] = 1.0 + t
            for o, ps in ((opt, params), (other, other_params)):
                self.refill(ps, t)
                o.step()
        assert_same(written(opt, params), written(other, other_params))

    @pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
    def test_a_step_is_three_launches(self):
        opt, params = self.model()
        for t in range(3):
            self.refill(params, t)
            opt.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            opt.step()
            torch.cuda.synchronize()
        kernels = [
            event.name
            for event in profile.events()
            if event.device_type.name == "CUDA" and not event.name.startswith(("Mem", "mem"))
        ]
        assert sorted(kernels) == ["accumulate_kernel", "apply_kernel", "tune_kernel"]

    def test_streams(self):
        (opt, params), (other, other_params) = self.model(), self.model()
        stream = torch.cuda.Stream()
        for t in range(4):
            self.refill(params, t)
            opt.step()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.refill(other_params, t)
                other.step()
            torch.cuda.current_stream().wait_stream(stream)
        assert_same(written(other, other_params), written(opt, params))
