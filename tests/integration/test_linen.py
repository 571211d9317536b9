"""Flax Linen: layers that hold a kernel, and Flax's lifted transformations."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from harness import KEY, Case, Model, check, drawn, normal, parametrize, through_gain

pytestmark = pytest.mark.usefixtures("quick_compile")


def linen(module: nn.Module, *shape: int, kwargs: Any = None, **options: Any) -> Case:
    """A case of a module on an input of this shape. Variables that are not parameters are passed as data."""

    def make() -> Model:
        x, call = normal(*shape, seed=1), partial(module.apply, **(kwargs or {}))
        rngs = {"params": KEY, "dropout": jax.random.key(1)}
        variables = drawn(jax.eval_shape(lambda: module.init(rngs, x, **(kwargs or {}))))
        state = {k: v for k, v in variables.items() if k != "params"}

        def apply(params: Any, x: Any, state: Any, key: Any) -> Any:
            out, _ = call({"params": params, **state}, x, rngs={"dropout": key}, mutable=[*state, "intermediates"])
            return jax.tree.leaves(out)[-1]

        return through_gain(apply, variables["params"], x, state, jax.random.key(2))

    return Case(make, **options)


class Attend(nn.Module):
    """One embedding reads the tokens and gives the logits over tokens."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(7, 6)
        tokens = jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % 7
        return embed.attend(nn.Dense(6)(embed(tokens) + x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(6)(nn.tanh(nn.Dense(8)(nn.LayerNorm()(x)))), None


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block, policy=jax.checkpoint_policies.dots_saveable)()(nn.remat(Block)()(x)[0])[0]


class Vmapped(nn.Module):
    """One layer for each slice of the input, then one layer that all slices share."""

    @nn.compact
    def __call__(self, x):
        own = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(6)
        shared = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(6)
        return shared(nn.tanh(own(x)))


class Tied(nn.Module):
    """An autoencoder whose decoder is the transpose of its encoder."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, use_bias=False, name="dense")
        h = nn.tanh(dense(x))
        return h @ dense.variables["params"]["kernel"].T


def scanned(**options):
    return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, **options)


masked = jnp.ones((3, 3, 4, 5)).at[1:, 2:].set(0)

CASES = {
    "DenseGeneral": linen(nn.DenseGeneral((2, 3), axis=(-2, -1)), 4, 3, 5),
    "DenseGeneral with batch axes": linen(nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), 4, 3, 6),
    "Einsum": linen(nn.Einsum((3, 6, 5), "bnd,ndf->bnf"), 4, 3, 6),
    "Conv 2d": linen(nn.Conv(5, (3, 3), strides=2), 2, 6, 6, 4),
    "Conv 3d": linen(nn.Conv(3, (2, 2, 2)), 2, 4, 4, 4, 3),
    "Conv grouped and dilated": linen(nn.Conv(6, (3, 3), kernel_dilation=2, feature_group_count=2), 2, 6, 6, 4),
    "Conv depthwise": linen(nn.Conv(8, (3, 3), feature_group_count=4), 2, 5, 5, 4),
    "Conv circular": linen(nn.Conv(5, (3,), padding="CIRCULAR"), 2, 8, 4),
    "Conv masked": linen(nn.Conv(5, (3, 3), mask=masked), 2, 5, 5, 4),
    "ConvTranspose": linen(nn.ConvTranspose(5, (3, 3), strides=(2, 2)), 2, 4, 4, 3),
    "ConvTranspose by the transposed kernel": linen(nn.ConvTranspose(5, (3,), transpose_kernel=True), 2, 6, 4),
    "ConvLocal 2d": linen(nn.ConvLocal(3, (2, 2), strides=(2, 2)), 2, 4, 4, 2),
    "Embed with attend": linen(Attend(), 2, 4, 6, in_part="embedding"),
    "RNN of OptimizedLSTMCell": linen(nn.RNN(nn.OptimizedLSTMCell(6), reverse=True), 2, 5, 4),
    "RNN of ConvLSTMCell": linen(nn.RNN(nn.ConvLSTMCell(3, (3, 3))), 2, 3, 4, 4, 2),
    "MultiHeadDotProductAttention": linen(
        nn.MultiHeadDotProductAttention(2, normalize_qk=True, dropout_rate=0.3, deterministic=False), 2, 4, 6
    ),
    "SpectralNorm": linen(nn.SpectralNorm(nn.Dense(5)), 4, 6, kwargs={"update_stats": True}, kept="kernel"),
    "WeightNorm of a convolution": linen(
        nn.WeightNorm(nn.Conv(5, (3, 3))), 2, 4, 4, 3, in_part="kernel", kept="kernel"
    ),
    "normalizations": linen(
        nn.Sequential(
            [nn.Dense(6), nn.BatchNorm(False), nn.Dense(6), nn.GroupNorm(2), nn.PReLU(), nn.Dense(6), nn.RMSNorm(),
             nn.InstanceNorm(), nn.Dropout(0.2, deterministic=False), nn.LayerNorm(), nn.Dense(3)]
        ), 4, 3, 6,
    ),
    "scan over layers": linen(scanned()(), 4, 6),
    "scan over rematerialized layers": linen(
        nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(), 4, 6, kept="Dense_1"
    ),
    "remat": linen(Remat(), 4, 6, kept="CheckpointBlock_1/Dense_1"),
    "vmap": linen(Vmapped(), 3, 4, 6),
    "tied to its transpose": linen(Tied(), 4, 6),
    "jit": linen(nn.jit(nn.Dense)(5), 4, 6),
}  # fmt: skip


@parametrize(CASES)
def test_linen(case):
    check(case)
