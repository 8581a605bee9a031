"""What the ops on vectors promise in every backend, see support/vector_ops.py; and Space."""

import pytest
import torch
from support.cases import DTYPES, WIDE, assert_same
from support.vector_ops import (
    LAYOUTS,
    OPS,
    OPTIONS,
    Place,
    assert_right,
    do,
    on_backends,
    parameters,
    vector,
)
from support.vector_ops import place as place  # a fixture

from mechanic_fused.backends.layout import CPU_CHUNK
from mechanic_fused.vectors import Space


@on_backends(name=OPS, dtype=DTYPES, layout=LAYOUTS)
def test_an_op_agrees_with_the_oracle_and_the_reference(place, name, dtype, layout):
    assert_right(name, place, layout, (dtype,))


@on_backends(name=OPS)
def test_weights_of_several_dtypes(place, name):
    assert_right(name, place, "flat", DTYPES)


@on_backends(name=["difference_dots", "dots", "abs_max", "adarem"])
def test_results_repeat_to_the_bit_on_any_number_of_threads(place, name):
    first = do(name, place)
    # torch's own sums may differ with the number of threads, and Triton uses none of them.
    for threads in (1, 2) if place.backend == "cpp" else (1,):
        torch.set_num_threads(threads)
        assert_same(do(name, place), first)


@on_backends(dtype=DTYPES)
def test_a_step_of_0_leaves_the_weights(place, dtype):
    space = Space(parameters(place, "flat", (dtype,)), place.backend)
    w, d = space.copy(), vector(place, "flat", (WIDE[dtype],), 1)
    space.step_along(space.weights, w, d, 1.0)
    assert not all(torch.equal(x, y) for x, y in zip(space.weights, w, strict=True))
    space.step_along(space.weights, w, d, torch.zeros((), device=place.device))
    assert_same(space.weights, w)


@on_backends(dtype=DTYPES)
def test_axpby_without_a_does_not_read_what_was_there(place, dtype):
    def spoil(vectors):
        for s in vectors[0]:
            s.fill_(torch.nan)

    done = do("put", place, "offset", (dtype,), spoil)
    assert_same(done.after, do("put", place, "offset", (dtype,)).after)


@on_backends(dtype=DTYPES)
def test_gradient_elements_that_are_not_finite_count_as_0_in_adarem(place, dtype):
    def spoil(vectors):
        for g in vectors[1]:
            for start, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
                g[start::7] = bad

    done = assert_right("adarem", place, "offset", (dtype,), spoil)
    assert all(x.isfinite().all() for x in (*done.after[0], *done.after[2]))


@on_backends(dtype=DTYPES)
def test_the_largest_of_an_infinity_and_of_a_nan(place, dtype):
    def spoil(vectors):
        for i, bad in ((2, -torch.inf), (3, torch.nan), (4, torch.nan), (5, -torch.nan)):
            vectors[0][i][1] = bad
        vectors[0][4][2] = torch.inf

    found = do("abs_max", place, "flat", (dtype,), spoil).returned
    assert found[0] == 0 and found[1].isfinite() and found[1] > 0
    assert found[2] == torch.inf
    assert found[3:].isnan().all()


@on_backends()
def test_the_largest_of_a_vector_that_is_wider_than_the_weights(place):
    wide = vector(place, seed=1)
    found = Space(parameters(place, "flat", (torch.bfloat16,)), place.backend).abs_max(wide)
    assert found.tolist() == [float(x.abs().max()) if x.numel() else 0.0 for x in wide]


@on_backends()
def test_weights_without_elements(place):
    space = Space([torch.nn.Parameter(torch.empty(0, device=place.device))], place.backend)
    w, s = space.copy(), space.zeros()
    space.step_along(space.weights, w, s, 1.0)
    space.axpby(s, w)
    assert space.difference_dots(s, w, w).tolist() == [0, 0]
    assert space.dots(w, w, s).tolist() == [0, 0, 0, 0]
    assert space.abs_max(w).tolist() == [0]
    assert space.adarem(w, s, space.abs_max(s), OPTIONS).tolist() == [0]


WRITES = {
    "step_along": lambda s, zeros: s.step_along(s.weights, s.copy(), zeros, 1.0),
    "adarem": lambda s, zeros: s.adarem(zeros, s.zeros(), s.abs_max(zeros), OPTIONS),
    "restore": lambda s, zeros: s.restore(s.copy()),
    "step_along of a copy": lambda s, zeros: s.step_along(s.copy(), s.weights, zeros, 1.0),
}


@on_backends(name=WRITES)
def test_autograd_sees_writes_to_the_weights_and_no_others(place, name):
    p = torch.nn.Parameter(torch.ones(3, device=place.device))
    loss = (p * p).sum()
    space = Space([p], place.backend)
    WRITES[name](space, space.zeros())
    if name == "step_along of a copy":
        loss.backward()
        assert p.grad.tolist() == [2, 2, 2]
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestSpace:
    def test_without_weights_it_is_refused(self):
        with pytest.raises(ValueError, match="expected weights to work on, got none"):
            Space([])

    def test_a_backend_that_does_not_serve_the_device_is_refused(self):
        with pytest.raises(ValueError, match="backend"):
            Space([torch.nn.Parameter(torch.ones(1))], backend="cuda")

    def test_only_strided_weights_take_the_reference(self, cpp):
        for layout in LAYOUTS:
            # The first two, of no and of one element, are dense whatever their strides.
            weights = vector(Place(cpp, "cpu", CPU_CHUNK), layout)[2:5]
            names = [bucket.key.backend for bucket in Space(weights, cpp).buckets]
            assert names == ["reference" if layout == "strided" else "cpp"]

    def test_zeros_and_copies_have_the_layout_of_the_weights(self, backend):
        weights = vector(Place(backend, "cpu", 3), "transposed", DTYPES)
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
    def test_none_if_no_weight_has_one(self):
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
        with pytest.raises(ValueError, match=r"dense and real, got torch\.sparse_coo"):
            Space([p]).gradients()
