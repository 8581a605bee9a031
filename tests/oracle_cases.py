"""Weights, gradients and options for whoever steps beside the oracle, all as numpy's float64."""

import numpy as np
import torch

# Weights of size 1 must go at least this far, or a comparison of them shows nothing.
MOVED = 0.05
STEPS = 20

# The last is one chunk of 4,096 and a remainder.
SHAPES = ((1,), (7,), (5, 13), (4099,))

CASES = {
    "sgd": ("sgd", {"lr": 0.05}),
    "dampened": (
        "sgd",
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    ),
    "nesterov": ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "maximize": ("sgd", {"lr": 0.05, "momentum": 0.9, "maximize": True, "weight_decay": 0.05}),
    "adam": ("adam", {"lr": 1.0, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}),
    "adamw": ("adamw", {"lr": 1.0, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}),
    "adamw maximize": ("adamw", {"lr": 1.0, "maximize": True, "weight_decay": 0.05}),
    "lion": ("lion", {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.05}),
}
# A start at which the weights move within 20 steps, and a λ that shows.
TUNER = {"s_init": 1e-2, "s_decay": 0.1}


def start_weights():
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape) for shape in SHAPES]


def noisy_gradients(weights, t, sign=1.0):
    """Of ½Σd(x − o)² with its noise at step t; `sign` = −1 for those who maximize."""
    rng = np.random.default_rng([2, t])
    out = []
    for x in weights:
        i = np.arange(x.size).reshape(x.shape)
        out.append(sign * ((1 + i % 5) * (x - np.cos(i)) + 0.3 * rng.standard_normal(x.shape)))
    return out


def parameters(weights, dtype=torch.float64):
    return [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in weights]


def set_gradients(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)


def arrays(params):
    return [p.detach().double().numpy() for p in params]
