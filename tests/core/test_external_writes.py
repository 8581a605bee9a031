"""Weights and state that others write: before the run starts, and in mid-run."""

import collections

import pytest
import torch
from support import cases
from support.cases import (
    EXACT,
    FEW,
    RUNNING,
    STEPS,
    Training,
    assert_same,
    double,
    move,
    snapshot,
    ulp,
    values,
)

from mechanic_fused import mechanize
from mechanic_fused.backends import reference

# Of x_ref, of x and, in float64, of the two sums that are expected here.
ROUNDINGS = 4


# The start


@pytest.mark.parametrize("dry", [False, True], ids=["", "after a dry run"])
@pytest.mark.parametrize("how", ["copied", "assigned"])
def test_a_run_starts_from_the_weights_of_its_first_step(train, how, dry):
    late = train()
    if dry:
        late.step_on_zeros()
    late.t = 0
    early = train(seed=1)
    for p, x in zip(late.params, early.x, strict=True):
        if how == "assigned":
            p.data = x
        else:
            cases.write([p], [x])
    assert_same(late.run().x, early.run().x)


def test_a_model_may_be_cast_after_construction(implementation):
    late, early = cases.SmallNet(), cases.SmallNet().double()
    one = Training(implementation, params=late.parameters())
    late.double()
    other = Training(implementation, params=early.parameters())
    assert_same(one.run(FEW).x, other.run(FEW).x)


@pytest.mark.parametrize("lr", [0.0, 1.0])
@pytest.mark.parametrize("base", cases.FUSED)
def test_a_dry_run_creates_state_and_changes_nothing_else(implementation, train, base, lr):
    one = train(base, **cases.OPTIONS[base])
    group, before, scale = one.group, one.x, one.opt.scale
    usual, group["lr"] = group["lr"], lr
    one.step_on_zeros()
    assert_same(one.x, before)
    assert_same(one.opt.scale, scale)
    if implementation != "fallback":
        assert all({"x_ref", "delta"} < one.opt.state[p].keys() for p in one.params)
    one.t, group["lr"] = 0, usual
    assert_same(one.run().snapshot(), train(base, **cases.OPTIONS[base]).run().snapshot())


# Weights written in mid-run


def halve(p):
    with torch.no_grad():
        p.mul_(0.5)


def clamp(p):
    with torch.no_grad():
        p.clamp_(-0.1, 0.1)


def prune(p):
    with torch.no_grad():
        p[::2] = 0


def load(p):
    cases.write([p], [torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape)])


def swap_data(p):
    p.data = p.data * 0.5


def flatten(p):
    """As torch.nn.utils.vector_to_parameters: the weight becomes a view of a vector."""
    vector = torch.cat([p.detach().flatten() * 0.5, torch.zeros(3, dtype=p.dtype)])
    torch.nn.utils.vector_to_parameters(vector[: p.numel()], [p])


WRITES = [halve, clamp, prune, load, swap_data, flatten]


