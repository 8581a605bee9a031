"""x_ref of one block of 128 elements in eight: beside its oracle, saved, loaded and refused."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from support.beside_oracle import Beside
from support.cases import (
    CASES,
    FALLBACK,
    FEW,
    FULL,
    RUNNING,
    SCALE_PER,
    STEPS,
    Training,
    assert_same,
    give,
    gradients,
    make_weights,
)
from test_running_form import STARTS, joined, loss_of

from mechanic_fused import MechanicAdamW, MechanicSGD, mechanize
from mechanic_fused.kept_blocks import WHOLE, keep, kept_count, spread

EVERY = {"variant": RUNNING, "x_ref_every": 8}
SHAPES = ((7,), (8191,), (8192,), (3, 2900), (9217,))
"""Too small to be kept in part, and the smallest that is not; an end within a kept block."""


def kept(n, first=0):
    """Return which of n elements of a weight from `first` on have an x_ref."""
    return torch.from_numpy(np.arange(first, first + n) // 128 % 8 == 0)


# Which elements


@pytest.mark.parametrize("phase", [0, 1, 100, 127, 128, 129, 500, 1023])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 900, 1023, 1024, 1025, 5000])
def test_each_kept_element_is_found_and_put_back(size, phase):
    x = torch.arange(1.0, 1 + size)
    expected = kept(size, phase)
    found = keep(x, x, phase)
    assert kept_count(size, phase) == len(found) == expected.sum()
    assert_same(found, x[expected])
    whole = spread(found, x, phase)
    assert_same(whole, torch.where(expected, x, torch.nan))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_elements_are_numbered_in_the_order_of_storage(axes):
    stored = torch.arange(2 * 30 * 40.0).view(2, 30, 40)
    x = stored.permute(axes)
    # Its strides may differ from the weight's, as those of a gradient do.
    assert_same(keep(x.contiguous(), x, 0), stored.view(-1)[kept(2400)])
    whole = spread(keep(x, x, 0), x, 0)
    assert whole.stride() == x.stride()
    assert whole.isfinite().equal(kept(2400).view(2, 30, 40).permute(axes))


def test_weights_with_gaps_are_numbered_by_their_axes():
    x = torch.arange(2400.0).view(40, 60)[:, ::2]
    assert_same(keep(x, x, 0), x.reshape(-1)[kept(1200)])
    assert spread(keep(x, x, 0), x, 0).isfinite().view(-1).equal(kept(1200))


# Beside the oracle


def beside(implementation, base, start, shapes=SHAPES, **options):
    own = {"s_init": 0.02} if start == "s_init" else {}
    return Beside(implementation, base, shapes=shapes, **{**EVERY, **own, **options})


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", FULL)
def test_each_base_and_start_agrees_with_the_oracle(implementation, case, start):
    base, options = CASES[case]
    both = beside(implementation, base, start, **options)
    both.run(loss=loss_of(start))
    assert both.opt.scale_source == start
    sizes = [len(both.opt.state[p]["x_ref"].view(-1)) for p in both.params]
    assert sizes == [7, 8191, 1024, 1152, 1153]


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_groups_may_keep_all_or_a_part(implementation, scale_per):
    def groups(weights):
        return [{"params": weights[:3]}, {"params": weights[3:], "x_ref_every": 1}]

    both = beside(implementation, "adamw", "norms", groups=groups, scale_per=scale_per)
    both.run()
    assert [both.opt.state[p]["x_ref"].numel() for p in both.params[2:4]] == [1024, 8700]


def as_view(x):
    """Return the numbers in the midst of a storage, misaligned."""
    room = torch.full((x.numel() + 6,), torch.nan, dtype=x.dtype)
    return room[3:-3].view(x.shape).copy_(x)


@pytest.mark.parametrize("how", ["view", "gaps"])
def test_views_and_weights_with_gaps_agree_with_the_oracle(implementation, how):
    def with_gaps(x):
        room = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
        return room[..., 0].copy_(x)

    laid_out = {"view": as_view, "gaps": with_gaps}[how]
    if how == "gaps" and implementation == "cpp":
        pytest.skip("weights with gaps take the reference")
    beside(implementation, "lion", "norms", laid_out=laid_out).run()


def test_gradients_may_come_and_go_and_be_nonfinite(implementation):
    def edit(t, grads):
        if t == 7:
            grads[4][[0, 200]] = np.nan, np.inf
        return [None if (t + i) % 4 == 0 else g for i, g in enumerate(grads)]

    both = beside(implementation, "adamw", "loss", scale_per="parameter")
    both.run(edit, loss_of("loss"))
    assert both.opt.nonfinite_steps == both.oracle.nonfinite_steps > 0


# Runs


def run(implementation="reference", shapes=SHAPES, **options):
    return Training(implementation, shapes=shapes, s_init=None, **{**EVERY, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_lose_no_update(implementation, dtype):
    low = run(implementation, dtype=dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in low.params]
    full = Training(implementation, "adamw", wide, s_init=None, **EVERY)
    for t in range(FEW):
        grads = gradients(low.params, t)
        low.step(grads)
        full.step([g.float() for g in grads])
        assert_same(joined(low), full.x)
    assert low.opt.scale == full.opt.scale
    assert low.opt.state[low.params[2]]["x_ref"].dtype is dtype


def test_a_transposed_weight_learns_what_its_storage_does(implementation):
    plain, other = make_weights([(90, 100)]), make_weights([(90, 100)])
    turned = [torch.nn.Parameter(p.detach().t()) for p in other]
    one, two = (Training(implementation, "adamw", p, s_init=None, **EVERY) for p in (plain, turned))
    for t in range(FEW):
        grads = gradients(plain, t)
        one.step(grads)
        two.step([g.t().contiguous() for g in grads])
    assert_same(one.x[0], two.x[0].t())
    assert one.opt.scale == two.opt.scale


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_released_gradients_give_the_same_run(backend):
    """Up to the order of the sums."""
    found = []
    for released in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(90, 100), torch.nn.Tanh(), torch.nn.Linear(100, 90)
        )
        opt = MechanicAdamW(net.parameters(), lr=1.0, backend=backend, **EVERY)
        if released:
            opt.release_gradients()
        for _ in range(STEPS):
            opt.zero_grad()
            loss = (net(torch.ones(4, 90)) - 1).square().mean()
            loss.backward()
            opt.step(loss=loss.detach())
        found.append([opt.scale, *(p.detach().clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_reset_takes_the_weights_as_they_are_frozen_ones_too():
    one = run().run(FEW)
    one.params[4].requires_grad_(False)
    one.opt.reset_scale()
    for p, phase in zip(one.params, [WHOLE, WHOLE, 0, 0, 0], strict=True):
        x = p.detach()
        expected = x if phase == WHOLE else keep(x, x, 0)
        assert_same(one.opt.state[p]["x_ref"], expected)


def test_a_group_may_join_a_run(implementation):
    one = run(implementation).run(FEW)
    more = make_weights([(8192,), (8192,)], seed=3)
    one.opt.add_param_group({"params": more[:1]})
    one.opt.add_param_group({"params": more[1:], "x_ref_every": 1})
    one.params += more
    one.run(FEW)
    assert [one.opt.state[p]["x_ref"].numel() for p in more] == [1024, 8192]


# Saved and loaded


def through_bytes(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_a_copy_goes_on_to_the_bit(implementation, way, dtype):
    one = run(implementation, dtype=dtype).run(STEPS)
    if way in ("state_dict", "torch.save"):
        saved = one.saved()
        other = run(implementation, dtype=dtype, seed=1)
        other.load(through_bytes(saved) if way == "torch.save" else copy.deepcopy(saved), one.t)
        assert_same(other.saved(), saved)
    else:
        other = run(implementation, dtype=dtype)
        move = copy.deepcopy if way == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        other.params, other.opt = move((one.params, one.opt))
        other.t = one.t
        assert_same(other.saved(), one.saved())
    one.run(FEW), other.run(FEW)
    assert_same(one.x, other.x)
    assert torch.equal(one.opt.scale, other.opt.scale)
    assert_same(one.opt.state[one.params[3]], other.opt.state[other.params[3]])


def test_a_checkpoint_has_the_shape_of_the_weights_and_nan_for_what_is_not_kept():
    one = run().run(FEW)
    start = [p.detach() for p in make_weights(SHAPES)]
    seen = []
    one.opt.register_state_dict_post_hook(lambda _, saved: seen.append(saved["state"][3]["x_ref"]))
    state = one.opt.state_dict()["state"]
    for i, x in enumerate(start):
        elements = kept(x.numel()) if x.numel() >= 8192 else torch.ones(x.numel(), dtype=bool)
        assert_same(state[i]["x_ref"], torch.where(elements.view(x.shape), x, torch.nan))
    assert_same(seen, [state[3]["x_ref"]])
    assert one.opt.state[one.params[3]]["x_ref"].dim() == 1


def test_a_whole_x_ref_loads_into_a_part(implementation):
    whole = run(implementation, x_ref_every=1).run(STEPS)
    part = run(implementation, seed=1).load(copy.deepcopy(whole.saved()), STEPS)
    x_ref = whole.opt.state[whole.params[3]]["x_ref"]
    part.run(FEW)
    assert_same(part.opt.state[part.params[3]]["x_ref"], keep(x_ref, x_ref, 0))
    assert part.group["x_ref_every"] == 8


def test_a_checkpoint_of_an_exact_form_loads_into_a_part():
    exact = Training("reference", shapes=SHAPES).run(FEW)
    part = run(seed=1).load(copy.deepcopy(exact.saved()), FEW).run(FEW)
    x_ref = exact.opt.state[exact.params[2]]["x_ref"]
    assert_same(part.opt.state[part.params[2]]["x_ref"], keep(x_ref, x_ref, 0))


def test_a_part_does_not_load_into_a_whole_x_ref(implementation):
    saved = run(implementation).run(FEW).saved()
    whole = run(implementation, x_ref_every=1, seed=1).run(FEW)
    before = whole.snapshot()
    text = "lacks most of x_ref: expected x_ref_every=8 for param group 0, got 1"
    with pytest.raises(ValueError, match=text):
        whole.opt.load_state_dict(saved["optimizer"])
    assert_same(whole.snapshot(), before)


def test_a_part_of_another_memory_layout_is_refused():
    turned = [torch.nn.Parameter(p.detach().t()) for p in make_weights([(90, 100)])]
    saved = Training("reference", "adamw", turned, s_init=None, **EVERY).run(FEW).opt.state_dict()
    one = run(shapes=[(100, 90)])
    one.opt.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"shape \(100, 90\) had the same strides, \(90, 1\)"):
        one.run(1)


@pytest.mark.parametrize("variant", [RUNNING, "annealed"])
def test_a_group_that_is_changed_is_checked(variant):
    one = Training("reference", variant=variant).run(FEW)
    one.group["x_ref_every"] = 8 if variant != RUNNING else 4
    before = one.x
    with pytest.raises(ValueError, match=r"x_ref_every must be (one of 1, 8|1 with variant='ann)"):
        one.run(1)
    assert_same(one.x, before)


def test_what_was_not_kept_cannot_be_asked_for_later():
    one = run().run(FEW)
    one.group["x_ref_every"] = 1
    with pytest.raises(ValueError, match="expected x_ref_every=8 to stay in its param group, got"):
        one.run(1)
    other = run(x_ref_every=1).run(FEW)
    other.group["x_ref_every"] = 8
    other.run(FEW)
    assert other.opt.state[other.params[2]]["x_ref"].numel() == 1024


def test_a_plain_base_gets_nothing_of_it():
    one = run().run(STEPS)
    plain = one.opt.to_base()
    assert "x_ref_every" not in plain.param_groups[0]
    plain = torch.optim.AdamW(one.params)
    plain.load_state_dict(one.opt.state_dict())
    give(one.params, gradients(one.params, 0))
    plain.step()


# Refused


@pytest.mark.parametrize("bad", [0, 2, 16, 8.0, True, None, "8"])
def test_another_share_is_refused(bad):
    with pytest.raises(ValueError, match=f"x_ref_every must be one of 1, 8, got {bad!r}"):
        MechanicAdamW(make_weights(), x_ref_every=bad)
    with pytest.raises(ValueError, match=f"x_ref_every must be one of 1, 8, got {bad!r}"):
        MechanicAdamW([{"params": make_weights(), "x_ref_every": bad}])


@pytest.mark.parametrize(
    "options", [{"variant": "optax"}, {"variant": "annealed"}, {"s_decay": 0.1}]
)
@pytest.mark.parametrize("make", [MechanicSGD, mechanize(torch.optim.RAdam), FALLBACK["adamw"]])
def test_the_exact_forms_need_all_of_x_ref(make, options):
    text = "x_ref_every must be 1 with variant='(optax|annealed)'.*variant='running', got 8"
    with pytest.raises(ValueError, match=text):
        make(make_weights(), x_ref_every=8, **options)
    opt = make(make_weights(), **options)
    assert "x_ref_every" not in opt.param_groups[0]
    with pytest.raises(ValueError, match=text):
        opt.add_param_group({"params": make_weights(seed=1), "x_ref_every": 8})
    assert len(opt.param_groups) == 1
