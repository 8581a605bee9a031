"""Triton against the reference on the CPU: the same bits of x, Δ and state, the same sums."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_lockstep import (
    CASES,
    DTYPES,
    FEWER,
    FULL,
    INTERPRETED,
    NARROW,
    in_lockstep,
    of_sizes,
    on_kernels,
    random_gradient,
    triton_module,
    twins,
)

from mechanic_fused.backends import layout

pytest.importorskip("triton")

# A power by repeated squaring errs by 2⁻⁵³/(1 − β), relative to 1 − βᵗ, beside the libraries' pow;
# a coefficient in float32 hides it, one in float64 shows it in each of up to 20 updates of size 1.
POWER_RTOL = 20 * 2.0**-53 / (1 - 0.999)
# Neighbours of a misaligned weight: a kernel that writes too far would write here.
GUARD = 7.0

# The files with tests of Triton's kernels that need no GPU.
INTERPRETABLE = ("triton", "triton_verbs", "host_reads", "far_elements")


@pytest.fixture
def lockstep(monkeypatch):
    """Gives a function that steps twins and compares them."""
    return in_lockstep(triton_module(monkeypatch), monkeypatch)


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.parametrize(
    "selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)]
)  # fmt: skip
def test_in_the_interpreter(selection):
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in INTERPRETABLE]
    command = [sys.executable, "-m", "pytest", "-q", "-m", selection, *files]
    # Of a plugin that happens to be installed nothing is needed here; it may warn of another one,
    # as pytest-benchmark does of xdist, and warnings are errors.
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
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

    @pytest.mark.parametrize(
        ("case", "dtype"),
        [
            ("sgd", torch.float32),
            ("adamw", torch.float32),
            ("adamw", torch.bfloat16),
            ("lion decay", torch.float16),
        ],
        ids=str,
    )
    def test_narrow_delta(self, lockstep, case, dtype):
        base, options = CASES[case]
        lockstep(twins(base, of_sizes(dtype, FEWER), narrow_delta=True, **options))

    @pytest.mark.slow
    def test_many_weights_beside_a_large_one(self, lockstep):
        sizes = [1 + i % 17 for i in range(40)] + [layout.CPU_CHUNK, 2 * layout.CPU_CHUNK + 1]
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

        make = of_sizes(torch.float32, (5, 1025, 4100, 0, 3, 0, layout.CPU_CHUNK + 1))
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
