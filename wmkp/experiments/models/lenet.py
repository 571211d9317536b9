"""LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling, for 32x32 images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class LeNet(nn.Module):
    """Two convolutions and three dense layers: 61,706 parameters for grey images and ten classes.

    Call: images (batch, 32, 32, channels) -> logits (batch, num_classes), float32.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (6, 16):
            x = nn.relu(nn.Conv(features, (5, 5), padding="VALID", dtype=self.dtype)(x))
            n, height, width, _ = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, features).max((2, 4))  # like nn.max_pool, but fast on CPUs
        x = x.reshape(x.shape[0], -1)
        for features in (120, 84):
            x = nn.relu(nn.Dense(features, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)
