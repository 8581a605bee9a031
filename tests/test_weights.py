"""Weights of every layout, size and dtype."""

import pytest
import torch
from cases import (
    FEW,
    LEARNED,
    LONG,
    OPTIONS,
    QUICK,
    SCALES,
    SHAPES,
    STEPS,
    SUM_RTOL,
    SmallNet,
    assert_same,
    assert_within,
    build,
    differs,
    gradients,
    loss_of,
    make_weights,
    run,
    set_gradients,
    train_net,
    ulp,
)

LAYOUTS = {
    "strided": lambda x: torch.cat([x.flatten(), x.flatten()])[::2].as_strided(
        x.flatten().shape, (2,)
    ),
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: torch.cat([x, x], dim=3)[..., ::2],
    "inside a larger one": lambda x: torch.stack([x, x])[1],
}


@pytest.mark.parametrize("gradient_layout", ["weight's", "contiguous", "transposed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_of_any_layout_learns_as_a_contiguous_one(road, layout, gradient_layout):
    start = make_weights([(4, 6, 3, 5)], torch.float64)[0].detach()
    found = []
    for lay in (LAYOUTS[layout], lambda x: LAYOUTS[layout](x).contiguous()):
        p = torch.nn.Parameter(lay(start.clone()))
        strides = p.stride()
        opt = build(road, "adamw", [p], **QUICK, **OPTIONS["adamw"])
        for t in range(STEPS):
            (g,) = gradients([p], t)
            if gradient_layout == "contiguous":
                g = g.contiguous()
            elif gradient_layout == "transposed":
                g = g.mT.contiguous().mT if g.dim() > 1 else g
            p.grad = g
            opt.step()
        assert p.stride() == strides
        found.append([p.detach().contiguous(), opt.scale])
    assert differs(found[0][0], start)
    for one, other in zip(*found, strict=True):
        # Only the order of the sums differs.
        assert_within(one, other, STEPS * SUM_RTOL * float(other.abs().max()))


CONVERSIONS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("when", ["before", "after the dry step", "in mid-run"])
@pytest.mark.parametrize("layout", CONVERSIONS)
def test_a_weight_laid_out_anew_goes_on_as_it_was(road, layout, when):
    """model.to(memory_format=...) assigns to .data."""
    found = []
    for convert in (False, True):
        p = make_weights([(4, 6, 3, 5)], torch.float64)[0]
        opt = build(road, "adamw", [p], **QUICK)
        if when == "after the dry step":
            p.grad = torch.zeros_like(p)
            opt.step()
        if when == "in mid-run":
            run(opt, [p], FEW)
        if convert:
            p.data = CONVERSIONS[layout](p.data)
        run(opt, [p], FEW, first=FEW)
        assert p.is_contiguous() is not convert
        found.append(p.detach().contiguous())
    assert_within(found[1], found[0], STEPS * SUM_RTOL * float(found[0].abs().max()))


def test_a_square_weight_transposed_in_place_is_one_written_by_hand(road):
    """The same address and shape, but other strides."""
    found = []
    for by_view in (False, True):
        (p,) = make_weights([(4, 4)])
        opt = build(road, "adamw", [p], **QUICK)
        run(opt, [p], FEW)
        transposed = p.detach().t()
        if by_view:
            p.grad = None
            p.data = transposed
        else:
            with torch.no_grad():
                p.copy_(transposed.clone())
        run(opt, [p], FEW, first=FEW)
        assert p.is_contiguous() is not by_view
        found.append(p.detach().contiguous())
    # The sums may be taken in another order.
    assert_within(found[1], found[0], ulp(found[0]))


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, FEW])
def test_a_model_converted_to_another_dtype_goes_on_where_it_is(road, to, steps):
    if road == "general" and steps and to is torch.float64:
        pytest.skip("the base's own state is its own affair: torch refuses float32 beside float64")
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    run(opt, params, steps)
    for p in params:
        p.grad = None
        p.data = p.data.to(to)
    loss = loss_of(params)
    run(opt, params, LONG, first=steps)
    assert all(p.dtype is to for p in params)
    assert loss_of(params) < LEARNED * loss


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_weights_of_one_element_and_of_none(road, shape):
    p, other = torch.nn.Parameter(torch.ones(shape)), make_weights()
    opt = build(road, "adamw", [p, *other], **QUICK)
    run(opt, [p, *other])
    assert p.shape == shape
    assert (p != 1).all()
    assert opt.state[p]["delta"].shape == opt.state[p]["x_ref"].shape == shape
    alone = torch.nn.Parameter(torch.ones(shape))
    opt = build(road, "adamw", [alone], **QUICK)
    run(opt, [alone])
    assert alone.isfinite().all() and opt.scale.isfinite().all()


