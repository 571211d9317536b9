"""The learning rules (NamedTuples of pure functions), a factory for each, and the choice of a rule by path."""

import dataclasses
import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wmkp import checks
from wmkp.forward import descent, forward_signal
from wmkp.program.interpreter import Direct
from wmkp.program.pathways import Signal, hebbian
from wmkp.program.products import Product, WeightTransportError
from wmkp.program.projections import Analysis, Projection


class Mirror(NamedTuple):
    """How mirror mode trains a rule's B: the noise, the response to it, and how fast B follows.

    Attributes:
      noise: one of ``NOISES``.
      noise_std: sigma, the standard deviation of each presynaptic value.
      num_samples: samples that a mirror step draws for a projection. None: as many as ``target_angle`` needs.
      target_angle: degrees between B and W^T at which mirroring settles while W stands still. None: what ``SAMPLES``
        samples for each input leave.
      rate: a, the share of B that one mirror step replaces by its estimate of W^T. None: 1/t at the t-th mirror step,
        so that B is the mean of all estimates. An estimate that is exact by the law of angles replaces all of B.
      activation: phi, or None for a linear response.
      bias: "blocked" (no bias in mirror mode) or "kept" (the layer's own).
      signal: a function of ``wmkp.Synapses`` on noise that B descends by ``rate``, in place of the average of x y^T; or
        None.
      each_step: whether ``mirror_step`` changes B, or only the mirror steps before training do.
      start: mirror steps before training, by ``steps.init`` and ``init_feedback``.
    """

    noise: str = "gaussian"
    noise_std: float = 1.0
    num_samples: int | None = None
    target_angle: float | None = None
    rate: float | None = 0.1
    activation: Callable[[jax.Array], jax.Array] | None = None
    bias: str = "blocked"
    signal: Signal | None = None
    each_step: bool = True
    start: int = 0


class Rule(NamedTuple):
    """A learning rule: which array carries the error back through a projection, and how that array learns.

    Attributes:
      name: the name that tables print.
      init: ``(key, projection, W) -> B``, of W's shape and dtype, or a pytree that ``backward`` understands.
      backward: ``(W, B) -> array`` in W's layout that carries the error back. None: W itself (backprop). If you
        differentiate an engaged function by hand, ``backward`` must read W behind ``jax.lax.stop_gradient``.
      signal: what B descends in engaged mode: a function of ``wmkp.Synapses`` that returns an array in W's layout,
        which is differentiated through ``backward`` to B. If B is no array, it may also return a pytree of B's
        structure. It is summed over uses, as W's gradient is. None: B does not learn in engaged mode. ``wmkp.hebbian``:
        Kolen-Pollack's signal.
      optimizer: the optax transformation that turns the signal into B's change. None: the optimizer that trains W.
      error: ``(delta, key) -> array`` of delta's shape, which travels back through B. W's own gradient keeps delta.
        None: delta itself. ``key`` is None if no key was given.
      noise: standard deviation of Gaussian noise that engaged mode adds to the projection's input.
      mirror: how B learns in mirror mode. None: it does not.
      redrawn: whether each engaged step draws B again.
      direct: whether B carries the output's error straight to this projection's input.
      transports: what of W reaches the backward pass or B: "weights", "signs", "changes" (then B's signal is W's whole
        gradient, not that of this use alone) or "nothing".
    """

    name: str
    init: Callable[[jax.Array, Projection, jax.Array], Any] | None
    backward: Callable[[jax.Array, Any], Any] | None
    signal: Signal | None = None
    optimizer: optax.GradientTransformation | None = None
    error: Callable[[Any, Any], Any] | None = None
    noise: float = 0.0
    mirror: Mirror | None = None
    redrawn: bool = False
    direct: bool = False
    transports: str = "nothing"


RuleOrRules = Rule | Mapping[str, Rule]
P = ParamSpec("P")


