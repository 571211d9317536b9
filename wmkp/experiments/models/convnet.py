"""A small convolutional network for small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class ConvNet(nn.Module):
    """Five 3x3 convolutions (16, 16, 32, 32, 32 features; the third strides by 2) with ReLU, mean over positions, readout.

    Call: images (batch, height, width, channels) -> logits (batch, num_classes), float32.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (features, stride) in enumerate(((16, 1), (16, 1), (32, 2), (32, 1), (32, 1))):
            x = nn.relu(nn.Conv(features, (3, 3), stride, dtype=self.dtype, name=f"conv{i + 1}")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x.mean((1, 2))).astype(jnp.float32)
