"""Keras 3 on JAX: layers with weights and whole models, called by ``stateless_call`` with variables by path."""

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest
from harness import Case, Model, check, drawn, normal, parametrize, through_gain

import wmkp

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KERAS_BACKEND", "jax")  # Keras reads this once, at import
    patch.setenv("KERAS_HOME", os.devnull)  # do not read or write the settings in the user's home
    keras = pytest.importorskip("keras", reason="pip install -e '.[integration]'")
layers, ops = keras.layers, keras.ops

pytestmark = pytest.mark.usefixtures("quick_compile")


def functional(build: Callable[[Any], Any], *shape: int, training: bool = True) -> Model:
    """A functional model on an input of this shape. Variables that are not trained are passed as data."""
    with keras.StatelessScope(initialize_variables=False):  # only the shapes are needed
        inputs = keras.Input(batch_shape=shape)
        model = keras.Model(inputs, build(inputs))
    keras.utils.clear_session(free_memory=False)  # restart the numbering in the next model's names
    shapes = {v.path: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.trainable_variables}
    state = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.non_trainable_variables]
    assert len(shapes) == len(model.trainable_variables), "each path is one variable's"

    def apply(params: Any, x: Any, state: Any) -> Any:
        return model.stateless_call([params[path] for path in shapes], state, x, training=training)[0]

    return through_gain(apply, drawn(shapes), normal(*shape, seed=1), drawn(state))


def model(build: Callable[[Any], Any], *shape: int, training: bool = True, **options: Any) -> Case:
    return Case(lambda: functional(build, *shape, training=training), **options)


def chain(*build: Any) -> Callable[[Any], Any]:
    """Applies layers one after another. Each model makes new layers."""

    def call(x: Any) -> Any:
        for layer in build:
            x = layer()(x)
        return x

    return call


def tied(x):
    embed = layers.ReversibleEmbedding(6, 6)
    return embed(layers.Dense(6)(embed(ops.argmax(x, -1)) + x), reverse=True)


def lora(x):
    layer = layers.Dense(5)
    layer.build(x.shape)
    layer.enable_lora(2)
    return layer(x)


def remat(x):
    with keras.RematScope():
        hidden, out = layers.Dense(8, activation="gelu"), layers.Dense(6)
    return x + out(hidden(x))


def cnn(x):
    for groups in (1, 2):
        x = layers.Conv2D(4, 3, strides=2, padding="same", groups=groups, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return layers.Dense(3)(layers.GlobalAveragePooling2D()(x))


def densely_connected(x):
    x = layers.Concatenate()([x, layers.Dense(4)(x)])
    return layers.Dense(3)(layers.ReLU()(layers.BatchNormalization()(x)))


def transformer(x):
    x = layers.Dense(6)(x) + layers.Embedding(4, 6)(ops.broadcast_to(ops.arange(4), x.shape[:2]))
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 3, dropout=0.2, seed=1)(y, y, use_causal_mask=True)
    y = layers.Dense(8, activation="gelu")(layers.LayerNormalization()(x))
    x = x + layers.Dropout(0.1, seed=2)(layers.Dense(6)(y))
    return layers.Dense(3)(layers.LayerNormalization()(x))  # without it the loss overflows


def mobilenet(x):
    """The first two of the eleven blocks of MobileNetV3Small, and a readout."""
    net = keras.applications.MobileNetV3Small(
        input_tensor=x, weights=None, alpha=0.35, minimalistic=True, include_top=False, include_preprocessing=False
    )
    return layers.Dense(3)(layers.GlobalAveragePooling2D()(net.get_layer("expanded_conv_1_project_bn").output))


dense = lambda: layers.Dense(6)

CASES = {
    "Dense in mixed_bfloat16": model(chain(lambda: layers.Dense(5, dtype="mixed_bfloat16")), 4, 6, bound=1e-2),
    "EinsumDense": model(chain(lambda: layers.EinsumDense("btd,dhk->bthk", (None, 2, 3), bias_axes="hk")), 2, 4, 6),
    "Conv1D": model(chain(lambda: layers.Conv1D(5, 3, padding="causal", dilation_rate=2)), 2, 8, 4),
    "Conv2DTranspose": model(chain(lambda: layers.Conv2DTranspose(5, 3, strides=2)), 2, 4, 4, 3),
    "ReversibleEmbedding": model(tied, 2, 4, 6, in_part="embeddings"),
    "GRU": model(chain(lambda: layers.GRU(6, dropout=0.2, recurrent_dropout=0.2, seed=1)), 2, 5, 4),
    "GroupQueryAttention": model(lambda x: layers.GroupQueryAttention(3, 4, 2)(x, x), 2, 4, 6),
    # Its score is a hand-written product: the sum of scale * tanh(query + key).
    "AdditiveAttention": model(
        lambda x: layers.AdditiveAttention()([layers.Dense(6)(x), x]), 2, 4, 6,
        refused={"model/additive_attention/scale": "reduce_sum"},
    ),
    "normalizations": model(
        chain(dense, layers.LayerNormalization, dense, lambda: layers.GroupNormalization(2), dense,
              layers.RMSNormalization, dense, layers.UnitNormalization, lambda: layers.Dropout(0.2, seed=1), dense),
        4, 3, 6,
    ),
    "BatchNormalization by its statistics": model(
        chain(dense, layers.BatchNormalization, layers.ReLU, dense), 8, 6, training=False
    ),
    # A cond on whether the kernel is all zeros returns the normalized kernel.
    "SpectralNormalization": model(
        chain(lambda: layers.SpectralNormalization(layers.Dense(5))), 4, 6, unmirrored="."
    ),
    "densely connected": model(densely_connected, 8, 6),
    "LoRA": model(lora, 4, 6, refused={f"model/dense/lora_kernel_{k}": "dot_general" for k in "ab"}),
    "RematScope": model(remat, 4, 6, kept="dense/kernel"),
    "convolutional net": model(cnn, 2, 8, 8, 3),
    "Transformer block": model(transformer, 2, 4, 6, local="bias|embeddings"),
    "MobileNetV3Small": model(mobilenet, 4, 32, 32, 3),
}  # fmt: skip


@parametrize(CASES)
def test_keras(case):
    check(case)


def test_patterns_of_paths_pick_out_layers():
    fun, params, args = functional(chain(lambda: layers.Dense(5, name="head")), 4, 6)
    rule = {"^model/head/kernel$": wmkp.kolen_pollack()}
    feedback = jax.eval_shape(lambda: wmkp.init_feedback(jax.random.key(0), rule, fun, params, *args))
    assert feedback["model"]["head/kernel"].shape == (6, 5)
