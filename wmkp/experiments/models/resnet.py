"""Residual networks (He et al. 2016): ResNet-20 and -56 for CIFAR, ResNet-18 and -50 for ImageNet."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any


class ConvNorm(nn.Module):
    """A convolution with its BatchNorm and, if asked for, its ReLU, in either order.

    ``norm_last`` normalizes after the ReLU, as most runs of Akrout et al. (2019) did.
    """

    features: int
    kernel: int
    strides: int = 1
    relu: bool = True
    norm_last: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # Symmetric padding, as in the papers' code. SAME would pad a strided convolution only at its end.
        pad = self.kernel // 2
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.strides,
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
        )(x)
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        if not self.relu:
            return norm(x)
        return norm(nn.relu(x)) if self.norm_last else nn.relu(norm(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    strides: int
    padded_shortcut: bool
    norm_last: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm_last=self.norm_last, dtype=self.dtype)
        y = conv(self.features, 3, self.strides)(x, train)
        y = conv(self.features, 3, relu=False)(y, train)
        if x.shape != y.shape:
            if self.padded_shortcut:
                missing = self.features - x.shape[-1]
                x = jnp.pad(
                    x[:, :: self.strides, :: self.strides], ((0, 0),) * 3 + ((missing // 2, missing - missing // 2),)
                )
            else:
                x = conv(self.features, 1, self.strides, relu=False, name="shortcut")(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """A 1x1, a (strided) 3x3 and a 1x1 convolution to four times the features, and a shortcut."""

    features: int
    strides: int
    padded_shortcut: bool
    norm_last: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm_last=self.norm_last, dtype=self.dtype)
        y = conv(self.features, 1)(x, train)
        y = conv(self.features, 3, self.strides)(y, train)
        y = conv(4 * self.features, 1, relu=False)(y, train)
        if x.shape != y.shape:
            x = conv(4 * self.features, 1, self.strides, relu=False, name="shortcut")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network.

    Call: images (batch, height, width, 3), ``train`` -> logits (batch, num_classes), float32.

    Attributes:
      num_classes: the number of logits.
      stages: the number of blocks in each stage. Features double from stage to stage.
      block: ``BasicBlock`` or ``Bottleneck``.
      features: the features of the first stage.
      imagenet_stem: whether it starts with a strided 7x7 convolution and max-pooling, instead of one 3x3 convolution.
      padded_shortcut: whether shortcuts between stages are padded with zeros, instead of 1x1 convolutions.
      norm_last: whether BatchNorm comes after the ReLU.
      dtype: the dtype of the computation. Parameters are float32.
    """

    num_classes: int
    stages: Sequence[int]
    block: type[nn.Module]
    features: int
    imagenet_stem: bool
    padded_shortcut: bool = False
    norm_last: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = x.astype(self.dtype)
        conv = partial(ConvNorm, norm_last=self.norm_last, dtype=self.dtype, name="stem")
        if self.imagenet_stem:
            x = conv(self.features, 7, 2)(x, train)
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        else:
            x = conv(self.features, 3)(x, train)
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                x = self.block(
                    features=self.features * 2**stage,
                    strides=2 if stage > 0 and i == 0 else 1,
                    padded_shortcut=self.padded_shortcut,
                    norm_last=self.norm_last,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)


ResNet20 = partial(ResNet, stages=(3,) * 3, block=BasicBlock, features=16, imagenet_stem=False, padded_shortcut=True)
ResNet56 = partial(ResNet, stages=(9,) * 3, block=BasicBlock, features=16, imagenet_stem=False, padded_shortcut=True)
ResNet18 = partial(ResNet, stages=(2, 2, 2, 2), block=BasicBlock, features=64, imagenet_stem=True)
ResNet50 = partial(ResNet, stages=(3, 4, 6, 3), block=Bottleneck, features=64, imagenet_stem=True)
