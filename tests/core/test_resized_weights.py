"""Weights that grow and shrink in mid-run, as points that are split, cloned and pruned do."""

import copy

import pytest
import torch
from support.cases import values

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize

ROWS, STEPS = 6, 15
IDENTITY = torch.arange(ROWS)
MAKERS = {
    "AdamW": lambda ps: MechanicAdamW(ps, weight_decay=0.01),
    "AdamW, reference": lambda ps: MechanicAdamW(ps, backend="reference"),
    "annealed": lambda ps: MechanicAdamW(ps, variant="annealed"),
    "optax": lambda ps: MechanicAdamW(ps, variant="optax"),
    "bfloat16": lambda ps: MechanicAdamW(ps),
    "a scale a weight": lambda ps: MechanicAdamW(ps, scale_per="parameter"),
    "SGD": lambda ps: MechanicSGD(ps, momentum=0.9),
    "Lion": lambda ps: MechanicLion(ps),
    "RAdam": lambda ps: mechanize(torch.optim.RAdam)(ps, lr=1.0),
}


def _started(name, steps=STEPS):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((ROWS, 3), (4,))]
    opt = MAKERS[name](weights)
    _step(weights, opt, steps)
    return weights, opt


def _step(weights, opt, steps=STEPS):
    for _ in range(steps):
        for p in weights:
            p.grad = torch.sin(3 * p.detach().float()).to(p.dtype)
        opt.step()


def _replace(weights, opt, index_map):
    old = weights[0].detach()
    rows = [old[i] if i >= 0 else torch.full_like(old[0], 0.5) for i in index_map.tolist()]
    new = torch.nn.Parameter(torch.stack(rows) if rows else old[:0].clone())
    opt.replace_parameter(weights[0], new, index_map)
    return [new, weights[1]]


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_rows_go_on_to_the_bit(name):
    weights, opt = _started(name)
    _step(weights, opt)
    mapped, other = _started(name)
    mapped = _replace(mapped, other, IDENTITY)
    _step(mapped, other)
    assert all(map(torch.equal, values(mapped), values(weights)))
    assert torch.equal(other.scale, opt.scale)


@pytest.mark.parametrize("name", MAKERS)
def test_rows_in_another_order_go_on_as_they_were(name):
    """Sums are added in another order, so S differs in its last bits."""
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    weights, opt = _started(name)
    _step(weights, opt)
    mapped, other = _started(name)
    mapped = _replace(mapped, other, order)
    _step(mapped, other)
    tolerance = 1e-2 if name == "bfloat16" else 1e-4
    torch.testing.assert_close(mapped[0], weights[0][order], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "index_map", [[0, 1, 2, 3, 4, 5, -1, -1], [1, 3], [2, 2, 2, -1, 5], [], [-1]], ids=str
)
def test_grown_and_pruned_weights_go_on(name, index_map):
    weights, opt = _started(name)
    scale = opt.scale.clone()
    index_map = torch.tensor(index_map, dtype=torch.int64)
    old = copy.deepcopy(dict(opt.state[weights[0]]))
    mapped = _replace(weights, opt, index_map)
    assert torch.equal(opt.scale, scale)
    kept = index_map >= 0
    for entry, value in opt.state[mapped[0]].items():
        if not torch.is_tensor(value) or old[entry].shape != (ROWS, 3):
            assert value == old[entry]
            continue
        assert torch.equal(value[kept], old[entry][index_map[kept]]), entry
        wanted = mapped[0].detach() if entry == "x_ref" else torch.zeros_like(value)
        assert torch.equal(value[~kept], wanted[~kept]), entry
    before = values(mapped)
    _step(mapped, opt, 3)
    for p, was in zip(mapped, before, strict=True):
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, was)
    opt.load_state_dict(opt.state_dict())


def test_a_row_whose_values_changed_stays_where_it_was_put_in_the_exact_forms():
    weights, opt = _started("optax")
    new = torch.nn.Parameter(weights[0].detach() + 10)
    opt.replace_parameter(weights[0], new, IDENTITY)
    put = new.detach().clone()
    _step([new, weights[1]], opt, 1)
    assert (new - put).abs().max() < 1


def test_an_x_ref_that_is_kept_in_part_starts_anew():
    old = torch.nn.Parameter(torch.randn(9000, 2))
    opt = MechanicAdamW([old], x_ref_every=8)
    _step([old], opt, 3)
    index_map = torch.cat([torch.arange(4500), torch.full((4600,), -1)])
    new = torch.nn.Parameter(torch.randn(9100, 2))
    opt.replace_parameter(old, new, index_map)
    _step([new], opt, 3)
    assert opt.state[new]["x_ref"].numel() < new.numel() / 7


def test_released_gradients_of_the_new_weight_are_taken():
    weights = [torch.nn.Parameter(torch.ones(3, 2))]
    opt = MechanicAdamW(weights)
    opt.release_gradients()
    (weights[0] ** 2).sum().backward()
    opt.step()
    new = torch.nn.Parameter(torch.ones(5, 2))
    opt.replace_parameter(weights[0], new, torch.tensor([0, 1, 2, -1, -1]))
    for _ in range(3):
        (new**2).sum().backward()
        opt.step()
    assert new.grad is None
    assert (new < 1).all()


@pytest.mark.parametrize(
    ("new", "index_map", "error"),
    [
        (torch.ones(6, 4), IDENTITY, r"expected the shape \(rows, 3\)"),
        (torch.ones(6, 3).double(), IDENTITY, r"torch.float64"),
        (torch.ones(()), IDENTITY, r"rows"),
        (torch.ones(5, 3), IDENTITY, r"expected \(5,\) int64, got \(6,\)"),
        (torch.ones(6, 3), IDENTITY.float(), r"got \(6,\) torch.float32"),
        (torch.ones(6, 3), IDENTITY + 1, r"to 5, got 1 to 6"),
        (torch.ones(6, 3), IDENTITY - 2, r"expected -1 .* got -2 to 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(new, index_map, error):
    weights, opt = _started("AdamW")
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=error):
        opt.replace_parameter(weights[0], torch.nn.Parameter(new), index_map)
    assert opt.param_groups[0]["params"] == weights
    assert str(opt.state_dict()) == str(before)


def test_a_weight_that_is_not_here_is_refused():
    weights, opt = _started("AdamW")
    stranger = torch.nn.Parameter(torch.ones(ROWS, 3))
    for old, new in ((stranger, stranger), (weights[0], weights[1])):
        with pytest.raises(ValueError, match="expected an old weight"):
            opt.replace_parameter(old, new, IDENTITY)


@pytest.mark.parametrize("rows", [4, 8])
def test_the_error_of_a_weight_resized_by_hand_names_what_else_there_is(rows):
    weights, opt = _started("AdamW")
    new = torch.nn.Parameter(torch.ones(rows, 3))
    state = opt.state.pop(weights[0])
    state.update(exp_avg=torch.zeros(rows, 3), exp_avg_sq=torch.zeros(rows, 3))
    opt.state[new], opt.param_groups[0]["params"][0] = state, new
    new.grad = torch.ones(rows, 3)
    with pytest.raises(ValueError, match=r"x_ref of shape \(6, 3\).*replace_parameter"):
        opt.step()
    state["x_ref"] = new.detach().clone()
    opt.step()
