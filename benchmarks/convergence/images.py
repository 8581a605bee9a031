"""scikit-learn's digits as images: classifiers of patches, and diffusion nets without labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .problem import Classification, Problem, Scores
from .tabular import pixels
from .transformer import encoder_layers

SIZE, PATCH = 8, 2
SHIFT, TURN, NOISE = 0.5, math.radians(10), 0.1
"""Augmentation: the largest shift in pixels and rotation, the deviation of the noise."""

DIFFUSED = 128
"""Images in a batch of the diffusion net."""


class VisionTransformer(nn.Module):
    """Patches of 2 × 2 pixels, two layers, the mean of their outputs: (n, 64) to (n, 10)."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, width))
        self.layers = nn.Sequential(*encoder_layers(width, layers, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x.view(-1, 1, SIZE, SIZE)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(patches + self.position)).mean(1))


class Augmented(Classification):
    """Classify images that are shifted, turned and noisy in training."""

    def batch(self) -> tuple[Tensor, Tensor]:
        x, y = super().batch()
        return self._augmented(x), y

    def _augmented(self, x: Tensor) -> Tensor:
        n, generator = len(x), self.generator
        angle = TURN * (2 * torch.rand(n, generator=generator) - 1)
        # The image's coordinates go from -1 to 1.
        shift = SHIFT * 2 / SIZE * (2 * torch.rand(n, 2, 1, generator=generator) - 1)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
        places = F.affine_grid(torch.cat([turn, shift], 2), [n, 1, SIZE, SIZE], align_corners=False)
        # The background, -1, is what comes in at the edges.
        image = x.view(n, 1, SIZE, SIZE) + 1
        moved = F.grid_sample(image, places, align_corners=False) - 1
        return moved.flatten(1) + NOISE * torch.randn(n, SIZE * SIZE, generator=generator)


def vit(seed: int) -> Augmented:
    """A vision transformer with two layers of width 64."""
    torch.manual_seed(seed)
    return Augmented(VisionTransformer(), seed, *pixels(seed), size=32)


class Mixing(nn.Module):
    """Perceptrons over the patches of each channel, then over the channels of each patch."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Linear(patches, 4 * patches), nn.GELU(), nn.Linear(4 * patches, patches)
        )
        self.channels = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


class Mixer(nn.Module):
    """Patches of 2 × 2 pixels, three layers, the mean of their outputs: (n, 64) to (n, 10)."""

    def __init__(self, width: int = 48, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.layers = nn.Sequential(*(Mixing((SIZE // PATCH) ** 2, width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x.view(-1, 1, SIZE, SIZE)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(patches)).mean(1))


def mixer(seed: int) -> Augmented:
    """A perceptron mixer with three layers of width 48."""
    torch.manual_seed(seed)
    return Augmented(Mixer(), seed, *pixels(seed), size=32)


class Residual(nn.Module):
    """A perceptron with a hidden layer that adds to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Phases(nn.Module):
    """Sines and cosines of a time: (n, 1) to (n, 2·frequencies)."""

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("frequency", math.pi * 2.0 ** torch.arange(-1, frequencies - 1))

    def forward(self, t: Tensor) -> Tensor:
        phase = t * self.frequency
        return torch.cat([phase.sin(), phase.cos()], 1)


class Denoiser(nn.Module):
    """Predict the noise in x = cos(πt/2)·image + sin(πt/2)·noise from (n, 64) and t (n, 1)."""

    def __init__(self, width: int = 256, blocks: int = 3, frequencies: int = 8) -> None:
        super().__init__()
        self.phases = Phases(frequencies)
        self.image, self.time = nn.Linear(SIZE**2, width), nn.Linear(2 * frequencies, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SIZE**2)
        # As is usual in diffusion, the first prediction is 0.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(self.phases(t))
        return self.head(self.norm(self.blocks(self.image(x) + time)))


class Timed(nn.Module):
    """A residual block of convolutions at a time: (n, width, 8, 8) and (n, width) to the former."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(2)
        )
        self.time = nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.second(self.first(x) + self.time(time)[:, :, None, None])


class Velocity(nn.Module):
    """Predict noise − image on the line between them from (n, 64) and t (n, 1)."""

    def __init__(self, width: int = 32, blocks: int = 2, frequencies: int = 8) -> None:
        super().__init__()
        self.phases = Phases(frequencies)
        self.image = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU())
        self.blocks = nn.ModuleList(Timed(width) for _ in range(blocks))
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(self.phases(t))
        x = self.image(x.view(-1, 1, SIZE, SIZE))
        for block in self.blocks:
            x = block(x, time)
        return self.head(x).flatten(1)


class Diffusion(Problem):
    """Predict the noise of images; the scores have noise of their own, the same for all models."""

    images = DIFFUSED

    def __init__(self, model: nn.Module, seed: int, train: Tensor, validation: Tensor) -> None:
        super().__init__(model, seed)
        self.train, self.validation = train, validation

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(len(self.train), (self.images,), generator=self.generator)
        return self._noisy(self.train[chosen], self.generator)

    @staticmethod
    def _noisy(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return (noisy images, t, noise)."""
        t = torch.rand(len(images), 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        angle = math.pi / 2 * t
        return angle.cos() * images + angle.sin() * noise, t, noise

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self._loss(self.model, batch)

    @staticmethod
    def _loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, t, noise = batch
        return F.mse_loss(model(x, t), noise)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        generator = torch.Generator().manual_seed(0)
        train, validation = (
            self._loss(model, self._noisy(part.repeat(8, 1), generator)).item()
            for part in (self.train, self.validation)
        )
        return {"train_loss": train, "validation_loss": validation}


def denoise(seed: int) -> Diffusion:
    """A residual perceptron of width 256 that predicts the noise."""
    (train, _), (validation, _) = pixels(seed)
    torch.manual_seed(seed)
    return Diffusion(Denoiser(), seed, train, validation)


class Flow(Diffusion):
    """Predict the velocity from images to noise (flow matching, arXiv 2210.02747)."""

    images = 32

    @staticmethod
    def _noisy(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return (points between images and noise, t, noise − images)."""
        t = torch.rand(len(images), 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        return (1 - t) * images + t * noise, t, noise - images


def flow(seed: int) -> Flow:
    """A convolutional net of width 32 that predicts the velocity."""
    (train, _), (validation, _) = pixels(seed)
    torch.manual_seed(seed)
    return Flow(Velocity(), seed, train, validation)
