"""What the tests of AutoDrop have in common: thresholds, and weights that drift."""

import torch

NEVER = {1: 0.0, 2: -360.0}  # thresholds below every change of an angle
ALWAYS = 360.0


def drift(params, t):
    """Move weights by a constant direction and noise."""
    rng = torch.Generator().manual_seed(t)
    with torch.no_grad():
        for p in params:
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.add_((0.03 * torch.ones_like(noise) + 0.02 * noise).to(p.dtype))
