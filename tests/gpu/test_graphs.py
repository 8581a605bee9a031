"""CUDA graphs: replays come to the bits of steps outside a graph. All of it needs a GPU."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from support.cases import EXACT, FUSED, QUICK, RUNNING, STEPS, assert_same
from support.kernels import READ_ON_DEVICE, gpu_kernels
from support.lockstep import copied, random_gradient

from mechanic_fused import MechanicAdamW
from mechanic_fused.backends.device_tables import SPARES

GPU = "cuda"
WARM_UP = 3
# A start from which a small network learns for STEPS steps without its loss growing.
GENTLE = {"s_init": 1e-3}
DEFAULTS = {"weight_decay": 0.1, "variant": EXACT, **QUICK}
# A replay may err at most twice as much, beside float64, as the same operations outside the graph.
WIDTH_FACTOR = 2

pytestmark = [
    pytest.mark.gpu,
    # What torch says of its own prototypes: a refused capture, deterministic operations.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(params=READ_ON_DEVICE)
def backend(request, monkeypatch):
    return gpu_kernels(request.param, monkeypatch).name


@pytest.fixture
def example():
    """examples/cuda_graph.py as a module."""
    path = Path(__file__).resolve().parents[2] / "examples" / "cuda_graph.py"
    spec = importlib.util.spec_from_file_location("cuda_graph", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, generator=rng, dtype=torch.float64) for n in (5, 1025, 0, 70000)]
    params = [torch.nn.Parameter(x.to(GPU, dtype)) for x in drawn]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def fill(params, t):
    """Put a step's gradients where a graph reads them."""
    for i, p in enumerate(params):
        p.grad.copy_(random_gradient(p, t, i))


def outside(run):
    """Run on a side stream, as what comes before a capture should."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def captured(run):
    """Return a function that replays ``run``, which is recorded and not run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Pair:
    """The same optimizer twice: one that is captured after a few steps, one that never is."""

    def __init__(self, backend, steps=1, dtype=torch.float32, base="adamw", **options):
        self.params, self.others = weights(dtype), weights(dtype)
        self.opt, self.other = (
            FUSED[base](params, backend=backend, **{**DEFAULTS, **options})
            for params in (self.params, self.others)
        )
        self.steps = steps
        outside(lambda: [self.eager(t, self.opt, self.params) for t in range(WARM_UP)])
        for t in range(WARM_UP):
            self.eager(t, self.other, self.others)
        self.replay = captured(lambda: [self.opt.step() for _ in range(steps)])

    def eager(self, t, opt, params, steps=1):
        fill(params, t)
        for _ in range(steps):
            opt.step()

    def check(self, t):
        """Replay with the gradients of step t, and compare."""
        fill(self.params, t)
        self.replay()
        self.eager(t, self.other, self.others, self.steps)
        assert_same(copied(self.opt, self.params), copied(self.other, self.others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [EXACT, RUNNING])
@pytest.mark.parametrize("base", ["adamw", "sgd", "lion"])
def test_replays_have_the_bits_of_steps_outside_a_graph(backend, base, variant, dtype):
    pair = Pair(backend, dtype=dtype, base=base, variant=variant)
    for t in range(WARM_UP, STEPS):
        pair.check(t)


def test_a_narrow_delta_is_rounded_by_other_bits_in_each_replay(backend):
    pair = Pair(backend, base="sgd", delta_dtype=torch.bfloat16)
    for t in range(WARM_UP, STEPS):
        pair.check(t)


def test_a_step_outside_the_graph_may_come_between_two_replays(backend):
    """Also one whose gradients lie elsewhere: the graph has kept its own addresses."""
    pair = Pair(backend)
    for t in range(WARM_UP, STEPS, 2):
        pair.check(t)
        kept = [p.grad for p in pair.params]
        for p in pair.params:
            p.grad = torch.zeros_like(p)
        for opt, params in ((pair.opt, pair.params), (pair.other, pair.others)):
            pair.eager(t + 1, opt, params)
        for p, g in zip(pair.params, kept, strict=True):
            p.grad = g


@pytest.mark.parametrize("changed", ["lr", "weight_decay", "tune_scale"])
def test_a_changed_number_counts_in_the_next_replay_once_it_is_refreshed(backend, changed):
    pair = Pair(backend)
    for t in range(WARM_UP, STEPS):
        for opt in (pair.opt, pair.other):
            opt.param_groups[0][changed] = t % 2 == 0 if changed == "tune_scale" else 1 / t
        pair.opt.refresh_hyperparameters()
        pair.check(t)


@pytest.mark.parametrize(("variant", "slope"), [("annealed", -1 / 64), ("optax", 1 / 16)])
def test_a_tensor_lr_counts_in_the_next_replay(backend, variant, slope):
    """A rising one only where no peak is known: the host sees a number rise, and not a tensor."""
    pair = Pair(backend, lr=torch.ones((), device=GPU), variant=variant)
    for t in range(WARM_UP, STEPS):
        pair.opt.param_groups[0]["lr"].fill_(1 + slope * t)
        pair.other.param_groups[0]["lr"] = 1 + slope * t
        pair.check(t)


def test_weights_written_between_replays_stay_written_once_it_is_said(backend):
    pair = Pair(backend)
    for t in range(WARM_UP, STEPS):
        with torch.no_grad():
            for p in (*pair.params, *pair.others):
                p.mul_(0.5)
        # No Python runs in a replay that could notice it, as the other's next step does.
        pair.opt.shift_reference()
        pair.check(t)


def test_a_graph_holds_as_many_steps_as_the_docs_say(backend):
    pair = Pair(backend, steps=SPARES)
    for t in range(WARM_UP, STEPS):
        pair.check(t)


def test_a_graph_of_more_steps_is_refused(backend):
    with pytest.raises(RuntimeError, match=f"at most {SPARES} steps"):
        Pair(backend, steps=SPARES + 1)


def test_a_capture_with_changed_hyperparameters_is_refused(backend):
    pair = Pair(backend)
    pair.opt.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="refresh_hyperparameters"):
        captured(pair.opt.step)


