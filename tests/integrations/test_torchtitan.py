"""torchtitan itself, on the CPU with gloo: its container, schedulers, checkpoints and metrics."""

import pytest
import torch
from support import sharding
from support.cases import assert_same
from support.sharding import assert_agrees
from support.stacks import import_stack

from mechanic_fused import MechanicAdamW, integrations, mechanize

pytestmark = [
    pytest.mark.stacks,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

import_stack("torchtitan")

from support import torchtitan_runs as runs  # noqa: E402

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_of_a_model_learn_what_one_optimizer_learns(implementation):
    found = runs.run(sharded=False, implementation=implementation)
    assert_agrees([found], runs.plain_loop())


def test_shards_learn_what_one_process_learns(ranks):
    assert_agrees(ranks(2).run(runs.run), runs.plain_loop())


@pytest.mark.parametrize("implementation", ["fused", "fused_opt_states_bf16"])
def test_a_run_resumes_from_torchtitans_checkpoint_to_the_bit(ranks, tmp_path, implementation):
    options = {"implementation": implementation, "of_tuner": {"s_init": 1e-3}}
    whole = ranks(2).run(runs.run, **options)
    assert_same(ranks(2).run(runs.run, str(tmp_path), **options), whole)


def test_reading_the_state_before_the_first_step_changes_no_bit():
    assert_same(runs.run(sharded=False, reads_state=True), runs.run(sharded=False))


def test_fused_opt_states_bf16_makes_a_state_of_16_bits():
    narrow = {"implementation": "fused_opt_states_bf16", "of_tuner": {"s_init": 1e-3}}
    optimizers = runs.make(sharded=False, **narrow)[2]
    assert [opt.param_groups[0]["optim_bits"] for opt in optimizers] == [16] * len(runs.PARTS)
    expected = runs.plain_loop(optim_bits=16, variant="running")
    assert_agrees([runs.run(sharded=False, **narrow)], expected)


def test_other_optimizers_of_the_container_keep_torchtitans_narrow_state():
    """Its hook makes that before a step; torch's fused step over it needs a GPU."""
    param_groups = runs.groups_of("AdamW", lr=1e-3)[:1] + runs.groups_of(lr=1.0)[1:]
    options = {"implementation": "fused_opt_states_bf16", "of_tuner": {"s_init": 1e-3}}
    optimizers = runs.make(sharded=False, param_groups=param_groups, **options)[2]
    hooks = {type(opt): len(opt._optimizer_step_pre_hooks) for opt in optimizers}
    assert hooks == {torch.optim.AdamW: 1, MechanicAdamW: 0}


def test_stages_whose_group_is_not_named_are_refused(ranks):
    with pytest.raises(AssertionError, match="name the group of its stages"):
        ranks(2).run(runs.pipeline_run, reduced=False)


def test_stages_whose_group_is_named_learn_the_scale_of_the_whole(ranks):
    expected = sharding.run("single")
    assert_agrees(ranks(2).run(runs.pipeline_run, reduced=True), expected)


def test_the_learned_rate_is_among_the_metrics(ranks, tmp_path):
    for metrics, rate in ranks(2).run(runs.metrics_run, str(tmp_path)):
        assert metrics["effective_lr"] == pytest.approx(rate, rel=1e-6)
        assert metrics["mechanic/scale"] > 0
        assert metrics["loss_metrics/global_avg_loss"] == 1.0
        assert any(name.startswith("lr/MechanicAdamW") for name in metrics)


def test_a_base_without_a_fused_update_keeps_its_own_state(monkeypatch):
    made = mechanize(torch.optim.RAdam)
    monkeypatch.setitem(integrations.BY_NAME, "MechanicRAdam", made)
    options = {"implementation": "fused_opt_states_bf16"}
    param_groups = runs.groups_of("MechanicRAdam", lr=1.0, fused=None, foreach=None)
    net, _, optimizers, schedulers = runs.make(sharded=False, param_groups=param_groups, **options)
    runs.train(net, optimizers, schedulers, 0, 3)
    assert all(isinstance(opt, made) and opt.scale > 0 for opt in optimizers)


def test_an_error_of_ours_comes_before_other_optimizers_have_moved():
    param_groups = runs.groups_of("AdamW", lr=1e-3)[:1] + runs.groups_of(lr=1.0)[1:]
    net, _, optimizers, schedulers = runs.make(sharded=False, param_groups=param_groups)
    runs.train(net, optimizers, schedulers, 0, 2)
    before = sharding.full_weights(net)
    ours = next(opt for opt in optimizers if isinstance(opt, MechanicAdamW))
    ours.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr"):
        optimizers.step()
    assert_same(sharding.full_weights(net), before)
