"""Weights that are stepped on the host: the numbers of the ordinary step, whatever is around it."""

import copy
import gc
import os
import re
import threading
import time
import weakref

import pytest
import torch
from support import cases
from support.cases import FUSED, RADAM, Training, assert_same, make_weights, run, snapshot

from mechanic_fused import MechanicAdamW, MechanicSGD, mechanize, offload, step_together
from mechanic_fused.plan import StepPlan

STEPS = 8


class LateLanes:
    """A device whose copies are made as late as they may be: when somebody waits for them.

    What is copied too early by mistake, or is never waited for, shows in the numbers.
    """

    def __init__(self, device):
        self.down, self.up, self.lock = [], [], threading.RLock()

    def fetch(self, task, *read):
        """Queue a copy to the host."""
        with self.lock:
            self.down.append(task)
            return LateEvent(self, len(self.down))

    def send(self, task):
        """Queue a copy to the device."""
        with self.lock:
            self.up.append(task)

    def meet(self):
        """Make what was sent."""
        with self.lock:
            while self.up:
                self.up.pop()()

    def arrive(self, count):
        """Make the first copies to the host, in their order."""
        with self.lock, torch.no_grad():
            for i in range(count):
                task, self.down[i] = self.down[i], lambda: None
                task()


class LateEvent:
    """The end of a copy."""

    def __init__(self, lanes, count):
        self.synchronize = lambda: lanes.arrive(count)


@pytest.fixture(params=["cpu", "late"])
def device(request, monkeypatch):
    """A device: that of the host, or one beside it."""
    if request.param == "late":
        lanes = LateLanes("late")

        def late_copy(self, p):
            self._lanes["late"] = lanes
            return offload.PinnedCopy(p, lanes)

        monkeypatch.setattr(offload.Offload, "_new_copy", late_copy)
    return request.param


SHAPES = ((64, 96), (96,), (3, 5), ())
pytestmark = pytest.mark.usefixtures("device")
WEIGHT = 64 * 96 * 4
"""Bytes of the first of these, in float32."""


def training(offloaded, base="adamw", implementation="auto", shapes=SHAPES, **options):
    options = {"variant": "running", **cases.OPTIONS[base], **options}
    return Training(implementation, base, shapes=shapes, offload=offloaded, **options)


def both(loop, *args, **options):
    """Run a loop with offload and without; weights, S and state must have the same bits."""
    here, there = (training(offloaded, *args, **options) for offloaded in (False, True))
    for each in (here, there):
        loop(each)
    assert_same(here.snapshot(), there.snapshot())


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_bits_are_those_of_the_ordinary_step(base, dtype):
    both(lambda each: each.run(STEPS), base, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"optim_bits": 8},
        {"optim_bits": 16, "x_ref_every": 8},
        {"max_grad_norm": 0.5},
        {"scale_per": "parameter"},
        {"implementation": "reference"},
    ],
    ids=str,
)
def test_options_change_nothing_of_that(options):
    both(lambda each: each.run(STEPS), shapes=((128, 128), (7,)), **options)


