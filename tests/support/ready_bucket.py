"""A bucket that waits for an op, holding the same numbers whatever the backend."""

import torch

from mechanic_fused.backends.layout import HYPER

from .cases import EXACT, FUSED, OPTIONS, QUICK, RUNNING
from .lockstep import moved, written

CHUNK = 1024
"""Elements of a chunk for these layouts."""

CUDA_CHUNK = 8
"""As many chunks as a GPU reduces in more than one group of them."""

LAYOUTS = [  # shape, storage offset, order of the axes
    ((0,), 0, (0,)),
    ((1,), 0, (0,)),
    ((63,), 0, (0,)),
    ((1025,), 1, (0,)),
    ((3, 5, 40), 0, (2, 0, 1)),
    ((2100,), 0, (0,)),
    ((16, 16), 0, (1, 0)),
]
ABSENT = 2
"""The weight whose gradient is absent."""


def numbers(seed, i, shape, dtype):
    """Random, and far enough from 0 that half of one is a number of every dtype."""
    rng = torch.Generator().manual_seed(100 * seed + i)
    if dtype is torch.int16:
        return torch.randint(-(1 << 15), 1 << 15, shape, generator=rng).to(dtype)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    return (x + 0.5 * x.sign()).to(dtype)


def laid_out(i, dtype, seed):
    shape, offset, axes = LAYOUTS[i]
    size = torch.Size(shape).numel()
    room = torch.empty(offset + size, dtype=dtype)
    return room[offset:].copy_(numbers(seed, i, (size,), dtype)).view(shape).permute(axes)


def absent_or(i, g):
    return None if i == ABSENT else g


def bad_elements(i, g):
    if g.dim() == 1 and g.numel() > 1:
        g[0], g[-1], g[g.numel() // 2] = torch.nan, torch.inf, -torch.inf
    return absent_or(i, g)


def with_gradient(row, factor):
    """Return a row of hyperparameters with another factor of the gradients."""
    column = HYPER.index("gradient")
    return [*row[:column], factor, *row[column + 1 :]]


class ReadyBucket:
    """An optimizer whose only bucket waits for an op, after one step.

    Args:
        spoil: (a weight's index, its gradient) → what its gradient shall be.
        clip: (N², max_norm) or None.
        loss_scale: what GradScaler has multiplied the gradients by.
    """

    def __init__(
        self, kernels, base, dtype, spoil=absent_or, clip=None, loss_scale=1.0, layouts=LAYOUTS,
        **options,
    ):  # fmt: skip
        device = kernels.device
        self.ops = kernels.ops
        self.rtol = kernels.sum_rtol(dtype)
        xs = [laid_out(i, dtype, 0) for i in range(len(layouts))]
        self.params = [torch.nn.Parameter(moved(x, device)) for x in xs]
        options = {**OPTIONS[base], **QUICK, "variant": EXACT, **options}
        self.opt = FUSED[base](self.params, backend=kernels.name, **options)
        for p in self.params:
            p.grad = torch.ones_like(p)
        self.opt.step()
        for i, p in enumerate(self.params):
            p.grad = moved(spoil(i, laid_out(i, dtype, 1)), device)
            for seed, (name, value) in enumerate(self.opt.state[p].items(), 2):
                if name != "step":
                    drawn = numbers(seed, i, value.shape, value.dtype)
                    value.copy_(drawn.abs() if value.is_floating_point() else drawn)
        [self.bucket] = self.opt._plan.buckets
        self.tuner = self.opt._tuner
        sign = -1.0 if options.get("maximize") else 1.0
        live = kernels.reads_on_device and loss_scale != 1
        gradient = sign if live else sign / loss_scale
        self.bucket.collect_gradients()
        self.bucket.write_tables(
            [with_gradient(row, gradient) for row in self.bucket.hyper_rows],
            {},
            torch.full((), loss_scale, device=device) if live else None,
            None,
            self.tuner.counters[0, 0] if self.bucket.delta_is_bfloat16 else None,
        )
        if clip:
            self.bucket.clip = torch.tensor(clip, dtype=torch.float64, device=device)
        self.ops.prepare(self.bucket)
        self.sums = self.bucket.sums
        self.sums.copy_(torch.arange(1.0, 1 + self.sums.numel()).view(self.sums.shape))

    def accumulated(self):
        """Accumulate, or step in the running form; return what that has written, on the CPU."""
        if self.opt.param_groups[0]["variant"] == RUNNING:
            self.ops.step(self.bucket, self.tuner)
        else:
            self.ops.accumulate(self.bucket)
        return self.written()

    def written(self):
        return {"weights": written(self.opt, self.params), "sums": self.sums.cpu().clone()}

    def tables(self):
        """Return what has the tables that kernels read, as ``tensors`` and ``chunks``."""
        handle = self.bucket.handle
        if hasattr(handle, "chunks"):
            return handle
        return getattr(handle, "tables", self.bucket)
