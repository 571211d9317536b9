"""The learning rules: each a NamedTuple of pure functions, one factory a rule, and the choice of a rule per path."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import checks
from wmkp.alignment import Alignment
from wmkp.program.interpreter import Direct
from wmkp.program.projections import Analysis, Projection, WeightTransportError


class Mirror(NamedTuple):
    """How a rule's B is mirrored (eq. 6-8): the noise, the response to it, and how fast B follows.

    Attributes:
      noise: one of ``NOISES``.
      noise_std: sigma, the standard deviation of each presynaptic value.
      num_samples: how many samples a mirror step draws for a projection, or None: what ``target_angle`` asks for.
      target_angle: degrees; the angle between B and W^T that mirroring settles at while W stands still. None: what
        ``SAMPLES`` samples for each input leave.
      rate: a, the share of B that one mirror step replaces by the estimate of W^T. None: 1/t at the t-th mirror step,
        so that B is the mean of all estimates (an estimate that the law calls exact replaces all of B).
      activation: phi, or None for a linear response.
      bias: "blocked" (none reaches the mirror) or "kept" (the layer's own).
      alignment: local losses to go down instead of the average of x y^T, or None.
      each_step: whether ``mirror_step`` learns, or only the mirror period before training.
      start: how many mirror steps ``steps.init`` takes before training.
    """

    noise: str = "gaussian"
    noise_std: float = 1.0
    num_samples: int | None = None
    target_angle: float | None = None
    rate: float | None = 0.1
    activation: Callable[[jax.Array], jax.Array] | None = None
    bias: str = "blocked"
    alignment: Alignment | None = None
    each_step: bool = True
    start: int = 0


class Rule(NamedTuple):
    """Which array carries the error back through a projection, and how that array learns.

    Attributes:
      name: as the tables print it.
      init: ``(key, projection, W) -> B``, in W's shape and dtype (or a pytree of its own, see ``backward``).
      backward: ``(W, B) -> array`` in W's layout: what the error goes back through; None for W itself (backprop). Where an
        engaged function is differentiated by hand, it must read W behind ``jax.lax.stop_gradient``.
      learns: whether B learns in engaged mode from the signal y delta^T, by W's own optimizer.
      mirror: how B learns in mirror mode; None where it does not.
      local: the local loss by which B learns in engaged mode from the projection's own activity, or None.
      transported: whether B's signal is W's whole gradient, carried over, instead of the circuit's own.
      redrawn: whether B is drawn anew at each engaged step.
      transports: what of W reaches the backward pass or B: "weights", "signs", "changes" or "nothing".
      direct: whether B carries the error at the network's output straight to this projection's input.
    """

    name: str
    init: Callable[[jax.Array, Projection, jax.Array], Any] | None
    backward: Callable[[jax.Array, Any], Any] | None
    learns: bool = False
    mirror: Mirror | None = None
    local: Alignment | None = None
    transported: bool = False
    redrawn: bool = False
    direct: bool = False
    transports: str = "nothing"


RuleOrRules = Rule | Mapping[str, Rule]


@dataclasses.dataclass(frozen=True)
class _RandomFeedback:
    """A Gaussian B of standard deviation ``scale / sqrt(fan_in)``."""

    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> jax.Array:
        std = _std(self.scale, projection.fan_in, projection.path, w)
        b = (jax.random.normal(key, w.shape) * std).astype(w.dtype)
        _check_unrelated(b, w, projection.path)
        return b


def _fixed(w: jax.Array, b: Any) -> Any:
    """B carries the error, and does not learn in engaged mode."""
    return jax.lax.stop_gradient(b)


def _learned(w: jax.Array, b: Any) -> Any:
    """B carries the error, and learns from its signal."""
    return b


def _check_unrelated(b: jax.Array, w: jax.Array, path: str) -> None:
    """ValueError if B is W over again, drawn from the same key (as far as values are known: not while tracing)."""
    if isinstance(b, jax.core.Tracer) or not isinstance(w, jax.Array | np.ndarray) or isinstance(w, jax.core.Tracer):
        return
    x, y = (np.asarray(a.ravel()[:64], np.float64) for a in (b, w))
    # By chance two such vectors are nowhere near: one draw in 10^11 for 32 entries.
    if x.size >= 32 and abs(x @ y) > 0.9 * math.sqrt(x @ x) * math.sqrt(y @ y):
        raise ValueError(
            f"key gives params[{path!r}] a B that is its W over again: W was drawn from this key too (the i-th key of "
            "jax.random.split(key) is that of the i-th B), and W would be transported. Give B a key of its own: "
            "jax.random.fold_in(key, 1), or another seed."
        )


def _check_scale(scale: float) -> None:
    checks.positive("scale", scale, ", the standard deviation of B times sqrt(fan_in)")


def _std(scale: float, fan_in: int, path: str, w: jax.Array) -> float:
    """B's standard deviation. ValueError if draws of it are beyond W's dtype, and B would be infinite or all zeros."""
    std, limits = scale / math.sqrt(fan_in), jnp.finfo(w.dtype)
    if not float(limits.smallest_subnormal) <= std <= float(limits.max) / 6:  # no draw is beyond six of them
        raise ValueError(
            f"scale={scale:g} gives params[{path!r}] a B of standard deviation {std:.2g}, which {w.dtype} cannot hold; give "
            "a scale nearer to 1, or keep params in a wider dtype"
        )
    return std


def backprop() -> Rule:
    """Backpropagation: the error goes back through W^T (eq. 2).

    All of the weights are transported. No feedback weights, no extra memory or time: the function is left as it is.
    """
    return Rule("backprop", None, None, transports="weights")


def feedback_alignment(scale: float = 1.0) -> Rule:
    """Feedback alignment (Lillicrap et al. 2016): the error goes back through a fixed random B (eq. 3-4).

    ``delta_l = phi'(y_l) B_{l+1} delta_{l+1}``. Nothing is transported, and nothing but W learns.

    Args:
      scale: B is Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: ``scale`` is not a positive number.
    """
    _check_scale(scale)
    return Rule("feedback_alignment", _RandomFeedback(scale), _fixed)


def sign_symmetry(magnitude: str = "uniform", scale: float = 1.0) -> Rule:
    """Sign-concordant feedback (Liao et al. 2016, Moskovitz et al. 2018, Xiao et al. 2018): through abs(B) * sign(W)^T.

    The signs of W are transported at every step, its magnitudes are not. B holds the magnitudes, with the signs that W
    had when B was made; the backward pass takes W's signs of the moment. B does not learn.

    Args:
      magnitude: "uniform" (uSF): one constant c for all; "fixed" (frSF): Gaussian, drawn once; "batch" (brSF):
        Gaussian, drawn anew for each batch (by ``engaged_step``; with ``value_and_grad`` alone, call ``init_feedback``
        for each).
      scale: c, or the Gaussian's standard deviation, is ``scale / sqrt(fan_in)``: with the default that of W's initial
        distribution under LeCun initialisation (sqrt(2) for He's).

    Raises:
      ValueError: an argument is out of its range.
    """
    _check_scale(scale)
    names = {"uniform": "sign_symmetry", "fixed": "sign_symmetry_fixed", "batch": "sign_symmetry_batch"}
    checks.one_of("magnitude", magnitude, tuple(names))

    init = _SignedMagnitudes(magnitude, scale)
    return Rule(names[magnitude], init, _signed, redrawn=magnitude == "batch", transports="signs")


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
    """B's magnitudes with W's signs of the moment."""
    return jax.lax.stop_gradient(jnp.abs(b) * jnp.sign(w))


def _exact_start(start: str) -> Mirror | None:
    """The mirror of a start: exact in one step, for the B that will only have to stay there."""
    checks.one_of("start", start, ("random", "mirror"))
    return Mirror("orthogonal", rate=1.0, each_step=False, start=1) if start == "mirror" else None


def kolen_pollack(scale: float = 1.0, *, start: str = "random") -> Rule:
    """Kolen-Pollack as a local circuit (Akrout et al. 2019, eq. 15-18): B learns beside W from the same two activities.

    ``dB = -eta y_l delta_{l+1}^T - lambda B`` where ``dW = -eta delta_{l+1} y_l^T - lambda W``. Both changes are the
    same matrix, so that with weight decay W - B^T shrinks by (1 - eta lambda) a step (eq. 14). Nothing is transported;
    each synapse sees its own two sides only, and there is no second mode. Train B by ``wmkp.updates.kolen_pollack``
    with the optimizer that trains W.

    What it does slowly is forget the initial difference; it adds none. With ``start="mirror"`` the mirror period before
    training (``steps.init(..., mirror_steps=1)``) removes that difference at once: one mirror step of fan_in orthogonal
    samples is exact, and from there B follows W^T, and learning backprop, to rounding, in one mode and without decay.

    The signal is that of the projection alone: a parameter that is also used otherwise (an embedding that is looked up
    and tied to the output) has a gradient that B does not share, and B then follows it only in part.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.
      start: "random", or "mirror".

    Raises:
      ValueError: an argument is out of its range.
    """
    _check_scale(scale)
    return Rule("kolen_pollack", _RandomFeedback(scale), _learned, learns=True, mirror=_exact_start(start))


def mirrored_kolen_pollack(
    noise: str = "orthogonal",
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
    """Mirrored Kolen-Pollack (MKP): B starts from a weight mirror, takes W's own changes, and is mirrored now and then.

    Engaged mode changes B as ``kolen_pollack`` does: ``dB = -eta y_l delta_{l+1}^T - lambda B``. These changes are W's,
    so that B does not lag behind W, and W - B^T stands still but for decay. Mirror mode, as in ``weight_mirror``, takes
    that difference away: before training, and then as rarely as one likes (``steps.mirror_step``). Since the difference
    stands still, B is the mean over all mirror steps, and the angle to W^T goes to zero with their number on any noise.
    Nothing is transported. Train B by ``wmkp.updates.kolen_pollack`` with the optimizer that trains W.

    By default one mirror step of fan_in orthogonal samples is exact, and learning follows backprop to rounding. Noise of
    other kinds starts from 20 mirror steps, which leave 4.5 degrees.

    Args:
      noise, noise_std, num_samples, activation, bias: as in ``weight_mirror``.
      target_angle: degrees between B and W^T that the mirror steps before training leave. None: fan_in samples a mirror
        step for orthogonal noise (twice that in pairs), 8 fan_in for other noise.
      rate: the share of B that a mirror step replaces. None: 1/t at the t-th mirror step, the mean over all.
      start: mirror steps before training. None: 1 of orthogonal noise, 20 of other noise.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: an argument is out of its range; the message names it.
    """
    _check_scale(scale)
    checks.one_of("noise", noise, NOISES)
    if start is None:
        start = 1 if "orthogonal" in noise else 20
    mirror = Mirror(noise, noise_std, num_samples, target_angle, rate, activation, bias, start=start)
    _check_mirror(mirror)
    return Rule("mirrored_kolen_pollack", _RandomFeedback(scale), _learned, learns=True, mirror=mirror)


def kolen_pollack_transported(scale: float = 1.0) -> Rule:
    """Kolen-Pollack as first published (Kolen and Pollack 1994, eq. 12-14): W's changes are carried over to B.

    ``dW = A - lambda W`` and ``dB = A^T - lambda B``, A being W's own. Weights are not transported, their changes are:
    for comparison with the circuit of ``kolen_pollack``, from which it differs only where a parameter has other uses
    than its product with an activation.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: ``scale`` is not a positive number.
    """
    rule = kolen_pollack(scale)
    return rule._replace(name="kolen_pollack_transported", transported=True, transports="changes")


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
        return (self.r, self.b), (self.shape, self.order)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "ProductFeedback":
        """For JAX."""
        return cls(*children, *static)


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


def product_feedback_alignment(expansion: float = 4.0, scale: float = 1.0) -> Rule:
    """Product feedback alignment (PFA; Li et al. 2024): the error goes back through two populations, R B; B learns.

    ``dL/dx := R B delta``. B goes to an intermediate population, larger than x's, and learns as Kolen-Pollack's does,
    from what its own two sides hold: ``dB = -eta (R^T x) delta^T - lambda B``. R is fixed and random with R R^T near
    the identity, and R B aligns with W^T, though no array becomes the transpose of another. Nothing is transported.

    B's decay and learning rate are W's (``wmkp.updates.kolen_pollack``); R takes no part in it.

    Args:
      expansion: size of the intermediate population over fan_in. R R^T differs from the identity by about
        ``1 / sqrt(expansion)`` an entry times ``1 / sqrt(fan_in)``: R B aligns the better the larger it is.
      scale: R B starts with entries of standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: an argument is out of its range; or, from ``init_feedback``, a parameter that is not one matrix.
    """
    _check_scale(scale)
    checks.number("expansion", expansion, "be a positive number, at most 1000", lambda x: 0 < x <= 1000)

    return Rule("product_feedback_alignment", _RandomProduct(expansion, scale), _product, learns=True)


@dataclasses.dataclass(frozen=True)
class _RandomDirect:
    """A Gaussian B from the network's outputs, of standard deviation ``scale / sqrt(outputs)``."""

    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> Direct:
        shape = projection.direct_shape()
        std = _std(self.scale, shape[-1], projection.path, w)
        return Direct((jax.random.normal(key, shape) * std).astype(w.dtype))


def direct_feedback_alignment(scale: float = 1.0) -> Rule:
    """Direct feedback alignment (DFA; Nokland 2016): the output's error goes to each projection's input by its own B.

    ``dL/dx := B_l e``, e the error at the network's output (that of the last projection), B_l fixed and random, of
    shape (size of x) by (outputs). Nothing passes between projections: the chain is cut there, and goes on only through
    what has no weights (activation functions, normalisations, skip connections). Nothing is transported. W's own
    gradient stays delta x^T (eq. 4).

    Args:
      scale: B is Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: ``scale`` is not a positive number; from ``init_feedback``, an output inside a ``lax.scan``, or a
        parameter whose inputs are of different sizes.
    """
    _check_scale(scale)
    return Rule("direct_feedback_alignment", _RandomDirect(scale), _fixed, direct=True)


def direct_kolen_pollack(scale: float = 1.0) -> Rule:
    """Direct Kolen-Pollack (DKP; Webster et al. 2021): direct feedback alignment whose B_l learn.

    ``dB_l = -eta x e^T - lambda B_l``, from the input that B_l reaches and the error that it carries, with W's own
    learning rate and decay (``wmkp.updates.kolen_pollack``). Nothing is transported.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: as ``direct_feedback_alignment``.
    """
    _check_scale(scale)
    return Rule("direct_kolen_pollack", _RandomDirect(scale), _learned, learns=True, direct=True)


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
    """Any sum of Kunin et al.'s (2020) primitives: B goes down the gradient of a local loss R(B; W, x).

    With u = W x and v = B^T x, R is ``decay 1/2 |B|^2 - amplitude <v, u> + sparse 1/2 |v|^2 + null 1/2 |B u|^2 -
    self_alignment <B, W^T>``, means over samples; so ``dB = rate (-decay B + amplitude x u^T - sparse x v^T - null (B
    u) u^T + self_alignment W^T)``. W's own share of these losses is off. All but ``self_alignment`` (which transports
    the weights) are local to the synapse. A weight mirror is ``alignment(amplitude=1, decay=1)``.

    Args:
      amplitude, decay, null, sparse, self_alignment: the coefficients.
      on: "noise" (mirror mode, by ``mirror_step``) or "activity" (engaged mode: x is the projection's own input).
      rate: the step down R's gradient; with noise at unit variance, 1 is stable for decay alone.
      noise, noise_std, num_samples: with ``on="noise"``, as in ``weight_mirror``.
      name: as tables print it.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.
      whiten: on activity, amplitude's term is multiplied by ``E[x x^T]^-1`` (which no synapse could do alone).
      normalize: on activity, what the terms that hold x are divided by: "none", "mean" (x's mean square) or "total"
        (the mean of ``|x|^2``, under which a rate below 2 is stable for ``sparse``).

    Raises:
      ValueError: an argument is out of its range.
    """
    _check_scale(scale)
    losses = Alignment(decay, amplitude, sparse, null, self_alignment, whiten, normalize, rate)
    for coefficient in ("amplitude", "decay", "null", "sparse", "self_alignment"):
        checks.coefficient(coefficient, getattr(losses, coefficient))
    if not any(losses[:5]):
        raise ValueError(
            "the coefficients (amplitude, decay, null, sparse, self_alignment) are all zero; one must be positive"
        )
    checks.positive("rate", rate)
    checks.stable("rate * decay", rate * decay)
    checks.one_of("normalize", normalize, ("none", "mean", "total"))
    checks.one_of("on", on, ("noise", "activity"))
    checks.flag("whiten", whiten)
    mirror = Mirror(noise, noise_std, num_samples, 6.0, min(rate, 1.0), alignment=losses)
    _check_mirror(mirror)
    if whiten and normalize != "none":
        raise ValueError(
            f'whiten divides by the covariance already; normalize must be "none" beside it, got {normalize!r}'
        )
    init = _RandomFeedback(scale)
    transports = "weights" if self_alignment else "nothing"
    if on == "activity":
        return Rule(name, init, _learned, local=losses, transports=transports)
    if whiten or normalize != "none":
        raise ValueError('whiten and normalize have a meaning on="activity" alone: noise is white, its variance known')
    return Rule(name, init, _fixed, mirror=mirror, transports=transports)


def information_alignment(
    amplitude: float = 1.0, null: float = 0.5, decay: float = 0.5, *, rate: float = 0.1, noise_std: float = 1.0
) -> Rule:
    """Information alignment (Kunin et al. 2020): amplitude + null + decay, on noise.

    ``dB = rate (amplitude x u^T - null (B u) u^T - decay B)`` on noise. A weight mirror whose null term keeps B from
    growing. Local; stabler than the weight mirror across architectures in that paper. B settles at ``amplitude W^T
    (null W W^T + decay / sigma^2)^-1``, at no angle to W^T where W's rows are orthogonal and of one norm.

    Args:
      amplitude, null, decay: the coefficients (the paper's were found by search, one number each).
      rate, noise_std: as in ``alignment``.

    Raises:
      ValueError: an argument is out of its range; the message names it.
    """
    return alignment(
        amplitude=amplitude, null=null, decay=decay, rate=rate, noise_std=noise_std, name="information_alignment"
    )


def symmetric_alignment(self_alignment: float = 1.0, decay: float = 1.0, *, rate: float = 0.1) -> Rule:
    """Symmetric alignment (Kunin et al. 2020): self + decay, B relaxes to ``self_alignment / decay`` W^T.

    ``dB = rate (self_alignment W^T - decay B)``, at every engaged step. It transports the weights, and is no local
    rule: the yardstick for those that are.

    Args:
      self_alignment, decay: the coefficients.
      rate: as in ``alignment``.

    Raises:
      ValueError: an argument is out of its range; the message names it.
    """
    return alignment(self_alignment=self_alignment, decay=decay, rate=rate, on="activity", name="symmetric_alignment")


def activation_alignment(amplitude: float = 1.0, sparse: float = 1.0, *, rate: float = 1.0) -> Rule:
    """Activation alignment (Kunin et al. 2020): amplitude + sparse, on the network's own activity, in engaged mode.

    ``dB = rate (amplitude x u^T - sparse x v^T)``, the delta rule by which B^T learns to answer x as W does; it settles
    at ``amplitude / sparse`` times W^T wherever the activity reaches. Local, with no second mode. Both terms are
    divided by the mean of ``|x|^2``, so that one rate is stable whatever the size of the activity.

    Args:
      amplitude, sparse: the coefficients.
      rate: as in ``alignment``; stable below ``2 / sparse``.

    Raises:
      ValueError: an argument is out of its range; the message names it.
    """
    return alignment(
        amplitude=amplitude, sparse=sparse, rate=rate, on="activity", normalize="total", name="activation_alignment"
    )


def activity_mirror(*, whiten: bool = False, rate: float = 0.1) -> Rule:
    """A weight mirror on the network's own activity instead of noise (eq. 5 with x as it comes), in engaged mode.

    ``dB = rate (x u^T / s - B)``, s the mean square of x, whose mean is ``E[x x^T] / s W^T - B``: the input's
    covariance comes along, and with it an angle that no averaging removes. ``wmkp.input_covariances`` shows it. With
    ``whiten`` it is divided out, which no synapse could do alone.

    Args:
      whiten: whether to multiply by ``E[x x^T]^-1`` of the batch.
      rate: a, the share of the difference that a step takes away.

    Raises:
      ValueError: an argument is out of its range; the message names it.
    """
    return alignment(
        amplitude=1.0, decay=1.0, rate=rate, on="activity", whiten=whiten, normalize="none" if whiten else "mean",
        name="activity_mirror_whitened" if whiten else "activity_mirror",
    )  # fmt: skip


def weight_mirror(
    noise: str = "gaussian",
    noise_std: float = 1.0,
    num_samples: int | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    bias: str = "blocked",
    *,
    target_angle: float = 6.0,
    rate: float = 0.1,
    scale: float = 1.0,
) -> Rule:
    """Weight mirrors (Akrout et al. 2019, eq. 5-11): in a second mode, noise through W teaches B its transpose.

    Engaged mode sends the error back through B (eq. 3) and leaves B as it is. Mirror mode feeds each projection noise
    x, takes its response y = phi(W x + b) and moves B along x y^T (eq. 7), whose mean is sigma^2 E[phi'] W^T: exactly
    so, by Stein's lemma, for Gaussian noise, no bias and any continuous phi. Nothing is transported; B's synapse sees its two
    sides only.

    Orthogonal noise gives a linear response's W^T exactly at fan_in samples and its multiples; in pairs x, -x it gives ReLU's exactly
    too (relu(z) - relu(-z) = z), at 2 fan_in. A brain could do the pairs (a pattern and its opposite in turn, against
    a resting rate) and could wake its neurons one after another, which is the simplest orthogonal noise; it could
    hardly draw a dense orthogonal pattern over a whole population, which asks the neurons to agree on it beforehand.

    Args:
      noise: "gaussian", "uniform" or "rademacher" (random signs), of zero mean; "antithetic" (Gaussian pairs x, -x);
        "orthogonal" (X^T X = N sigma^2 I) or "orthogonal+antithetic".
      noise_std: sigma, in the units of the presynaptic activity.
      num_samples: samples a mirror step draws for each projection. None: as many as ``target_angle`` takes at ``rate``
        (see ``wmkp.samples_for_angle``).
      activation: phi, applied to the response; None for a linear one.
      bias: "blocked", or "kept": the layer's own bias is added before phi, which leaves an angle that no number of
        samples removes. (Beside a gain, as a weight norm's, it cannot be kept.)
      target_angle: degrees between B and W^T that the leaky average settles at while W stands still.
      rate: a in (0, 1], the share of the difference between B and the estimate of W^T that one mirror step takes away.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: an argument is out of its range; the message names it.
    """
    _check_scale(scale)
    mirror = Mirror(noise, noise_std, num_samples, target_angle, rate, activation, bias)
    _check_mirror(mirror)
    return Rule("weight_mirror", _RandomFeedback(scale), _fixed, mirror=mirror)


NOISES = ("gaussian", "uniform", "rademacher", "orthogonal", "antithetic", "orthogonal+antithetic")
# Samples a mirror step draws for each input where neither num_samples nor target_angle says (of pairs, so many pairs).
SAMPLES = {noise: 1 if "orthogonal" in noise else 8 for noise in NOISES}


def _check_mirror(mirror: Mirror) -> None:
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
    elif mirror.alignment is not None:
        raise ValueError("rule.mirror.rate is None, and an alignment has no mean over mirror steps; give a rate")
    least = 0 if mirror.rate is not None else 1
    must = f"be an integer of at least {least}, and below 2^31"
    if least:
        must += " (rate=None is the mean over all mirror steps, the first of them before training)"
    checks.number("start", mirror.start, must, lambda x: least <= x < 2**31, numbers.Integral)
    checks.flag("rule.mirror.each_step", mirror.each_step)
    if not isinstance(mirror.alignment, Alignment | None):
        raise TypeError(f"rule.mirror.alignment must be an Alignment, or None; got {checks.shown(mirror.alignment)}")
    if mirror.activation is not None and not callable(mirror.activation):
        raise ValueError(f"activation must be a function of an array, or None; got {checks.shown(mirror.activation)}")


def _check_fields(rule: Rule) -> None:
    """TypeError or ValueError unless a rule, which may be the user's own, is whole."""
    if (rule.init is None) != (rule.backward is None):
        lacking = "init" if rule.init is None else "backward"
        raise ValueError(
            f"rule {rule.name} has no {lacking}: give both, or neither for backprop. Without backward the error would go "
            "back through W, and without init there is no B."
        )
    if rule.init is not None:
        checks.function("rule.init", rule.init, "(key, projection, W) -> B")
        checks.function("rule.backward", rule.backward, "(W, B) -> array in W's layout")
    for name in ("learns", "transported", "redrawn", "direct"):
        checks.flag(f"rule.{name}", getattr(rule, name))
    for name, article, kind in (("mirror", "a", Mirror), ("local", "an", Alignment)):
        if not isinstance(value := getattr(rule, name), kind | None):
            raise TypeError(f"rule.{name} must be {article} {kind.__name__}, or None; got {checks.shown(value)}")
    if rule.mirror is not None:
        _check_mirror(rule.mirror)


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
                    f"rule's pattern {pattern!r} is no regular expression ({error}); re.escape(path) makes one of a path"
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


def check_samples(analysis: Analysis) -> None:
    """ValueError if no sample reaches any projection."""
    outputs = [p.output_aval.shape for products in analysis.sites().values() for p in products]
    if outputs and all(0 in shape for shape in outputs):
        raise ValueError("args hold no sample: every projection's output is empty. Pass a batch of at least one.")


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
            "fun has no projection: no parameter multiplies an activation. Data must be an argument of fun (not a "
            "closed-over array, nor a Python number or list), and params its first argument."
        )
    if isinstance(rule, Rule):
        rules = dict.fromkeys(paths, rule)
    else:
        rules = {}
        for pattern in rule:
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(f"rule's pattern {pattern!r} matches no projection; there are: {', '.join(paths)}")
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
            if len({r.local for r in joined}) > 1 or len({r.mirror for r in joined if r.mirror}) > 1:
                raise ValueError(
                    f"rule gives params[{path!r}] and a parameter that is joined to it, as one weight, different mirrors or "
                    "local losses; give all parts of a weight one rule"
                )
            if product.obstacle and rules[path].backward is not None:
                raise WeightTransportError(
                    f"params[{path!r}] reaches a product with an activation through {product.obstacle!r}, where feedback weights "
                    "cannot follow it, so the error could only travel back through W. Multiply the activation by the parameter "
                    "itself (or by a reshape, transpose, slice, cast or constant multiple of it), or give this parameter backprop: "
                    f'rule={{"{re.escape(path)}": wmkp.backprop(), ".*": ...}}.'
                )
    return rules
