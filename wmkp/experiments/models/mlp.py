"""A multi-layer perceptron."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class MLP(nn.Module):
    """Dense layers with tanh between them.

    Attributes:
      hidden: the width of each hidden layer.
      num_classes: the number of logits.
      dtype: the dtype of the computation. Parameters are float32.
    """

    hidden: Sequence[int]
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (batch, num_classes), float32, for inputs (batch, ...)."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.tanh(nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)
