"""The optimizers that are measured: ours, torch's own, and other packages for the same purpose."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import mechanic_fused

from .cases import counted_bytes, plan_bytes

Make = Callable[[list[Any]], Any]

DECAY = 0.01


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer to measure.

    Args:
        name: its name in tables.
        make: weights → optimizer.
        ours: count bytes from its plan; otherwise from the torch operations of a step.
        shares_gradients: it only reads gradients, so it needs no copy of them.
        compiler: wrap its step in torch.compile with this backend.
        counted: count the operations of this optimizer instead, where ``make``'s are not what runs.
    """

    name: str
    make: Make
    ours: bool = False
    shares_gradients: bool = True
    compiler: str = ""
    counted: Make | None = None

    def bytes_per_parameter(self, optimizer: Any, parameters: int, dtype: torch.dtype) -> float:
        """Return the bytes that a step must read and write for each parameter."""
        if self.ours:
            return plan_bytes(optimizer) / parameters
        return counted_bytes(self.counted or self.make, dtype)


def torch_adamw(form: str, decay: float = DECAY, **options: Any) -> OptimizerSpec:
    """Return torch's AdamW; ``form`` is "fused" or "foreach"."""
    return OptimizerSpec(
        f"torch AdamW {form}, wd={decay:g}",
        lambda weights: torch.optim.AdamW(
            weights, lr=1e-6, weight_decay=decay, **{form: True}, **options
        ),
    )


def adamw_of_masters() -> OptimizerSpec:
    """Return torch's fused AdamW over float32 copies of the weights and gradients, made once."""

    def make(weights: list[Any]) -> Any:
        masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
        return torch.optim.AdamW(masters, lr=1e-6, weight_decay=DECAY, fused=True)

    return OptimizerSpec("torch AdamW fused, float32 masters", make)


def torch_sgd(form: str) -> OptimizerSpec:
    """Return torch's SGD with momentum; ``form`` is "fused" or "foreach"."""
    return OptimizerSpec(
        f"torch SGD {form}, momentum",
        lambda weights: torch.optim.SGD(weights, lr=1e-6, momentum=0.9, **{form: True}),
    )


def torch_adamw_narrow() -> OptimizerSpec:
    """Return torch's fused AdamW with its state in bfloat16 beside float32 weights."""

    def make(weights: list[Any]) -> Any:
        optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=DECAY, fused=True)
        optimizer.step()
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].bfloat16()
        return optimizer

    return OptimizerSpec("torch AdamW fused, bf16 state", make)


def adamw(
    backend: str = "auto",
    decay: float = DECAY,
    delta_dtype: torch.dtype | None = None,
    variant: str | None = None,
    x_ref_every: int = 1,
    optim_bits: int = 32,
    bf16_stochastic_round: bool = False,
) -> OptimizerSpec:
    """Return our AdamW; the name has what is not the default."""
    suffix = "" if variant is None else f", {variant}"
    suffix += "" if backend == "auto" else f", {backend}"
    suffix += ", bf16 Δ" if delta_dtype is torch.bfloat16 else ""
    suffix += f", x_ref/{x_ref_every}" if x_ref_every > 1 else ""
    suffix += f", {optim_bits} bits" if optim_bits < 32 else ""
    suffix += ", x rounded" if bf16_stochastic_round else ""
    return OptimizerSpec(
        f"MechanicAdamW wd={decay:g}{suffix}",
        lambda weights: mechanic_fused.MechanicAdamW(
            weights,
            lr=1.0,
            weight_decay=decay,
            backend=backend,
            variant=variant,
            delta_dtype=delta_dtype,
            x_ref_every=x_ref_every,
            optim_bits=optim_bits,
            bf16_stochastic_round=bf16_stochastic_round,
        ),
        ours=True,
    )


def sgd(backend: str = "auto") -> OptimizerSpec:
    """Return our SGD with momentum."""
    return OptimizerSpec(
        "MechanicSGD momentum",
        lambda weights: mechanic_fused.MechanicSGD(weights, lr=1.0, momentum=0.9, backend=backend),
        ours=True,
    )


def lion(backend: str = "auto") -> OptimizerSpec:
    """Return our Lion."""
    return OptimizerSpec(
        f"MechanicLion wd={DECAY:g}",
        lambda weights: mechanic_fused.MechanicLion(
            weights, lr=1.0, weight_decay=DECAY, backend=backend
        ),
        ours=True,
    )


