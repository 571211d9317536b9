"""Flax NNX: layers that hold a kernel, and transformations of modules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from harness import KEY, Case, Model, check, drawn, normal, parametrize, through_gain

import wmkp.nnx

pytestmark = pytest.mark.usefixtures("quick_compile")


def module(build: Callable[[nnx.Rngs], Any], *shape: int, concrete: bool = False, **options: Any) -> Case:
    """A case of a module on an input of this shape. The rest of the module's state is passed as data."""

    def make() -> Model:
        create = lambda: build(nnx.Rngs(KEY))
        model = create() if concrete else nnx.eval_shape(create)
        apply, params, state = wmkp.nnx.pure(model)
        run = lambda params, x, state: jax.tree.leaves(apply(params, state, x)[0])[-1]
        return through_gain(run, drawn(params), normal(*shape, seed=1), drawn(state))

    return Case(make, **options)


class Attend(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.dense = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        tokens = jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % 7
        return self.embed.attend(self.dense(self.embed(tokens) + x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Scanned(nnx.Module):
    """Layers that nnx.vmap makes and nnx.scan runs."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Block, in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}),), out_axes=0)(
            rngs.fork(split=3)
        )

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class Vmapped(nnx.Module):
    """One layer for each slice of the input, then one layer that all slices share."""

    def __init__(self, rngs):
        make = nnx.vmap(
            lambda rngs: nnx.Linear(6, 6, rngs=rngs), in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}),)
        )
        self.own, self.shared = make(rngs.fork(split=3)), nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(nnx.vmap(lambda m, x: m(x))(self.own, x))
        return nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(self.shared, x)


CASES = {
    "LinearGeneral": module(lambda rngs: nnx.LinearGeneral((3, 5), (2, 3), axis=(-2, -1), rngs=rngs), 4, 3, 5),
    "Einsum": module(lambda rngs: nnx.Einsum("bnd,ndf->bnf", (3, 6, 5), (3, 5), rngs=rngs), 4, 3, 6),
    "Conv 2d": module(lambda rngs: nnx.Conv(4, 6, (3, 3), strides=2, feature_group_count=2, rngs=rngs), 2, 6, 6, 4),
    "Embed with attend": module(Attend, 2, 4, 6, in_part="embedding"),
    "LoRA": module(lambda rngs: nnx.LoRA(6, 2, 5, base_module=nnx.Linear(6, 5, rngs=rngs), rngs=rngs), 4, 6),
    "LoRALinear": module(lambda rngs: nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs), 4, 6),
    "Bidirectional": module(
        lambda rngs: nnx.Bidirectional(
            nnx.RNN(nnx.LSTMCell(4, 6, rngs=rngs), rngs=rngs), nnx.RNN(nnx.GRUCell(4, 6, rngs=rngs), rngs=rngs), rngs=rngs
        ),
        2, 5, 4,
    ),
    "ConvTranspose, transposed": module(
        lambda rngs: nnx.ConvTranspose(3, 5, (3, 3), transpose_kernel=True, rngs=rngs), 2, 4, 4, 3
    ),
    "WeightNorm": module(
        lambda rngs: nnx.WeightNorm(nnx.Linear(6, 5, rngs=rngs), rngs=rngs),
        4, 6, concrete=True, in_part="kernel", kept="kernel",
    ),
    "scan": module(Scanned, 4, 6),
    "remat": module(Remat, 4, 6, kept="up/kernel"),
    "vmap": module(Vmapped, 3, 4, 6),
}  # fmt: skip


@parametrize(CASES)
def test_nnx(case):
    check(case)
