"""Weights of every layout, size and dtype are trained."""

import pytest
import torch
from support import cases
from support.cases import FEW, LEARNED, SCALE_PER, SHAPES, STEPS, SUM_RTOL, make_weights

IMAGE = (4, 6, 3, 5)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "strided": lambda x: torch.cat([x.flatten(), x.flatten()])[::2].as_strided((x.numel(),), (2,)),
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": channels_last,
    "every second column": lambda x: torch.cat([x, x], dim=3)[..., ::2],
    "inside a larger one": lambda x: torch.stack([x, x])[1],
}
GRADIENT_LAYOUTS = {
    "weight's": lambda g: g,
    "contiguous": lambda g: g.contiguous(),
    "transposed": lambda g: g.mT.contiguous().mT if g.dim() > 1 else g,
}


@pytest.mark.parametrize("of_gradient", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_of_any_layout_learns_as_a_contiguous_one(train, layout, of_gradient):
    (start,) = cases.values(make_weights([IMAGE], torch.float64))
    found = []
    for contiguous in (False, True):
        x = LAYOUTS[layout](start.clone())
        p = torch.nn.Parameter(x.contiguous() if contiguous else x)
        strides, one = p.stride(), train(params=[p])
        for t in range(STEPS):
            one.step([GRADIENT_LAYOUTS[of_gradient](g) for g in cases.gradients([p], t)])
        assert p.stride() == strides
        found.append([p.detach().contiguous(), one.opt.scale])
    assert cases.differs(found[0][0], start)
    # Only the order of the sums differs.
    cases.assert_near(*found, STEPS * SUM_RTOL)


CONVERSIONS = {
    "channels last": channels_last,
    "transposed": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("when", ["before", "after the dry run", "in mid-run"])
@pytest.mark.parametrize("layout", CONVERSIONS)
def test_a_weight_laid_out_anew_goes_on_as_it_was(train, layout, when):
    """model.to(memory_format=...) assigns to .data."""
    found = []
    for convert in (False, True):
        one = train(shapes=[IMAGE], dtype=torch.float64)
        (p,) = one.params
        if when == "after the dry run":
            one.step_on_zeros()
        if when == "in mid-run":
            one.run(FEW)
        if convert:
            p.data = CONVERSIONS[layout](p.data)
        one.run(FEW)
        assert p.is_contiguous() is not convert
        found.append([p.detach().contiguous()])
    cases.assert_near(*found, STEPS * SUM_RTOL)


def test_a_square_weight_transposed_in_place_is_one_written_by_hand(train):
    """The same address and shape, but other strides."""
    found = []
    for by_view in (False, True):
        one = train(shapes=[(4, 4)]).run(FEW)
        (p,) = one.params
        if by_view:
            p.grad = None
            p.data = p.detach().t()
        else:
            cases.write([p], [p.detach().t().clone()])
        one.run(FEW)
        assert p.is_contiguous() is not by_view
        found.append(p.detach().contiguous())
    # The sums may be taken in another order.
    cases.assert_within(found[1], found[0], cases.ulp(found[0]))


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, FEW])
def test_a_model_converted_to_another_dtype_goes_on_where_it_is(implementation, train, to, steps):
    if implementation == "fallback" and steps and to is torch.float64:
        pytest.skip("the base's own state is its own affair: torch refuses float32 beside float64")
    one = train().step_on_zeros().run(steps)
    for p in one.params:
        p.grad = None
        p.data = p.data.to(to)
    loss = one.loss
    one.run(cases.LONG)
    assert all(p.dtype is to for p in one.params)
    assert one.loss < LEARNED * loss


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_a_weight_may_have_one_element_or_none(train, shape):
    p = torch.nn.Parameter(torch.ones(shape))
    one = train(params=[p, *make_weights()]).run()
    assert p.shape == shape
    assert (p != 1).all()
    assert one.opt.state[p]["delta"].shape == one.opt.state[p]["x_ref"].shape == shape
    alone = train(params=[torch.nn.Parameter(torch.ones(shape))]).run()
    assert alone.params[0].isfinite().all()
    assert alone.opt.scale.isfinite().all()


def test_a_tied_weight_is_trained_once(implementation):
    """Through a second name, a weight must not be counted or moved twice."""
    losses = []
    for tied in (True, False):
        net = cases.SmallNet()
        named = [net.first.weight, net.first.bias, net.second.bias]
        weights = net.parameters() if tied else named
        opt = cases.build(implementation, "adamw", weights, **cases.QUICK)
        losses.append(cases.train_net(net, opt))
        assert len(opt.param_groups[0]["params"]) == 3
        assert net.first.weight is net.second.weight
    assert losses[0] == losses[1]


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_dtypes_may_be_mixed_in_one_model(train, scale_per):
    params = [p for dtype in cases.DTYPES for p in make_weights(dtype=dtype)]
    one = train(params=params, scale_per=scale_per)
    before = [cases.loss_of([p]) for p in params]
    one.run()
    assert [p.dtype for p in params] == [dtype for dtype in cases.DTYPES for _ in SHAPES]
    for p, loss in zip(params, before, strict=True):
        assert cases.loss_of([p]) < loss
    if scale_per == "model":
        exact = [p for _ in cases.DTYPES for p in make_weights(dtype=torch.float64)]
        scale = train(params=exact).run().opt.scale
        # The sums of all dtypes come together: S is that of float64 weights but for their rounding.
        rtol = STEPS * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(one.opt.scale, scale, rtol=rtol, atol=0)


def test_a_dtype_without_kernels_is_trained_by_the_reference(cpp):
    one = cases.Training(cpp, dtype=torch.float8_e5m2)
    before = one.loss
    assert one.run(cases.LONG).loss < LEARNED * before
