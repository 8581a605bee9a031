"""One clear error for each weight and gradient that cannot be used, and nothing changed."""

import pytest
import torch
from cases import (
    FEW,
    QUICK,
    assert_same,
    build,
    make_weights,
    run,
    set_gradients,
    snapshot,
    values,
)

from mechanic_fused import mechanize


def expect_error_and_no_change(opt, params, text):
    before = snapshot(opt, params)
    with pytest.raises(ValueError, match=text):
        opt.step()
    after = snapshot(opt, params)
    assert_same(after["weights"], before["weights"])
    assert_same(after["optimizer"], before["optimizer"])


def sparse_like(p):
    return torch.ones_like(p).to_sparse()


@pytest.mark.parametrize("place", [0, -1])
def test_a_sparse_gradient(road, place):
    params, twins = make_weights(), make_weights()
    opt, twin = (build(road, "adamw", weights, **QUICK) for weights in (params, twins))
    run(opt, params, FEW)
    set_gradients(params, FEW)
    params[place].grad = sparse_like(params[place])
    shape = str(tuple(params[place].shape)).replace("(", r"\(").replace(")", r"\)")
    expect_error_and_no_change(opt, params, f"gradients must be dense, got .*sparse.*{shape}")
    run(opt, params, FEW, first=FEW)
    run(twin, twins, 2 * FEW)
    assert_same(values(params), values(twins))


def test_a_sparse_embedding(road):
    model = torch.nn.Embedding(5, 3, sparse=True)
    opt = build(road, "sgd", model.parameters(), **QUICK)
    model(torch.tensor([1, 2])).sum().backward()
    weight = values(model.parameters())
    with pytest.raises(ValueError, match="gradients must be dense, got .*sparse"):
        opt.step()
    assert_same(values(model.parameters()), weight)


BAD_WEIGHTS = {
    "complex": (
        lambda: torch.ones(3, dtype=torch.complex64),
        r"weights must be real, got .*complex64.*\(3,\)",
    ),
    "expanded": (lambda: torch.ones(1).expand(3), r"share memory .*\(3,\), strides \(0,\)"),
    "overlapping itself": (
        lambda: torch.ones(10).as_strided((3, 2), (1, 1)),
        r"share memory .*\(3, 2\), strides \(1, 1\)",
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), "weights must be dense, got .*sparse"),
    "on another device": (lambda: torch.ones(3, device="meta"), "meta"),
}


@pytest.mark.parametrize("when", ["from the start", "added"])
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_a_weight_that_cannot_be_trained(road, kind, when):
    make, text = BAD_WEIGHTS[kind]
    good, bad = make_weights(), torch.nn.Parameter(make())
    if when == "from the start":
        opt = build(road, "adamw", [*good, bad], **QUICK)
    else:
        opt = build(road, "adamw", good, **QUICK)
        run(opt, good, FEW)
        opt.add_param_group({"params": [bad]})
    set_gradients(good, FEW)
    bad.grad = torch.zeros_like(bad)
    before = values(good), {p: dict(opt.state[p]) for p in opt.state}
    numbers = [x.clone() for state in before[1].values() for x in state.values()]
    with pytest.raises(ValueError, match=text):
        opt.step()
    assert_same(values(good), before[0])
    for p, state in before[1].items():
        assert opt.state[p].keys() == state.keys()
    assert_same([x for state in before[1].values() for x in state.values()], numbers)
    # Without the culprit the run goes on.
    opt.param_groups[-1]["params"].pop()
    twins = make_weights()
    twin = build(road, "adamw", twins, **QUICK)
    taken = 0 if when == "from the start" else FEW
    run(twin, twins, taken)
    run(opt, good, FEW, first=taken)
    run(twin, twins, FEW, first=taken)
    assert_same(values(good), values(twins))


def overlapping_pairs():
    buffer = torch.arange(12.0)
    return {
        "the same memory": (buffer, buffer.view(3, 4)),
        "a part": (buffer, buffer[3:6]),
        "an end": (buffer[:7], buffer[6:]),
        "every second element": (buffer, buffer[::2]),
        "other strides": (buffer[::2], buffer[::3]),
        "a column": (buffer.view(3, 4), buffer.view(3, 4)[:, 1]),
    }


def disjoint_pairs():
    buffer = torch.arange(12.0)
    return {
        "neighbours": (buffer[:6], buffer[6:]),
        "interleaved": (buffer[::2], buffer[1::2]),
        "columns": (buffer.view(3, 4)[:, :2], buffer.view(3, 4)[:, 2:]),
        "one of them empty": (buffer, buffer[3:3]),
        "inside the gaps": (buffer.view(3, 4)[:, 0], buffer.view(3, 4)[0, 1:]),
    }


@pytest.mark.parametrize("how", overlapping_pairs())
def test_weights_that_share_memory(road, how):
    params = [torch.nn.Parameter(x) for x in overlapping_pairs()[how]]
    opt = build(road, "adamw", params, **QUICK)
    set_gradients(params, 0)
    before = values(params)
    shapes = [str(tuple(p.shape)).replace("(", r"\(").replace(")", r"\)") for p in params]
    with pytest.raises(ValueError, match="must not share memory") as error:
        opt.step()
    assert all(shape.replace("\\", "") in str(error.value) for shape in shapes)
    assert_same(values(params), before)


@pytest.mark.parametrize("how", disjoint_pairs())
def test_weights_in_one_storage_that_share_none_of_it(road, how):
    params = [torch.nn.Parameter(x) for x in disjoint_pairs()[how]]
    apart = [torch.nn.Parameter(p.detach().clone()) for p in params]
    run(build(road, "sgd", params, lr=0.05, **QUICK), params, FEW)
    run(build(road, "sgd", apart, lr=0.05, **QUICK), apart, FEW)
    for p, q in zip(params, apart, strict=True):
        # The sums may be taken in another order.
        torch.testing.assert_close(p.detach(), q.detach())


def test_weights_that_come_to_share_memory_in_mid_run(road):
    params = make_weights([(6,), (6,)])
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    params[1].data = params[0].data
    set_gradients(params, FEW)
    expect_error_and_no_change(opt, params, "must not share memory")


@pytest.mark.parametrize("cut", [lambda x: x[:2], lambda x: x[:2].clone()], ids=["view", "copy"])
def test_a_weight_that_has_been_cut_in_mid_run(road, cut):
    """Its state has no place for the new shape; kernels must not read past the new gradient."""
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    for p in params:
        p.grad = None
        p.data = cut(p.data)
    set_gradients(params, FEW)
    expect_error_and_no_change(opt, params, r"shape.*\(2,.*\(3,|shape.*\(3,.*\(2,")


def test_a_base_whose_step_raises_leaves_weights_gradients_and_state():
    class Raising(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise KeyError("the base")

    params = make_weights(dtype=torch.bfloat16)
    opt = mechanize(Raising)(params, lr=0.05, **QUICK)
    run(opt, params, FEW)
    set_gradients(params, FEW)
    before, grads = snapshot(opt), [p.grad for p in params]
    opt.fails = True
    with pytest.raises(KeyError, match="the base"):
        opt.step()
    assert_same(snapshot(opt), before)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    opt.fails = False
    run(opt, params, 1, first=FEW)


def test_one_weight_twice_is_torchs_error(road):
    p = make_weights()[0]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        build(road, "adamw", [{"params": [p]}, {"params": [p]}])
