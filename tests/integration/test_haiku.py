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


def core(module: Callable[[], Any], unroll: Callable[..., Any] = hk.dynamic_unroll) -> Callable[[Any], Any]:
    """Runs a recurrent core over time (the first axis)."""

    def forward(x: Any) -> Any:
        cell = module()
        return unroll(cell, x, cell.initial_state(x.shape[1]))[0]

    return forward


def resnet(x):
    net = hk.nets.ResNet(
        (1, 1, 1, 1),
        3,
        {"decay_rate": 0.9},
        bottleneck=False,
        channels_per_group=(4, 4, 6, 6),
        use_projection=(True,) * 4,
    )
    return net(x, is_training=True)


def separable(x):
    return hk.SeparableDepthwiseConv2D(2, 3)(jax.nn.relu(hk.DepthwiseConv2D(1, 3)(x)))


def stack(x):
    return hk.experimental.layer_stack(3)(lambda x: x + hk.Linear(6)(jnp.tanh(hk.remat(hk.Linear(8))(x))))(x)


def spectral(x):
    w = hk.get_parameter("w", (6, 5), init=jnp.zeros)
    return x @ hk.SpectralNorm()(w)


def tied(x):
    embed = hk.Embed(7, 6)
    return hk.Linear(6)(embed(jnp.arange(x.shape[0]) % 7) + x) @ embed.embeddings.T


CASES = {
    "nets.MLP": haiku(lambda x: hk.nets.MLP((8, 6, 3))(x), 4, 6),
    "Conv1D": haiku(lambda x: hk.Conv1D(5, 3)(x), 2, 8, 4),
    "Conv2DTranspose": haiku(lambda x: hk.Conv2DTranspose(5, 3, stride=2)(x), 2, 4, 4, 3),
    "Conv3D": haiku(lambda x: hk.Conv3D(3, 2)(x), 2, 4, 4, 4, 3),
    "separable convolution": haiku(separable, 2, 5, 5, 3),
    "VanillaRNN": haiku(core(lambda: hk.VanillaRNN(6)), 5, 2, 4),
    "LSTM": haiku(core(lambda: hk.LSTM(6)), 5, 2, 4),
    "GRU unrolled": haiku(core(lambda: hk.GRU(6), hk.static_unroll), 3, 2, 4),
    "Conv2DLSTM": haiku(core(lambda: hk.Conv2DLSTM((4, 4), 3, 3)), 3, 2, 4, 4, 2),
    "MultiHeadAttention": haiku(lambda x: hk.MultiHeadAttention(2, 3, w_init=jnp.ones)(x, x, x), 2, 4, 6),
    "layer_stack and remat": haiku(stack, 4, 6),
    "embedding tied by hand": haiku(tied, 4, 6, in_part="embed"),
    "SpectralNorm": haiku(spectral, 4, 6, kept="w$"),
    "nets.ResNet": haiku(resnet, 2, 16, 16, 3),
    "nets.MobileNetV1": haiku(lambda x: hk.nets.MobileNetV1((1, 2), (4, 4), 3)(x, is_training=True), 2, 8, 8, 3),
}


@parametrize(CASES)
def test_haiku(case):
    check(case)
