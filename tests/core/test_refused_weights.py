"""One clear error for each weight and gradient that cannot be used, and nothing changed by it."""

import copy
import re

import pytest
import torch
from support import cases
from support.cases import FEW, assert_same, make_weights, values

from mechanic_fused import MechanicSGD


def check_refused(one, grads, text, error=ValueError):
    """Try a step, which must raise and change nothing."""
    before = one.snapshot()
    with pytest.raises(error, match=text):
        one.step(grads)
    assert_same(one.snapshot(), before)


# Gradients


@pytest.mark.parametrize("place", [0, -1])
def test_a_sparse_gradient_is_refused(train, place):
    one = train().run(FEW)
    grads = cases.gradients(one.params, FEW)
    grads[place] = torch.ones_like(grads[place]).to_sparse()
    shape = re.escape(str(tuple(one.params[place].shape)))
    check_refused(one, grads, f"gradients must be dense, got .*sparse.*{shape}")
    assert_same(one.run(FEW).x, train().run(2 * FEW).x)


def test_a_sparse_embedding_is_refused(train):
    model = torch.nn.Embedding(5, 3, sparse=True)
    one = train("sgd", model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    weight = one.x
    with pytest.raises(ValueError, match=r"gradients must be dense, got .*sparse"):
        one.opt.step()
    assert_same(one.x, weight)


def test_a_gradient_of_another_shape_is_refused():
    one = cases.Training(MechanicSGD, "sgd", shapes=[(4,)]).run(1)
    (p,) = one.params
    p.grad = torch.ones(4)
    p.data = torch.ones(64)
    with pytest.raises(ValueError, match=r"\(64,\).*\(4,\)"):
        one.opt.step()


# Weights that cannot be trained


def two_tensor():
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(4), torch.ones(4))


BAD_WEIGHTS = {
    "complex": (
        lambda: torch.ones(3, dtype=torch.complex64),
        r"weights must be real, got .*complex64.*\(3,\)",
    ),
    "expanded": (lambda: torch.ones(1).expand(3), r"share memory .*\(3,\) with strides \(0,\)"),
    "overlapping itself": (
        lambda: torch.ones(10).as_strided((3, 2), (1, 1)),
        r"share memory .*\(3, 2\) with strides \(1, 1\)",
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), "weights must be dense, got .*sparse"),
    "on another device": (lambda: torch.ones(3, device="meta"), "meta"),
    "without storage": (two_tensor, "storage of their own.*TwoTensor"),
}


@pytest.mark.parametrize("when", ["from the start", "added"])
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_a_weight_that_cannot_be_trained_is_refused(train, kind, when):
    make, text = BAD_WEIGHTS[kind]
    good, bad = make_weights(), torch.nn.Parameter(make())
    steps = 0 if when == "from the start" else FEW
    one = train(params=[*good, bad] if steps == 0 else good).run(steps, good)
    if steps:
        one.opt.add_param_group({"params": [bad]})
    cases.set_gradients(good, FEW)
    bad.grad = torch.zeros_like(bad)
    before = copy.deepcopy([values(good), [dict(one.opt.state.get(p, {})) for p in good]])
    with pytest.raises(ValueError, match=text):
        one.opt.step()
    assert_same([values(good), [dict(one.opt.state.get(p, {})) for p in good]], before)
    # Without the culprit the run goes on.
    one.opt.param_groups[-1]["params"].pop()
    one.run(FEW, good)
    assert_same(values(good), train().run(steps + FEW).x)


OVERLAPPING = {
    "the same memory": lambda b: (b, b.view(3, 4)),
    "a part": lambda b: (b, b[3:6]),
    "an end": lambda b: (b[:7], b[6:]),
    "every second element": lambda b: (b, b[::2]),
    "other strides": lambda b: (b[::2], b[::3]),
    "a column": lambda b: (b.view(3, 4), b.view(3, 4)[:, 1]),
}
DISJOINT = {
    "neighbours": lambda b: (b[:6], b[6:]),
    "interleaved": lambda b: (b[::2], b[1::2]),
    "columns": lambda b: (b.view(3, 4)[:, :2], b.view(3, 4)[:, 2:]),
    "one of them empty": lambda b: (b, b[3:3]),
    "inside the gaps": lambda b: (b.view(3, 4)[:, 0], b.view(3, 4)[0, 1:]),
}


def parts_of_a_buffer(cut):
    return [torch.nn.Parameter(x) for x in cut(torch.arange(12.0))]


@pytest.mark.parametrize("how", OVERLAPPING)
def test_weights_that_share_memory_are_refused(train, how):
    one = train(params=parts_of_a_buffer(OVERLAPPING[how]))
    before, shapes = one.x, [str(tuple(p.shape)) for p in one.params]
    with pytest.raises(ValueError, match="must not share memory") as error:
        one.run(1)
    assert all(shape in str(error.value) for shape in shapes)
    assert_same(one.x, before)


@pytest.mark.parametrize("how", DISJOINT)
def test_weights_in_one_storage_may_share_none_of_it(train, how):
    params = parts_of_a_buffer(DISJOINT[how])
    apart = train("sgd", cases.copies(params)).run(FEW)
    # The sums may be taken in another order.
    torch.testing.assert_close(train("sgd", params).run(FEW).x, apart.x)


def test_weights_that_come_to_share_memory_in_mid_run_are_refused(train):
    one = train(shapes=[(6,), (6,)]).run(FEW)
    one.params[1].data = one.params[0].data
    check_refused(one, cases.gradients(one.params, FEW), "must not share memory")


@pytest.mark.parametrize("cut", [lambda x: x[:2], lambda x: x[:2].clone()], ids=["view", "copy"])
def test_a_weight_that_is_cut_in_mid_run_is_refused(train, cut):
    """Its state has no place for the new shape; kernels must not read past the new gradient."""
    one = train().run(FEW)
    for p in one.params:
        p.grad = None
        p.data = cut(p.data)
    grads = cases.gradients(one.params, FEW)
    check_refused(one, grads, r"shape.*\(2,.*\(3,|shape.*\(3,.*\(2,")


def test_one_weight_twice_is_the_error_of_torch(train):
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        train(groups=lambda params: [{"params": params}, {"params": params}])
