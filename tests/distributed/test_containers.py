"""Containers that hold optimizers for the parts of a model, or lend one its weights for a step.

What torchtitan 0.3 and DeepSpeed 0.19 do is imitated; neither is installed.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import sharding
from support.cases import assert_same, differs
from support.sharding import STEPS, SUMS_BYTES, Collectives, assert_agrees, batch, loss_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from mechanic_fused import MechanicAdamW, step_together

HALF = STEPS // 2
OPTIONS = {"lr": 1.0, "weight_decay": 0.1, **sharding.OPTIONS}

# torchtitan: an optimizer for each part, named groups, a dry step, a flat state dict


def named_groups(part):
    """Return groups as torchtitan makes them by patterns: the implementation stands in each."""
    groups = []
    for is_matrix in (True, False):
        named = {n: p for n, p in part.named_parameters() if (p.ndim > 1) is is_matrix}
        group = {"params": list(named.values()), "param_names": list(named)}
        groups.append({**group, "fused": True, "foreach": False})
    return groups


class Container:
    """An optimizer for each part of a model, with one scale for all, and one flat state dict."""

    def __init__(self, parts):
        self.parts = parts
        self.optimizers = [MechanicAdamW(named_groups(part), **OPTIONS) for part in parts]

    def step(self):
        step_together(self.optimizers)
        for opt in self.optimizers:
            opt.zero_grad()

    def make_state(self):
        """Take the dry step by which a container gets entries to read or to fill."""
        if self.optimizers[0].state:
            return
        groups = [group for opt in self.optimizers for group in opt.param_groups]
        for group in groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.step()
        for group in groups:
            group["lr"] = OPTIONS["lr"]

    def named(self):
        """Yield (optimizer, group, its options, names and weights)."""
        self.make_state()
        for opt in self.optimizers:
            for group in opt.param_groups:
                options = [name for name in group if name not in ("params", "param_names")]
                pairs = zip(group["param_names"], group["params"], strict=True)
                yield opt, group, options, list(pairs)

    def state_dict(self):
        flat = {}
        for opt, group, options, pairs in self.named():
            for name, p in pairs:
                flat |= {f"state.{name}.{k}": value for k, value in opt.state[p].items()}
                flat |= {f"param_groups.{name}.{k}": group[k] for k in options}
        return flat

    def load_state_dict(self, flat):
        """Load; the options of a group are those of its first weight."""
        loaded = {opt: {"state": {}, "param_groups": []} for opt in self.optimizers}
        for opt, _, options, pairs in self.named():
            state, groups = loaded[opt].values()
            first = len(state)
            for i, (name, p) in enumerate(pairs, first):
                state[i] = {k: flat[f"state.{name}.{k}"] for k in opt.state[p]}
            group = {k: flat[f"param_groups.{pairs[0][0]}.{k}"] for k in options}
            groups.append({"params": list(range(first, len(state))), **group})
        for opt, state_dict in loaded.items():
            opt.load_state_dict(state_dict)


class FlattenedByTorch(Container):
    """The same, flattened by torch.distributed.checkpoint."""

    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self):
        pairs = zip(self.parts, self.optimizers, strict=True)
        states = [get_optimizer_state_dict(*pair, options=self.flat) for pair in pairs]
        return {name: value for state in states for name, value in state.items()}

    def load_state_dict(self, flat):
        for part, opt in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, opt, flat, options=self.flat)


def make(sharded, container=Container):
    net = sharding.model()
    parts = [
        nn.ModuleDict({"embedding": net.embedding, "norm": net.norm}),
        nn.ModuleDict({"up": net.up, "down": net.down, "gain": net.gain, "head": net.head}),
    ]
    if sharded:
        for module in net.children():
            fully_shard(module, mesh=sharding.flat_mesh())
    return net, container(parts)


def train(net, container, first, steps):
    for t in range(first, first + steps):
        loss_of(net, batch(t)).backward()
        container.step()


def contained_run(folder=None, sharded=True, container=Container, reads_state=False):
    """Train a model in two parts; with a folder, resume there in fresh objects half way."""
    net, opt = make(sharded, container)
    if reads_state:
        before = sharding.full_weights(net)
        assert any(name.endswith(".delta") for name in opt.state_dict())
        assert_same(sharding.full_weights(net), before)
    train(net, opt, 0, HALF)
    if folder:
        dcp.save({"net": net.state_dict(), "opt": opt.state_dict()}, checkpoint_id=folder)
        net, opt = make(sharded, container)
        state = {"net": net.state_dict(), "opt": opt.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
    train(net, opt, HALF, STEPS - HALF)
    learned = [part.scale for part in opt.optimizers]
    assert torch.equal(*learned)
    return {
        "weights": sharding.full_weights(net),
        "scale": learned[0],
        "nonfinite": opt.optimizers[0].nonfinite_steps,
        "norms": [],
        "implementation": opt.optimizers[0].implementation,
    }


def test_optimizers_that_step_together_learn_the_scale_of_one(ranks):
    expected = sharding.run("single")
    found = contained_run(sharded=False)
    assert_agrees([found], expected)
    assert_agrees(ranks(2).run(contained_run), expected)
    assert found["implementation"].startswith("fused")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("container", [Container, FlattenedByTorch])
def test_a_container_resumes_from_one_flat_state_dict_to_the_bit(ranks, tmp_path, container):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert_same(contained_run(one, False, container), contained_run(None, False, container))
    resumed = ranks(2).run(contained_run, two, container=container)
    assert_same(resumed, ranks(2).run(contained_run, container=container))


def test_reading_the_state_before_the_first_step_changes_no_bit():
    assert_same(contained_run(sharded=False, reads_state=True), contained_run(sharded=False))


def collectives_of_a_container():
    net, opt = make(sharded=True)
    train(net, opt, 0, 2)
    loss_of(net, batch(2)).backward()
    with Collectives() as collectives:
        opt.step()
    return collectives.reductions, collectives.others


def test_optimizers_that_step_together_reduce_once(ranks):
    assert ranks(2).run(collectives_of_a_container) == [([SUMS_BYTES], [])] * 2


@pytest.mark.parametrize(
    ("name", "values"),
    [("max_grad_norm", (1.0, None)), ("s_init", (1e-3, 1e-4)), ("scale_per", ("group", "group"))],
)
def test_optimizers_that_step_together_must_have_the_same_options(name, values):
    optimizers = [MechanicAdamW([nn.Parameter(torch.ones(2))], **{name: v}) for v in values]
    with pytest.raises(ValueError, match="optimizers that step together must have"):
        step_together(optimizers)


def test_optimizers_that_step_together_must_have_started_together():
    parts = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optimizers = [MechanicAdamW(part.parameters()) for part in parts]
    sum(part(torch.ones(2)) for part in parts).backward()
    optimizers[0].step()
    with pytest.raises(ValueError, match="must have started together"):
        step_together(optimizers)


# DeepSpeed: flat float32 weights that are lent to the optimizer for a step


def lend_group(opt, flat):
    """ZeRO-1 and ZeRO-2 step each group by itself, in a list of its own."""
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups


def lend_weight(opt, flat):
    """ZeRO-3 puts the weight into its group only while it is stepped."""
    opt.param_groups[0]["params"] = [flat]
    opt.step()
    opt.param_groups[0]["params"] = []


def ordinary(opt, flat):
    opt.step()


def flat_run(step):
    """Train bfloat16 weights that follow a flat float32 one, as ZeRO's partition on a rank does."""
    net = sharding.model(torch.bfloat16)
    weights = list(net.parameters())
    flat = nn.Parameter(torch.cat([p.detach().float().flatten() for p in weights]))
    opt = MechanicAdamW([flat], **OPTIONS)
    scales = []
    for t in range(STEPS):
        net.zero_grad()
        loss_of(net, batch(t)).backward()
        flat.grad = torch.cat([p.grad.float().flatten() for p in weights])
        opt.param_groups[0]["lr"] = 1.0 - t / STEPS
        step(opt, flat)
        flat.grad = None
        nn.utils.vector_to_parameters(flat.detach().bfloat16(), weights)
        scales.append(opt.scale)
    assert differs(scales[-1], scales[0])
    return [flat.detach(), *scales, dict(opt.state[flat])]


@pytest.mark.parametrize("lend", [lend_group, lend_weight])
def test_a_weight_lent_for_a_step_takes_the_ordinary_step(lend):
    assert_same(flat_run(lend), flat_run(ordinary))
