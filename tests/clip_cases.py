"""Buckets that wait for a verb, the same numbers in each whatever the backend."""

import os

import torch
from cases import FUSED, QUICK, SUM_RTOL
from lockstep import FLOAT_SUM_RTOL

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = {
    "reference": "cpu",
    "cpp": "cpu",
    "cuda": "cuda",
    "triton": "cpu" if INTERPRETED else "cuda",
}
READS_ON_DEVICE = ("cuda", "triton")

# Shape, storage offset, order of the axes; some take several chunks.
CHUNK = 1024
LAYOUTS = [
    ((0,), 0, (0,)),
    ((1,), 0, (0,)),
    ((63,), 0, (0,)),
    ((1025,), 1, (0,)),
    ((3, 5, 40), 0, (2, 0, 1)),
    ((2100,), 0, (0,)),
    ((16, 16), 0, (1, 0)),
]
ABSENT = 2
CASES = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "adamw": {"lr": 1.0, "weight_decay": 0.1},
    "lion": {"lr": 0.5, "weight_decay": 0.1},
}


def numbers(seed, i, shape, dtype):
    """Random, and far enough from 0 that half of one is a number of every dtype."""
    rng = torch.Generator().manual_seed(100 * seed + i)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    return (x + 0.5 * x.sign()).to(dtype)


def laid_out(i, dtype, device, seed):
    shape, offset, axes = LAYOUTS[i]
    size = torch.Size(shape).numel()
    room = torch.empty(offset + size, dtype=dtype, device=device)
    flat = room[offset:].copy_(numbers(seed, i, (size,), dtype))
    return flat.view(shape).permute(axes)


def absent_or(i, g):
    return None if i == ABSENT else g


class Ready:
    """An optimizer whose only bucket waits for a verb: all of its tensors are the same numbers
    whatever the backend.

    Args:
        spoil: called with a weight's number and its gradient, returns what the gradient shall be.
        clip: (N², max_norm) or None.
        loss_scale: what GradScaler has multiplied the gradients by.
    """

    def __init__(
        self, backend, base, dtype, spoil=absent_or, clip=None, loss_scale=1.0, layouts=LAYOUTS,
        **options,
    ):  # fmt: skip
        device = DEVICES[backend]
        self.params = [
            torch.nn.Parameter(laid_out(i, dtype, device, 0)) for i in range(len(layouts))
        ]
        options = {**CASES[base], **QUICK, **options}
        self.opt = FUSED[base](self.params, backend=backend, **options)
        for p in self.params:
            p.grad = torch.ones_like(p)
        self.opt.step()
        for i, p in enumerate(self.params):
            p.grad = spoil(i, laid_out(i, dtype, device, 1))
            for seed, (name, value) in enumerate(self.opt.state[p].items(), 2):
                if name != "step":
                    value.copy_(numbers(seed, i, value.shape, value.dtype).abs())
        [self.bucket] = self.opt._plan.buckets
        self.verbs = self.bucket.backend
        sign = -1.0 if options.get("maximize") else 1.0
        live = backend in READS_ON_DEVICE and loss_scale != 1
        self.bucket.collect_gradients()
        self.bucket.load(
            [[*row[:-1], sign if live else sign / loss_scale] for row in self.bucket.hyper_rows],
            {},
            torch.full((), loss_scale, device=device) if live else None,
            None,
            clip and torch.tensor(clip, dtype=torch.float64, device=device),
        )
        self.verbs.prepare(self.bucket)
        self.sums = self.bucket.sums
        self.sums.copy_(torch.arange(1.0, 1 + self.sums.numel()).view(self.sums.shape))
        self.rtol = FLOAT_SUM_RTOL if backend == "cpp" and dtype != torch.float64 else SUM_RTOL

    def written(self):
        return [
            {"x": p.detach().cpu(), **{k: v.cpu() for k, v in self.opt.state[p].items()}}
            for p in self.params
        ]

    def accumulated(self):
        self.verbs.accumulate(self.bucket)
        return {"weights": self.written(), "sums": self.sums.cpu()}


def bad_elements(i, g):
    if g.dim() == 1 and g.numel() > 1:
        g[0], g[-1], g[g.numel() // 2] = torch.nan, torch.inf, -torch.inf
    return absent_or(i, g)
