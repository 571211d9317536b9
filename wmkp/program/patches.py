"""A convolution's weight gradient on a CPU: matrix products over a few examples' patches at a time.

XLA computes this gradient as a convolution with a kernel of the image's size. Its CPU backend lays out patches inside
the product. That is fast for many output channels and slow for few. It also lays out patches for a 1x1 kernel, whose
gradient is one matrix product (``python -m benchmarks.conv``; in whole steps ``python -m benchmarks --only engaged``).
Other devices use XLA's gradient.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from wmkp.program import compat

LEAST = 2**24  # multiplications; with fewer it does not pay
FEW = 32  # output channels; with more XLA is mostly as fast or faster, and needs less memory
CHUNK = 2**19  # entries of patches laid out at a time: 2 MB


def applies(eqn_params: dict[str, Any], x: Any, w: Any, out: Any) -> bool:
    """Whether this gradient is faster: the kernel is 1x1 or has few outputs.

    The convolution must be large enough and plain: no groups, no dilated input, float32.

    Args:
      eqn_params: the parameters of the ``conv_general_dilated``.
      x, w, out: shapes and dtypes of input, kernel and output.
    """
    outputs, _, *taps = (w.shape[axis] for axis in eqn_params["dimension_numbers"].rhs_spec)
    return (
        (math.prod(taps) == 1 or outputs <= FEW)
        and eqn_params["feature_group_count"] == eqn_params["batch_group_count"] == 1
        and all(d == 1 for d in eqn_params["lhs_dilation"])
        and all(min(p) >= 0 for p in eqn_params["padding"])
        and x.dtype == w.dtype == out.dtype == jnp.float32
        and math.prod(w.shape) * math.prod(out.shape) // outputs >= LEAST
    )


def weight_gradient(eqn_params: dict[str, Any], x: jax.Array, delta: jax.Array, kernel: tuple[int, ...]) -> jax.Array:
    """delta x^T summed over examples and positions, in the layout of the kernel.

    Args:
      eqn_params: the parameters of the ``conv_general_dilated``.
      x: its input, delta: the cotangent of its output, in their own layouts.
      kernel: its shape.
    """
    numbers = eqn_params["dimension_numbers"]
    x, delta = (
        jnp.moveaxis(a, (spec[0], spec[1]), (0, -1)) for a, spec in ((x, numbers.lhs_spec), (delta, numbers.out_spec))
    )
    taps = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    count, *size, outputs = delta.shape
    features = x.shape[-1]
    strides, dilation = eqn_params["window_strides"], eqn_params["rhs_dilation"]

    def patches(x: jax.Array) -> jax.Array:
        """(examples and positions, taps and features)."""
        x = jnp.pad(x, ((0, 0), *eqn_params["padding"], (0, 0)))
        parts = []
        for tap in itertools.product(*map(range, taps)):
            start = [t * d for t, d in zip(tap, dilation, strict=True)]
            stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, strides, strict=True)]
            parts.append(jax.lax.slice(x, (0, *start, 0), (len(x), *stop, features), (1, *strides, 1)))
        return jnp.concatenate(parts, axis=-1).reshape(len(x) * math.prod(size), math.prod(taps) * features)

    # The patches of a 1x1 kernel are the input itself, so all examples are taken at once.
    laid_out = math.prod(size) * math.prod(taps) * features if math.prod(taps) > 1 else 1
    wanted = max(1, CHUNK // laid_out)
    chunk = next(n for n in range(min(wanted, count), 0, -1) if count % n == 0)
    # Each chunk takes examples from all parts of the batch, so a batch that is divided among devices stays divided.
    # Only one chunk at a time is padded and laid out.
    x, delta = (a.reshape(chunk, count // chunk, *a.shape[1:]) for a in (x, delta))

    # A strided 1x1 kernel picks positions from its input. This waits for delta: picked early, they would be kept beside
    # the input, and an engaged step would need more memory than backprop.
    waits = math.prod(taps) == 1 and max(strides) > 1

    def product(x: jax.Array, delta: jax.Array) -> jax.Array:
        if waits:
            # One number of each example, so that each device waits only for its own examples.
            of_each = delta[(slice(None), *[slice(1)] * (delta.ndim - 1))]
            x = x - compat.zeros_of(of_each).astype(x.dtype)
        return patches(x).T @ delta.reshape(len(x) * math.prod(size), outputs)

    def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        part = [jax.lax.dynamic_index_in_dim(a, i, axis=1, keepdims=False) for a in (x, delta)]
        return total + product(*part), None

    # No examples give zeros of the right type: inside a shard_map they are each device's own, like the rest.
    zero = product(x[:0, 0], delta[:0, 0])
    total, _ = jax.lax.scan(add, zero, jnp.arange(count // chunk))
    whole = total.reshape(*taps, features, outputs)
    # From (space, in, out) to the kernel's axes: rhs_spec is (out, in, space).
    place = [*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]]
    return whole.transpose([place.index(axis) for axis in range(len(place))])
