"""The law of angles: a mirror step's mean signal, the angle that it leaves, and the samples that an angle needs."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import checks
from wmkp.rule import SAMPLES, Mirror, Rule, check_rule

Activation = Callable[[jax.Array], jax.Array] | None


def mirror_gain(rule: Rule) -> float:
    """sigma^2 E[phi'] of a rule's mirror: the mean signal over W^T, and the decay under which B settles at W^T.

    See eq. 11. E[phi'] is taken at weights of unit norm. It is 1 for a linear response and 1/2 for ReLU, at any
    weights.

    Raises:
      ValueError: the rule has no mirror mode.

    Example:
      >>> wmkp.mirror_gain(wmkp.weight_mirror("gaussian", noise_std=2.0))
      4.0
    """
    return _gain(mirror_of(rule))


def mirror_of(rule: Rule) -> Mirror:
    check_rule(rule, mapping=False)
    if rule.mirror is None:
        raise ValueError(f"rule {rule.name} has no mirror mode; use one that has, such as weight_mirror()")
    return rule.mirror


def _gain(mirror: Mirror) -> float:
    mean_slope, _, _ = _response(mirror.activation, mirror.noise_std)
    return mirror.noise_std**2 * mean_slope


def _response(activation: Activation, std: float) -> tuple[float, float, float]:
    """E[phi'(z)], and the variances of phi's signal: of all of phi, and of its odd part.

    z is Gaussian of standard deviation ``std``. A variance is E[phi^2] / (std^2 E[phi']^2), so that a linear response has 1.
    """
    if activation is None:
        return 1.0, 1.0, 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(128)
    weights = weights / weights.sum()
    z = std * nodes
    with jax.ensure_compile_time_eval():
        try:
            phi, some = (np.asarray(activation(jnp.asarray(x, jnp.float32)), np.float64) for x in (z, z[63::-1]))
        except Exception as error:
            raise ValueError(
                f"activation raised {checks.first_line(error)}; use a function that maps an array elementwise, such as jax.nn.relu"
            ) from error
    if phi.shape != z.shape:
        raise ValueError(
            f"activation must map an array elementwise; for shape {list(z.shape)} it returned {list(phi.shape)}. Use one such as jax.nn.relu"
        )
    if not np.allclose(some, phi[63::-1], rtol=1e-4, atol=1e-5 * np.abs(phi).max(), equal_nan=True):
        raise ValueError(
            "activation must map an array elementwise; here one element's value depends on other elements. Use one such as jax.nn.relu"
        )
    slope = float(np.sum(weights * nodes * phi) / std)  # Stein's lemma
    odd = (phi - phi[::-1]) / 2
    if not slope > 1e-6 * math.sqrt(np.sum(weights * phi**2)) / std:  # NaN as well
        raise ValueError(
            f"activation has a mean slope E[phi'] of {slope:.3g} on noise of noise_std {std:g}; it must be positive, or "
            "the response says nothing about W. Use an increasing activation, or another noise_std."
        )
    scale = (std * slope) ** 2
    return slope, float(np.sum(weights * phi**2) / scale), float(np.sum(weights * odd**2) / scale)


def mirror_angle(num_samples: int, fan_in: int, rule: Rule) -> float:
    """The law of angles: degrees between B and W^T at which mirroring settles while W stands still.

    One estimate from N Gaussian samples is at ``tan(theta) = sqrt(c fan_in / N)``. c is 1 for a linear response, 2 for
    ReLU, and E[phi^2] / (sigma^2 E[phi']^2) in general. With n < fan_in orthogonal samples and a linear response it is
    ``sqrt((fan_in - n) / n)``, and zero at every multiple of fan_in. Antithetic pairs keep only phi's odd part (ReLU's
    is linear), and need two samples a direction. For ReLU without pairs, orthogonal noise does somewhat better than
    this law.

    A leaky average of rate a divides tan^2 by (2 - a) / a. A mean over all mirror steps (``rate=None``) does not
    settle: there the angle is that after the ``rule.mirror.start`` steps before training. The law assumes that no bias
    is kept.

    Args:
      num_samples: N, the samples that a mirror step draws.
      fan_in: the projection's.
      rule: the rule, for its noise, activation and rate.

    Raises:
      ValueError: the rule has no mirror mode; ``num_samples`` or ``fan_in`` is not an integer of at least 1.

    Example:
      >>> round(wmkp.mirror_angle(64, 64, wmkp.weight_mirror("gaussian", rate=1.0)))
      45
    """
    mirror = mirror_of(rule)
    checks.count("num_samples", num_samples)
    checks.count("fan_in", fan_in)
    return math.degrees(math.atan(math.sqrt(_tangent_squared(num_samples, fan_in, mirror))))


def _tangent_squared(num_samples: int, fan_in: int, mirror: Mirror) -> float:
    paired = "antithetic" in mirror.noise
    directions = num_samples / 2 if paired else num_samples
    one = _one_estimate(directions, fan_in, _excess(mirror), "orthogonal" in mirror.noise)
    return one * _share(mirror)


def variance(mirror: Mirror, fan_in: int) -> float:
    """The variance of one estimate's noise relative to |W|^2: tan^2 of the angle that one estimate leaves."""
    return _tangent_squared(samples_drawn(mirror, fan_in), fan_in, mirror._replace(rate=1.0))


def noise_left(mirror: Mirror, noise: float, count: jax.Array) -> jax.Array | float:
    """The variance of B's noise before the mirror step ``count``, relative to |W|^2. One estimate has ``noise``."""
    if mirror.rate is None:
        return noise / jnp.maximum(count - 1, 1) if noise else 0.0
    return noise * _share(mirror)


def _share(mirror: Mirror) -> float:
    """The share of an estimate's variance that remains after averaging."""
    return 1 / mirror.start if mirror.rate is None else mirror.rate / (2 - mirror.rate)


def _excess(mirror: Mirror) -> float:
    """How far the signal's variance exceeds that of a linear response."""
    _, whole, odd = _response(mirror.activation, mirror.noise_std)
    excess = (odd if "antithetic" in mirror.noise else whole) - 1
    return excess if excess > 1e-9 else 0.0  # ReLU's pairs are linear up to rounding


def concentrated(mirror: Mirror) -> bool:
    """Whether an estimate's noise falls on one input: an even response, summed over a Hartley matrix, does this."""
    _, whole, odd = _response(mirror.activation, mirror.noise_std)
    return mirror.noise == "orthogonal" and whole - odd > 1e-9


def _one_estimate(directions: float, fan_in: int, excess: float, orthogonal: bool) -> float:
    """tan^2 of the angle of one estimate."""
    uneven = fan_in / directions
    if orthogonal:
        # Every direction was drawn ``blocks`` times, and some of them once more.
        blocks, part = divmod(directions / fan_in, 1)
        uneven = part * (1 - part) / (blocks + part) ** 2
    return excess * fan_in / directions + uneven


def samples_for_angle(angle: float, fan_in: int, rule: Rule) -> int:
    """How many samples a mirror step must draw for B to settle within ``angle`` degrees of W^T (see ``mirror_angle``).

    Args:
      angle: degrees, between 0 and 90.
      fan_in: the projection's.
      rule: the rule, for its noise, activation and rate.

    Raises:
      ValueError: the rule has no mirror mode, or ``angle`` or ``fan_in`` is out of range.

    Example:
      >>> wmkp.samples_for_angle(45.0, 64, wmkp.weight_mirror("gaussian", rate=1.0))
      64
    """
    checks.number("angle", angle, "lie between 0 and 90 degrees (from 1e-6 on)", lambda x: 1e-6 <= x < 90)
    checks.count("fan_in", fan_in)
    return _samples(angle, fan_in, mirror_of(rule))


def _samples(angle: float, fan_in: int, mirror: Mirror) -> int:
    pairs = 2 if "antithetic" in mirror.noise else 1
    tangent = math.tan(math.radians(angle)) ** 2 / _share(mirror)
    excess = _excess(mirror)
    if "orthogonal" not in mirror.noise:
        return pairs * max(1, math.ceil((excess + 1) * fan_in / tangent - 1e-9))
    # Below fan_in directions tan^2 is ((excess + 1) fan_in - n) / n; above, at least excess fan_in / n.
    directions = max(1, math.ceil((excess + 1) * fan_in / (tangent + 1) - 1e-9))
    if directions > fan_in:
        directions = math.ceil(excess * fan_in / tangent - 1e-9)
        while _one_estimate(directions, fan_in, excess, True) > tangent + 1e-12 / _share(mirror):
            directions += 1
    return pairs * directions


def samples_drawn(mirror: Mirror, fan_in: int) -> int:
    """The samples that a mirror step draws for a projection."""
    if mirror.num_samples is not None:
        return int(mirror.num_samples)
    if mirror.target_angle is not None:
        return _samples(mirror.target_angle, fan_in, mirror)
    return SAMPLES[mirror.noise] * fan_in * (2 if "antithetic" in mirror.noise else 1)


def mirror_rate(mirror: Mirror, fan_in: int, count: jax.Array) -> jax.Array | float:
    """The share of B that the mirror step number ``count`` (from 1) replaces."""
    if mirror.rate is not None:
        return mirror.rate
    exact = mirror.bias == "blocked" and not variance(mirror, fan_in)
    return 1.0 if exact else 1 / count
