"""One clear error for each thing that cannot be done, and nothing changed by the attempt."""

import sys

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    QUICK,
    PlainAdamW,
    assert_same,
    build,
    make_weights,
    run,
    set_gradients,
    snapshot,
    values,
)

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, backends, mechanize

# Option → a bad value, and what the message must say: its name, what was expected, what was given.
BAD_OPTIONS = {
    "s_decay": [(-0.5, r"s_decay must be .*0 or more.* -0\.5"), (float("nan"), "s_decay .*nan")],
    "s_init": [
        (0.0, r"s_init must be .*above 0.* 0\.0"),
        (-1.0, r"s_init .*-1\.0"),
        (float("inf"), "s_init .*finite.* inf"),
    ],
    "tuner_eps": [(0.0, r"tuner_eps must be .*above 0.* 0\.0"), (float("nan"), "tuner_eps .*nan")],
    "tuner_betas": [
        ((), r"tuner_betas must be .*\(0, 1\).* \(\)"),
        ((0.9, 1.0), r"tuner_betas must be .*\(0, 1\).*1\.0"),
        ((0.0, 0.9), r"tuner_betas .*0\.0"),
        ((0.9, float("nan")), "tuner_betas .*nan"),
        (0.9, r"tuner_betas .*0\.9"),
    ],
    "variant": [("adam", "variant must be one of .*optax.* 'adam'")],
    "scale": [("layer", "scale must be one of .*parameter.* 'layer'")],
    "backend": [("gpu", "backend must be .*reference.* 'gpu'")],
}
BAD = [(name, value, text) for name, rows in BAD_OPTIONS.items() for value, text in rows]


@pytest.mark.parametrize(("name", "value", "text"), BAD)
def test_a_bad_option_of_the_instance(name, value, text):
    with pytest.raises((ValueError, TypeError), match=text):
        MechanicAdamW(make_weights(), **{name: value})


@pytest.mark.parametrize(("name", "value", "text"), BAD)
def test_a_bad_option_of_the_class(name, value, text):
    named = {"tuner_betas": "betas", "tuner_eps": "eps"}.get(name, name)
    with pytest.raises((ValueError, TypeError), match=text):
        mechanize(torch.optim.AdamW, **{named: value})(make_weights())


@pytest.mark.parametrize("name", ["s_decay", "s_init", "tuner_eps", "tuner_betas"])
def test_a_bad_type_names_the_option(name):
    with pytest.raises((ValueError, TypeError), match=f"{name} must be .*many"):
        MechanicAdamW(make_weights(), **{name: "many"})


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (MechanicAdamW, {"lr": -1.0}, r"[Ll]earning rate.*-1\.0"),
        (MechanicAdamW, {"betas": (1.0, 0.9)}, r"beta.*1\.0"),
        (MechanicSGD, {"nesterov": True}, "[Nn]esterov"),
        (MechanicLion, {"lr": -1.0}, r"lr must be 0 or more.*-1\.0"),
        (MechanicLion, {"betas": (0.9,)}, r"betas must be two .*\(0\.9,\)"),
        (MechanicLion, {"betas": (0.9, 1.0)}, r"betas must be .*1\.0"),
        (MechanicLion, {"weight_decay": -1.0}, r"weight_decay must be 0 or more.*-1\.0"),
    ],
)
def test_a_bad_option_of_the_base(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(make_weights(), **options)


def test_an_option_that_nobody_knows():
    with pytest.raises(TypeError, match="narow_state"):
        MechanicAdamW(make_weights(), narow_state=True)


@pytest.mark.parametrize("make", [MechanicAdamW, MechanicSGD, mechanize(torch.optim.RAdam)])
@pytest.mark.parametrize("how", ["option", "group", "added group"])
def test_differentiable(make, how):
    text = "differentiable must be False"
    if how == "option":
        with pytest.raises(ValueError, match=text):
            make(make_weights(), differentiable=True)
    elif how == "group":
        with pytest.raises(ValueError, match=text):
            make([{"params": make_weights(), "differentiable": True}])
    else:
        params = make_weights()
        opt = make(params, **QUICK)
        run(opt, params, FEW)
        before = snapshot(opt)
        with pytest.raises(ValueError, match=text):
            opt.add_param_group({"params": make_weights(), "differentiable": True})
        assert_same(snapshot(opt), before)


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (torch.nn.Linear, "Base must be a subclass of torch.optim.Optimizer, got .*Linear"),
        (torch.optim.AdamW(make_weights()), "Base must be a subclass of .*got AdamW"),
        (MechanicAdamW, "Base must be a plain optimizer, got MechanicAdamW"),
        (torch.optim.LBFGS, "Base must step without a closure, got LBFGS"),
    ],
)
def test_what_cannot_be_mechanized(base, text):
    with pytest.raises(TypeError, match=text):
        mechanize(base)


# Weights and gradients that cannot be used.


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


MORE_BETAS = tuple(1 - 0.5**n for n in range(1, 12))


@pytest.mark.parametrize("betas", [(0.9,), MORE_BETAS, (1.5,) * 6], ids=["fewer", "more", "bad"])
def test_tuner_betas_changed_in_mid_run(road, betas):
    """The tuner's state has a place for each beta, and kernels trust their number."""
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    before = opt.param_groups[0]["tuner_betas"]
    opt.param_groups[0]["tuner_betas"] = betas
    set_gradients(params, FEW)
    weights, state = values(params), [dict(opt.state[p]) for p in params]
    with pytest.raises(ValueError, match="tuner_betas"):
        opt.step()
    opt.param_groups[0]["tuner_betas"] = before
    assert_same(values(params), weights)
    assert_same([dict(opt.state[p]) for p in params], state)
    run(opt, params, 1, first=FEW)


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


# Backends


@pytest.mark.parametrize("name", ["cpp", "cuda", "triton"])
def test_a_backend_that_is_not_here_says_what_to_install(name):
    row = next(row for row in backends.table() if row.name == name)
    if row.available:
        pytest.skip(f"{name} is available here")
    with pytest.raises(ValueError, match=f"backend '{name}' is not available: .*install"):
        MechanicAdamW(make_weights(), backend=name)


def test_without_the_extension_auto_is_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "mechanic_fused._native", None)
    monkeypatch.delitem(sys.modules, "mechanic_fused.native", raising=False)
    with pytest.raises(ValueError, match="backend 'cpp' is not available: .*compiler"):
        MechanicAdamW(make_weights(), backend="cpp")
    params = make_weights()
    opt = MechanicAdamW(params, **QUICK)
    run(opt, params, FEW)
    assert opt.road == "fused: reference"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_the_backend_does_not_serve(cpp, device):
    with pytest.raises(ValueError, match=f"backend 'cpp' serves weights on cpu, got .*{device}"):
        backends.resolve(cpp, device)


@pytest.mark.parametrize("make", [*FUSED.values(), mechanize(PlainAdamW)])
def test_an_optimizer_over_nothing_is_torchs_error(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
