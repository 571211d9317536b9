"""The learning rules whose errors go back layer by layer, a factory for each."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import checks
from wmkp.program.pathways import hebbian
from wmkp.program.projections import Projection
from wmkp.rule import BACKPROP, LOCAL, NOISES, Fixed, Mirror, Rule, check_mirror, named


@dataclasses.dataclass(frozen=True)
class RandomFeedback:
    """A Gaussian B of standard deviation ``scale / sqrt(fan_in)``."""

    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> jax.Array:
        std = std_of(self.scale, projection.fan_in, projection.path, w)
        b = (jax.random.normal(key, w.shape) * std).astype(w.dtype)
        _check_unrelated(b, w, projection.path)
        return b


def fixed(w: jax.Array, b: Any) -> Any:
    """B carries the error, and does not learn in engaged mode."""
    return jax.lax.stop_gradient(b)


def learned(w: jax.Array, b: Any) -> Any:
    """B carries the error, and learns from its signal."""
    return b


def _check_unrelated(b: jax.Array, w: jax.Array, path: str) -> None:
    """ValueError if B equals W because both were drawn from one key. Traced values are not checked."""
    if isinstance(b, jax.core.Tracer) or not isinstance(w, jax.Array | np.ndarray) or isinstance(w, jax.core.Tracer):
        return
    x, y = (np.asarray(a.ravel()[:64], np.float64) for a in (b, w))
    # Chance makes two vectors of 32 entries this similar once in 10^11 draws.
    if x.size >= 32 and abs(x @ y) > 0.9 * math.sqrt(x @ x) * math.sqrt(y @ y):
        raise ValueError(
            f"key gives params[{path!r}] a B equal to its W: both were drawn from this key (the i-th B's key is the "
            "i-th key of jax.random.split(key)), so W would be transported. Use another key for B: "
            "jax.random.fold_in(key, 1), or another seed."
        )


def check_scale(scale: float) -> None:
    checks.positive("scale", scale, ", the standard deviation of B times sqrt(fan_in)")


def std_of(scale: float, fan_in: int, path: str, w: jax.Array) -> float:
    """B's standard deviation. ValueError if W's dtype cannot hold draws of it, so that B would be infinite or zero."""
    std, limits = scale / math.sqrt(fan_in), jnp.finfo(w.dtype)
    if not float(limits.smallest_subnormal) <= std <= float(limits.max) / 6:  # no draw exceeds six standard deviations
        raise ValueError(
            f"scale={scale:g} gives params[{path!r}] a B of standard deviation {std:.2g}, which {w.dtype} cannot hold; use "
            "a scale nearer to 1, or keep params in a wider dtype"
        )
    return std


@named
def backprop() -> Rule:
    """Backpropagation: the error goes back through W^T.

    It transports the weights. There is no B, and no extra memory or time: your function stays as it is. Use it as the
    reference, or for parts of a model that no other rule fits.

    Example:
      >>> rule = {"^head/": wmkp.backprop(), ".*": wmkp.kolen_pollack()}
    """
    return BACKPROP


@named
def local() -> Rule:
    """Declares that a parameter is local to its neurons, so the backward pass may read it.

    wmkp accepts a parameter with at most one axis longer than one as a gain of single neurons. It refuses one with more
    long axes, because a handwritten product looks the same. If each value belongs to one neuron (a LayerNorm over
    channels, height and width, or a spline's scales), give its path this rule. wmkp then differentiates the parameter
    as under ``backprop()``.

    Example:
      >>> rule = {"norm/scale": wmkp.local(), ".*": wmkp.kolen_pollack()}
    """
    return LOCAL


@named
def feedback_alignment(scale: float = 1.0) -> Rule:
    """Feedback alignment (Lillicrap et al. 2016): the error goes back through a fixed random B.

    ``delta_l = phi'(y_l) B_{l+1} delta_{l+1}`` (eq. 3-4). Only W learns, and nothing is transported. Use it as a
    baseline.

    Args:
      scale: B is Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: ``scale`` is not a positive number.

    Example:
      >>> rule = wmkp.feedback_alignment()
    """
    check_scale(scale)
    return Rule("feedback_alignment", RandomFeedback(scale), fixed)


@named
def sign_symmetry(magnitude: str = "uniform", scale: float = 1.0) -> Rule:
    """Sign symmetry (Liao et al. 2016, Moskovitz et al. 2018, Xiao et al. 2018): back through abs(B) * sign(W)^T.

    Each step transports W's current signs. The magnitudes are B's own and do not learn. B itself keeps the signs that W
    had when B was made.

    Args:
      magnitude: "uniform" (uSF): one constant c. "fixed" (frSF): Gaussian, drawn once. "batch" (brSF): Gaussian, drawn
        again by each ``engaged_step``; with ``value_and_grad`` alone, call ``init_feedback`` for each batch.
      scale: c, or the Gaussian's standard deviation, is ``scale / sqrt(fan_in)``. 1 is that of LeCun's initialization,
        sqrt(2) that of He's.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> rule = wmkp.sign_symmetry("fixed")
    """
    check_scale(scale)
    checks.one_of("magnitude", magnitude, ("uniform", "fixed", "batch"))

    init = _SignedMagnitudes(magnitude, scale)
    return Rule("sign_symmetry", init, _signed, redrawn=magnitude == "batch", transports="signs")


@dataclasses.dataclass(frozen=True)
class _SignedMagnitudes:
    """Magnitudes, constant or Gaussian, with W's signs."""

    magnitude: str
    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> jax.Array:
        size = jnp.ones(w.shape) if self.magnitude == "uniform" else jnp.abs(jax.random.normal(key, w.shape))
        std = std_of(self.scale, projection.fan_in, projection.path, w)
        return (jnp.where(w < 0, -1, 1) * size * std).astype(w.dtype)


def _signed(w: jax.Array, b: jax.Array) -> jax.Array:
    """B's magnitudes with W's current signs."""
    return jax.lax.stop_gradient(jnp.abs(b) * jnp.sign(w))


def _exact_start(start: str) -> Mirror | None:
    """The mirror of a mirrored start: exact in one step, and only before training."""
    checks.one_of("start", start, ("random", "mirror"))
    return Mirror("orthogonal", rate=1.0, each_step=False, start=1) if start == "mirror" else None


@named
def kolen_pollack(scale: float = 1.0, *, start: str = "random") -> Rule:
    """Kolen-Pollack (Akrout et al. 2019): B receives the same changes as W.

    By eq. 15-18, ``dB = -eta y_l delta_{l+1}^T - lambda B``, where ``dW = -eta delta_{l+1} y_l^T - lambda W``. Each
    synapse computes its change from what it sees on its two sides. Nothing is transported, and there is no second mode.
    With weight decay, W - B^T shrinks by (1 - eta lambda) a step (eq. 14).

    From a random B this takes thousands of steps. With ``start="mirror"``, one mirror step of fan_in orthogonal samples
    makes B = W^T before training. From there learning follows backprop to rounding, with or without decay.

    Train B by ``wmkp.updates.kolen_pollack`` of W's optimizer; ``make_steps`` does so. If a parameter has other uses
    than its product (an embedding tied to the output), B does not see their gradients, and follows W only in part.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.
      start: "random" or "mirror".

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> rule = wmkp.kolen_pollack(start="mirror")
    """
    check_scale(scale)
    return Rule("kolen_pollack", RandomFeedback(scale), learned, hebbian, mirror=_exact_start(start))


@named
def mirrored_kolen_pollack(
    noise: str | None = None,
    noise_std: float = 1.0,
    num_samples: int | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    bias: str = "blocked",
    *,
    target_angle: float | None = None,
    rate: float | None = None,
    start: int | None = None,
    scale: float = 1.0,
) -> Rule:
    """Mirrored Kolen-Pollack (MKP): B starts from a mirror, receives W's changes, and is mirrored now and then.

    Engaged mode changes B as ``kolen_pollack`` does. So B does not lag behind W, and W - B^T only decays. Mirror mode,
    as in ``weight_mirror``, removes that difference: before training, and then as rarely as you like
    (``steps.mirror_step``). B is the mean over all mirror steps, so its angle to W^T goes to zero on any noise. Nothing
    is transported. Train B by ``wmkp.updates.kolen_pollack`` of W's optimizer; ``make_steps`` does so.

    By default one mirror step of fan_in orthogonal samples is exact, and learning follows backprop to rounding. Other
    noise starts from 20 mirror steps, which leave 4.5 degrees.

    Args:
      noise, noise_std, num_samples, activation, bias: as in ``weight_mirror``.
      target_angle: degrees between B and W^T after the mirror steps before training. None: fan_in samples a mirror step
        of orthogonal noise (twice that in pairs), 8 fan_in of other noise.
      rate: the share of B that a mirror step replaces. None: 1/t at the t-th mirror step, the mean over all.
      start: mirror steps before training. None: 1 of orthogonal noise, 20 of other noise.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: an argument is out of its range; the message names it.

    Example:
      >>> rule = wmkp.mirrored_kolen_pollack()  # for a whole program see ``make_steps``
    """
    check_scale(scale)
    mirror = _mirror(noise, noise_std, num_samples, activation, bias, target_angle, start)._replace(rate=rate)
    check_mirror(mirror)
    return Rule("mirrored_kolen_pollack", RandomFeedback(scale), learned, hebbian, mirror=mirror)


@named
def kolen_pollack_transported(scale: float = 1.0) -> Rule:
    """Kolen-Pollack as first published (Kolen and Pollack 1994): W's changes are copied to B.

    ``dW = A - lambda W`` and ``dB = A^T - lambda B`` (eq. 12-14), where A is W's own change. It transports changes, not
    weights. It differs from ``kolen_pollack`` only if a parameter has other uses than its product: then A is the whole
    gradient.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: ``scale`` is not a positive number.

    Example:
      >>> rule = wmkp.kolen_pollack_transported()
    """
    rule = kolen_pollack(scale)
    return rule._replace(name="kolen_pollack_transported", transports="changes")


@jax.tree_util.register_pytree_node_class
class ProductFeedback:
    """Feedback through two populations, R B: ``b`` to an intermediate one, ``r`` from there.

    ``r`` is (groups, fan_in, intermediate), ``b`` is (groups, intermediate, fan_out); ``effective()`` is their product
    in the weight's own layout.
    """

    def __init__(self, r: Any, b: Any, shape: tuple[int, ...], order: tuple[int, ...]):
        self.r, self.b, self.shape, self.order = r, b, shape, order

    def effective(self) -> jax.Array:
        """R B in the weight's shape and layout."""
        product = (self.r @ self.b).reshape([self.shape[a] for a in self.order])
        return product.transpose(sorted(range(len(self.order)), key=self.order.__getitem__))

    def tree_flatten(self) -> tuple[tuple[Any, Any], Any]:
        """For JAX."""
        return (Fixed(self.r), self.b), (self.shape, self.order)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "ProductFeedback":
        """For JAX."""
        r, b = children
        return cls(r.array if isinstance(r, Fixed) else r, b, *static)


@dataclasses.dataclass(frozen=True)
class _RandomProduct:
    """R and B, whose product has entries of standard deviation ``scale / sqrt(fan_in)``."""

    expansion: float
    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> ProductFeedback:
        axes = projection.matrix_axes(w.shape)
        groups, fan_in, fan_out = (math.prod(w.shape[a] for a in role) for role in axes)
        hidden = max(1, round(self.expansion * fan_in))
        r_key, b_key = jax.random.split(key)
        r = jax.random.normal(r_key, (groups, fan_in, hidden)) / math.sqrt(hidden)
        b = jax.random.normal(b_key, (groups, hidden, fan_out)) * std_of(self.scale, fan_in, projection.path, w)
        return ProductFeedback(r.astype(w.dtype), b.astype(w.dtype), w.shape, (*axes[0], *axes[1], *axes[2]))


def _product(w: jax.Array, b: ProductFeedback) -> jax.Array:
    """R B carries the error; R is fixed."""
    return ProductFeedback(jax.lax.stop_gradient(b.r), b.b, b.shape, b.order).effective()


@named
def product_feedback_alignment(expansion: float = 4.0, scale: float = 1.0) -> Rule:
    """Product feedback alignment (PFA; Li and Benna 2024): the error goes back through a product R B, and B learns.

    ``dL/dx := R B delta``. The error passes through an intermediate population larger than x's. B learns as under
    Kolen-Pollack, from its own two sides: ``dB = -eta (R^T x) delta^T - lambda B``, with W's learning rate and decay
    (``wmkp.updates.kolen_pollack``). R is fixed and random, and R R^T is close to the identity. R B aligns with W^T,
    but no array becomes the transpose of another. Nothing is transported.

    Args:
      expansion: size of the intermediate population over fan_in. R R^T differs from the identity by about
        ``1 / sqrt(expansion)`` an entry times ``1 / sqrt(fan_in)``, so a larger one aligns better.
      scale: R B starts with entries of standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: an argument is out of its range; or, from ``init_feedback``, a parameter that is not one matrix.

    Example:
      >>> rule = wmkp.product_feedback_alignment(expansion=2.0)
    """
    check_scale(scale)
    checks.number("expansion", expansion, "be a positive number, at most 1000", lambda x: 0 < x <= 1000)

    return Rule("product_feedback_alignment", _RandomProduct(expansion, scale), _product, hebbian)


@named
def weight_mirror(
    noise: str | None = None,
    noise_std: float = 1.0,
    num_samples: int | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    bias: str = "blocked",
    *,
    target_angle: float | None = None,
    rate: float | None = None,
    start: int | None = None,
    scale: float = 1.0,
) -> Rule:
    """Weight mirrors (Akrout et al. 2019): in a second mode, noise through W teaches B its transpose.

    Engaged mode sends the error back through B (eq. 3) and leaves B unchanged. Mirror mode feeds each projection noise
    x, takes its response y = phi(W x + b), and moves B along x y^T (eq. 7). The mean of x y^T is sigma^2 E[phi'] W^T.
    By Stein's lemma this is exact for Gaussian noise, no bias and any continuous phi. Nothing is transported.

    Take one mirror step after each engaged step: a B that lags behind W can end learning. By default a
    mirror step draws fan_in orthogonal samples, which is exact for a linear response, and replaces all of B. In pairs
    x, -x, 2 fan_in samples are exact for ReLU too. ``mirrored_kolen_pollack`` does not lag, whatever the noise and
    mirror period.

    Args:
      noise: "gaussian", "uniform" or "rademacher" (random signs), of zero mean; "antithetic" (Gaussian pairs x, -x);
        "orthogonal" (X^T X = N sigma^2 I) or "orthogonal+antithetic". None: orthogonal, in pairs if there is an
        activation.
      noise_std: sigma, in the units of the presynaptic activity.
      num_samples: samples that a mirror step draws for each projection. None: as many as ``target_angle`` needs at
        ``rate`` (see ``wmkp.samples_for_angle``).
      activation: phi, applied to the response. None: a linear response.
      bias: "blocked", or "kept": then the layer's own bias is added before phi, which leaves an angle that no number of
        samples removes. It cannot be kept beside a gain, such as a weight norm's.
      target_angle: degrees between B and W^T at which the leaky average settles while W stands still. None: fan_in
        samples of orthogonal noise (twice that in pairs), 8 fan_in of other noise.
      rate: a in (0, 1], the share of B that one mirror step replaces by its estimate of W^T. None: 1 for orthogonal
        noise with neither ``num_samples`` nor ``target_angle``, else 0.5.
      start: mirror steps before training, by ``steps.init`` and ``init_feedback``. None: 1 where ``rate=None`` is 1,
        else 20.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: an argument is out of its range; the message names it.

    Example:
      >>> rule = wmkp.weight_mirror("gaussian", target_angle=10.0, rate=0.1)
    """
    check_scale(scale)
    mirror = _mirror(noise, noise_std, num_samples, activation, bias, target_angle, start)
    if rate is None:
        rate = 1.0 if _draws_all(mirror) else 0.5
    mirror = mirror._replace(rate=rate)
    check_mirror(mirror)
    return Rule("weight_mirror", RandomFeedback(scale), fixed, mirror=mirror)


def _mirror(noise: Any, noise_std: Any, num_samples: Any, activation: Any, bias: Any, angle: Any, start: Any) -> Mirror:
    """A mirror with default noise and start where they are None. The caller sets the rate."""
    if noise is None:
        noise = "orthogonal" if activation is None else "orthogonal+antithetic"
    checks.one_of("noise", noise, NOISES)
    mirror = Mirror(noise, noise_std, num_samples, angle, None, activation, bias)
    if start is None:
        start = 1 if _draws_all(mirror) else 20
    return mirror._replace(start=start)


def _draws_all(mirror: Mirror) -> bool:
    """Whether a mirror step draws each of fan_in orthogonal directions once."""
    return "orthogonal" in mirror.noise and mirror.num_samples is None and mirror.target_angle is None
