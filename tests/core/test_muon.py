"""Muon without a learning rate: torch's Muon at a frozen scale, by hand and by the fallback."""

import copy
import functools
import gc
import itertools
import re
import weakref

import pytest
import torch
from support.cases import assert_near, assert_same, make_weights, snapshot, values
from torch import nn

from mechanic_fused import MechanicMuon, Muon, mechanize, muon_groups
from mechanic_fused.backends import muon as ops
from mechanic_fused.backends import orthogonalize
from mechanic_fused.backends.orthogonalize import (
    POLAR_EXPRESS,
    QUINTIC,
    adjusted_ratio,
    newton_schulz,
)

MATRICES = ((32, 32), (48, 20), (20, 48), (1, 24), (24, 1), (48, 20))
OTHERS = ((20,), (17, 8), ())
STEPS = 8
LONG = 50
S = 0.02
PlainMuon = type("PlainMuon", (Muon,), {"__module__": __name__})


def groups_of(matrices, others=(), **options):
    found = [{"params": matrices, "use_muon": True, **options}]
    found += [{"params": list(others), "use_muon": False}]
    return [group for group in found if group["params"]]


def made(
    matrices=MATRICES, others=OTHERS, seed=0, dtype=torch.float32, cls=MechanicMuon, **options
):
    params = make_weights((*matrices, *others), dtype, seed)
    n = len(matrices)
    of_group = {k: options.pop(k) for k in ("split_sizes", "maximize") if k in options}
    options.setdefault("ns_dtype", torch.float32)
    return params, cls(groups_of(params[:n], params[n:], **of_group), **options)


def give(params, t):
    rng = torch.Generator().manual_seed(t)
    for p in params:
        g = p.detach().double() + torch.randn(p.shape, generator=rng, dtype=torch.float64)
        p.grad = g.to(p.dtype)


def train(params, *opts, steps=STEPS, first=0, loss=None):
    for t in range(first, first + steps):
        give(params, t)
        for opt in opts:
            opt.step(**({} if loss is None else {"loss": loss}))


@pytest.fixture
def in_full_width(monkeypatch):
    """torch's Muon multiplies in bfloat16 on the CPU too."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t.clone())


# The products


@pytest.mark.parametrize("capabilities", [{}, {"amx_bf16": True}, {"avx512_bf16": True}], ids=str)
def test_products_are_in_bfloat16_where_that_is_fast(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    orthogonalize.multiplies_bfloat16.cache_clear()
    dtype = functools.partial(orthogonalize.product_dtype, torch.device("cpu"))
    fast = torch.bfloat16 if capabilities else torch.float32
    assert dtype(torch.float32, {}) is dtype(torch.float32, {"ns_dtype": None}) is fast
    assert dtype(torch.float32, {"ns_dtype": torch.bfloat16}) is torch.bfloat16
    assert dtype(torch.float32, {"ns_dtype": torch.float32}) is torch.float32
    assert dtype(torch.float64, {"ns_dtype": torch.bfloat16}) is torch.float64
    assert orthogonalize.product_dtype(torch.device("cuda"), torch.float32, {}) is torch.bfloat16
    orthogonalize.multiplies_bfloat16.cache_clear()


def oracle(matrix, coefficients, steps, margin=1.0):
    """Orthogonalize in float64 by the singular values: each goes through the polynomials."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (matrix.double().norm() * margin)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


