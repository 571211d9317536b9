"""Haiku: modules with weights, and whole models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from harness import KEY, Case, Model, check, drawn, normal, parametrize, through_gain

hk = pytest.importorskip("haiku", reason="pip install -e '.[integration]'")

pytestmark = pytest.mark.usefixtures("quick_compile")


def haiku(forward: Callable[[Any], Any], *shape: int, **options: Any) -> Case:
    """A case of a function that makes modules and calls them on an input of this shape."""

    def make() -> Model:
        transformed = hk.transform_with_state(forward)
        x = normal(*shape, seed=1)
        params, state = drawn(jax.eval_shape(lambda: transformed.init(KEY, x)))
        apply = lambda params, x, state, key: transformed.apply(params, state, key, x)[0]
        return through_gain(apply, params, x, state, KEY)

    return Case(make, **options)


def recurrent(x):
    """Runs a recurrent core over time (the first axis)."""
    cell = hk.LSTM(6)
    return hk.dynamic_unroll(cell, x, cell.initial_state(x.shape[1]))[0]


def stack(x):
    return hk.experimental.layer_stack(3)(lambda x: x + hk.Linear(6)(jnp.tanh(hk.remat(hk.Linear(8))(x))))(x)


def spectral(x):
    w = hk.get_parameter("w", (6, 5), init=jnp.zeros)
    return x @ hk.SpectralNorm()(w)


def tied(x):
    embed = hk.Embed(7, 6)
    return hk.Linear(6)(embed(jnp.arange(x.shape[0]) % 7) + x) @ embed.embeddings.T


CASES = {
    "Conv2DTranspose": haiku(lambda x: hk.Conv2DTranspose(5, 3, stride=2)(x), 2, 4, 4, 3),
    "LSTM": haiku(recurrent, 5, 2, 4),
    "MultiHeadAttention": haiku(lambda x: hk.MultiHeadAttention(2, 3, w_init=jnp.ones)(x, x, x), 2, 4, 6),
    "layer_stack and remat": haiku(stack, 4, 6),
    "embedding tied by hand": haiku(tied, 4, 6, in_part="embed"),
    "SpectralNorm": haiku(spectral, 4, 6, kept="w$"),
    "nets.MobileNetV1": haiku(lambda x: hk.nets.MobileNetV1((1, 2), (4, 4), 3)(x, is_training=True), 2, 8, 8, 3),
}


@parametrize(CASES)
def test_haiku(case):
    check(case)
