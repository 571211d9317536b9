"""Local losses whose gradients train B: the alignment primitives of Kunin et al. (2020), on noise or on activity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Multiply = Callable[[Any, Any], Any]


class Alignment(NamedTuple):
    """One coefficient for each primitive of R(B; W, x), with u = W x and v = B^T x, means over samples.

    Attributes:
      decay: of ``1/2 |B|^2``, which gives ``dB`` proportional to ``-B``.
      amplitude: of ``-<v, u>``: ``x u^T``, the weight mirror's signal.
      sparse: of ``1/2 |v|^2``: ``-x v^T``.
      null: of ``1/2 |B u|^2``: ``-(B u) u^T``.
      self_alignment: of ``-<B, W^T>``: ``W^T``; transports the weights.
      whiten: whether amplitude's ``x u^T`` is freed of the input's covariance, ``E[x x^T]^-1 E[x u^T]``; not local.
      normalize: by what amplitude, sparse and null are divided: "none" (1), "mean" (x's mean square, the scale of
        ``E[x x^T]``) or "total" (fan_in times that, at least its largest eigenvalue).
      rate: how far B goes down the gradient of R a step.
    """

    decay: float = 0.0
    amplitude: float = 0.0
    sparse: float = 0.0
    null: float = 0.0
    self_alignment: float = 0.0
    whiten: bool = False
    normalize: str = "none"
    rate: float = 0.1


def local_gradient(
    alignment: Alignment, multiply: Multiply, x: jax.Array, u: jax.Array, w: Any, b: jax.Array, samples: Any
) -> jax.Array:
    """The gradient of R with respect to B, in W's layout (``whiten`` apart, which needs the covariance).

    Args:
      alignment: the coefficients.
      multiply: the product, ``u = multiply(x, w)``.
      x: the presynaptic activity.
      u: the response to it.
      w: the weight as the product sees it (read by ``self_alignment`` alone).
      b: the feedback weight in the same layout.
      samples: what sums over samples are divided by: their number, times a normalization if there is one.
    """
    # Each side is divided by the root: a quotient by all samples is less than float16 can hold.
    x, u = ((a / samples**0.5).astype(a.dtype) for a in (x, u))
    x, u, w = jax.lax.stop_gradient((x, u, w))

    def loss(b: jax.Array) -> jax.Array:
        total = jnp.zeros((), b.dtype)
        if alignment.decay:
            total += alignment.decay * _dot(b, b) / 2
        if alignment.self_alignment:
            total -= alignment.self_alignment * _dot(b, w)
        if alignment.amplitude or alignment.sparse:
            v = multiply(x, b)
            total += alignment.sparse * _dot(v, v) / 2 - alignment.amplitude * _dot(v, u)
        if alignment.null:
            (back,) = jax.linear_transpose(lambda x: multiply(x, b), x)(u)
            total += alignment.null * _dot(back, back) / 2
        return total

    return jax.grad(loss)(b)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(dtype) * b.astype(dtype))


def covariance(product: Any, x: jax.Array) -> jax.Array:
    """E[x x^T] of a product's input, (groups, fan_in, fan_in)."""
    x = product.input_matrices(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.einsum("kni,knj->kij", x, x) / x.shape[1]


_RIDGE = 1e-4  # of the mean variance: directions that the activity hardly reaches are left out of the whitening


def activity_gradient(alignment: Alignment, product: Any, uses: float) -> Callable[[Any, Any, Any, Any], Any]:
    """``(x, u, w, b) -> `` the gradient of R on a product's own activity, in W's layout; R a mean over so many uses."""

    def gradient(x: jax.Array, u: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        samples = product.samples()
        if not alignment.whiten:
            if alignment.normalize != "none":
                power = jnp.mean(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) + 1e-12
                samples = samples * power * (product.fans()[0] if alignment.normalize == "total" else 1)
            return local_gradient(alignment, product.multiply, x, u, w, b, samples) / uses
        others = alignment._replace(amplitude=0.0)
        alone = Alignment(amplitude=alignment.amplitude)
        signal = local_gradient(alone, product.multiply, x, u, w, b, samples)
        c = covariance(product, x)
        mean = jnp.trace(c, axis1=-2, axis2=-1)[:, None, None] / c.shape[-1]
        ridge = (_RIDGE * mean + 1e-30) * jnp.eye(c.shape[-1])[None]  # without activity no signal, rather than NaN
        whitened = jnp.linalg.solve(c + ridge, product.to_matrices(signal).astype(c.dtype))
        signal = product.from_matrices(whitened, b.shape).astype(b.dtype)
        return (signal + local_gradient(others, product.multiply, x, u, w, b, samples)) / uses

    return gradient
