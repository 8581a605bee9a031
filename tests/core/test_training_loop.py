"""A loop in plain PyTorch may scale losses, accumulate, clip, and evaluate averaged weights."""

import pytest
import torch
from support.cases import assert_same, build, differs, values
from support.chain_model import LEARNED, ChainModel, batch, loss_of

from mechanic_fused import MechanicAdamW

STEPS, PASSES, LONG = 12, 2, 60
CLIP = 0.1
QUICK = {"s_init": 0.01}


class Loop:
    """Backward passes with autocast and a loss scale, then unscale_, clip and step."""

    def __init__(self, seed=0, scaler=None, dtype=None, clip=CLIP, **options):
        self.model = ChainModel(seed)
        self.opt = MechanicAdamW(self.model.parameters(), lr=1.0, **{**QUICK, **options})
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.dtype, self.clip = dtype, clip

    def advance(self, first, steps, passes=PASSES):
        for t in range(first * passes, (first + steps) * passes, passes):
            for i in range(t, t + passes):
                with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                    loss = self.model(**batch(i))["loss"] / passes
                self.scaler.scale(loss).backward()
            if self.clip:
                self.scaler.unscale_(self.opt)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.scaler.step(self.opt)
            self.scaler.update()
            self.opt.zero_grad()

    def saved(self):
        return {
            "weights": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, saved):
        self.model.load_state_dict(saved["weights"])
        self.opt.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])


@pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["", "clipped"])
@pytest.mark.parametrize("passes", [1, PASSES])
def test_a_loss_scale_changes_no_bit(passes, clip, fused):
    """It is a power of two, so scaling and unscaling are exact."""
    scaled = Loop(scaler=torch.amp.GradScaler("cpu"), clip=clip, fused=fused)
    plain = Loop(clip=clip, fused=fused)
    for loop in (scaled, plain):
        loop.advance(0, STEPS, passes)
    assert scaled.scaler.get_scale() > 1
    assert_same(scaled.model.state_dict(), plain.model.state_dict())
    assert_same(scaled.opt.state_dict(), plain.opt.state_dict())


def test_each_option_reaches_the_weights():
    """Or the tests around would show nothing."""
    found = []
    for passes, clip, dtype in [(1, None, None), (2, None, None), (1, CLIP, None)] + [
        (1, None, dtype) for dtype in (torch.bfloat16, torch.float16)
    ]:
        loop = Loop(clip=clip, dtype=dtype)
        loop.advance(0, STEPS, passes)
        found.append(loop.model.state_dict())
    assert all(differs(one, other) for i, one in enumerate(found) for other in found[:i])


@pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])
def test_float16_autocast_learns_through_overflows_and_resumes_to_the_bit(tmp_path, fused):
    """The loss scale is far too large at first, so the first steps are skipped."""
    options = {"dtype": torch.float16, "clip": 1.0, "fused": fused}
    loop = Loop(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**24), **options)
    before = loss_of(loop.model)
    loop.advance(0, STEPS)
    assert loop.scaler.get_scale() < 2.0**24
    torch.save(loop.saved(), tmp_path / "run.pt")
    loop.advance(STEPS, LONG)
    assert loss_of(loop.model) <= LEARNED * before
    assert loop.opt.nonfinite_steps == 0

    other = Loop(seed=1, scaler=torch.amp.GradScaler("cpu"), **options)
    other.load(torch.load(tmp_path / "run.pt", weights_only=True))
    other.advance(STEPS, LONG)
    assert_same(other.saved(), loop.saved())


# Averaged weights: ways to swap them in for an evaluation, and the weights back


def copied(model, weights):
    with torch.no_grad():
        for p, x in zip(model.parameters(), weights, strict=True):
            p.copy_(x)


def loaded(model, weights):
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))


def through_data(model, weights):
    for p, x in zip(model.parameters(), weights, strict=True):
        p.data.copy_(x)


def exchanged(model, weights):
    for p, x in zip(model.parameters(), weights, strict=True):
        p.data = x


def by_parameters(model, weights):
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(weights), model.parameters()
    )


SWAPS = (copied, loaded, through_data, exchanged, by_parameters)


def averaged_run(implementation, swap):
    """Train, keep an exponential average and, given a swap, evaluate it after every step."""
    model = ChainModel()
    opt = build(implementation, "adamw", model.parameters(), **QUICK)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
    for t in range(STEPS):
        opt.zero_grad()
        model(**batch(t))["loss"].backward()
        opt.step()
        average.update_parameters(model)
        if swap:
            kept = [p.detach().clone() for p in model.parameters()]
            swap(model, values(average.module.parameters()))
            assert loss_of(model) == loss_of(average.module)
            swap(model, kept)
    assert differs(values(average.module.parameters()), values(model.parameters()))
    return [*values(model.parameters()), opt.state_dict(), *values(average.module.parameters())]


@pytest.mark.parametrize("swap", SWAPS)
def test_evaluating_an_average_changes_no_bit_of_the_run(implementation, swap):
    assert_same(averaged_run(implementation, swap), averaged_run(implementation, None))