def check_next_step_starts_here(one):
    params, opt = one.params, one.opt
    written = [double(p) for p in params]
    before, refs = [move(opt, p) for p in params], values(one.states("x_ref"))
    one.run(1)
    for p, x, old, ref in zip(params, written, before, refs, strict=True):
        sizes = [t.to(p.dtype) for t in (p, ref, opt.state[p]["x_ref"], old, move(opt, p))]
        cases.assert_within(p, x + move(opt, p) - old, ROUNDINGS * ulp(*sizes))
        assert cases.differs(double(p), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_by_hand_is_not_undone(train, write, dtype):
    one = train(dtype=dtype).run(STEPS)
    trained = one.x
    for p in one.params:
        write(p)
    assert cases.differs(one.x, trained)
    check_next_step_starts_here(one)


@pytest.mark.parametrize("piece", [reference.PIECE, 4], ids=["whole", "in pieces"])
def test_a_write_that_torch_cannot_see_needs_one_call(train, piece, monkeypatch):
    monkeypatch.setattr(reference, "PIECE", piece)
    one = train().run(STEPS)
    for p in one.params:
        p.data.mul_(0.5)
    written = one.x
    one.opt.shift_reference()
    assert_same(one.x, written)
    check_next_step_starts_here(one)


@pytest.mark.parametrize("steps", [0, FEW])
def test_shifting_without_a_write_changes_nothing(train, steps):
    found = []
    for shift in (False, True):
        one = train().run(steps)
        if shift:
            one.opt.shift_reference()
        found.append(one.run(FEW).snapshot())
    assert_same(*found)


def test_an_averaged_copy_may_be_swapped_in_and_out(train):
    """As people evaluate an EMA: the run goes on as if it had not happened, to the rounding."""
    found = []
    for swap in (False, True):
        one = train(dtype=torch.float64).run(FEW)
        if swap:
            kept = one.x
            cases.write(one.params, [torch.zeros_like(x) for x in kept])
            cases.write(one.params, kept)
        one.run(FEW)
        found.append([*one.x, one.opt.scale])
    cases.assert_near(*found, STEPS * cases.SUM_RTOL)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_weight_can_be_repaired_by_hand(broken):
    one = Training(shapes=[(3,)], s_init=None).run(1)
    (p,) = one.params
    for value in (broken, 3.0):
        with torch.no_grad():
            p[0] = value
        one.step_on_zeros()
    assert torch.isfinite(p).all()
    assert abs(p[0].item() - 3.0) < 1e-3


# State written in mid-run


@pytest.mark.parametrize("backend", ["reference", "auto", "fallback"])
def test_state_that_was_replaced_or_cleared_is_what_the_next_step_uses(backend):
    one = Training(backend, shapes=[(3,)]).run(1)
    (p,) = one.params
    one.opt.state[p]["exp_avg"] = torch.full((3,), 50.0)
    one.run(1)
    assert (one.opt.state[p]["exp_avg"] > 40).all()
    one.opt.state.clear()
    one.run(1)
    assert one.opt.state[p]["step"] == 1
    assert set(one.opt.state[p]) >= {"delta", "x_ref", "exp_avg"}
    one.opt.state[p] = dict(one.opt.state[p], exp_avg=torch.full((3,), 50.0))
    one.run(1)
    assert (one.opt.state[p]["exp_avg"] > 40).all()
    one.opt.state = collections.defaultdict(dict)
    one.run(1)
    assert one.opt.state[p]["step"] == 1
    assert one.opt.state_dict()["state"][0]["step"] == 1


def to_new_memory(t):
    t.data = t.clone()


@pytest.mark.parametrize("variant", [EXACT, RUNNING])
@pytest.mark.parametrize("moved", [to_new_memory, torch.Tensor.share_memory_])
def test_state_that_has_moved_is_followed(train, variant, moved):
    """As in offloading, and where torch shares a tensor with another process."""
    one, other = (train(variant=variant).run(FEW) for _ in range(2))
    entries = [t for state in one.opt.state.values() for t in state.values() if torch.is_tensor(t)]
    left = [t.detach() for t in entries]
    for t in entries:
        moved(t)
    kept = values(left)
    one.run(FEW), other.run(FEW)
    assert_same(snapshot(one.opt), snapshot(other.opt))
    assert_same(one.x, other.x)
    if moved is to_new_memory:
        assert_same(values(left), kept)


@pytest.mark.parametrize("variant", [EXACT, RUNNING])
def test_own_state_that_was_replaced_is_what_the_next_step_uses(implementation, variant):
    one = Training(implementation, shapes=[(3,)], variant=variant).run(1)
    (p,) = one.params
    for replaced in (lambda state: state, dict):
        moved = one.opt.state[p]["x_ref"] + 1
        one.opt.state[p] = replaced(one.opt.state[p])
        one.opt.state[p]["x_ref"] = moved
        one.run(1)
        assert one.opt.state[p]["x_ref"] is moved


class Restless(torch.optim.SGD):
    """Keep a counter under a key that is not a weight, and replace every weight's state dict."""

    def step(self, closure=None):
        super().step(closure)
        self.state["steps"] = self.state.get("steps", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = dict(self.state[p])


@pytest.mark.parametrize("variant", [EXACT, RUNNING])
def test_what_the_base_does_to_its_state_makes_no_new_plan(variant):
    params = cases.make_weights()
    opt = mechanize(Restless, variant=variant)(params, lr=1.0)
    for t in range(STEPS):
        cases.give(params, cases.gradients(params, t))
        opt.step()
        if t == FEW:
            opt.load_state_dict(opt.state_dict())
        if t == FEW + 1:
            plan = opt._plan
    assert opt._plan is plan
