"""One equation in which a weight multiplies an activation: its axes, its weight gradient, its weight as matrices."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmkp.program import compat, patches
from wmkp.program.kinds import Kind

Bind = Callable[..., list[Any]]


class WeightTransportError(ValueError):
    """An error could only go back through a forward weight W, because the feedback weights B cannot follow W."""


class Product:
    """One equation that multiplies a weight with an activation (or an obstacle to doing so without transport)."""

    def __init__(
        self,
        eqn: Any,
        bind: Bind,
        weight: int,
        kinds: Sequence[Kind],
        obstacle: str | None,
        lengths: tuple[int, ...],
    ):
        kind = kinds[weight]
        self.primitive: str = eqn.primitive.name
        self.eqn_params: dict[str, Any] = eqn.params
        self.weight = weight  # which operand the weight is
        self.params = kind.params
        if obstacle:
            self.params = self.params.union(*(k.params for k in kinds if k.static or kind.data))
        self.obstacle = obstacle
        self.gain = False  # whether the obstacle is an elementwise scaling, which ``local`` allows
        self.followed = True  # whether B can follow the weight; if not, no error passes here
        self.unmirrored = (
            "data multiplies, adds to or selects from it" if kind.unmirrored == "data" else kind.unmirrored
        )
        self.plain = kind.plain
        self.stack = kind.stack
        self.needs_feedback = any(k.active for i, k in enumerate(kinds) if i != weight)
        self.weight_aval = eqn.invars[weight].aval
        self.input_avals = [v.aval for i, v in enumerate(eqn.invars) if i != weight]
        self.output_aval = eqn.outvars[0].aval
        self.lengths = lengths  # of the scans around it, outermost first (and of a shard_map, how many devices)
        # Whether a CPU takes its weight's gradient by patches.
        self.by_patches = (
            self.primitive == "conv_general_dilated"
            and weight == 1
            and patches.applies(eqn.params, self.input_avals[0], self.weight_aval, self.output_aval)
        )
        self.bind = bind
        self.pending = False  # whether later equations may still show it to be a gain (``Kind.scaled``)
        self.bias: Any = None  # the weight that is added to its output, if any: (plan, variable)
        # Whether a gain scales the weight or the bias (any other effect of data on a weight is ``unmirrored``).
        self.scaled = kind.gained or kind.data

    def multiply(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product, as the equation computes it."""
        return self.bind(*((w, x) if self.weight == 0 else (x, w)))[0]

    def weight_gradient(self, x: jax.Array, delta: jax.Array) -> jax.Array:
        """delta x^T: the transpose of the product with respect to its weight."""
        aval = self.weight_aval

        def transpose(x: jax.Array, delta: jax.Array) -> jax.Array:
            (dw,) = jax.linear_transpose(lambda w: self.multiply(x, w), aval)(delta)
            return self.laid_out(dw)

        if not self.by_patches:
            return transpose(x, delta)
        by_patches = lambda x, delta: patches.weight_gradient(self.eqn_params, x, delta, aval.shape)
        return jax.lax.platform_dependent(x, delta, cpu=by_patches, default=transpose)

    def laid_out(self, w: jax.Array) -> jax.Array:
        """An array in the weight's layout. For convolutions, whose libraries have another layout, ``compat.laid_out`` fixes it."""
        return compat.laid_out(w) if self.primitive == "conv_general_dilated" else w

    def axes(self) -> tuple[list[int], list[int], list[int], int]:
        """The weight's axes as (groups, inputs, outputs), and into how many groups a conv splits its outputs."""
        rank = self.weight_aval.ndim
        if self.primitive == "dot_general":
            contract, batch = self.eqn_params["dimension_numbers"]
            inputs, groups = list(contract[self.weight]), list(batch[self.weight])
            return groups, inputs, [a for a in range(rank) if a not in inputs and a not in groups], 1
        out, into, *space = self.eqn_params["dimension_numbers"].rhs_spec
        groups = self.eqn_params["feature_group_count"] * self.eqn_params["batch_group_count"]
        return [], [*space, into], [out], groups

    def output_axes(self) -> list[int]:
        """The output's axes that index the weight's groups and outputs, in the order (groups, outputs)."""
        if self.primitive == "dot_general":
            _, batch = self.eqn_params["dimension_numbers"]
            groups, free = len(batch[0]), len(self.axes()[2])
            start = groups if self.weight == 0 else self.output_aval.ndim - free
            return [*range(groups), *range(start, start + free)]
        return [self.eqn_params["dimension_numbers"].out_spec[1]]

    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out)."""
        shape = self.weight_aval.shape
        if self.primitive not in compat.BILINEAR or (self.primitive == "conv_general_dilated" and self.weight == 0):
            return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        _, inputs, outputs, _ = self.axes()
        return math.prod(shape[a] for a in inputs), math.prod(shape[a] for a in outputs)

    def to_matrices(self, w: jax.Array) -> jax.Array:
        """(*stack, *weight shape) -> (K, fan_in, outputs of one group), K counting scans' steps and groups."""
        lead = w.ndim - self.weight_aval.ndim
        groups, inputs, outputs, split = self.axes()
        order = [*range(lead), *(lead + a for a in [*groups, *inputs, *outputs])]
        fan_in, fan_out = self.fans()
        w = w.transpose(order).reshape(-1, fan_in, split, fan_out // split)
        return w.swapaxes(1, 2).reshape(-1, fan_in, fan_out // split)

    def from_matrices(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of ``to_matrices``: (K, fan_in, outputs) -> ``shape`` = (*stack, *weight shape)."""
        lead = len(shape) - self.weight_aval.ndim
        groups, inputs, outputs, split = self.axes()
        order = [*range(lead), *(lead + a for a in [*groups, *inputs, *outputs])]
        m = m.reshape(-1, split, *m.shape[1:]).swapaxes(1, 2)
        return m.reshape([shape[a] for a in order]).transpose(np.argsort(order))

    def samples(self) -> int:
        """The number of samples of each output value (batch and positions)."""
        shape = self.output_aval.shape
        return math.prod(size for axis, size in enumerate(shape) if axis not in self.output_axes())

    def input_matrices(self, x: jax.Array) -> jax.Array:
        """The product's input as (K, samples, fan_in), K its groups, each sample in the order of ``to_matrices``."""
        x = compat.gathered(x)  # an array divided over explicit axes cannot be rearranged
        groups, _, _, split = self.axes()
        fan_in = self.fans()[0]
        if self.primitive == "dot_general":
            contract, batch = self.eqn_params["dimension_numbers"]
            inputs, groups = list(contract[1 - self.weight]), list(batch[1 - self.weight])
            samples = [a for a in range(x.ndim) if a not in inputs and a not in groups]
            count = math.prod(x.shape[a] for a in groups)
            return x.transpose([*groups, *samples, *inputs]).reshape(count, -1, fan_in)
        p = self.eqn_params
        numbers = p["dimension_numbers"]
        if p["batch_group_count"] > 1 or self.weight == 0:
            raise ValueError(
                "input covariances and whitening do not support a convolution by batch groups, or one whose left operand is the weight; "
                "use another form of convolution, or leave whitening out"
            )
        space = [self.weight_aval.shape[a] for a in numbers.rhs_spec[2:]]
        patches = jax.lax.conv_general_dilated_patches(
            x, space, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], dimension_numbers=numbers
        )
        patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)  # features come before the positions within a patch
        patches = patches.reshape(-1, split, fan_in // math.prod(space), math.prod(space))
        return patches.transpose(1, 0, 3, 2).reshape(split, -1, fan_in)
