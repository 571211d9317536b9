"""The learning rules: each a NamedTuple of pure functions, one factory a rule, and the choice of a rule per path."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmkp.projections import Analysis, Projection, WeightTransportError


class Mirror(NamedTuple):
    """How a rule's B is mirrored (eq. 6-8): the noise, the response to it, and how fast B follows.

    Attributes:
      noise: "gaussian", "uniform" or "rademacher".
      noise_std: sigma, the standard deviation of each presynaptic value.
      num_samples: how many samples a mirror step draws for a projection, or None: what ``target_angle`` asks for.
      target_angle: degrees; the angle between B and W^T that the leaky average settles at, if W stands still.
      rate: a, the share of B that one mirror step replaces (of B's difference from the estimate of W^T).
      activation: phi, or None for a linear response.
      bias: "blocked" (none reaches the mirror) or "kept" (the layer's own).
      each_step: whether ``mirror_step`` learns, or only the mirror period before training.
    """

    noise: str = "gaussian"
    noise_std: float = 1.0
    num_samples: int | None = None
    target_angle: float = 6.0
    rate: float = 0.1
    activation: Callable[[jax.Array], jax.Array] | None = None
    bias: str = "blocked"
    each_step: bool = True


class Rule(NamedTuple):
    """Which array carries the error back through a projection, and how that array learns.

    Attributes:
      name: as the tables print it.
      init: ``(key, projection, W) -> B``, in W's shape and dtype.
      backward: ``(W, B) -> array`` in W's layout: what the error goes back through; None for W itself (backprop).
      learns: whether B learns in engaged mode, from the signal y delta^T.
      mirror: how B learns in mirror mode; None where it does not.
    """

    name: str
    init: Callable[[jax.Array, Projection, jax.Array], jax.Array] | None
    backward: Callable[[jax.Array, jax.Array], jax.Array] | None
    learns: bool = False
    mirror: Mirror | None = None


RuleOrRules = Rule | Mapping[str, Rule]


def _random_feedback(scale: float) -> Callable[[jax.Array, Projection, jax.Array], jax.Array]:
    def init(key: jax.Array, projection: Projection, w: jax.Array) -> jax.Array:
        return (jax.random.normal(key, w.shape) * (scale / math.sqrt(projection.fan_in))).astype(w.dtype)

    return init


def _check_scale(scale: float) -> None:
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, the standard deviation of B times sqrt(fan_in); got {scale!r}")


def backprop() -> Rule:
    """Backpropagation: the error goes back through W^T (eq. 2).

    All of the weights are transported. No feedback weights, no extra memory or time: the function is left as it is.
    """
    return Rule("backprop", None, None)


def feedback_alignment(scale: float = 1.0) -> Rule:
    """Feedback alignment (Lillicrap et al. 2016): the error goes back through a fixed random B (eq. 3-4).

    ``delta_l = phi'(y_l) B_{l+1} delta_{l+1}``. Nothing is transported, and nothing but W learns.

    Args:
      scale: B is Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: ``scale`` is not a positive number.
    """
    _check_scale(scale)
    return Rule("feedback_alignment", _random_feedback(scale), lambda w, b: jax.lax.stop_gradient(b))


def sign_symmetry(scale: float = 1.0) -> Rule:
    """Uniform sign-concordant feedback (uSF; Liao et al. 2016, Xiao et al. 2018): the error goes back through c sign(W)^T.

    The signs of W are transported at every step, its magnitudes are not. ``B`` holds the magnitude c, with the signs W had
    at the start; the backward pass uses ``abs(B) * sign(W)``.

    Args:
      scale: c is ``scale / sqrt(fan_in)``, with the default the standard deviation of W's initial distribution under LeCun
        initialisation (use sqrt(2) for He's).

    Raises:
      ValueError: ``scale`` is not a positive number.
    """
    _check_scale(scale)

    def init(key: jax.Array, projection: Projection, w: jax.Array) -> jax.Array:
        return jnp.where(w < 0, -1, 1).astype(w.dtype) * (scale / math.sqrt(projection.fan_in))

    def backward(w: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jnp.abs(b) * jnp.sign(w))

    return Rule("sign_symmetry", init, backward)


def kolen_pollack(scale: float = 1.0) -> Rule:
    """Kolen-Pollack as a local circuit (Akrout et al. 2019, eq. 15-18): B learns beside W from the same two activities.

    ``dB = -eta y_l delta_{l+1}^T - lambda B`` where ``dW = -eta delta_{l+1} y_l^T - lambda W``. Both changes are the same
    matrix, so that with weight decay W - B^T shrinks by (1 - eta lambda) a step (eq. 14). Nothing is transported; each
    synapse sees its own two sides only, and there is no second mode. Train B by ``wmkp.updates.kolen_pollack`` with the
    optimizer that trains W.

    The signal is that of the projection alone: a parameter that is also used otherwise (an embedding that is looked up
    and tied to the output) has a gradient that B does not share, and B then follows it only in part.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: ``scale`` is not a positive number.
    """
    _check_scale(scale)
    return Rule("kolen_pollack", _random_feedback(scale), lambda w, b: b, learns=True)


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

    Engaged mode sends the error back through B (eq. 3) and leaves B as it is. Mirror mode feeds each projection noise x,
    takes its response y = phi(W x + b) and moves B along x y^T (eq. 7), whose mean is sigma^2 E[phi'] W^T: exactly so, by
    Stein's lemma, for Gaussian noise, no bias and any phi. Nothing is transported; B's synapse sees its two sides only.

    Args:
      noise: "gaussian", "uniform" or "rademacher" (random signs); zero mean.
      noise_std: sigma, in the units of the presynaptic activity.
      num_samples: samples a mirror step draws for each projection. None: as many as ``target_angle`` takes at ``rate``
        (see ``wmkp.samples_for_angle``).
      activation: phi, applied to the response; None for a linear one.
      bias: "blocked", or "kept": the layer's own bias is added before phi, which leaves an angle that no number of
        samples removes.
      target_angle: degrees between B and W^T that the leaky average settles at while W stands still.
      rate: a in (0, 1], the share of the difference between B and the estimate of W^T that one mirror step takes away.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(fan_in)``.

    Raises:
      ValueError: an argument is out of its range; the message names it.
    """
    _check_scale(scale)
    mirror = Mirror(noise, noise_std, num_samples, target_angle, rate, activation, bias)
    _check_mirror(mirror)
    return Rule("weight_mirror", _random_feedback(scale), lambda w, b: jax.lax.stop_gradient(b), mirror=mirror)


NOISES = ("gaussian", "uniform", "rademacher", "orthogonal", "antithetic", "orthogonal+antithetic")


def _check_mirror(mirror: Mirror) -> None:
    if mirror.noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}; got {mirror.noise!r}")
    if mirror.bias not in ("blocked", "kept"):
        raise ValueError(f'bias must be "blocked" or "kept"; got {mirror.bias!r}')
    if not (math.isfinite(mirror.noise_std) and mirror.noise_std > 0):
        raise ValueError(f"noise_std must be a positive number; got {mirror.noise_std!r}")
    if mirror.num_samples is not None and not (isinstance(mirror.num_samples, int) and mirror.num_samples >= 1):
        raise ValueError(f"num_samples must be an integer of at least 1, or None; got {mirror.num_samples!r}")
    if not 0 < mirror.target_angle < 90:
        raise ValueError(f"target_angle must lie between 0 and 90 degrees; got {mirror.target_angle!r}")
    if not 0 < mirror.rate <= 1:
        raise ValueError(f"rate must lie in (0, 1]; got {mirror.rate!r}")
    if mirror.activation is not None and not callable(mirror.activation):
        raise ValueError(f"activation must be a function of an array, or None; got {mirror.activation!r}")


def resolve(rule: RuleOrRules, analysis: Analysis) -> dict[str, Rule]:
    """The rule of each projection: ``rule`` itself, or the first whose pattern is found in the path (``re.search``).

    Raises:
      TypeError: ``rule`` is no rule and no mapping of patterns to rules.
      ValueError: no projection at all; a pattern that matches none, or a projection that matches no pattern.
      WeightTransportError: feedback weights cannot follow a parameter whose rule is not backprop.
    """
    sites = analysis.sites()
    paths = list(sites)
    if isinstance(rule, Rule):
        if not paths and rule.backward is not None:
            raise ValueError(
                "fun has no projection: no parameter multiplies an activation. Data must be an argument of fun (not a "
                "closed-over array), and params its first argument."
            )
        rules = dict.fromkeys(paths, rule)
    elif isinstance(rule, Mapping) and all(isinstance(r, Rule) for r in rule.values()):
        rules = {}
        for pattern in rule:
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(f"rule's pattern {pattern!r} matches no projection; there are: {', '.join(paths)}")
        for path in paths:
            found = next((r for pattern, r in rule.items() if re.search(pattern, path)), None)
            if found is None:
                raise ValueError(f'no pattern of rule matches projection {path!r}; end with ".*" to match all others')
            rules[path] = found
    else:
        raise TypeError(f"rule must be a wmkp rule such as kolen_pollack(), or a mapping of path patterns to rules; got {rule!r}")
    for path, products in sites.items():
        for product in products:
            if product.obstacle and rules[path].backward is not None:
                raise WeightTransportError(
                    f"params[{path!r}] reaches a product with an activation through {product.obstacle!r}, where feedback "
                    "weights cannot follow it, so the error could only travel back through W. Multiply the activation by "
                    "the parameter itself (or by a reshape, transpose, slice, cast or constant multiple of it), or give "
                    f'this parameter backprop: rule={{"{re.escape(path)}": wmkp.backprop(), ".*": ...}}.'
                )
    return rules