class Net(torch.nn.Module):
    """Layers one after the other, so that the backward pass goes from the last to the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def train(opt, net, steps=STEPS, first=0):
    for t in range(first, first + steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
        loss = (net(x) - 1).square().mean()
        loss.backward()
        opt.step(loss=loss)
        opt.zero_grad()


def released(offloaded, **options):
    net = Net()
    opt = MechanicAdamW(net.parameters(), lr=1.0, offload=offloaded, **options)
    opt.release_gradients()
    return opt, net


@pytest.mark.parametrize("options", [{}, {"optim_bits": 8}, {"scale_per": "parameter"}], ids=str)
def test_released_gradients_have_the_bits_of_released_gradients(options):
    runs = [released(offloaded, **options) for offloaded in (True, False)]
    for opt, net in runs:
        train(opt, net)
    assert_same(*(snapshot(opt) for opt, _ in runs))


def test_the_state_is_on_the_host_and_the_gradients_are_freed():
    opt, net = released(True)
    train(opt, net, 1)
    (net(torch.ones(1, 8))).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    opt.step()
    assert {t.device.type for p in opt.state.values() for t in p.values()} == {"cpu"}


def test_weights_are_stepped_while_the_backward_pass_goes_on(monkeypatch):
    """The gradient of the first layer waits until the weight of the last has been stepped."""
    opt, net = released(True)
    train(opt, net, 1)
    last, stepped, threads = net.layers[-1].weight, threading.Event(), set()
    step_bucket = StepPlan.step_bucket

    def note(plan, bucket):
        step_bucket(plan, bucket)
        if bucket.parameters[0] is last:
            threads.add(threading.current_thread())
            stepped.set()

    monkeypatch.setattr(StepPlan, "step_bucket", note)
    seen = []
    hidden = net.layers[0](torch.ones(4, 8))
    hidden.register_hook(lambda _: seen.append(stepped.wait(60)))
    for layer in net.layers[1:]:
        hidden = layer(hidden.relu())
    hidden.sum().backward()
    assert seen == [True]
    assert len(threads - {threading.current_thread()}) == 1
    opt.step()


def test_what_still_needs_a_stepped_weight_raises():
    """As where the weight is written at once: a second backward pass through the old one."""
    opt, net = released(True)
    train(opt, net, 1)
    loss = net(torch.ones(4, 8)).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_needs_it_in_the_same_backward_pass_raises_too():
    """As where the weight is written at once, though here that may come later."""
    weight, before = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    opt = MechanicSGD([weight], lr=1.0, s_init=0.1, offload=True)
    opt.release_gradients()
    hidden = before * weight.detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (hidden @ weight).sum().backward()
    opt.zero_grad()


def test_an_error_in_the_thread_is_raised_by_the_step_until_gradients_are_dropped(monkeypatch):
    opt, net = released(True)
    train(opt, net, 1)
    step_bucket, done = StepPlan.step_bucket, []

    def fail(plan, bucket):
        done.append(bucket)
        if len(done) == 2:
            raise MemoryError("no room")
        step_bucket(plan, bucket)

    monkeypatch.setattr(StepPlan, "step_bucket", fail)
    net(torch.ones(4, 8)).sum().backward()
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            opt.step()
        assert len(done) == len(list(net.parameters()))
    opt.zero_grad()
    train(opt, net, 1)


WRITES = {
    "in place": lambda p: p.mul_(0.5),
    "through data": lambda p: p.data.clamp_(-0.1, 0.1),
    "through a view": lambda p: p.detach().view(-1)[:2].zero_(),
    "moved": lambda p: setattr(p, "data", p.data.clone() * 0.5),
    "rows in another order": lambda p: p.copy_(p.flip(0).clone()),
    "rows in another order, through data": lambda p: p.data.copy_(p.data.flip(0)),
    "of another sign, through data": lambda p: p.data.neg_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("release", [False, True])
def test_what_others_write_to_weights_is_taken(write, release):
    runs = []
    for offloaded in (True, False):
        opt, net = released(offloaded) if release else (None, Net())
        opt = opt or MechanicAdamW(net.parameters(), lr=1.0, offload=offloaded)
        for t in range(STEPS):
            train(opt, net, 1, t)
            if t in (2, 3, 6):
                with torch.no_grad():
                    for p in list(net.parameters())[t % 2 :: 2]:
                        WRITES[write](p)
        runs.append((opt, net))
    assert_same(*(snapshot(opt) for opt, _ in runs))


def test_weights_that_are_loaded_before_the_first_gradient_are_the_start():
    """Also one that gets no gradient in the first step."""

    def loop(each):
        each.opt.step()
        for p in each.params:
            p.data.add_(1)
        cases.set_gradients(each.params, 0)
        each.params[0].grad = None
        each.opt.step()
        each.run(STEPS)

    both(loop)


@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_state_that_is_dropped_starts_from_what_was_written_since(has_gradient):
    def loop(each):
        each.run(1)
        each.opt.state.pop(each.params[0])
        with torch.no_grad():
            each.params[0].mul_(0.5)
        cases.set_gradients(each.params, 1)
        if not has_gradient:
            each.params[0].grad = None
        each.opt.step()
        each.run(STEPS)

    both(loop)


def test_so_are_those_loaded_before_the_first_released_gradient():
    runs = [released(offloaded) for offloaded in (True, False)]
    for opt, net in runs:
        opt.step()
        for p in net.parameters():
            p.data.add_(0.1)
        train(opt, net)
    assert_same(*(snapshot(opt) for opt, _ in runs))


def test_weights_may_have_no_gradient_for_a_while():
    def loop(each):
        for t in range(STEPS):
            cases.set_gradients(each.params, t)
            for p in each.params[t % 3 :: 3]:
                p.grad = None
            each.opt.step()

    both(loop)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t(),
        lambda x: torch.empty_strided(x.shape, (2 * x.stride(0), 2)).copy_(x),
        lambda x: x[None, :, :, None].contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "with gaps", "channels last"],
)
@pytest.mark.parametrize("x_ref_every", [1, 8])
def test_weights_may_have_any_strides(layout, x_ref_every):
    runs = []
    for offloaded in (True, False):
        [x] = make_weights([(96, 128)])
        p = torch.nn.Parameter(layout(x.detach()))
        opt = MechanicAdamW([p], lr=1.0, offload=offloaded, x_ref_every=x_ref_every)
        run(opt, [p], STEPS)
        runs.append(snapshot(opt))
    assert_same(*runs)


def test_gradients_of_another_dtype_or_layout_are_taken():
    runs = []
    for offloaded in (True, False):
        params = make_weights([(4, 6), (5,)])
        opt = MechanicSGD(params, lr=1.0, offload=offloaded)
        for t in range(STEPS):
            cases.set_gradients(params, t)
            params[0].grad = params[0].grad.t().contiguous().t()
            opt.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("saved_offloaded", [True, False])
def test_a_checkpoint_goes_on_with_and_without_offload(saved_offloaded):
    whole = training(not saved_offloaded, optim_bits=8)
    whole.run(2 * STEPS)
    first = training(saved_offloaded, optim_bits=8)
    first.run(STEPS)
    saved = copy.deepcopy(first.opt.state_dict())
    second = training(not saved_offloaded, optim_bits=8, params=first.params)
    second.opt.load_state_dict(saved)
    second.t = STEPS
    second.run(STEPS)
    assert_same(whole.snapshot(), second.snapshot())


def slow(monkeypatch):
    """Let the thread come late."""
    step_bucket = StepPlan.step_bucket

    def later(plan, bucket):
        time.sleep(0.02)
        step_bucket(plan, bucket)

    monkeypatch.setattr(StepPlan, "step_bucket", later)


def test_a_checkpoint_between_backward_and_step_has_what_was_stepped(monkeypatch):
    slow(monkeypatch)
    found = []
    for offloaded in (True, False):
        opt, net = released(offloaded)
        train(opt, net, 2)
        net(torch.ones(4, 8)).sum().backward()
        saved = opt.state_dict()["state"]
        found.append(copy.deepcopy((saved, net.state_dict())))
        opt.step()
    assert {int(entries["step"]) for entries in saved.values()} == {3}
    assert_same(*found)


def test_what_is_written_after_gradients_are_dropped_stays(monkeypatch):
    slow(monkeypatch)
    opt, net = released(True)
    train(opt, net, 2)
    kept = copy.deepcopy(net.state_dict())
    net(torch.ones(4, 8)).sum().backward()
    opt.zero_grad()
    net.load_state_dict(kept)
    time.sleep(0.2)
    assert_same(net.state_dict(), kept)


def test_gradients_on_their_way_are_bounded(monkeypatch, device):
    """The backward pass waits for the oldest."""
    monkeypatch.setattr(offload, "PART", 3 * 8 * 8 * 4)
    opt, net = released(True)
    train(opt, net, 1)
    most, begin = [], offload.HostCopy.begin
    under_way = opt._run.offload._under_way

    def note(host_copy, g):
        most.append(sum(each.gradient.nbytes for each in under_way))
        return begin(host_copy, g)

    monkeypatch.setattr(offload.HostCopy, "begin", note)
    monkeypatch.setattr(offload.PinnedCopy, "begin", note)
    if device == "cpu":
        net(torch.ones(4, 8)).sum().backward()
        assert 0 < max(most) <= 3 * 8 * 8 * 4
        opt.step()


def test_a_dropped_optimizer_frees_its_state():
    opt, net = released(True)
    train(opt, net, 1)
    held = weakref.ref(opt._run.offload)
    state = weakref.ref(next(iter(opt.state.values()))["x_ref"])
    del opt
    gc.collect()
    assert held() is None
    assert state() is None
    net(torch.ones(4, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_has_a_thread_of_its_own():
    opt, net = released(True)
    train(opt, net, 1)
    torch.set_num_threads(1)  # those of OpenMP are not there after a fork
    child = os.fork()
    if child == 0:
        train(opt, net, 1)
        os._exit(7)
    deadline = time.monotonic() + 60
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if found == (0, 0):
        os.kill(child, 9)
    assert os.waitstatus_to_exitcode(found[1]) == 7


@pytest.mark.parametrize("how", ["group", "checkpoint"])
def test_an_option_without_a_fused_update_is_refused_when_it_comes(how):
    each = training(True)
    each.run(2)
    before = each.snapshot()
    expected = "offload=True needs a fused update, got amsgrad=True"
    if how == "group":
        each.group["amsgrad"] = True
        with pytest.raises(ValueError, match=expected):
            each.run(1)
        each.group["amsgrad"] = False
    else:
        saved = torch.optim.AdamW(make_weights(SHAPES), amsgrad=True).state_dict()
        with pytest.raises(ValueError, match=expected):
            each.opt.load_state_dict(saved)
    assert_same(each.snapshot(), before)
    each.run(1)


def test_it_says_what_steps():
    with torch._subclasses.FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(64, 64, device="cuda"))
        opt = MechanicAdamW([p], offload=True, backend="reference")
    assert opt.implementation == "fused (reference)"


def test_offload_and_none_do_not_step_together():
    params = make_weights([(4, 6), (5,)])
    opts = [MechanicSGD([p], lr=1.0, offload=i == 0) for i, p in enumerate(params)]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="must all have offload=True or none"):
        step_together(opts)


def test_a_checksum_makes_no_copy_of_the_weight():
    x = torch.randn(1 << 20, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        offload.checksum(x)
    made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert made < x.nbytes / 8


def test_a_copy_goes_on_alone():
    here = training(True)
    here.run(STEPS)
    net = torch.nn.ParameterList(here.params)
    both = copy.deepcopy((net, here.opt))
    there = training(True, params=list(both[0]))
    there.opt, there.t = both[1], here.t
    before = [p.clone() for p in here.params]
    there.run(STEPS)
    assert all(torch.equal(p, x) for p, x in zip(here.params, before, strict=True))
    here.run(STEPS)
    for p, q in zip(here.params, there.params, strict=True):
        assert torch.equal(p, q)


def test_a_weight_may_be_replaced_and_a_group_may_join():
    def loop(each):
        each.run(STEPS)
        old = each.params[0]
        rows = torch.arange(32).flip(0)
        each.params[0] = torch.nn.Parameter(old.detach()[rows].clone())
        each.opt.replace_parameter(old, each.params[0], rows)
        each.params += make_weights([(7, 2)])
        each.opt.add_param_group({"params": each.params[-1:]})
        each.run(STEPS)
        each.opt.reset_scale()
        each.run(STEPS)

    both(loop)


def test_parts_of_a_model_step_together():
    runs = []
    for offloaded in (True, False):
        params = make_weights([(4, 6), (5,)])
        opts = [MechanicSGD([p], lr=1.0, s_init=0.1, offload=offloaded) for p in params]
        for t in range(STEPS):
            cases.set_gradients(params, t)
            step_together(opts)
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


def test_weights_are_stepped_in_parts_while_others_are_copied(monkeypatch):
    """Their sums are added in another order."""
    monkeypatch.setattr(offload, "PART", WEIGHT)
    monkeypatch.setattr("mechanic_fused.plan.PART", WEIGHT)
    shapes = ((64, 96), (64, 96), (32, 96), (32, 96), (5,))
    there, here = (training(offloaded, shapes=shapes) for offloaded in (True, False))
    for each in (there, here):
        each.run(STEPS)
    sizes = [len(bucket.weights) for bucket in there.opt.plan_step().buckets]
    assert sizes == [1, 1, 2, 1]
    torch.testing.assert_close(there.opt.scale, here.opt.scale, rtol=1e-9, atol=0)
    for p, q in zip(there.params, here.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_grad_scaler_unscales_and_skips():
    net = Net()
    opt = MechanicAdamW(net.parameters(), lr=1.0, offload=True, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(opt, net, 2)
    before = [p.clone() for p in net.parameters()]
    for bad in (True, False):
        scaler.scale(net(torch.ones(4, 8)).square().mean()).backward()
        if bad:
            net.layers[0].weight.grad[0] = torch.inf
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        same = [torch.equal(p, x) for p, x in zip(net.parameters(), before, strict=True)]
        assert all(same) if bad else not any(same)


def test_memory_under_fake_tensors_is_the_hosts():
    with torch._subclasses.FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(64, 64, device="cuda"))
        opt = MechanicAdamW([p], offload=True)
        p.grad = torch.empty_like(p)
        opt.step()
        assert {t.device.type for t in opt.state[p].values()} == {"cpu"}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda ps: MechanicAdamW(ps, offload=1.5), "offload must be one of True, False, got 1.5"),
        (
            lambda ps: MechanicAdamW(ps, offload=True, variant="optax"),
            "needs variant='running', whose S is known before the step, got 'optax'",
        ),
        (
            lambda ps: MechanicAdamW(ps, offload=True, amsgrad=True),
            "offload=True needs a fused update, got amsgrad=True has no fused update",
        ),
        (
            lambda ps: MechanicAdamW(ps, offload=True, backend="cuda"),
            "expected backend='auto', 'cpp' or 'reference', got 'cuda'",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, expected, monkeypatch):
    monkeypatch.setattr("mechanic_fused.backends._missing", lambda name: "")
    with pytest.raises(ValueError, match=re.escape(expected)):
        make(make_weights())


def test_a_flat_weight_of_fsdp1_is_refused():
    [p] = make_weights([(5,)])
    p._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"got a FSDP1 weight .*cpu_offload=CPUOffload"):
        MechanicAdamW([p], offload=True)


def test_classes_without_a_fused_update_do_not_have_it():
    with pytest.raises(ValueError, match="offload=True needs a fused update"):
        RADAM(make_weights(), offload=True)
    mechanize(torch.optim.AdamW)(make_weights(), offload=True)