def named(factory: Callable[P, Rule]) -> Callable[P, Rule]:
    """Names a factory's rules by their arguments, such as ``weight_mirror(noise='gaussian')``."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Rule:
        rule = factory(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if "name" in given:
            return rule
        changed = [f"{k}={_shown(v)}" for k, v in given.items() if v != signature.parameters[k].default]
        return rule._replace(name=factory.__name__ + (f"({', '.join(changed)})" if changed else ""))

    return make


def _shown(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


@jax.tree_util.register_pytree_node_class
class Fixed:
    """A part of B that does not learn: no optimizer sees it, so it neither moves nor decays.

    Use it in a B of several arrays: ``init`` returns ``{"Q": Q, "P": Fixed(P)}``, and ``backward`` reads
    ``B["P"].array``.

    Attributes:
      array: the array (or a pytree of arrays).
    """

    def __init__(self, array: Any):
        self.array = array

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        """For JAX."""
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, static: None, children: Any) -> "Fixed":
        """For JAX."""
        return cls(*children)


def learning_part(b: Any) -> Any:
    """A B with None in place of its fixed parts."""
    return jax.tree.map(lambda x: None if isinstance(x, Fixed) else x, b, is_leaf=lambda x: isinstance(x, Fixed))


@dataclasses.dataclass(frozen=True)
class RandomFeedback:
    """A Gaussian B of standard deviation ``scale / sqrt(fan_in)``."""

    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> jax.Array:
        std = _std(self.scale, projection.fan_in, projection.path, w)
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


def _std(scale: float, fan_in: int, path: str, w: jax.Array) -> float:
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
    return Rule("backprop", None, None, transports="weights")


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
    return Rule("local", None, None, transports="nothing")


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
        std = _std(self.scale, projection.fan_in, projection.path, w)
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
        b = jax.random.normal(b_key, (groups, hidden, fan_out)) * _std(self.scale, fan_in, projection.path, w)
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


@dataclasses.dataclass(frozen=True)
class _RandomDirect:
    """A Gaussian B from the network's outputs, of standard deviation ``scale / sqrt(outputs)``."""

    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> Direct:
        shape = projection.direct_shape()
        std = _std(self.scale, shape[-1], projection.path, w)
        return Direct((jax.random.normal(key, shape) * std).astype(w.dtype))


@named
def direct_feedback_alignment(scale: float = 1.0) -> Rule:
    """Direct feedback alignment (DFA; Nokland 2016): the output's error goes to each projection's input by its own B.

    ``dL/dx := B_l e``, where e is the error at the network's output (the last projection). B_l is fixed and random, of
    shape (size of x) by (outputs). No error passes between projections, except through what has no weights: activation
    functions, normalizations, skip connections. Nothing is transported, and W's own gradient stays delta x^T (eq. 4).

    If a scan makes the output, each step's error goes to that step's projections. wmkp computes the layers in sequence,
    not in parallel.

    Args:
      scale: B is Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: ``scale`` is not a positive number; from ``init_feedback``, an output without one error (in a
        ``lax.cond``, or on its way to a projection in the next step of a scan), or inputs of different sizes.

    Example:
      >>> rule = wmkp.direct_feedback_alignment()
    """
    check_scale(scale)
    return Rule("direct_feedback_alignment", _RandomDirect(scale), fixed, direct=True)


@named
def direct_kolen_pollack(scale: float = 1.0) -> Rule:
    """Direct Kolen-Pollack (DKP; Webster et al. 2021): direct feedback alignment whose B_l learn.

    ``dB_l = -eta x e^T - lambda B_l``, from the input x that B_l reaches and the output's error e that it carries.
    Learning rate and decay are W's (``wmkp.updates.kolen_pollack``). Nothing is transported.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: as ``direct_feedback_alignment``.

    Example:
      >>> rule = wmkp.direct_kolen_pollack()
    """
    check_scale(scale)
    return Rule("direct_kolen_pollack", _RandomDirect(scale), learned, hebbian, direct=True)


@named
def forward_direct_feedback_alignment(rate: float = 0.1, scale: float = 1.0) -> Rule:
    """Forward direct feedback alignment (FDFA; Bacho and Chu 2024): direct feedback that learns the output's derivatives.

    The error goes back as under ``direct_feedback_alignment``: ``dL/dx := B_l e``. At each step noise xi on each input x
    runs forward with the data, and forward-mode differentiation gives its effect on the output, ``J xi``. B_l follows the
    mean of J^T over samples: ``B_l <- B_l + rate (xi (J xi)^T - B_l)``. Nothing is transported.

    ``value_and_grad`` makes the signal, and needs a ``key`` for the noise; ``make_steps`` gives it one. A step costs a
    second forward pass.

    Args:
      rate: the share of B_l that a step replaces.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: an argument is out of its range; from ``init_feedback``, as ``direct_feedback_alignment``; from a step, an
        output inside a ``lax.scan``.

    Example:
      >>> rule = wmkp.forward_direct_feedback_alignment()
    """
    check_scale(scale)
    checks.number("rate", rate, "lie in (0, 1]", lambda x: 0 < x <= 1)
    optimizer = descent(rate)
    return Rule(
        "forward_direct_feedback_alignment", _RandomDirect(scale), learned, forward_signal, optimizer, direct=True
    )


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


