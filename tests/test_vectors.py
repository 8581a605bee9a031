"""The verbs over vectors of all weights, in every backend: beside an oracle, and to the bit.

Without a GPU Triton's run in its interpreter, in a process of its own (see triton_lockstep.py).
"""

import os
import subprocess
import sys

import pytest
import torch
from cases import WIDE, assert_same
from triton_lockstep import DTYPES, INTERPRETED
from vector_cases import (
    LAYOUTS,
    OPTIONS,
    VERBS,
    Place,
    assert_bits_of_reference,
    assert_right,
    do,
    of_dtypes,
    of_dtypes_and_layouts,
    on_backends,
    place,
    vector,
)

from mechanic_fused.backends.layout import CPU_CHUNK as CHUNK
from mechanic_fused.vectors import Space

__all__ = ["place"]  # pytest finds the fixture here


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.parametrize(
    "selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)]
)  # fmt: skip
def test_in_the_interpreter(selection):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", selection, "-k", "triton", __file__]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# Of the interpreter's numpy, which says so where it makes a NaN.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestVerbs:
    @on_backends("reference", "cpp")
    @of_dtypes_and_layouts
    @pytest.mark.parametrize("name", VERBS)
    def test_the_oracle_and_the_reference_agree(self, place, name, dtype, layout):
        done = do(name, place, layout, (dtype,))
        assert_right(name, done)
        assert_bits_of_reference(name, place, done, layout, (dtype,))

    @on_backends("reference", "cpp")
    @pytest.mark.parametrize("name", VERBS)
    def test_weights_of_several_dtypes(self, place, name):
        done = do(name, place, "flat", DTYPES)
        assert_right(name, done)
        assert_bits_of_reference(name, place, done, "flat", DTYPES)

    @on_backends("reference", "cpp")
    @pytest.mark.parametrize("name", ["difference_dots", "dots", "abs_max", "adarem"])
    def test_results_repeat_to_the_bit_on_any_number_of_threads(self, place, name):
        first = do(name, place)
        # torch's own sums may differ by threads, Triton runs on none of them.
        for threads in (1, 2) if place.backend == "cpp" else (1,):
            torch.set_num_threads(threads)
            assert_same(do(name, place), first)

    @on_backends("reference", "cpp")
    @of_dtypes
    def test_no_displacement_is_the_weight_itself(self, place, dtype):
        weights = [torch.nn.Parameter(x) for x in vector(place, "flat", (dtype,), 0)]
        space = Space(weights, place.backend)
        w, d = space.copy(), vector(place, "flat", (WIDE[dtype],), 1)
        space.step_along(space.weights, w, d, 1.0)
        assert not all(torch.equal(x, y) for x, y in zip(space.weights, w, strict=True))
        space.step_along(space.weights, w, d, torch.zeros((), device=place.device))
        assert_same(space.weights, w)

    @on_backends("reference", "cpp")
    @of_dtypes
    def test_put_does_not_read_what_was_there(self, place, dtype):
        def spoil(vectors):
            for s in vectors[0]:
                s.fill_(torch.nan)

        done = do("put", place, "offset", (dtype,), spoil)
        assert_same(done.after, do("put", place, "offset", (dtype,)).after)

    @on_backends("reference", "cpp")
    @of_dtypes
    def test_gradients_that_are_not_finite_count_as_0_in_adarem(self, place, dtype):
        def spoil(vectors):
            for g in vectors[1]:
                for start, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
                    g[start::7] = bad

        done = do("adarem", place, "offset", (dtype,), spoil)
        assert all(x.isfinite().all() for x in (*done.after[0], *done.after[2]))
        assert_right("adarem", done)
        assert_bits_of_reference("adarem", place, done, "offset", (dtype,), spoil)

    @on_backends("reference", "cpp")
    @of_dtypes
    def test_the_largest_of_an_infinity_and_of_a_nan(self, place, dtype):
        def spoil(vectors):
            for i, bad in ((2, -torch.inf), (3, torch.nan), (4, torch.nan), (5, -torch.nan)):
                vectors[0][i][1] = bad
            vectors[0][4][2] = torch.inf

        found = do("abs_max", place, "flat", (dtype,), spoil).returned
        assert found[0] == 0 and found[1].isfinite() and found[1] > 0
        assert found[2] == torch.inf
        assert found[3:].isnan().all()

    @on_backends("reference", "cpp")
    def test_the_largest_of_a_wide_vector(self, place):
        weights = [torch.nn.Parameter(x) for x in vector(place, "flat", (torch.bfloat16,), 0)]
        wide = vector(place, "flat", (torch.float32,), 1)
        found = Space(weights, place.backend).abs_max(wide)
        assert found.tolist() == [float(x.abs().max()) if x.numel() else 0.0 for x in wide]

    @on_backends("reference", "cpp")
    def test_weights_without_elements(self, place):
        space = Space([torch.nn.Parameter(torch.empty(0, device=place.device))], place.backend)
        w, s = space.copy(), space.zeros()
        space.step_along(space.weights, w, s, 1.0)
        space.axpby(s, w)
        assert space.difference_dots(s, w, w).tolist() == [0, 0]
        assert space.dots(w, w, s).tolist() == [0, 0, 0, 0]
        assert space.abs_max(w).tolist() == [0]
        peaks = space.abs_max(s)
        assert space.adarem(w, s, peaks, OPTIONS).tolist() == [0]

    @on_backends("reference", "cpp")
    @pytest.mark.parametrize("name", ["step_along", "adarem"])
    def test_a_backward_through_the_old_weights_raises(self, place, name):
        p = torch.nn.Parameter(torch.ones(3, device=place.device))
        space = Space([p], place.backend)
        loss = (p * p).sum()
        zeros = space.zeros()
        if name == "step_along":
            space.step_along(space.weights, space.copy(), zeros, 1.0)
        else:
            space.adarem(zeros, space.zeros(), space.abs_max(zeros), OPTIONS)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @on_backends("reference", "cpp")
    def test_a_copy_that_is_displaced_is_no_write_to_the_weights(self, place):
        p = torch.nn.Parameter(torch.ones(3, device=place.device))
        space = Space([p], place.backend)
        loss = (p * p).sum()
        space.step_along(space.copy(), space.weights, space.zeros(), 1.0)
        loss.backward()
        assert p.grad.tolist() == [2, 2, 2]


