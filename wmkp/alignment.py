"""Local losses whose gradients train B: the alignment primitives of Kunin et al. (2020), on noise or on activity.

Each rule here is a signal (a function of what a projection's synapses see) and an optimizer for B, as any rule may have.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmkp import checks
from wmkp.forward import descent
from wmkp.program.pathways import Synapses
from wmkp.rule import Mirror, Rule, check_mirror, named
from wmkp.rules import RandomFeedback, check_scale, fixed, learned


class Alignment(NamedTuple):
    """The gradient of a loss R(B; W, x) as a signal, with one coefficient for each primitive; u = W x and v = B^T x.

    Attributes:
      decay: of ``1/2 |B|^2``, which gives ``dB`` proportional to ``-B``.
      amplitude: of ``-<v, u>``: ``x u^T``, the weight mirror's signal.
      sparse: of ``1/2 |v|^2``: ``-x v^T``.
      null: of ``1/2 |B u|^2``: ``-(B u) u^T``.
      self_alignment: of ``-<B, W^T>``: ``W^T``; transports the weights.
      whiten: whether ``E[x x^T]^-1`` multiplies amplitude's ``x u^T``; not local.
      normalize: the divisor of amplitude, sparse and null. "none": 1. "mean": x's mean square, the scale of
        ``E[x x^T]``. "total": fan_in times that, which is at least its largest eigenvalue.
    """

    decay: float = 0.0
    amplitude: float = 0.0
    sparse: float = 0.0
    null: float = 0.0
    self_alignment: float = 0.0
    whiten: bool = False
    normalize: str = "none"

    def __call__(self, synapses: Synapses) -> jax.Array:
        """R's gradient at B, in W's layout. R is a mean over samples and over the uses of the parameter."""
        x, samples = synapses.x, synapses.samples
        if not self.whiten:
            if self.normalize != "none":
                power = jnp.mean(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) + 1e-12
                samples = samples * power * (synapses.fan_in if self.normalize == "total" else 1)
            return local_gradient(self, synapses, samples) / synapses.uses
        product = synapses.product
        assert product is not None
        signal = local_gradient(Alignment(amplitude=self.amplitude), synapses, samples)
        c = covariance(product, x)
        mean = jnp.trace(c, axis1=-2, axis2=-1)[:, None, None] / c.shape[-1]
        ridge = (_RIDGE * mean + 1e-30) * jnp.eye(c.shape[-1])[None]  # without activity the signal is zero, not NaN
        whitened = jnp.linalg.solve(c + ridge, product.to_matrices(signal).astype(c.dtype))
        signal = product.from_matrices(whitened, signal.shape).astype(signal.dtype)
        return (signal + local_gradient(self._replace(amplitude=0.0), synapses, samples)) / synapses.uses


def local_gradient(alignment: Alignment, synapses: Synapses, samples: Any) -> jax.Array:
    """The gradient of R with respect to B, in W's layout, without ``whiten`` (which needs the covariance).

    Args:
      alignment: the coefficients.
      synapses: x, u, B, and W for ``self_alignment``.
      samples: the divisor of sums over samples: their number, times a normalization if there is one.
    """
    # Each side is divided by the root of the samples: dividing by all of them at once would underflow in float16.
    multiply = synapses.multiply
    x, u = ((a / samples**0.5).astype(a.dtype) for a in (synapses.x, synapses.u))
    x, u, w = jax.lax.stop_gradient((x, u, synapses.w))

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

    return jax.grad(loss)(synapses.b)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(dtype) * b.astype(dtype))


def covariance(product: Any, x: jax.Array) -> jax.Array:
    """E[x x^T] of a product's input, (groups, fan_in, fan_in)."""
    x = product.input_matrices(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.einsum("kni,knj->kij", x, x) / x.shape[1]


_RIDGE = 1e-4  # relative to the mean variance: directions with little activity are not whitened


@named
def alignment(
    *,
    amplitude: float = 0.0,
    decay: float = 0.0,
    null: float = 0.0,
    sparse: float = 0.0,
    self_alignment: float = 0.0,
    on: str = "noise",
    rate: float = 0.1,
    noise: str = "gaussian",
    noise_std: float = 1.0,
    num_samples: int | None = None,
    name: str = "alignment",
    scale: float = 1.0,
    whiten: bool = False,
    normalize: str = "none",
) -> Rule:
    """Any sum of the primitives of Kunin et al. (2020): B descends a local loss R(B; W, x).

    With u = W x and v = B^T x, R is ``decay 1/2 |B|^2 - amplitude <v, u> + sparse 1/2 |v|^2 + null 1/2 |B u|^2 -
    self_alignment <B, W^T>``, as means over samples. So ``dB = rate (-decay B + amplitude x u^T - sparse x v^T - null
    (B u) u^T + self_alignment W^T)``. These losses do not change W. All are local to the synapse, except
    ``self_alignment``, which transports the weights. A weight mirror is ``alignment(amplitude=1, decay=1)``.

    Args:
      amplitude, decay, null, sparse, self_alignment: the coefficients.
      on: "noise" (mirror mode, by ``mirror_step``) or "activity" (engaged mode: x is the projection's own input).
      rate: the step down R's gradient. With noise of unit variance, 1 is stable for decay alone.
      noise, noise_std, num_samples: with ``on="noise"``, as in ``weight_mirror``.
      name: the name that tables print.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.
      whiten: on activity, multiplies amplitude's term by ``E[x x^T]^-1``, which no synapse could do alone.
      normalize: on activity, divides the terms that hold x by: "none", "mean" (x's mean square) or "total" (the mean of
        ``|x|^2``, under which a rate below 2 is stable for ``sparse``).

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> rule = wmkp.alignment(amplitude=1, null=0.5, decay=0.5, on="noise")
    """
    check_scale(scale)
    losses: Any = Alignment(decay, amplitude, sparse, null, self_alignment, whiten, normalize)
    for coefficient in ("amplitude", "decay", "null", "sparse", "self_alignment"):
        checks.coefficient(coefficient, getattr(losses, coefficient))
    if not any(losses[:5]):
        raise ValueError(
            "the coefficients (amplitude, decay, null, sparse, self_alignment) are all zero: set one above 0, or use feedback_alignment()"
        )
    checks.positive("rate", rate)
    checks.stable("rate * decay", rate * decay)
    checks.one_of("normalize", normalize, ("none", "mean", "total"))
    checks.one_of("on", on, ("noise", "activity"))
    checks.flag("whiten", whiten)
    # A mirror's rate is at most 1. A larger rate goes into the coefficients.
    more = max(rate, 1.0)
    on_noise: Any = Alignment(more * decay, more * amplitude, more * sparse, more * null, more * self_alignment)
    mirror = Mirror(noise, noise_std, num_samples, 6.0, min(rate, 1.0), signal=on_noise)
    check_mirror(mirror)
    if whiten and normalize != "none":
        raise ValueError(f'whiten already divides by the covariance; use normalize="none" with it, got {normalize!r}')
    init = RandomFeedback(scale)
    transports = "weights" if self_alignment else "nothing"
    if on == "activity":
        descend = descent(rate)
        return Rule(name, init, learned, losses, descend, transports=transports)
    if whiten or normalize != "none":
        raise ValueError('whiten and normalize apply only to on="activity": noise is white already; leave them out')
    return Rule(name, init, fixed, mirror=mirror, transports=transports)


@named
def information_alignment(
    amplitude: float = 1.0, null: float = 0.5, decay: float = 0.5, *, rate: float = 0.1, noise_std: float = 1.0
) -> Rule:
    """Information alignment (Kunin et al. 2020): amplitude + null + decay, on noise.

    ``dB = rate (amplitude x u^T - null (B u) u^T - decay B)``. This is a weight mirror whose null term keeps B from
    growing. It is local, and that paper found it more stable across architectures. B settles at ``amplitude W^T (null W
    W^T + decay / sigma^2)^-1``: at no angle to W^T if W's rows are orthogonal and of equal norm.

    Args:
      amplitude, null, decay: the coefficients (the paper found its own by search, one number each).
      rate, noise_std: as in ``alignment``.

    Raises:
      ValueError: an argument is out of its range; the message names it.

    Example:
      >>> rule = wmkp.information_alignment()
    """
    return alignment(amplitude=amplitude, null=null, decay=decay, rate=rate, noise_std=noise_std)


@named
def symmetric_alignment(self_alignment: float = 1.0, decay: float = 1.0, *, rate: float = 0.1) -> Rule:
    """Symmetric alignment (Kunin et al. 2020): self-alignment + decay, so B relaxes to ``self_alignment / decay`` W^T.

    ``dB = rate (self_alignment W^T - decay B)`` at every engaged step. It transports the weights: a reference, not a
    local rule.

    Args:
      self_alignment, decay: the coefficients.
      rate: as in ``alignment``.

    Raises:
      ValueError: an argument is out of its range; the message names it.

    Example:
      >>> rule = wmkp.symmetric_alignment()
    """
    return alignment(self_alignment=self_alignment, decay=decay, rate=rate, on="activity")


@named
def activation_alignment(amplitude: float = 1.0, sparse: float = 1.0, *, rate: float = 1.0) -> Rule:
    """Activation alignment (Kunin et al. 2020): amplitude + sparse, on the network's own activity, in engaged mode.

    ``dB = rate (amplitude x u^T - sparse x v^T)`` is the delta rule: B^T learns to answer x as W does. B settles at
    ``amplitude / sparse`` times W^T in the directions that the activity reaches. It is local and has no second mode.
    Both terms are divided by the mean of ``|x|^2``, so one rate is stable whatever the size of the activity.

    Args:
      amplitude, sparse: the coefficients.
      rate: as in ``alignment``. It is stable below ``2 / sparse``.

    Raises:
      ValueError: an argument is out of its range; the message names it.

    Example:
      >>> rule = wmkp.activation_alignment()
    """
    return alignment(amplitude=amplitude, sparse=sparse, rate=rate, on="activity", normalize="total")


@named
def activity_mirror(*, whiten: bool = False, rate: float = 0.1) -> Rule:
    """A weight mirror on the network's own activity instead of noise, in engaged mode.

    ``dB = rate (x u^T / s - B)``, which is eq. 5 with x as it comes, where s is the mean square of x. Its mean is
    ``E[x x^T] / s W^T - B``, so B inherits the input's covariance, and an angle remains that no averaging removes.
    ``wmkp.input_covariances`` shows it. ``whiten`` divides by the covariance, which no synapse could do alone.

    Args:
      whiten: whether to multiply by ``E[x x^T]^-1`` of the batch.
      rate: a, the share of the difference that one step removes.

    Raises:
      ValueError: an argument is out of its range; the message names it.

    Example:
      >>> rule = wmkp.activity_mirror(whiten=True)
    """
    normalize = "none" if whiten else "mean"
    return alignment(amplitude=1.0, decay=1.0, rate=rate, on="activity", whiten=whiten, normalize=normalize)
