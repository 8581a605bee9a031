"""What users do between steps, in any order: the C++ backend beside the reference, to the bit, and
the reference beside an oracle of each step in float64.

Twins get the same weights, gradients and events. Sums may differ by their order alone, see
``support/lockstep.py``; everything else that a step writes must be equal. A finding becomes a test
of its own where its kind belongs.
"""

import copy
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.cases import FUSED, assert_same
from support.kernels import kernels_of
from support.lockstep import Lockstep, give_gradients, random_gradient, written
from support.single_step import SingleStep

# In float64 powers and roots of the libraries differ by an ulp, and nothing rounds that away.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3,), (), (0,), (5, 3), (130,), (2, 3, 4), (9000,), (33, 128), (45, 97))
"""The last two are stored in 8 and in 16 bits, if any."""
BITS = (32, 16, 8)


def _with_one(number):
    def change(g):
        if g.numel():
            g.view(-1)[g.numel() // 2] = number
        return g

    return change


def _strided(g):
    return torch.stack([g, g], -1)[..., 0]


GRADIENTS = {
    "plain": lambda g: g,
    "none": lambda g: None,
    "zero": lambda g: g * 0,
    "large": lambda g: g * 1e4,
    "tiny": lambda g: g * 1e-30,
    "with NaN": _with_one(math.nan),
    "with infinity": _with_one(math.inf),
    "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1) if g.dim() else g,
    "strided": _strided,
    "negated view": lambda g: torch._neg_view(-g),
}

NOT_FINITE = ("with NaN", "with infinity")

WRITES = {
    "in place": lambda p: p.mul_(0.5),
    "through data": lambda p: p.data.clamp_(-0.5, 0.5),
    "pruned": lambda p: p.data[:1].zero_() if p.dim() else None,
    "moved": lambda p: setattr(p, "data", p.data.clone(memory_format=torch.preserve_format)),
    "noisy": lambda p: p.add_(0.25),
}

options = st.fixed_dictionaries(
    {
        "variant": st.sampled_from(["running", "running", "annealed", "optax", "paper", "pytorch"]),
        "scale_per": st.sampled_from(["model", "group", "parameter"]),
        "s_init": st.sampled_from([None, 0.1]),
        "optim_bits": st.sampled_from([32, *BITS]),
    }
)


class Twins(RuleBasedStateMachine):
    """An optimizer of the reference and one of the C++ backend, through the same events."""

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.threads_before = torch.get_num_threads()
        self.t = 0

    @initialize(
        base=st.sampled_from(sorted(FUSED)),
        dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
        options=options,
        more=st.sampled_from([{}, {"maximize": True}, {"weight_decay": 0.1}]),
        part=st.booleans(),
        rounds=st.booleans(),
        offloaded=st.booleans(),
    )
    def begin(self, base, dtypes, shapes, options, more, part, rounds, offloaded):
        """Make twins."""
        options = {k: v for k, v in options.items() if v is not None} | more
        self.base, self.options, self.scale_per = base, options, options["scale_per"]
        self.in_part = part and options["variant"] == "running"
        if self.in_part:
            options["x_ref_every"] = 8
        if rounds and options["variant"] == "running" and options["optim_bits"] < 32:
            options["bf16_stochastic_round"] = True
        self.offloaded = offloaded and options["variant"] == "running"
        kernels = kernels_of("cpp", self.patch)
        self.lockstep = Lockstep(kernels, self.patch, options["variant"])
        self.pairs = []
        for name in ("reference", "cpp"):
            torch.manual_seed(len(shapes))
            params = [
                torch.nn.Parameter(torch.randn(shape).to(dtypes[i % len(dtypes)]))
                for i, shape in enumerate(shapes)
            ]
            self.pairs.append((self.make(params, name), params))

    def make(self, params, backend):
        """Return an optimizer as the case began with."""
        options = self.options
        if backend == "cpp" and self.offloaded:
            options = {**options, "offload": True}
        return FUSED[self.base](params, lr=1.0, backend=backend, **options)

    def made_anew(self, opt):
        """Return an optimizer of the same groups that has seen nothing."""
        return self.make([{"params": group["params"]} for group in opt.param_groups], opt._backend)

    def each(self, event):
        """Let the same thing happen to both."""
        for i, (opt, params) in enumerate(self.pairs):
            self.pairs[i] = event(opt, params) or (opt, params)

    @rule(
        kinds=st.lists(st.sampled_from(sorted(GRADIENTS)), min_size=1, max_size=3),
        loss=st.sampled_from([None, None, 1.0, 0.5, 0.0, -1.0, math.nan]),
        steps=st.integers(1, 3),
    )
    def step(self, kinds, loss, steps):
        """Take steps with gradients of these kinds."""
        for _ in range(steps):
            if loss is not None:
                self.each(lambda opt, _: opt.observe(loss))

            def gradient(p, t, i):
                kind = kinds[(i + t) % len(kinds)]
                # Beside elements without an x_ref g·(x − x_ref) may be finite where ‖g‖, of which
                # its tolerance is derived, is not.
                kind = "plain" if self.in_part and kind in NOT_FINITE else kind
                return GRADIENTS[kind](random_gradient(p, t, i))

            # A loaded x_ref gets its layout in the plan, and tolerances are derived from it.
            self.each(lambda opt, _: opt.plan_step() and None)
            opt, params = self.pairs[0]
            give_gradients(params, self.t, gradient)
            opt.plan_step()  # a weight that has just been given a gradient gets its format
            oracle = SingleStep(opt, self.scale_per)
            self.lockstep.step(self.pairs, self.t, gradient)
            oracle.check(self.lockstep.recorded)
            self.t += 1

    @rule(kind=st.sampled_from(sorted(WRITES)), index=st.integers(0, 9))
    def write(self, kind, index):
        """Write a weight as users do."""

        def event(_, params):
            with torch.no_grad():
                WRITES[kind](params[index % len(params)])

        self.each(event)

    @rule(index=st.integers(0, 9))
    def freeze_or_unfreeze(self, index):
        """Change requires_grad."""

        def event(_, params):
            p = params[index % len(params)]
            p.requires_grad_(not p.requires_grad)

        self.each(event)

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 3.0]), group=st.integers(0, 3))
    def set_lr(self, lr, group):
        """Change the lr of a group."""

        def event(opt, _):
            opt.param_groups[group % len(opt.param_groups)]["lr"] = lr

        self.each(event)

    @precondition(lambda self: len(self.pairs[0][1]) < 6)
    @rule(shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
    def add_group(self, shape, dtype):
        """Add a group of one weight."""

        def event(opt, params):
            p = torch.nn.Parameter(random_gradient(torch.empty(shape), 0, len(params)).to(dtype))
            opt.add_param_group({"params": [p], "lr": 0.5})
            params.append(p)

        self.each(event)

    @rule()
    def load_each_others_checkpoint(self):
        """Save both and load each into the other."""
        saved = [copy.deepcopy(opt.state_dict()) for opt, _ in self.pairs]
        for (opt, _), other in zip(self.pairs, reversed(saved), strict=True):
            opt.load_state_dict(other)

    @rule()
    def resume(self):
        """Go on with a new optimizer that loads the checkpoint."""

        def event(opt, params):
            other = self.made_anew(opt)
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
            return other, params

        self.each(event)

    @precondition(lambda self: self.can_convert())
    @rule()
    def to_base_and_back(self):
        """Take a plain step of the base in between."""

        def event(opt, params):
            base = opt.to_base()
            give_gradients(params, self.t, random_gradient)
            base.step()
            other = self.made_anew(opt)
            other.load_state_dict(copy.deepcopy(base.state_dict()))
            return other, params

        self.each(event)

    def can_convert(self):
        """Whether a plain base can step: S is known, and no lr overflows in float16."""
        scale = self.pairs[0][0].scale
        # With a scale for each weight the base has a group for each.
        return self.scale_per != "parameter" and bool(scale.gt(0).any() and scale.lt(6e4).all())

    @rule(bits=st.sampled_from(BITS), index=st.integers(0, 9))
    def change_bits(self, bits, index):
        """Store the base's state of a group otherwise from here on."""

        def event(opt, _):
            opt.param_groups[index % len(opt.param_groups)]["optim_bits"] = bits

        self.each(event)

    @rule(threads=st.sampled_from([1, 2]))
    def threads(self, threads):
        """Share the weights out over more threads or fewer."""
        torch.set_num_threads(threads)

    @rule()
    def copy(self):
        """Go on with copies."""
        self.each(lambda opt, params: copy.deepcopy((opt, params)))

    @rule(index=st.integers(0, 9), entry=st.integers(0, 9), how=st.sampled_from("cmd"))
    def replace_state(self, index, entry, how):
        """Replace an entry of a weight's state, move it, or replace the dict around it."""

        def event(opt, params):
            p = params[index % len(params)]
            entries = opt.state.get(p)
            if not entries:
                return
            name = sorted(entries)[entry % len(entries)]
            if how == "c":
                entries[name] = entries[name].clone(memory_format=torch.preserve_format)
            elif how == "m":
                entries[name].data = entries[name].data.clone(memory_format=torch.preserve_format)
            else:
                opt.state[p] = dict(entries)

        self.each(event)

    @rule(index=st.integers(0, 9))
    def forget_state(self, index):
        """Drop a weight's state."""
        self.each(lambda opt, params: opt.state.pop(params[index % len(params)], None) and None)

    @rule(frozen=st.booleans())
    def freeze_scale(self, frozen):
        """Stop or resume learning S."""
        self.each(lambda opt, _: opt.freeze_scale(frozen))

    @rule()
    def reset_scale(self):
        """Start a new run."""
        self.each(lambda opt, _: opt.reset_scale())

    @rule(index=st.integers(0, 9), rows=st.lists(st.integers(-1, 99), max_size=6))
    def replace_parameter(self, index, rows):
        """Let a weight grow or shrink."""

        def event(opt, params):
            place = index % len(params)
            old = params[place]
            if old.dim() == 0:
                return
            index_map = torch.tensor([r % len(old) if len(old) and r >= 0 else -1 for r in rows])
            index_map = index_map.to(torch.int64)
            new = torch.zeros(len(rows), *old.shape[1:], dtype=old.dtype)
            new[index_map >= 0] = old.detach()[index_map[index_map >= 0]]
            params[place] = torch.nn.Parameter(new)
            opt.replace_parameter(old, params[place], index_map)

        self.each(event)

    @rule()
    def read(self):
        """Read all that can be read."""

        def event(opt, _):
            with torch.inference_mode():
                repr(opt), opt.learned_lr(), opt.scale, opt.grad_norm, opt.scale_source

        self.each(event)

    @invariant()
    def twins_are_alike(self):
        """Compare all that steps and events write."""
        if not hasattr(self, "pairs") or len(self.pairs) < 2:
            return
        (opt, params), (other, others) = self.pairs
        assert_same(written(other, others), written(opt, params))
        torch.testing.assert_close(other.scale, opt.scale, rtol=1e-10, atol=0, equal_nan=True)

    def teardown(self):
        """Undo the patches."""
        self.patch.undo()
        torch.set_num_threads(self.threads_before)


class MoreTwins(Twins):
    """The same for longer."""


COMMON = settings(
    deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=20, database=None
)
nothing_to_do = pytest.mark.filterwarnings("ignore:step.. has found no gradient")

TestTwins = Twins.TestCase
TestTwins.pytestmark = [nothing_to_do]
TestTwins.settings = settings(COMMON, max_examples=600, derandomize=True)
if "FUZZ_CASES" in os.environ:  # other cases each time
    cases = int(os.environ["FUZZ_CASES"])
    TestTwins.settings = settings(COMMON, max_examples=cases, print_blob=True)

TestMoreTwins = MoreTwins.TestCase
TestMoreTwins.pytestmark = [nothing_to_do, pytest.mark.slow]
TestMoreTwins.settings = settings(COMMON, max_examples=6000, derandomize=True)
