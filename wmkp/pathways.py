"""The products of a weight with an activation whose backward pass goes through feedback weights.

Forward, y = W x. Backward, the error goes on as B delta (eq. 3) and W's own gradient stays delta x^T (eq. 4), the
outer product of what the synapse sees on its two sides. Both are transposes of the one bilinear product, so that every
dense, grouped, strided or dilated variant is served by the same few lines.
"""

from collections.abc import Callable
from typing import Any

import jax

from wmkp.projections import WeightTransportError

Multiply = Callable[[jax.Array, jax.Array], jax.Array]


def through_feedback(multiply: Multiply, x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """``multiply(x, w)``, with the error sent back through ``b``; W is not among what the backward pass keeps.

    The cotangent of ``b`` is that of ``w`` (eq. 15: y delta^T in the paper's layout, delta y^T in W's), which is the
    Kolen-Pollack signal.
    """

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return multiply(x, w)

    def forward(x: jax.Array, w: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return multiply(x, w), (x, b)

    def backward(kept: tuple[jax.Array, jax.Array], delta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, b = kept
        (dx,) = jax.linear_transpose(lambda x: multiply(x, b), x)(delta)
        (dw,) = jax.linear_transpose(lambda w: multiply(x, w), b)(delta)
        return dx, dw, dw

    product.defvjp(forward, backward)
    return product(x, w, b)


def without_feedback(multiply: Multiply, x: jax.Array, w: jax.Array, path: str) -> jax.Array:
    """``multiply(x, w)`` where no error is to go back to ``x``: asking for one is an error, not weight transport."""

    aval = jax.typeof(w)

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return multiply(x, w)

    def forward(x: Any, w: Any) -> tuple[jax.Array, jax.Array]:
        if x.perturbed:
            raise WeightTransportError(
                f"a gradient was asked for at the input of projection {path!r}, which has no feedback weights "
                "(its entry in feedback is None), so the error would travel back through W. Differentiate with "
                "respect to params and feedback only, or let the input depend on params, so that init_feedback gives "
                "this projection a B."
            )
        return multiply(x.value, w.value), x.value

    def backward(x: jax.Array, delta: Any) -> tuple[None, Any]:
        if isinstance(delta, jax.custom_derivatives.SymbolicZero):
            return None, None
        return None, jax.linear_transpose(lambda w: multiply(x, w), aval)(delta)[0]

    product.defvjp(forward, backward, symbolic_zeros=True)
    return product(x, w)