def test_an_expanded_gradient_is_read_as_a_dense_one(road):
    found = []
    for dense in (False, True):
        p = make_weights([(63,)])[0]
        opt = build(road, "adamw", [p], **QUICK)
        for t in range(FEW):
            expanded = torch.full((1,), 1.0 + t).expand(p.shape)
            p.grad = expanded.contiguous() if dense else expanded
            opt.step()
        found.append(p.detach())
    assert_same(found[1], found[0])


def test_a_gradient_of_another_dtype_is_brought_to_the_weights(road):
    """torch lets a weight ask for it."""
    found = []
    for wide in (False, True):
        p = make_weights([(63,)], torch.bfloat16)[0]
        opt = build(road, "adamw", [p], **QUICK)
        if wide:
            p.grad_dtype = torch.float32
        for t in range(FEW):
            (g,) = gradients([p], t)
            p.grad = g.float() if wide else g
            opt.step()
            assert p.grad.dtype is (torch.float32 if wide else torch.bfloat16)
        found.append(p.detach())
    assert_same(found[1], found[0])


def test_a_tied_weight_is_trained_once(road):
    """Through a second name, a weight must not be counted or moved twice."""
    tied = SmallNet()
    opt = build(road, "adamw", tied.parameters(), **QUICK)
    losses = train_net(tied, opt)
    assert sum(len(group["params"]) for group in opt.param_groups) == 3
    assert tied.first.weight is tied.second.weight

    functional = SmallNet()
    weights = [functional.first.weight, functional.first.bias, functional.second.bias]
    again = train_net(functional, build(road, "adamw", weights, **QUICK))
    assert losses == again


@pytest.mark.parametrize("scale", SCALES)
def test_dtypes_may_be_mixed_in_one_model(road, scale):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [p for dtype in dtypes for p in make_weights(dtype=dtype)]
    opt = build(road, "adamw", params, scale=scale, **QUICK)
    before = [loss_of([p]) for p in params]
    run(opt, params, STEPS)
    assert [p.dtype for p in params] == [dtype for dtype in dtypes for _ in SHAPES]
    for p, loss in zip(params, before, strict=True):
        assert loss_of([p]) < loss
    exact = make_weights(dtype=torch.float64) * len(dtypes)
    if scale == "global":
        exact = [p for _ in dtypes for p in make_weights(dtype=torch.float64)]
        twin = build(road, "adamw", exact, **QUICK)
        run(twin, exact, STEPS)
        # The sums of all dtypes come together: S is that of float64 weights but for their rounding.
        torch.testing.assert_close(
            opt.scale, twin.scale, rtol=STEPS * torch.finfo(torch.bfloat16).eps, atol=0
        )


def test_a_dtype_without_kernels_is_trained_by_the_reference(cpp):
    narrow = make_weights(dtype=torch.float8_e5m2)
    opt = build(cpp, "adamw", narrow, **QUICK)
    before = loss_of(narrow)
    for t in range(LONG):
        set_gradients(narrow, t)
        opt.step()
    assert loss_of(narrow) < LEARNED * before