class TestSpace:
    def test_no_weights(self):
        with pytest.raises(ValueError, match="expected weights to work on, got none"):
            Space([])

    def test_a_backend_that_does_not_serve_the_device(self):
        with pytest.raises(ValueError, match="backend"):
            Space([torch.nn.Parameter(torch.ones(1))], backend="cuda")

    def test_only_strided_weights_take_the_reference(self, cpp):
        place = Place(cpp, "cpu", CHUNK)
        for layout in LAYOUTS:
            # The first two, of no and of one element, are dense whatever their strides.
            found = Space(vector(place, layout, (torch.float32,), 0)[2:5], cpp)
            names = [part.key.backend for part in found.parts]
            assert names == ["reference" if layout == "strided" else "cpp"]

    def test_zeros_and_copies_lie_as_the_weights_do(self, backend):
        weights = vector(Place(backend, "cpu", 3), "transposed", DTYPES, 0)
        space = Space(weights, backend)
        for x, zero, twin in zip(weights, space.zeros(), space.copy(), strict=True):
            assert not zero.any() and zero.dtype is WIDE[x.dtype]
            assert zero.stride() == twin.stride() == x.stride()
            assert torch.equal(twin, x) and (twin.data_ptr() != x.data_ptr() or not x.numel())

    def test_a_weight_that_has_moved_does_not_fit(self, backend):
        p = torch.nn.Parameter(torch.ones(3))
        space = Space([p], backend)
        assert space.fits()
        p.data = p.data.clone()
        assert not space.fits()


class TestGradients:
    def test_none_where_no_weight_has_one(self):
        assert Space([torch.nn.Parameter(torch.ones(3))]).gradients() is None

    def test_zeros_for_absent_ones(self):
        weights = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
        weights[1].grad = torch.ones(3)
        absent, own = Space(weights).gradients()
        assert absent.tolist() == [0, 0]
        assert own.data_ptr() == weights[1].grad.data_ptr()

    def test_they_take_the_layout_and_the_dtype_of_the_weights(self):
        p = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.bfloat16).t())
        p.grad_dtype = None
        p.grad = torch.arange(15.0).reshape(3, 5) / 7
        (g,) = Space([p]).gradients()
        assert g.dtype is torch.bfloat16 and g.stride() == p.stride()
        assert torch.equal(g, p.grad.bfloat16())

    def test_sparse_ones_are_refused(self):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3).to_sparse()
        with pytest.raises(ValueError, match="dense and real, got torch.sparse_coo"):
            Space([p]).gradients()