def _matrices_and_others(weights: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return what Muon steps, and what AdamW does: the two embeddings in front and all vectors."""
    matrices = [w for w in weights[2:] if w.dim() > 1]
    return matrices, [*weights[:2], *(w for w in weights[2:] if w.dim() < 2)]


def muon(optim_bits: int = 32) -> OptimizerSpec:
    """Return our Muon, with AdamW for what is no matrix."""

    def make(weights: list[Any]) -> Any:
        matrices, others = _matrices_and_others(weights)
        groups = [{"params": matrices}, {"params": others, "use_muon": False}]
        groups = [group for group in groups if group["params"]]
        return mechanic_fused.MechanicMuon(groups, weight_decay=DECAY, optim_bits=optim_bits)

    suffix = f", {optim_bits} bits" if optim_bits < 32 else ""
    return OptimizerSpec(f"MechanicMuon{suffix}", make, ours=True)


def torch_muon() -> OptimizerSpec:
    """Return torch's Muon, with its fused AdamW for what is no matrix."""

    class Both:
        def __init__(self, weights: list[Any]) -> None:
            matrices, others = _matrices_and_others(weights)
            options = {"lr": 1e-6, "weight_decay": DECAY}
            adjusted = {"adjust_lr_fn": "match_rms_adamw"}
            self.optimizers: list[Any] = []
            if matrices:
                self.optimizers.append(torch.optim.Muon(matrices, **options, **adjusted))
            if others:
                self.optimizers.append(torch.optim.AdamW(others, **options, fused=True))

        def step(self) -> None:
            for optimizer in self.optimizers:
                optimizer.step()

    return OptimizerSpec("torch Muon, AdamW fused", Both)


def mechanic_pytorch(fused: bool = False) -> OptimizerSpec:
    """Return the authors' package around AdamW, used as in its README."""

    def make(weights: list[Any]) -> Any:
        package = importlib.import_module("mechanic_pytorch")
        options = {"fused": True} if fused else {}
        return package.mechanize(torch.optim.AdamW)(weights, lr=1.0, weight_decay=DECAY, **options)

    name = f"mechanic-pytorch AdamW{' fused' if fused else ''}"
    return OptimizerSpec(name, make, shares_gradients=False)


def other_tuners() -> list[OptimizerSpec]:
    """Return other optimizers that need no learning rate. Some write to their gradients."""

    def schedulefree(weights: list[Any]) -> Any:
        package = importlib.import_module("schedulefree")
        optimizer = package.AdamWScheduleFree(weights, lr=1e-6, weight_decay=DECAY)
        optimizer.train()
        return optimizer

    makes: dict[str, Make] = {
        "prodigyopt Prodigy": lambda weights: importlib.import_module("prodigyopt").Prodigy(
            weights, weight_decay=DECAY
        ),
        "schedulefree AdamW": schedulefree,
        "dadaptation Adam": lambda weights: importlib.import_module("dadaptation").DAdaptAdam(
            weights, weight_decay=DECAY, decouple=True
        ),
    }
    return [OptimizerSpec(name, make, shares_gradients=False) for name, make in makes.items()]


def lean_adamws() -> list[OptimizerSpec]:
    """Return AdamW with a state of 8 bits of other packages, where they are installed."""

    def bitsandbytes(weights: list[Any]) -> Any:
        package = importlib.import_module("bitsandbytes")
        return package.optim.AdamW8bit(weights, lr=1e-6, weight_decay=DECAY)

    def torchao(weights: list[Any]) -> Any:
        package = importlib.import_module("torchao.optim")
        return package.AdamW8bit(weights, lr=1e-6, weight_decay=DECAY)

    def flashoptim(weights: list[Any]) -> Any:
        package = importlib.import_module("flashoptim")
        return package.FlashAdamW(weights, lr=1e-6, weight_decay=DECAY)

    makes: dict[str, Make] = {
        "bitsandbytes AdamW8bit": bitsandbytes,
        "torchao AdamW8bit": torchao,
        "FlashAdamW": flashoptim,
    }
    return [OptimizerSpec(name, make) for name, make in makes.items()]


def compiled(spec: OptimizerSpec, compiler: str) -> OptimizerSpec:
    """Return an optimizer with a compiled step; it moves the bytes of torch's fused AdamW."""
    return replace(
        spec,
        name=f"{spec.name}, compiled",
        compiler=compiler,
        counted=torch_adamw("fused").make,
    )