SHAPES = [(7, 7), (5, 9), (9, 5), (5, 10), (5, 11), (17, 4), (1, 6), (6, 1)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("name", ["torch's", "polar_express"])
@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_matrices_are_orthogonalized_together(rows, columns, name, steps):
    rng = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, rows, columns, generator=rng, dtype=torch.float64)
    chosen, all_of_them, margin = (
        (QUINTIC, (QUINTIC,), 1.0) if name == "torch's" else (name, POLAR_EXPRESS, 1.02)
    )
    expected = [oracle(matrix, all_of_them, steps, margin) for matrix in matrices]
    found = newton_schulz(matrices.clone(), chosen, steps, 1e-7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("singular_values", ["gaussian", "1/i", "1/i²", "geometric", "rank 8"])
@pytest.mark.parametrize("name", ["torch's", "polar_express"])
def test_long_matrices_in_bfloat16_are_rounded_no_worse_than_step_by_step(name, singular_values):
    rows, columns = 96, 320
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    if singular_values != "gaussian":
        i = torch.arange(rows, dtype=torch.float64)
        made = {"1/i": 1 / (1 + i), "1/i²": (1 + i) ** -2, "geometric": 10 ** (-6 * i / rows)}
        s = made.get(singular_values, (i < 8).double())
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ torch.diag(s) @ v
    matrix = matrix.bfloat16()
    chosen, margin = (QUINTIC, 1.0) if name == "torch's" else (name, 1.02)
    of_steps = (QUINTIC,) if name == "torch's" else POLAR_EXPRESS
    x = matrix / (matrix.norm() * margin)
    for step in range(5):
        a, b, c = of_steps[min(step, len(of_steps) - 1)]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    exact = oracle(matrix, of_steps, 5, margin)
    [found] = newton_schulz(matrix[None].clone(), chosen, 5, 1e-7)
    # A few per cent between two ways that round in different places is chance.
    assert (found - exact).norm() < 1.25 * (x - exact).norm()


def test_a_matrix_of_zeros_stays_zero_and_large_and_small_ones_are_alike():
    matrix = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    found = [newton_schulz(size * matrix, QUINTIC, 5, 1e-30) for size in (1e-12, 1.0, 1e12)]
    assert_near(found, [found[1]] * 3, 1e-5)
    assert not newton_schulz(torch.zeros(2, 4, 6), QUINTIC, 5, 1e-7).any()


def test_the_ratios_are_those_of_torch():
    for name, (rows, columns) in itertools.product(
        [None, "original", "match_rms_adamw"], [(4, 4), (12, 3), (3, 12)]
    ):
        expected = torch.optim._muon._adjust_lr(1.0, name, torch.Size((rows, columns)))
        assert adjusted_ratio(name, rows, columns) == expected


# The update


def assert_is_torchs(cls, **options):
    params, opt = made(cls=cls, **options)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    n = len(MATRICES)
    rate = S if cls is MechanicMuon else 1.0
    of_torch = {k: v for k, v in options.items() if k not in ("s_init", "dtype")}
    of_torch = {"adjust_lr_fn": "match_rms_adamw", **of_torch, "lr": options["lr"] * rate}
    adamw = {"betas": (0.9, 0.95), "weight_decay": options.get("weight_decay", 0.1)}
    plain = [
        torch.optim.Muon(others[:n], **of_torch),
        torch.optim.AdamW(others[n:], lr=of_torch["lr"], **adamw),
    ]
    if cls is MechanicMuon:
        opt.freeze_scale()
    for t in range(LONG):
        give(params, t)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        for each in plain:
            each.step()
    # In float32 each weight is rounded once a step by ours and twice by torch.
    wide = params[0].dtype is torch.float64
    assert_near(params, others, 1e-9 if wide else LONG * torch.finfo(torch.float32).eps / 2)
    return params, opt, plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.8},
        {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "weight_decay": 0.0},
        {"eps": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_run_at_a_frozen_scale_is_torchs(in_full_width, options, dtype):
    params, opt, plain = assert_is_torchs(MechanicMuon, lr=0.5, s_init=S, dtype=dtype, **options)
    base = opt.to_base()
    assert type(base) is Muon
    for p in params:
        p.grad = torch.ones_like(p)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    for each, of_torch in zip(base.to_torch(), plain, strict=True):
        for group, other in zip(each.param_groups, of_torch.param_groups, strict=True):
            assert group["lr"] == pytest.approx(other["lr"])
        each.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_the_plain_one_is_torchs_too(in_full_width):
    assert_is_torchs(Muon, lr=0.01)


def test_its_scales_are_those_of_groups_with_the_original_ratio():
    params, opt = made(adjust_lr_fn="original")
    train(params, opt, loss=1.0)
    assert len(opt.scale) == 2
    assert len(set(opt.scale.tolist())) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_ref_every", [1, 8])
def test_the_numbers_are_those_of_the_fallback(dtype, x_ref_every):
    """Which takes u and the sums from what the plain one has done to copies."""
    runs = []
    shapes = {"matrices": (*MATRICES, (96, 128))}
    for cls in (MechanicMuon, mechanize(PlainMuon)):
        params, opt = made(cls=cls, dtype=dtype, lr=1.0, x_ref_every=x_ref_every, **shapes)
        train(params, opt, loss=3.0)
        runs.append((params, opt))
    (params, opt), (others, other) = runs
    assert opt.implementation.startswith("fused")
    assert other.implementation.startswith("fallback")
    tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(opt.scale, other.scale, rtol=tolerance, atol=0)
    assert_near(params, others, tolerance)


def test_batches_have_a_bound_and_change_nothing(monkeypatch):
    batches, sizes = ops.batches, []

    def note(bucket):
        for indices in batches(bucket):
            sizes.append(len(indices))
            yield indices

    monkeypatch.setattr(ops, "batches", note)
    runs = []
    for most, expected in ((1 << 26, 5), (8 * 12 * 2, 2)):
        monkeypatch.setitem(ops.BATCH_ELEMENTS, "cpu", most)
        sizes.clear()
        params, opt = made([(8, 12)] * 5 + [(3, 4)], ())
        train(params, opt)
        runs.append(params)
        assert max(sizes) == expected
    assert_near(*runs, 1e-6)


# Shapes


def test_experts_convolutions_and_fused_projections_are_matrices():
    rng = torch.Generator().manual_seed(0)
    expert, conv, fused = (
        torch.randn(shape, generator=rng) for shape in ((3, 8, 6), (8, 2, 3, 1), (12, 8))
    )
    together = [nn.Parameter(x.clone()) for x in (expert, conv, fused)]
    apart = [*expert.unbind(), conv.flatten(1), *fused.split([4, 4, 4])]
    apart = [nn.Parameter(x.clone()) for x in apart]
    groups = [
        {"params": together[:2], "use_muon": True},
        {"params": together[2:], "use_muon": True, "split_sizes": (4, 4, 4)},
    ]
    one, other = (MechanicMuon(x, s_init=S, ns_dtype=torch.float32) for x in (groups, apart))
    for t in range(STEPS):
        give(together, t)
        grads = [p.grad for p in together]
        parts = [*grads[0].unbind(), grads[1].flatten(1), *grads[2].split([4, 4, 4])]
        for p, g in zip(apart, parts, strict=True):
            p.grad = g.clone()
        one.step()
        other.step()
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-9, atol=0)
    found = [*together[0].unbind(), together[1].flatten(1), *together[2].split([4, 4, 4])]
    assert_near(found, apart, 1e-6)


