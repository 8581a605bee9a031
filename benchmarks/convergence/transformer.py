"""The layers of torch's transformer, as all tasks use them: norms first, GELU, no dropout."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

OPTIONS = {"activation": "gelu", "dropout": 0.0, "batch_first": True, "norm_first": True}


def encoder_layers(width: int, layers: int, heads: int) -> Iterator[nn.Module]:
    """Yield encoder layers, (n, places, width) to the same shape."""
    for _ in range(layers):
        yield nn.TransformerEncoderLayer(width, heads, 4 * width, **OPTIONS)


def decoder_layers(width: int, layers: int, heads: int) -> Iterator[nn.Module]:
    """Yield decoder layers, which see another sequence as well."""
    for _ in range(layers):
        yield nn.TransformerDecoderLayer(width, heads, 4 * width, **OPTIONS)
