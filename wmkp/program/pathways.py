"""The products of a weight with an activation whose backward pass goes through feedback weights.

Forward, y = W x. Backward, the error goes on as B delta (eq. 3) and W's own gradient stays delta x^T (eq. 4), the
outer product of what the synapse sees on its two sides. Both are transposes of the one bilinear product, so that every
dense, grouped, strided or dilated variant is served by the same few lines.
"""

from collections.abc import Callable
from typing import Any

import jax

from wmkp.program import compat
from wmkp.program.products import Product
from wmkp.program.projections import WeightTransportError, direct_sizes

LocalGradient = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def through_feedback(
    product: Product,
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    local: LocalGradient | None = None,
    made: bool = False,
) -> jax.Array:
    """``product.multiply(x, w)``, with the error sent back through ``b``; W is not among what the backward pass keeps.

    The cotangent of ``b`` is that of ``w`` (eq. 15: y delta^T in the paper's layout, delta y^T in W's), which is the
    Kolen-Pollack signal; or, with ``local``, ``local(x, u, w, b)``: the gradient of a loss of this projection alone,
    which no error enters. A ``b`` that is ``made`` of W at each step is made when the error is there, and not kept from
    the forward pass.
    """

    @jax.custom_vjp
    def multiply(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return product.multiply(x, w)

    def forward(x: jax.Array, w: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
        u = product.multiply(x, w)
        return u, (x, b) if local is None else (x, b, local(*map(compat.gathered, (x, u, w, b))))

    def backward(kept: tuple[Any, ...], delta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, b = kept[:2]
        if made:
            b = compat.after(b, delta)
        (dx,) = jax.linear_transpose(lambda x: product.multiply(x, b), x)(delta)
        # B is read for dx, and overwritten (as W is, where B is made of it) by what comes of these.
        dw = compat.after(product.weight_gradient(x, delta), dx)
        return dx, dw, dw if local is None else compat.after(compat.divided_as(kept[2], jax.typeof(b)), dx)

    multiply.defvjp(forward, backward)
    return multiply(x, w, b)


def directly(
    product: Product, x: jax.Array, w: jax.Array, b: jax.Array, channel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``product.multiply(x, w)``, and ``channel`` as it came, whose cotangent times ``b`` is the error at ``x`` (Nokland 2016).

    ``b`` is (size of one input, size of one error); what travels back through the channel is the error at the network's
    output. The cotangent of ``b`` is x e^T, summed over samples (direct Kolen-Pollack).
    """
    _, inputs, errors = direct_sizes(x.shape, channel.shape)

    @jax.custom_vjp
    def multiply(x: jax.Array, w: jax.Array, b: jax.Array, channel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return product.multiply(x, w), channel

    def forward(x: jax.Array, w: jax.Array, b: jax.Array, channel: jax.Array) -> tuple[Any, Any]:
        return (product.multiply(x, w), channel), (x, b)

    def backward(kept: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        (x, b), (delta, error) = kept, cotangents
        e = compat.gathered(error).reshape(-1, errors).astype(b.dtype)
        dx = compat.divided_as((e @ b.T).reshape(x.shape).astype(x.dtype), jax.typeof(x))
        return (
            dx,
            product.weight_gradient(x, delta),
            compat.gathered(x).reshape(-1, inputs).astype(b.dtype).T @ e,
            error,
        )

    multiply.defvjp(forward, backward)
    return multiply(x, w, b, channel)


def emit_error(y: jax.Array, channel: jax.Array) -> jax.Array:
    """``y`` as it is; the error that comes back to it also enters the channel."""

    @jax.custom_vjp
    def emit(y: jax.Array, channel: jax.Array) -> jax.Array:
        return y

    emit.defvjp(lambda y, channel: (y, None), lambda _, error: (error, error))
    return emit(y, channel)


def without_feedback(product: Product, x: jax.Array, w: jax.Array, path: str) -> jax.Array:
    """``product.multiply(x, w)`` where no error is to go back to ``x``: asking for one is an error, not weight transport."""

    @jax.custom_vjp
    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return product.multiply(x, w)

    def forward(x: Any, w: Any) -> tuple[jax.Array, jax.Array]:
        if x.perturbed:
            raise WeightTransportError(
                f"a gradient was asked for at the input of projection {path!r}, which has no feedback weights "
                "(its entry in feedback is None), so the error would travel back through W. Differentiate with "
                "respect to params and feedback only, or let the input depend on params, so that init_feedback gives "
                "this projection a B."
            )
        return product.multiply(x.value, w.value), x.value

    def backward(x: jax.Array, delta: Any) -> tuple[None, Any]:
        if isinstance(delta, jax.custom_derivatives.SymbolicZero):
            return None, None
        return None, product.weight_gradient(x, delta)

    multiply.defvjp(forward, backward, symbolic_zeros=True)
    return multiply(x, w)
