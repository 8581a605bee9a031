"""record(): the numbers of the steps, from the device when they are asked for."""

import copy

import numpy as np
import pytest
import torch
from support.cases import make_weights

from mechanic_fused import MechanicAdamW, MechanicSGD, integrations

STEPS = 23


def trained(cls=MechanicAdamW, every=1, capacity=100, losses=True, steps=STEPS, **options):
    """Return an optimizer and what a reader who asks in every step has seen."""
    params = make_weights()
    opt = cls(params, lr=0.5, **options)
    opt.record(every, capacity)
    seen = []
    for t in range(steps):
        opt.param_groups[0]["lr"] = 0.5 * (1 - t / steps)
        for p in params:
            p.grad = p.detach() + 0.1
        loss = sum((p.detach() ** 2).sum() for p in params)
        weights = torch.cat([p.detach().double().reshape(-1) for p in params]).norm()
        seen.append((t + 1, opt.learned_lr()[0], opt.scale[0].item(), loss.item(), weights.item()))
        opt.step(loss=loss if losses else None)
        seen[-1] += (opt.grad_norm.item(),)
    return opt, seen


@pytest.mark.parametrize("reference", ["cpp", "reference"])
def test_it_has_what_a_reader_of_every_step_sees(reference):
    opt, seen = trained(backend=reference)
    found = opt.recording()
    step, rate, scale, loss, weights, gradient = map(np.array, zip(*seen, strict=True))
    assert (found.step == step).all()
    np.testing.assert_allclose(found.effective_lr, rate, rtol=1e-12)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-12)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(found.weight_norm, weights, rtol=1e-6)
    np.testing.assert_allclose(found.grad_norm, gradient, rtol=1e-12)
    assert (found.update_norm > 0).all()
    assert not found.h[:2].any()  # x has not moved before the second step
    assert found.h[2:].all()


def test_every_so_many_steps_and_the_newest_of_them():
    opt, _ = trained(every=5)
    assert opt.recording().step.tolist() == [1, 6, 11, 16, 21]
    opt, _ = trained(every=2, capacity=4)
    assert opt.recording().step.tolist() == [17, 19, 21, 23]
    opt, _ = trained(every=2, capacity=4, steps=3)
    assert opt.recording().step.tolist() == [1, 3]


def test_without_a_loss_it_is_not_a_number():
    opt, _ = trained(losses=False)
    assert np.isnan(opt.recording().loss).all()


def test_the_exact_forms_are_recorded_too():
    opt, _ = trained(MechanicSGD, variant="annealed", losses=False)
    found = opt.recording()
    assert len(found.step) == STEPS
    assert np.isnan(found.update_norm).all()
    assert (found.scale > 0).all()


def test_recording_changes_nothing_and_can_be_stopped():
    opt, _ = trained()
    plain, _ = trained(every=0)
    assert torch.equal(opt.scale, plain.scale)
    with pytest.raises(RuntimeError, match="call record"):
        plain.recording()
    assert copy.deepcopy(opt)._run.recorder is None


@pytest.mark.parametrize(("name", "value"), [("every", -1), ("every", 1.5), ("capacity", 0)])
def test_numbers_out_of_range_are_refused(name, value):
    opt = MechanicSGD(make_weights(), lr=1.0)
    with pytest.raises(ValueError, match=name):
        opt.record(**{name: value})


def test_the_picture_has_losses_and_rates():
    pytest.importorskip("matplotlib").use("Agg")
    figure = trained()[0].plot()
    losses, rates = figure.axes
    assert len(losses.lines[0].get_xdata()) == STEPS
    assert rates.get_yscale() == "log"


def test_an_lr_of_one_element_is_recorded():
    weight = torch.nn.Parameter(torch.ones(3))
    opt = MechanicSGD([weight], lr=torch.tensor([1.0]))
    opt.record(every=1)
    weight.grad = torch.ones(3)
    opt.step()
    assert opt.recording().step.tolist() == [1]


def test_rates_of_an_earlier_lr_are_means_over_known_scales():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = MechanicSGD([{"params": weights}, {"params": []}], lr=1.0, scale_per="parameter")
    weights[0].grad = torch.ones(3)
    opt.step()
    now, before = (integrations.learned_rates(opt, lrs) for lrs in (None, [0.5, 0.5]))
    assert before["effective_lr"] == pytest.approx(0.5 * now["effective_lr"])
    assert before["effective_lr/1"] == 0
