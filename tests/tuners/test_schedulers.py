"""What every tuner beside an optimizer promises; see support/schedulers.py."""

import copy
import pickle

import pytest
import torch
from support.cases import FUSED, assert_same, make_weights, set_gradients
from support.schedulers import BETA, PROBING, SCHEDULERS, Tuned, resumed, sgd, without_absent

of_schedulers = pytest.mark.parametrize("name", SCHEDULERS)
of_probing = pytest.mark.parametrize("name", PROBING)


def with_backend(name, backend):
    return {} if name == "FlatterFaster" else {"backend": backend}


@pytest.mark.parametrize(
    ("name", "stop"), [(name, stop) for name, row in SCHEDULERS.items() for stop in row.stops]
)
def test_it_resumes_to_the_bit(backend, name, stop):
    options = with_backend(name, backend)
    run = Tuned(name, **options).steps(stop)
    other = resumed(name, run, **options)
    start, drops = run.changed, name.startswith("AutoDrop")
    if drops and stop > 40:
        # Within a window, or an average, after a drop.
        state = run.tuner.state_dict()
        assert state["count"] and state["drops"]
    for each in (run, other):
        each.steps(60 if drops else 6)
    assert run.changed != start
    assert not drops or len(run.tuner.drops) > 1
    assert_same(other.snapshot(), run.snapshot())


@of_schedulers
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_go_on_alike(name, copied):
    run, twin = (Tuned(name).steps(4) for _ in range(2))
    twin.follow(copied(twin.tuner))
    assert twin.opt is not run.opt
    assert_same(twin.steps(5).snapshot(), run.steps(5).snapshot())


@of_schedulers
def test_state_dicts_have_the_entries_that_they_have_always_had(name):
    run = Tuned(name)
    assert run.tuner.state_dict().keys() == SCHEDULERS[name].entries
    assert run.steps(9).tuner.state_dict().keys() == SCHEDULERS[name].entries


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [(name, *bad) for name, row in SCHEDULERS.items() for bad in row.bad_states],
)
def test_a_bad_state_dict_is_refused_before_anything_changes(name, changes, said):
    run = Tuned(name).steps(20)
    state = without_absent({**run.tuner.state_dict(), **changes})
    before = run.snapshot()
    with pytest.raises(ValueError, match=said):
        run.tuner.load_state_dict(state)
    assert_same(run.snapshot(), before)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [(name, *refused) for name, row in SCHEDULERS.items() for refused in row.refused],
)
def test_options_out_of_range_are_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        Tuned(name, **options)


BASES = {
    "AutoDrop 1": ("adamw", "mechanic"),
    "AutoDrop 2": ("adamw", "mechanic"),
    "GeN": ("adamw", "mechanic"),
    "LQA": ("sgd",),
    "LRTuner": ("adamw", "mechanic"),
    "FlatterFaster": ("adamw", "mechanic"),
}
MAKERS = {
    "sgd": sgd,
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, betas=(BETA, 0.99)),
    "mechanic": lambda params: FUSED["adamw"](params, lr=0.1, betas=(BETA, 0.99)),
}


@pytest.mark.parametrize(
    ("name", "base"), [(name, base) for name, bases in BASES.items() for base in bases]
)
def test_a_run_in_which_nothing_is_changed_is_the_run_without(name, base):
    """A constant loss tells nothing, no angle is below the threshold, and lr/lr_ref is 1."""
    row = SCHEDULERS[name]
    params, alone = make_weights(), make_weights()
    opt, plain = MAKERS[base](params), MAKERS[base](alone)
    tuner = row.make(opt, **row.neutral)
    for t in range(40 if name.startswith("AutoDrop") else 6):
        set_gradients(params, t)
        set_gradients(alone, t)
        if row.probes:
            assert not tuner.step(lambda: torch.ones(()))
        opt.step()
        plain.step()
        if not row.probes:
            tuner.step()
    if name.startswith("AutoDrop"):
        assert tuner.angle is not None and not tuner.drops
    assert_same([params, opt.state_dict()], [alone, plain.state_dict()])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "FlatterFaster"])
def test_an_lr_that_is_a_tensor_stays_one_and_moves_once_if_groups_share_it(name):
    shared = torch.tensor(0.05, dtype=torch.float64)
    runs = []
    for lr in (shared, 0.05):
        params = make_weights(dtype=torch.float64)
        groups = [{"params": [p]} for p in params]
        run = Tuned(name, params, lambda _, lr=lr, groups=groups: sgd(groups, lr))
        for _ in range(60):
            run.steps(1)
            if float(run.opt.param_groups[0]["lr"]) != 0.05:
                break
        runs.append(run)
    assert all(group["lr"] is shared for group in runs[0].opt.param_groups)
    first, second = (run.changed for run in runs)
    assert first[0][0] != 0.05 and runs[0].t == runs[1].t
    # torch multiplies by an lr of 64 bits where it would by a number: to a few roundings.
    assert [lr for lr, _ in first] == pytest.approx([lr for lr, _ in second], rel=1e-12)
    last = runs[0].tuner.get_last_lr()
    assert [float(lr) for lr in last] == [float(shared)] * 3
    assert all(lr is not shared for lr in last)


@of_probing
@pytest.mark.parametrize(("lr", "bound"), [(0.01, {"max_lr": 0.0101}), (10.0, {"min_lr": 9.9})])
def test_the_range_of_the_lr_is_kept(name, lr, bound):
    run = Tuned(name, optimizer=lambda params: sgd(params, lr), **bound)
    set_gradients(run.params, 0)
    assert run.tuner.step(run.closure)
    assert run.tuner.get_last_lr() == list(bound.values())


@of_probing
def test_without_gradients_nothing_changes(name):
    run = Tuned(name)
    before = run.snapshot()
    with pytest.raises(ValueError, match="a probe needs gradients"):
        run.tuner.step(run.closure)
    assert_same(run.snapshot(), before)


@of_probing
def test_it_calls_its_closure_when_it_is_due(name):
    run = Tuned(name, every=4)
    calls, due, changed = [], [], []

    def counted():
        calls.append(run.t)
        return run.closure()

    for t in range(9):
        set_gradients(run.params, t)
        due.append(run.tuner.due)
        changed.append(run.tuner.step(counted))
    assert due == changed == [t % 4 == 0 for t in range(9)]
    assert len(calls) == 3 * len(run.tuner.losses)