class Model(nn.Module):
    """An embedding, fused projections, a convolution, experts, adapters, a head, norms."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.table = nn.Embedding(10, 8)
        self.cls_token = nn.Parameter(torch.ones(1, 1, 8))
        self.qkv = nn.Linear(8, 24)
        self.experts = nn.Parameter(torch.ones(2, 8, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.lora_a = nn.Linear(8, 2, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.attention = nn.ModuleDict({"multihead_out": nn.Linear(8, 8, bias=False)})
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def test_the_groups_of_a_model_go_by_shapes_kinds_and_names():
    groups = muon_groups(Model(), lr=0.5)
    names = [[name for name, _ in group["params"]] for group in groups]
    of_muon = ["experts", "qkv.weight", "conv.weight", "attention.multihead_out.weight"]
    assert names[0] == of_muon
    assert [group["use_muon"] for group in groups] == [True, False]
    assert groups[0]["lr"] == 0.5
    assert len(names[1]) == 9
    printed = str(groups).splitlines()
    assert re.fullmatch(r"weight +shape +numbers +stepped by", printed[0])
    assert re.fullmatch(r"experts +2 × 8 × 8 +128 +Muon", printed[1])
    assert len(printed) == 1 + 13
    opt = MechanicMuon(groups)
    assert opt.param_groups[0]["param_names"] == names[0]


def test_the_keys_of_the_authors_package_are_taken():
    params = make_weights(((4, 6), (5,)))
    opt = MechanicMuon(
        [
            {
                "params": params[:1],
                "use_muon": True,
                "lr": 0.02,
                "momentum": 0.9,
                "weight_decay": 0,
            },
            {
                "params": params[1:],
                "use_muon": False,
                "lr": 3e-4,
                "betas": (0.9, 0.99),
                "eps": 1e-9,
            },
        ]
    )
    assert [group["lr"] for group in opt.param_groups] == [0.02, 3e-4]
    train(params, opt, loss=1.0)


# The tuner


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_size_of_the_lr_does_not_matter(scale):
    runs = [made(lr=lr) for lr in (1e-3, 1e-3 * scale)]
    for params, opt in runs:
        train(params, opt, loss=3.0, steps=20)
    (params, opt), (others, other) = runs
    torch.testing.assert_close(other.scale * scale, opt.scale, rtol=1e-4, atol=0)
    assert_near(params, others, 1e-4)


def test_it_learns_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(17, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 17))
    opt = MechanicMuon(muon_groups(model))
    tokens = torch.arange(17)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens), tokens * 3 % 17)
        loss.backward()
        opt.step(loss=loss)
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert opt.scale_source == "loss"


def test_gradients_are_clipped_and_not_updates():
    """As if they had been clipped before; the update of a matrix has the same size as ever."""
    runs = []
    for inside in (True, False):
        params, opt = made(s_init=S, max_grad_norm=0.5 if inside else None)
        for t in range(STEPS):
            give(params, t)
            if not inside:
                nn.utils.clip_grad_norm_(params, 0.5)
            opt.step()
        runs.append(params)
    assert_near(*runs, 1e-5)


# What happens to runs


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_resumes_to_the_bit(bits, dtype):
    options = {"dtype": dtype, "optim_bits": bits, "matrices": ((64, 128), (5, 7))}
    params, opt = made(**options)
    train(params, opt, loss=1.0)
    stored = {32: torch.float32, 16: torch.bfloat16, 8: torch.int8}[bits]
    assert opt.state[params[0]]["momentum_buffer"].dtype is stored
    others, other = made(seed=1, **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    for each in ((params, opt), (others, other)):
        train(*each, first=STEPS)
    assert_same(snapshot(other), snapshot(opt))


def test_released_gradients_leave_the_same_numbers():
    runs = []
    for release in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        opt = MechanicMuon(muon_groups(model), ns_dtype=torch.float32)
        if release:
            opt.release_gradients()
        for t in range(STEPS):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
            loss = (model(x) - 1).square().mean()
            loss.backward()
            opt.step(loss=loss)
            opt.zero_grad()
        runs.append((opt, list(model.parameters())))
    torch.testing.assert_close(runs[0][0].scale, runs[1][0].scale, rtol=1e-9, atol=0)
    assert_near(runs[0][1], runs[1][1], 1e-6)


def test_weights_without_gradients_rest_and_nan_spoils_one_matrix_at_most():
    params, opt = made(s_init=S)
    train(params, opt, steps=2)
    give(params, 2)
    params[0].grad = None
    params[1].grad[3, 4] = torch.nan
    before = values(params)
    opt.step()
    assert torch.equal(params[0], before[0])
    assert all(p.isfinite().all() for p in params)
    assert not any(torch.equal(p, q) for p, q in zip(params[1:], before[1:], strict=True))
    assert opt.nonfinite_steps == 1


def test_odd_layouts_are_stepped_as_matrices():
    [x] = make_weights([(12, 8)])
    plain = nn.Parameter(x.detach().clone())
    runs = [
        plain,
        nn.Parameter(x.detach().t().contiguous().t()),
        nn.Parameter(x.detach().repeat_interleave(2, 1)[:, ::2]),
    ]
    for p in runs:
        opt = MechanicMuon([p], s_init=S, ns_dtype=torch.float32)
        for t in range(STEPS):
            g = torch.randn(12, 8, generator=torch.Generator().manual_seed(t))
            p.grad = g
            opt.step()
    assert_near(runs[1:], [plain, plain], 1e-6)


def test_a_checkpoint_of_torchs_muon_goes_on():
    params = make_weights(((6, 4), (3, 8)))
    plain = torch.optim.Muon(params, lr=0.1)
    train(params, plain, steps=3)
    for cls in (MechanicMuon, Muon):
        opt = cls([nn.Parameter(p.detach().clone()) for p in params])
        opt.load_state_dict(copy.deepcopy(plain.state_dict()))
        own = opt.param_groups[0]["params"]
        for p, q in zip(own, params, strict=True):
            assert_same(opt.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
        train(own, opt, steps=2)
        assert all(p.isfinite().all() for p in own)


def test_the_exact_forms_take_the_fallback():
    params, opt = made(cls=mechanize(Muon), variant="annealed")
    assert opt.implementation == "fallback: variant=annealed has no fused update"
    train(params, opt, steps=3)
    assert all(p.isfinite().all() for p in params)


def test_both_groups_know_their_peaks_and_late_ones_join_at_theirs():
    params, opt = made(lr=1.0)
    train(params, opt, steps=2)
    for group in opt.param_groups:
        group["lr"] = 0.1
    late = make_weights(((4, 4), (3,)))
    opt.add_param_group({"params": late[:1], "lr": 0.1})
    opt.add_param_group({"params": late[1:], "lr": 0.1, "use_muon": False})
    assert [group["peak_lr"] for group in opt.param_groups] == [1.0] * 4


def test_nothing_of_a_step_is_kept():
    params, opt = made(((64, 64),) * 4, ())
    train(params, opt, steps=2)
    [bucket] = opt._plan.buckets
    for parts in bucket.backend._parts.values():
        assert all(g is None for part in parts.values() for g in part.grads)


def test_a_dropped_optimizer_needs_no_garbage_collection():
    params, opt = made()
    train(params, opt, steps=2)
    plan = weakref.ref(opt._plan)
    gc.disable()
    try:
        del opt
        assert plan() is None
    finally:
        gc.enable()


def test_options_that_become_wrong_raise_before_anything_changes():
    params, opt = made(((6, 4),), (), split_sizes=[2, 4])
    assert opt.param_groups[0]["split_sizes"] == (2, 4)
    train(params, opt, steps=2)
    before = snapshot(opt)
    for name, value in (("split_sizes", (2, 3)), ("momentum", 2.0), ("ns_steps", 0)):
        kept = opt.param_groups[0][name]
        opt.param_groups[0][name] = value
        give(params, 2)
        with pytest.raises(ValueError, match=name):
            opt.step()
        opt.param_groups[0][name] = kept
        assert_same(snapshot(opt), before)
    train(params, opt, steps=1)


def test_options_that_stay_are_not_read_again():
    params, opt = made(split_sizes=None)
    train(params, opt, steps=2)
    assert not opt.plan_step().settings_changed


def test_groups_can_be_printed_when_an_optimizer_has_them():
    groups = muon_groups(Model())
    before = str(groups)
    MechanicMuon(groups)
    assert str(groups) == before


# What is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"momentum": 1.0}, "momentum must lie in [0, 1), got 1.0"),
        ({"ns_steps": 0}, "ns_steps must be 1 to 99, got 0"),
        ({"ns_steps": 100}, "ns_steps must be 1 to 99, got 100"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers"),
        ({"ns_coefficients": "cubic"}, "three numbers or 'polar_express', got 'cubic'"),
        ({"maximize": True}, "maximize must be False"),
        ({"ns_dtype": torch.float16}, "ns_dtype must be None, torch.bfloat16 or torch.float32"),
        ({"adjust_lr_fn": "mine"}, "adjust_lr_fn must be None, original or match_rms_adamw"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        (
            {"split_sizes": (3, 3)},
            "expected a sum of 32 for a weight of shape (32, 32), got (3, 3)",
        ),
        ({"others": (), "matrices": ((3,),)}, "as muon_groups(model) has it, got shape (3,)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [MechanicMuon, Muon])
def test_options_out_of_range_are_refused(cls, options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        made(cls=cls, **options)


def test_a_flat_weight_of_fsdp1_is_refused():
    [p] = make_weights([(12,)])
    p._fsdp_flattened = True
    with pytest.raises(
        ValueError, match=r"expected fully_shard .*got a flat weight of shape \(12,\)"
    ):
        MechanicMuon([p])


def test_what_torchs_muon_does_not_have_is_not_handed_to_it():
    for options in ({"ns_coefficients": "polar_express"}, {"split_sizes": (16, 16)}):
        with pytest.raises(ValueError, match="torch's Muon has three ns_coefficients"):
            made(((32, 8),), cls=Muon, **options)[1].to_torch()
    with pytest.raises(ValueError, match=re.escape("two dimensions, got shape (2, 3, 4)")):
        made(((2, 3, 4),), cls=Muon)[1].to_torch()
    assert made((), ((3,),), cls=Muon)[1].to_torch()[0] is None
