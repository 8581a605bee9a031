"""The base's state in 8 bits on several ranks: the codes of a single process."""

import pytest
import torch
from support.cases import RUNNING, assert_same
from support.placed_runs import load, placing, save
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mechanic_fused import MechanicAdamW

SHAPES = ((65, 128), (1, 4096), (64, 5, 32), (67, 100), (128, 64), (300,), (8, 16))
"""Rows that no two ranks share evenly; one row; blocks of 32 within two dimensions; none, so 16
bits; even rows; one dimension and a small one, which stay float32."""

HALF = 4


def recorded(shape, t):
    generator = torch.Generator().manual_seed(97 * t + sum(shape))
    g = torch.randn(shape, generator=generator)
    return g * 10.0 ** torch.randint(-2, 3, shape[:1], generator=generator).view(
        -1, *[1] * (len(shape) - 1)
    )


class Run:
    """Weights under a layout and their optimizer, which takes the same gradients under each.

    Args:
        layout: see ``placing``.
    """

    def __init__(self, layout, bits=8, variant=RUNNING, shapes=SHAPES, dtype=torch.float32):
        self.place = placing(layout)
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        self.params = [nn.Parameter(self.place(x)) for x in start]
        options = {"lr": 1e-2, "s_init": 0.1, "variant": variant, "optim_bits": bits}
        self.opt = MechanicAdamW(self.params, betas=(0.9, 0.95), **options)

    def train(self, first, steps):
        for t in range(first, first + steps):
            for p in self.params:
                p.grad = self.place(recorded(tuple(p.shape), t).to(p.dtype))
            self.opt.step()
        return self

    def state(self):
        """Return the whole state of each weight; codes are compared, x and x_ref are not."""
        return [
            {
                name: gathered(value).clone()
                for name, value in self.opt.state[p].items()
                if name not in ("x_ref", "x_low")
            }
            for p in self.params
        ]


def gathered(value):
    """Return an entry of all ranks; no process group gathers integers of 16 bits."""
    if not isinstance(value, DTensor):
        return value
    is_short = value.dtype is torch.int16
    return (value.to(torch.int32) if is_short else value).full_tensor().to(value.dtype)


def trained(layout, **options):
    return Run(layout, **options).train(0, HALF).state()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ("Shard(0)", 2),
        ("Shard(0)", 3),
        ("hsdp", 4),
        pytest.param("Shard(0) twice", 4, marks=pytest.mark.slow),
    ],
)
def test_every_layout_has_the_codes_of_a_single_process(ranks, layout, world, bits):
    shapes = SHAPES if layout != "Shard(0) twice" else [s for s in SHAPES if s[0] % 4 == 0]
    expected = trained(None, bits=bits, shapes=shapes)
    found = [state["exp_avg"].dtype for state in expected]
    assert (torch.int8 in found) == (bits == 8)
    assert {torch.bfloat16, torch.float32} <= set(found) or layout == "Shard(0) twice"
    for result in ranks(world).run(trained, layout, bits=bits, shapes=shapes):
        assert_same(result, expected)


@pytest.mark.parametrize("variant", [RUNNING, "annealed"])
def test_beside_bfloat16_weights_and_in_the_exact_forms_too(ranks, variant):
    options = {"variant": variant, "dtype": torch.bfloat16}
    expected = trained(None, **options)
    for result in ranks(2).run(trained, "Shard(0)", **options):
        assert_same(result, expected)


def save_half(folder, layout):
    save(Run(layout).train(0, HALF), folder)


def resume(folder, layout):
    """Return the state after a load, and after the rest of the run."""
    run = Run(layout).train(0, 1)
    load(run, folder)
    return run.state(), run.train(HALF, HALF).state()


def assert_resumes(found):
    after, at_the_end = found
    assert_same(after, trained(None))
    assert_same(at_the_end, Run(None).train(0, 2 * HALF).state())


@pytest.mark.parametrize(("layout", "world"), [("Shard(0)", 3), ("hsdp", 4), ("Shard(0)", 2)])
def test_what_two_ranks_save_goes_on_on_others_with_the_same_codes(ranks, tmp_path, layout, world):
    ranks(2).run(save_half, str(tmp_path), "Shard(0)")
    for found in ranks(world).run(resume, str(tmp_path), layout):
        assert_resumes(found)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_two_ranks_save_goes_on_in_one_process(ranks, tmp_path):
    ranks(2).run(save_half, str(tmp_path), "Shard(0)")
    assert_resumes(resume(str(tmp_path), None))


# What is refused


def error_of(function, *args):
    try:
        globals()[function](*args)
    except ValueError as error:
        return str(error)
    return ""


def by_columns(width):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    x = distribute_tensor(torch.randn(128, width), mesh, [Shard(1)], src_data_rank=None)
    p = nn.Parameter(x)
    opt = MechanicAdamW([p], lr=1e-2, s_init=0.1, optim_bits=8)
    for _ in range(2):
        p.grad = distribute_tensor(torch.ones(128, width), mesh, [Shard(1)], src_data_rank=None)
        opt.step()
    state = opt.state[p]
    return {name: tuple(state[name].full_tensor().shape) for name in ("exp_avg", "exp_avg_scale")}


def by_rows_and_columns():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = []
    for placements in ((Shard(0), Shard(1)), (Shard(1), Shard(0))):
        x = distribute_tensor(torch.randn(128, 128), mesh, placements, src_data_rank=None)
        p = nn.Parameter(x)
        opt = MechanicAdamW([p], lr=1e-2, s_init=0.1, optim_bits=8)
        p.grad = distribute_tensor(torch.ones(128, 128), mesh, placements, src_data_rank=None)
        opt.step()
        found.append(tuple(opt.state[p]["exp_avg_scale"].full_tensor().shape))
    return found


def by_fsdp1(bits):
    net = FullyShardedDataParallel(nn.Linear(128, 128), device_id=torch.device("cpu"))
    group = distributed.group.WORLD
    opt = MechanicAdamW(net.parameters(), reduce_group=group, optim_bits=bits)
    net(torch.ones(4, 128)).sum().backward()
    opt.step()
    return {entries["exp_avg"].dtype for entries in opt.state.values()}


def by_zero(bits):
    # Importing it warns of torch.jit, which would be an error in the tests' own process.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = nn.Linear(128, 128)
    options = {"reduce_group": distributed.group.WORLD, "optim_bits": bits}
    opt = ZeroRedundancyOptimizer(net.parameters(), MechanicAdamW, **options)
    net(torch.ones(4, 128)).sum().backward()
    opt.step()
    return {entries["exp_avg"].dtype for entries in opt.optim.state.values()}


def test_columns_are_shared_by_whole_blocks_or_refused(ranks):
    for found in ranks(2).run(by_columns, 256):
        assert found == {"exp_avg": (128, 256), "exp_avg_scale": (128, 4)}
    for error in ranks(2).run(error_of, "by_columns", 96):
        assert "whole blocks of 32" in error
        assert "optim_bits=16" in error


def test_rows_and_columns_are_shared_together(ranks):
    for found in ranks(4).run(by_rows_and_columns):
        assert found == [(128, 2)] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["by_fsdp1", "by_zero"])
def test_flat_shards_take_16_bits_and_refuse_8_at_the_constructor(ranks, how):
    for error in ranks(2).run(error_of, how, 8):
        assert "optim_bits=16 with reduce_group" in error
    for dtypes in ranks(2).run(f"test_narrow_state_in_shards.{how}", 16):
        assert dtypes <= {torch.bfloat16}