class Diary:
    """What stood on the device after each step of a training run: copies."""

    def __init__(self, model, opt):
        self.model, self.opt, self.days = model, opt, []

    def __call__(self, t, seen):
        params = list(self.model.parameters())
        self.days.append(
            {
                "lr": float(self.opt.param_groups[0]["lr"]),
                "batch": (seen.x.clone(), seen.y.clone()),
                "loss": seen.loss.clone(),
                "gradients": [p.grad.clone() for p in params],
                "state": copied(self.opt, params),
            }
        )


def loss_and_gradients(loss_of, model, x, y):
    """As one vector of float64."""
    loss = loss_of(model, x, y)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.double().flatten() for g in (loss.detach(), *found)])


@pytest.mark.parametrize("float_lr", [False, True], ids=["tensor lr", "float lr"])
def test_a_whole_training_step_is_the_same_in_a_graph(backend, example, float_lr):
    """Loss and gradients as near to float64's as outside a graph; from the same gradients, the
    bits of a step outside."""
    torch.manual_seed(0)
    model = example.network(GPU)
    eager = copy.deepcopy(model)
    options = {"weight_decay": 0.01, "backend": backend, **GENTLE}
    lr = 1.0 if float_lr else torch.tensor(1.0, device=GPU)
    opt = MechanicAdamW(model.parameters(), lr=lr, **options)
    diary = Diary(model, opt)
    example.train(model, opt, STEPS, diary)
    assert len(diary.days) == STEPS > example.WARM_UP
    assert len({day["lr"] for day in diary.days}) == STEPS  # the scheduler's

    params = list(eager.parameters())
    other = MechanicAdamW(params, lr=1.0, **options)
    for day in diary.days:
        expected = loss_and_gradients(example.loss_of, eager, *day["batch"])
        wide = loss_and_gradients(
            example.loss_of, copy.deepcopy(eager).double(), *[z.double() for z in day["batch"]]
        )
        parts = (day["loss"], *day["gradients"])
        actual = torch.cat([part.double().flatten() for part in parts])
        assert (actual - wide).norm() <= WIDTH_FACTOR * (expected - wide).norm()
        for p, g in zip(params, day["gradients"], strict=True):
            p.grad = g
        other.param_groups[0]["lr"] = day["lr"]
        other.step()
        assert_same(copied(other, params), day["state"])
    assert float(opt.scale) != float(diary.days[0]["state"][-1][0, 0])


OVERFLOW = 9  # the step, in the graph, whose gradients overflow


def test_grad_scaler_in_a_graph(backend, example):
    """As in docs/cuda-graphs.md: an overflow leaves everything but the loss scale as it was."""
    torch.manual_seed(0)
    model = example.network(GPU)
    eager = copy.deepcopy(model)
    options = {"fused": True, "backend": backend, **GENTLE}
    opt = MechanicAdamW(model.parameters(), lr=torch.tensor(1.0, device=GPU), **options)
    scaler = torch.amp.GradScaler(GPU, init_scale=1024.0, growth_interval=4)
    x = torch.empty(example.BATCH, example.FEATURES, device=GPU)
    y = torch.empty(example.BATCH, 1, device=GPU)
    params, others = list(model.parameters()), list(eager.parameters())
    other = MechanicAdamW(others, lr=1.0, **options)

    def training_step():
        with torch.autocast(GPU, torch.float16, cache_enabled=False):
            loss = torch.nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()

    def advance(t, run):
        """Return the loss scale of the step, its gradients and the state after it."""
        example.fill(x, y)
        if t == OVERFLOW:
            x.fill_(float("inf"))
        scale = scaler.get_scale()
        run()
        return scale, [p.grad.clone() for p in params], copied(opt, params)

    def warm_up():
        for t in range(WARM_UP):
            opt.zero_grad(set_to_none=True)
            days.append(advance(t, training_step))

    days = []
    outside(warm_up)
    opt.zero_grad(set_to_none=True)
    replay = captured(training_step)
    days += [advance(t, replay) for t in range(WARM_UP, STEPS)]

    for t, (scale, gradients, state) in enumerate(days):
        overflows = not all(bool(g.isfinite().all()) for g in gradients)
        assert overflows == (t == OVERFLOW)
        for p, g in zip(others, gradients, strict=True):
            p.grad = g
        other.grad_scale = torch.tensor(scale, device=GPU)
        other.found_inf = torch.tensor(float(overflows), device=GPU)
        other.step()
        assert_same(copied(other, others), state)
    assert_same(days[OVERFLOW][-1], days[OVERFLOW - 1][-1])
    scales = [scale for scale, *_ in days]
    assert scales[OVERFLOW + 1] == scales[OVERFLOW] / 2
    assert max(scales) > scales[0]  # it has grown inside the graph, too
    assert opt.nonfinite_steps == 0
