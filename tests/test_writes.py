"""Weights that somebody else writes: before the run starts, and in mid-run."""

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    NARROW_TOO,
    OPTIONS,
    QUICK,
    STEPS,
    SUM_RTOL,
    SmallNet,
    assert_same,
    assert_within,
    build,
    differs,
    double,
    make_weights,
    move,
    run,
    set_gradients,
    snapshot,
    train_net,
    ulp,
    values,
)

from mechanic_fused.backends import reference

# Of x_ref, of x and, in float64, of the two sums that are expected here.
ROUNDINGS = 4


# The start


@pytest.mark.parametrize("dry", [False, True], ids=["", "after a dry step"])
@pytest.mark.parametrize("how", ["load_state_dict", "data"])
def test_weights_loaded_after_construction_are_where_the_run_starts(road, how, dry):
    late, early = SmallNet(seed=0), SmallNet(seed=1)
    opt = build(road, "adamw", late.parameters(), **QUICK)
    if dry:
        for p in late.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    if how == "data":
        for p, q in zip(late.parameters(), early.parameters(), strict=True):
            p.data = q.data.clone()
    else:
        late.load_state_dict(early.state_dict())
    train_net(late, opt)
    train_net(early, build(road, "adamw", early.parameters(), **QUICK))
    assert_same(values(late.parameters()), values(early.parameters()))


def test_a_model_cast_after_construction(road):
    late, early = SmallNet(), SmallNet().double()
    opt = build(road, "adamw", late.parameters(), **QUICK)
    late.double()
    for t in range(FEW):
        set_gradients(list(late.parameters()), t)
        opt.step()
    run(build(road, "adamw", early.parameters(), **QUICK), list(early.parameters()), FEW)
    assert_same(values(late.parameters()), values(early.parameters()))


@pytest.mark.parametrize("lr", [0.0, 1.0])
@pytest.mark.parametrize("base", FUSED)
def test_a_dry_step_makes_state_and_changes_nothing_else(road, base, lr):
    params, straight = make_weights(), make_weights()
    opt = build(road, base, params, **QUICK, **OPTIONS[base])
    opt.param_groups[0]["lr"] = lr
    before, scale = values(params), opt.scale
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert_same(values(params), before)
    assert_same(opt.scale, scale)
    if road != "general":
        assert all({"x_ref", "delta"} < opt.state[p].keys() for p in params)
    opt.param_groups[0]["lr"] = OPTIONS[base]["lr"]
    run(opt, params)
    twin = build(road, base, straight, **QUICK, **OPTIONS[base])
    run(twin, straight)
    assert_same(snapshot(opt), snapshot(twin))


def test_zero_gradients_later_are_an_ordinary_step(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    before = snapshot(opt)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    after = snapshot(opt)
    assert differs(after["weights"], before["weights"])
    assert opt.state[params[0]]["step"] == FEW + 1


# Writing to the weights by hand


def halve(p):
    with torch.no_grad():
        p.mul_(0.5)


def clamp(p):
    with torch.no_grad():
        p.clamp_(-0.1, 0.1)


def prune(p):
    with torch.no_grad():
        p[::2] = 0


def swap_data(p):
    p.data = p.data * 0.5


def flatten(p):
    """As torch.nn.utils.vector_to_parameters: the weight becomes a view of a vector."""
    vector = torch.cat([p.detach().flatten() * 0.5, torch.zeros(3, dtype=p.dtype)])
    torch.nn.utils.vector_to_parameters(vector[: p.numel()], [p])


WRITES = {"mul_": halve, "clamp_": clamp, "a part": prune, "data": swap_data, "flatten": flatten}


@pytest.mark.parametrize("dtype", [*NARROW_TOO, torch.float64], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_by_hand_is_not_undone(road, write, dtype):
    params = make_weights(dtype=dtype)
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, STEPS)
    trained = values(params)
    for p in params:
        WRITES[write](p)
    assert differs(values(params), trained)
    check_next_step_starts_here(opt, params)


def check_next_step_starts_here(opt, params):
    written = [double(p) for p in params]
    before = [move(opt, p) for p in params]
    refs = [opt.state[p]["x_ref"].clone() for p in params]
    run(opt, params, 1, first=STEPS)
    for p, x, old, ref in zip(params, written, before, refs, strict=True):
        sizes = [t.to(p.dtype) for t in (p, ref, opt.state[p]["x_ref"], old, move(opt, p))]
        assert_within(p, x + move(opt, p) - old, ROUNDINGS * ulp(*sizes))
        assert differs(double(p), x)


def test_a_model_loaded_in_mid_run_is_not_undone(road):
    model, other = SmallNet(seed=0), SmallNet(seed=1)
    opt = build(road, "adamw", model.parameters(), **QUICK)
    train_net(model, opt)
    model.load_state_dict(other.state_dict())
    check_next_step_starts_here(opt, list(model.parameters()))


@pytest.mark.parametrize("piece", [reference.PIECE, 4], ids=["whole", "in pieces"])
def test_data_written_where_torch_cannot_see_it_needs_one_call(road, piece, monkeypatch):
    monkeypatch.setattr(reference, "PIECE", piece)
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, STEPS)
    for p in params:
        p.data.mul_(0.5)
    written = values(params)
    opt.shift_reference()
    assert_same(values(params), written)
    check_next_step_starts_here(opt, params)


@pytest.mark.parametrize("steps", [0, FEW])
def test_shifting_without_a_write_changes_nothing(road, steps):
    found = []
    for shift in (False, True):
        params = make_weights()
        opt = build(road, "adamw", params, **QUICK)
        run(opt, params, steps)
        if shift:
            opt.shift_reference()
        run(opt, params, FEW, first=steps)
        found.append(snapshot(opt))
    assert_same(found[1], found[0])


def test_an_averaged_copy_may_be_swapped_in_and_out(road):
    """As people evaluate an EMA: the run goes on as if it had not happened, to the rounding."""
    found = []
    for swap in (False, True):
        params = make_weights(dtype=torch.float64)
        opt = build(road, "adamw", params, **QUICK)
        run(opt, params, FEW)
        if swap:
            kept = values(params)
            with torch.no_grad():
                for p in params:
                    p.zero_()
                for p, x in zip(params, kept, strict=True):
                    p.copy_(x)
        run(opt, params, FEW, first=FEW)
        found.append([*values(params), opt.scale])
    for one, other in zip(*found, strict=True):
        assert_within(one, other, STEPS * SUM_RTOL * float(other.abs().max()))