NOISES = ("gaussian", "uniform", "rademacher", "orthogonal", "antithetic", "orthogonal+antithetic")
# Samples a mirror step draws for each input where neither num_samples nor target_angle says (of pairs, so many pairs).
SAMPLES = {noise: 1 if "orthogonal" in noise else 8 for noise in NOISES}


def check_mirror(mirror: Mirror) -> None:
    checks.one_of("noise", mirror.noise, NOISES)
    checks.one_of("bias", mirror.bias, ("blocked", "kept"))
    checks.positive("noise_std", mirror.noise_std)
    if mirror.num_samples is not None:
        must = "be an integer of at least 1, and below 2^31"
        checks.number("num_samples", mirror.num_samples, must, lambda x: 1 <= x < 2**31, numbers.Integral)
    between = "lie between 0 and 90 degrees (from 1e-6 on), or be None"
    if mirror.target_angle is not None:
        checks.number("target_angle", mirror.target_angle, between, lambda x: 1e-6 <= x < 90)
    if mirror.rate is not None:
        checks.number("rate", mirror.rate, "lie in (0, 1]", lambda x: 0 < x <= 1)
    elif mirror.signal is not None:
        raise ValueError(
            "rule.mirror.rate is None, but a mirror with its own signal needs a rate: use Mirror(signal=..., rate=0.1)"
        )
    least = 0 if mirror.rate is not None else 1
    must = f"be an integer of at least {least}, and below 2^31"
    if least:
        must += " (rate=None is the mean over all mirror steps, the first of them before training)"
    checks.number("start", mirror.start, must, lambda x: least <= x < 2**31, numbers.Integral)
    checks.flag("rule.mirror.each_step", mirror.each_step)
    if not mirror.each_step and mirror.start == 0:
        raise ValueError("rule.mirror never mirrors: set start=1 (a mirror step before training) or each_step=True")
    if mirror.signal is not None:
        checks.function("rule.mirror.signal", mirror.signal, "(synapses) -> array in W's layout, or None")
    if mirror.activation is not None and not callable(mirror.activation):
        raise ValueError(f"activation must be a function of an array, or None; got {checks.shown(mirror.activation)}")


def _check_fields(rule: Rule) -> None:
    """TypeError or ValueError if a rule (perhaps the user's own) is incomplete."""
    if (rule.init is None) != (rule.backward is None):
        lacking = "init" if rule.init is None else "backward"
        raise ValueError(
            f"rule {rule.name} has no {lacking}: give both, or neither for backprop. Without backward the error would go "
            "back through W, and without init there is no B."
        )
    if rule.init is not None:
        checks.function("rule.init", rule.init, "(key, projection, W) -> B")
        checks.function("rule.backward", rule.backward, "(W, B) -> array in W's layout")
    for name in ("redrawn", "direct"):
        checks.flag(f"rule.{name}", getattr(rule, name))
    checks.one_of("rule.transports", rule.transports, ("nothing", "signs", "changes", "weights"))
    checks.number("rule.noise", rule.noise, "be a number of at least 0", lambda x: x >= 0)
    if rule.signal is not None:
        checks.function("rule.signal", rule.signal, "(synapses) -> array in W's layout, or None")
    if rule.error is not None:
        checks.function("rule.error", rule.error, "(delta, key) -> array of delta's shape, or None")
    if rule.signal is not None and rule.backward is None:
        raise ValueError(f"rule {rule.name}: a signal trains B; give init and backward too")
    if rule.optimizer is not None:
        checks.transformation("rule.optimizer", rule.optimizer)
    if not isinstance(rule.mirror, Mirror | None):
        raise TypeError(f"rule.mirror must be a Mirror, or None; got {checks.shown(rule.mirror)}")
    if rule.mirror is not None:
        check_mirror(rule.mirror)


def check_rule(rule: Any, *, mapping: bool = True) -> None:
    """TypeError unless ``rule`` is a rule, or (with ``mapping``) a mapping of patterns to rules."""
    if isinstance(rule, Rule):
        _check_fields(rule)
        return
    if mapping and isinstance(rule, Mapping):
        for pattern, one in rule.items():
            if not isinstance(pattern, str):
                raise TypeError(f"rule's patterns must be strings, searched for in the paths; got {pattern!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"rule's pattern {pattern!r} is no regular expression ({error}); use re.escape(path) for a literal path"
                ) from None
            if not isinstance(one, Rule):
                raise TypeError(f"rule[{pattern!r}] must be a wmkp rule such as kolen_pollack(); got {_no_rule(one)}")
            check_rule(one)
        return
    what = ", or a mapping of path patterns to rules" if mapping else ""
    raise TypeError(f"rule must be a wmkp rule such as kolen_pollack(){what}; got {_no_rule(rule)}")


