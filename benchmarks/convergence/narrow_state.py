"""The base's state in fewer bits: twins of the same seed, which differ in that alone."""

from __future__ import annotations

from typing import Any

BITS = (32, 16, 8)
BETAS2 = (0.999, 0.95)

TASKS = ("char", "lora", "tokens", "digits_mlp", "digits_conv", "vit", "seq2seq", "mixer", "masked")
"""Those whose weights are large enough to be narrow."""


def arm(beta2: float, bits: int) -> str:
    """Return the name of an arm."""
    return f"beta2 {beta2:g}, {bits} bits"


NARROW: dict[str, dict[str, Any]] = {
    arm(beta2, bits): {"betas": (0.9, beta2), "optim_bits": bits}
    for beta2 in BETAS2
    for bits in BITS
}
"""Arm → options of MechanicAdamW."""
