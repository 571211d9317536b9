"""Transformers: ViT-Ti for images (Dosovitskiy et al. 2021, Touvron et al. 2021) and a small decoder for text."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any


class Block(nn.Module):
    """Pre-norm self-attention and MLP, each on a residual path."""

    heads: int
    mlp_width: int
    causal: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")(y, mask=mask)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(self.mlp_width, dtype=self.dtype, name="up")(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(y)


class ViT(nn.Module):
    """A vision transformer with a class token and learned positions; the defaults are ViT-Ti/16's.

    Call: images (batch, height, width, channels) -> logits (batch, num_classes), float32.
    """

    num_classes: int
    patch: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width)).astype(self.dtype)
        for i in range(self.depth):
            x = Block(self.heads, 4 * self.width, False, self.dtype, name=f"block{i + 1}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)[:, 0]
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """A decoder-only transformer with learned positions and a separate output layer.

    Call: tokens (batch, length), integers -> logits of the next token (batch, length, vocabulary), float32.
    """

    vocabulary: int
    max_length: int
    width: int = 128
    depth: int = 3
    heads: int = 4
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embedding")(tokens)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.max_length, self.width))
        x = x + positions[: tokens.shape[1]].astype(self.dtype)
        for i in range(self.depth):
            x = Block(self.heads, 4 * self.width, True, self.dtype, name=f"block{i + 1}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        return nn.Dense(self.vocabulary, dtype=self.dtype, name="output")(x).astype(jnp.float32)
