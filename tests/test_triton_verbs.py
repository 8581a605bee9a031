"""Triton's verbs one by one, on a GPU or in its interpreter (see test_triton.py)."""

import pytest
import torch
from cases import assert_same
from triton_lockstep import (
    DEVICE,
    DTYPES,
    FEWER,
    advance,
    of_sizes,
    on_kernels,
    triton_module,
    twins,
    written,
)

pytest.importorskip("triton")


@pytest.fixture
def kernels(monkeypatch):
    """The Triton backend's module."""
    return triton_module(monkeypatch)


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
            assert found.collect_gradients()
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

    def test_a_run_repeats_to_the_bit(self, kernels):
        found = []
        for _ in range(2):
            (_, (opt, params)) = twins("adamw", of_sizes(torch.float32), scale="parameter")
            for t in range(2):
                advance([(opt, params)], t)
            found.append([*written(opt, params), opt.scale.cpu()])
        assert_same(found[1], found[0])
