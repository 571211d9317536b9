"""A pre-norm residual perceptron: LayerNorm, then two dense layers, on each residual path."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class ResidualBlock(nn.Module):
    """``x + W2 relu(W1 LayerNorm(x))``, both layers as wide as the stream."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        y = nn.relu(nn.Dense(x.shape[-1], dtype=self.dtype, name="up")(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(y)


class ResidualMLP(nn.Module):
    """Pixels to a residual stream, blocks that add to it, LayerNorm, readout.

    Call: inputs (batch, ...) -> logits (batch, num_classes), float32.
    """

    num_classes: int
    width: int = 256
    depth: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.width, dtype=self.dtype, name="stem")(x.reshape(x.shape[0], -1))
        for i in range(self.depth):
            x = ResidualBlock(self.dtype, name=f"block{i + 1}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)