def _no_rule(value: Any) -> str:
    called = f" (call it: {value.__name__}())" if callable(value) and hasattr(value, "__name__") else ""
    return f"{checks.shown(value)}{called}"


def _check_allowed(path: str, product: Product, rule: Rule) -> None:
    """WeightTransportError unless the rule allows this use of the parameter, which B cannot follow."""
    if rule == backprop() or (rule == local() and product.gain):
        return
    declare = {name: f'rule={{"{re.escape(path)}": wmkp.{name}(), ".*": ...}}' for name in ("local", "backprop")}
    what = f"params[{path!r}] meets an activation in {product.obstacle!r}"
    if product.gain:
        raise WeightTransportError(
            f"{what}: it scales activations, and wmkp cannot tell gains of single neurons from a product written by hand. If each "
            f"of its values belongs to one neuron, declare it: {declare['local']}. If it connects neurons, write the "
            "product as x @ w, jnp.einsum or a convolution, so that it gets a B. Or let the error go back through it: "
            f"{declare['backprop']}."
        )
    if "complex" in str(product.obstacle):
        raise WeightTransportError(
            f"{what}: feedback weights are real. Keep the parameter as two real arrays, each with its own B, and write the product "
            "in real numbers: real, imag = x @ a, x @ b. Or let the error go back through it: "
            f"{declare['backprop']}."
        )
    raise WeightTransportError(
        f"{what}, where B cannot follow it, so the error could only go back through W. Multiply the activation by the parameter "
        "itself, or by a linear map of it (a reshape, a slice, a cast, a constant multiple), as x @ w, jnp.einsum or a "
        f"convolution. Or let the error go back through it: {declare['backprop']}."
    )


def check_samples(analysis: Analysis) -> None:
    """ValueError if no sample reaches any projection."""
    outputs = [p.output_aval.shape for products in analysis.sites().values() for p in products]
    if outputs and all(0 in shape for shape in outputs):
        raise ValueError(
            "args hold no samples: every projection's output is empty. Pass a batch of at least one sample."
        )


def resolve(rule: RuleOrRules, analysis: Analysis) -> dict[str, Rule]:
    """The rule of each projection: ``rule`` itself, or the first whose pattern is found in the path (``re.search``).

    Raises:
      TypeError: ``rule`` is no rule and no mapping of patterns to rules.
      ValueError: no projection at all; a pattern that matches none, or a projection that matches no pattern; a
        projection of no neurons, or that no sample reaches; parts of one weight whose B would learn differently.
      WeightTransportError: feedback weights cannot follow a parameter whose rule is not backprop.
    """
    check_rule(rule)
    sites = analysis.sites()
    paths = list(sites)
    if not paths and not (isinstance(rule, Rule) and rule.backward is None):
        raise ValueError(
            "fun has no projection: no parameter multiplies an activation. Call fun(params, *args): params first, and "
            "data as arrays in args (not closed over, and not Python numbers or lists)."
        )
    if isinstance(rule, Rule):
        rules = dict.fromkeys(paths, rule)
    else:
        rules = {}
        for pattern, one in rule.items():
            among = analysis.paths if one == local() else paths
            if not any(re.search(pattern, path) for path in among):
                raise ValueError(
                    f"rule's pattern {pattern!r} matches no projection; the projections are {', '.join(paths)}"
                )
        for path in paths:
            found = next((r for pattern, r in rule.items() if re.search(pattern, path)), None)
            if found is None:
                raise ValueError(f'no pattern of rule matches projection {path!r}; end with ".*" to match all others')
            rules[path] = found
    check_samples(analysis)
    for path, products in sites.items():
        for product in products:
            if rules[path].backward is not None and 0 in product.weight_aval.shape:
                raise ValueError(
                    f"params[{path!r}] is {list(product.weight_aval.shape)} where it multiplies an activation: a "
                    "projection of no neurons (fan_in or fan_out is zero) has no feedback weights. Leave it out of "
                    "the model, or give it backprop()."
                )
            joined = [rules[analysis.paths[leaf]] for leaf in product.params]
            circuits = {(r.signal, r.error, r.noise) for r in joined if r.backward is not None}
            plain = all(signal in (None, hebbian) and not (error or noise) for signal, error, noise in circuits)
            if (len(circuits) > 1 and not plain) or len({r.mirror for r in joined if r.mirror}) > 1:
                raise ValueError(
                    f"rule gives params[{path!r}] and a parameter that is joined to it, as one weight, different mirrors, "
                    "signals, errors or noises; give all parts of one weight the same rule"
                )
            if product.needs_feedback and product.obstacle:
                _check_allowed(path, product, rules[path])
    return rules
