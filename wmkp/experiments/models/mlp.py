"""A multi-layer perceptron."""

from collections.abc import Sequence

import jax
from flax import linen as nn


class MLP(nn.Module):
    """Dense layers with tanh between them.

    Attributes:
      hidden: the width of each hidden layer.
      num_classes: how many logits come out.
    """

    hidden: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) for inputs (batch, ...)."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.tanh(nn.Dense(width, name=f"hidden_{i}")(x))
        return nn.Dense(self.num_classes, name="output")(x)
