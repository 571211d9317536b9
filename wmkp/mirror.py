"""Mirror mode (eq. 5-11): noise in, Hebbian signal out; and the law of how good one mirror step is."""

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import checks
from wmkp.engaged import feedback_leaves
from wmkp.program import compat
from wmkp.program.interpreter import collect
from wmkp.program.pathways import Signal, Synapses
from wmkp.program.products import Product
from wmkp.program.projections import Analysis, WeightTransportError, analyse, is_array
from wmkp.rules import SAMPLES, Mirror, Rule, RuleOrRules, check_rule, resolve

Activation = Callable[[jax.Array], jax.Array] | None

# Numbers of noise for a projection (16 GiB in float32): they are told apart by 32 bits, and more would repeat.
MOST = 2**32
# Of them in memory at a time, and the least samples: few enough to stay near the processor, enough that no product is small.
AT_ONCE, LEAST = 2**21, 512
# And numbers of noise, responses and signals of all projections that are worked at together.
TOGETHER = 2**22
# A product with a matrix of fewer rows takes no longer than its fast transform.
SMALL = 256


def mirror_gain(rule: Rule) -> float:
    """sigma^2 E[phi'] of a rule's mirror (eq. 11): its mean signal over W^T, and the decay that settles at W^T.

    E[phi'] is taken at weights of unit norm. For a linear response it is 1 and for ReLU 1/2 at any weights.

    Raises:
      ValueError: the rule has no mirror mode.
    """
    return _gain(_mirror(rule))


def _mirror(rule: Rule) -> Mirror:
    check_rule(rule, mapping=False)
    if rule.mirror is None:
        raise ValueError(f"rule {rule.name} has no mirror mode; weight_mirror() has")
    return rule.mirror


def _gain(mirror: Mirror) -> float:
    mean_slope, _, _ = _response(mirror.activation, mirror.noise_std)
    return mirror.noise_std**2 * mean_slope


def _response(activation: Activation, std: float) -> tuple[float, float, float]:
    """E[phi'(z)], and how much more than a linear response's the variance of phi's signal is: all of phi, its odd part.

    For z Gaussian of standard deviation ``std``; the variances are E[phi^2] / (std^2 E[phi']^2), 1 for a linear phi.
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
                f"activation raised {checks.first_line(error)}; it must map an array elementwise"
            ) from error
    if phi.shape != z.shape:
        raise ValueError(
            f"activation must map an array elementwise; of shape {list(z.shape)} it made {list(phi.shape)}"
        )
    if not np.allclose(some, phi[63::-1], rtol=1e-4, atol=1e-5 * np.abs(phi).max(), equal_nan=True):
        raise ValueError(
            "activation must map an array elementwise; what this one makes of an element depends on others"
        )
    slope = float(np.sum(weights * nodes * phi) / std)  # Stein's lemma
    odd = (phi - phi[::-1]) / 2
    if not slope > 1e-6 * math.sqrt(np.sum(weights * phi**2)) / std:  # NaN as well
        raise ValueError(
            f"activation has a mean slope E[phi'] of {slope:.3g} on noise of noise_std {std:g}; it must be positive, or "
            "the response says nothing of W. Use a rising activation, or a noise_std at which it responds."
        )
    scale = (std * slope) ** 2
    return slope, float(np.sum(weights * phi**2) / scale), float(np.sum(weights * odd**2) / scale)


def mirror_angle(num_samples: int, fan_in: int, rule: Rule) -> float:
    """The law of angles: degrees between B and W^T that mirroring settles at, while W stands still.

    One estimate from N Gaussian samples is at ``tan(theta) = sqrt(c fan_in / N)``: c = 1 for a linear response, 2 for
    ReLU, E[phi^2] / (sigma^2 E[phi']^2) in general. Of n orthogonal samples only the directions not drawn are missing:
    ``sqrt((fan_in - n) / n)`` for a linear response, zero at every multiple of fan_in. For ReLU without pairs,
    orthogonal noise does somewhat better than this law. Antithetic pairs leave phi's odd part alone
    (ReLU's is linear: relu(z) - relu(-z) = z), at two samples a direction. A leaky average of rate a divides tan^2 by
    (2 - a) / a. A mean over all mirror steps (``rate=None``) has no end: for it the angle is that after the steps before
    training, ``rule.mirror.start`` of them. The law assumes that no bias is kept.

    Args:
      num_samples: N, the samples a mirror step draws.
      fan_in: the projection's.
      rule: the rule, for its noise, activation and rate.

    Raises:
      ValueError: the rule has no mirror mode; ``num_samples`` or ``fan_in`` is not an integer of at least 1.
    """
    mirror = _mirror(rule)
    checks.count("num_samples", num_samples)
    checks.count("fan_in", fan_in)
    return math.degrees(math.atan(math.sqrt(_tangent_squared(num_samples, fan_in, mirror))))


def _tangent_squared(num_samples: int, fan_in: int, mirror: Mirror) -> float:
    paired = "antithetic" in mirror.noise
    directions = num_samples / 2 if paired else num_samples
    one = _one_estimate(directions, fan_in, _excess(mirror), "orthogonal" in mirror.noise)
    return one * _share(mirror)


def _share(mirror: Mirror) -> float:
    """What averaging leaves of an estimate's variance."""
    return 1 / mirror.start if mirror.rate is None else mirror.rate / (2 - mirror.rate)


def _excess(mirror: Mirror) -> float:
    """How much more than a linear response's the variance of the signal is."""
    _, whole, odd = _response(mirror.activation, mirror.noise_std)
    excess = (odd if "antithetic" in mirror.noise else whole) - 1
    return excess if excess > 1e-9 else 0.0  # ReLU's pairs are linear, but for rounding


def _one_estimate(directions: float, fan_in: int, excess: float, orthogonal: bool) -> float:
    """tan^2 of the angle of one estimate."""
    uneven = fan_in / directions
    if orthogonal:
        # Every direction was drawn ``blocks`` times, and a part of them once more.
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
    """
    checks.number("angle", angle, "lie between 0 and 90 degrees (from 1e-6 on)", lambda x: 1e-6 <= x < 90)
    checks.count("fan_in", fan_in)
    return _samples(angle, fan_in, _mirror(rule))


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


def _drawn(mirror: Mirror, fan_in: int) -> int:
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
    exact = mirror.bias == "blocked" and not _tangent_squared(_drawn(mirror, fan_in), fan_in, mirror)
    return 1.0 if exact else 1 / count


def draw_noise(key: jax.Array, mirror: Mirror, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Noise of shape (K, N, fan_in): K projections, N samples of each.

    Orthogonal noise has X^T X = N sigma^2 I for every block of fan_in samples: a Hartley matrix, orthogonal at any size
    and made of one table of fan_in values, its columns' signs drawn anew and, for a last block that is not whole, its
    rows drawn at random. Antithetic noise is pairs x, -x.
    """
    return _noise(key, mirror, shape, dtype)(0, shape[1])


def _noise(key: jax.Array, mirror: Mirror, shape: tuple[int, int, int], dtype: Any) -> Callable[[Any, int], jax.Array]:
    """What ``draw_noise`` draws, in parts: ``(start, count) -> (K, count, fan_in)``, for parts that do not overlap."""
    blocks, samples, fan_in = shape
    if "antithetic" in mirror.noise:
        kind = mirror.noise.replace("antithetic", "").strip("+") or "gaussian"
        half = _noise(key, mirror._replace(noise=kind), (blocks, -(-samples // 2), fan_in), dtype)

        def pairs(start: Any, count: int) -> jax.Array:
            x = half((start + 1) // 2, -(-count // 2))
            return jnp.concatenate([x, -x], axis=1)[:, :count]

        return pairs
    if mirror.noise == "orthogonal":
        rows = _hartley_rows(key, shape, dtype)
        return lambda start, count: rows(start + jnp.arange(count, dtype=jnp.uint32)) * mirror.noise_std
    draw = {"gaussian": _gaussian, "uniform": _uniform, "rademacher": _signs}[mirror.noise]

    def independent(start: Any, count: int) -> jax.Array:
        own = key if count == samples else jax.random.fold_in(key, start)
        return draw(own, (blocks, count, fan_in), dtype) * mirror.noise_std

    return independent


def _words(key: jax.Array, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Two random uint32 of a shape: Threefry-2x32 (Salmon et al. 2011) of each element's place.

    It is jax.random's own cipher. That runs its rounds on CPUs as a loop over memory; written out, they are one pass
    (``python -m benchmarks.noise`` times both). An element depends on its place alone, so that devices share the work.
    """
    seed = jax.random.key_data(key)
    if seed.shape != (2,):  # a key of another generator
        seed = jax.random.bits(key, (2,), jnp.uint32)
    block, row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(3))
    return threefry(seed, (block, row * np.uint32(shape[2]) + column))


def threefry(seed: jax.Array, counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds: two words for each counter of two words, all uint32."""
    keys = (seed[0], seed[1], seed[0] ^ seed[1] ^ np.uint32(0x1BD11BDA))
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = a ^ (b << np.uint32(rotation) | b >> np.uint32(32 - rotation))
        a, b = a + keys[(group + 1) % 3], b + keys[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def _unit(words: jax.Array) -> jax.Array:
    """Random words as float32 in [0, 1)."""
    return jax.lax.bitcast_convert_type(words >> np.uint32(9) | np.uint32(0x3F800000), jnp.float32) - 1


def _uniform(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Of unit variance."""
    if dtype != jnp.float32:
        return math.sqrt(3) * jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    return math.sqrt(3) * (2 * _unit(_words(key, shape)[0]) - 1)


def _gaussian(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Of unit variance, by Box and Muller (1958): sqrt(-2 log u) sin(pi v / 2), u in (0, 1] and v in [-1, 1).

    The polynomial is a sine to float32's rounding, and a CPU runs through it; jax.random.normal's inverse error function
    takes longer than the cipher there (``python -m benchmarks.noise`` times both).
    """
    if dtype != jnp.float32:
        return jax.random.normal(key, shape, dtype)
    a, b = _words(key, shape)
    angle = np.float32(np.pi) * _unit(b) - np.float32(np.pi / 2)
    sine = jnp.zeros((), jnp.float32)
    for power in (11, 9, 7, 5, 3, 1):
        sine = sine * angle**2 + np.float32((-1) ** (power // 2) / math.factorial(power))
    return jnp.sqrt(-2 * jnp.log(1 - _unit(a))) * (sine * angle)


def _signs(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Random signs: 32 of each word, where jax.random.rademacher takes a word for each."""
    blocks, samples, fan_in = shape
    # By jax.random, whose loop the compiler fuses with nothing: it would make each word anew for each of its bits.
    words = jax.random.bits(key, (blocks, samples, -(-fan_in // 32)), jnp.uint32)
    places = np.arange(32, dtype=np.uint32).reshape(1, 1, 1, 32)
    bits = words[..., None] >> places & np.uint32(1)
    return (1 - 2 * bits.astype(dtype)).reshape(blocks, samples, -1)[..., :fan_in]


def _hartley_draw(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """What is random in orthogonal noise: signs of the columns of each block, (K, whole blocks + 1, fan_in); and the rows
    of the last block where it is not whole, (K, rest), or None."""
    blocks, samples, fan_in = shape
    whole, rest = divmod(samples, fan_in)
    if not rest:
        return _signs(key, (blocks, whole + 1, fan_in), dtype), None
    sign_key, row_key = jax.random.split(key)
    keys = jax.random.split(row_key, blocks)
    drawn = jax.vmap(lambda k: jax.random.choice(k, fan_in, (rest,), replace=False))(keys)
    return _signs(sign_key, (blocks, whole + 1, fan_in), dtype), drawn


def _hartley_rows(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """Orthogonal noise of unit variance: ``places -> (K, places, fan_in)``, the samples at these of N places."""
    blocks, samples, fan_in = shape
    whole = samples // fan_in
    # Row j of the matrix is cas(2 pi j k / fan_in), cas = cos + sin. With j = j1 m + j2 it is
    # cos(j1 m) cas(j2) + sin(j1 m) cas(-j2): two tables of about sqrt(fan_in) rows, and no trigonometry at run time.
    m = math.isqrt(fan_in - 1) + 1
    steps = np.arange(m, dtype=np.int64)[:, None] * np.arange(fan_in) % fan_in * (2 * np.pi / fan_in)
    strides = np.arange(m, dtype=np.int64)[:, None] * m * np.arange(fan_in) % fan_in * (2 * np.pi / fan_in)
    cos, sin = jnp.asarray(np.cos(strides), dtype), jnp.asarray(np.sin(strides), dtype)
    ahead = jnp.asarray(np.cos(steps) + np.sin(steps), dtype)
    back = jnp.asarray(np.cos(steps) - np.sin(steps), dtype)
    signs, drawn = _hartley_draw(key, shape, dtype)
    chosen = jnp.arange(fan_in)[None]
    if drawn is not None:
        chosen = jnp.concatenate([jnp.broadcast_to(chosen, (blocks, fan_in)), drawn], axis=1)

    def rows(places: jax.Array) -> jax.Array:
        block, place = places // fan_in, places % fan_in
        row = chosen[:, place if drawn is None else jnp.where(block < whole, place, fan_in + place)]
        # The barrier keeps the compiler from dividing for each element anew, and from working all of them out beforehand.
        block, j1, j2 = jax.lax.optimization_barrier((block, row // m, row % m))
        return (cos[j1] * ahead[j2] + sin[j1] * back[j2]) * signs[:, block]

    return rows


@functools.lru_cache
def _hartley_matrix(n: int, dtype: Any) -> np.ndarray:
    """cas(2 pi j k / n); one array for all projections of a program, which so holds it once."""
    places = np.arange(n)
    circle = np.cos(2 * np.pi / n * places) + np.sin(2 * np.pi / n * places)
    return circle.astype(dtype)[np.outer(places, places) % n]


def _hartley(x: jax.Array) -> jax.Array:
    """x times the matrix cas(2 pi j k / n), over the last axis, which has n entries.

    By a fast Fourier transform F, of which it is Re F - Im F (Bracewell 1983), or by the matrix where that is small.
    """
    n = x.shape[-1]
    if n < SMALL:
        return x @ _hartley_matrix(n, x.dtype)
    f = jnp.fft.rfft(x)  # of a real x, the first half; the rest is its conjugate, backwards
    return jnp.concatenate([f.real - f.imag, (f.real + f.imag)[..., (n - 1) // 2 : 0 : -1]], axis=-1)


def _transforms(mirror: Mirror, fan_in: int, shared: bool) -> bool:
    """Whether a projection's noise need not be written down: part of one Hartley matrix, of which at least half is drawn."""
    samples = _drawn(mirror, fan_in)
    paired = "antithetic" in mirror.noise
    if "orthogonal" not in mirror.noise or mirror.signal or shared or (paired and samples % 2):
        return False
    return fan_in <= 2 * (samples // 2 if paired else samples) <= 2 * fan_in


def _by_transforms(key: jax.Array, mirror: Mirror, w: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``_estimate`` where ``_transforms``, from the same noise.

    Its rows are h_j s, h_j a row of the Hartley matrix and s the signs of its columns. So all responses together are the
    transform of s W, and x y^T summed over samples is s times the transform of the responses: some log2(fan_in) operations for
    each weight in the place of 4 fan_in.
    """
    blocks, fan_in, _ = w.shape
    samples = _drawn(mirror, fan_in)
    pairs = "antithetic" in mirror.noise
    signs, drawn = _hartley_draw(key, (blocks, samples // 2 if pairs else samples, fan_in), w.dtype)
    scaled = mirror.noise_std * signs[:, :1]
    respond = mirror.activation or (lambda y: y)
    y = _hartley(scaled * w.swapaxes(1, 2))
    kept = 0 if bias is None else bias[:, :, None]
    y = respond(kept + y) - respond(kept - y) if pairs else respond(kept + y)
    if drawn is not None:
        taken = jax.vmap(lambda rows: jnp.zeros(fan_in, bool).at[rows].set(True))(drawn)
        y = jnp.where(taken[:, None], y, 0)
    return (scaled / samples * _hartley(y)).swapaxes(1, 2)


def _at_once(mirror: Mirror, blocks: int, fan_in: int, shared: bool) -> int:
    """The most samples of a projection that are in memory at a time."""
    # (Devices that share the noise share all of it, or each part would cost them a sum; a loss is one of all samples.)
    if shared or mirror.signal:
        return _drawn(mirror, fan_in)
    return max(LEAST, AT_ONCE // (blocks * fan_in) // 2 * 2)


def _numbers(mirror: Mirror, shape: tuple[int, ...]) -> int:
    """Of noise, responses and signals: what a projection's ``_estimate`` has in memory at a time."""
    blocks, fan_in, fan_out = shape
    samples = min(_drawn(mirror, fan_in), _at_once(mirror, blocks, fan_in, False))
    numbers = blocks * (samples * (fan_in + fan_out) + fan_in * fan_out)
    # By transforms: a spectrum, of complex numbers, and what it was made of.
    return max(numbers, 4 * math.prod(shape)) if _transforms(mirror, fan_in, False) else numbers


def _estimate(
    key: jax.Array,
    mirror: Mirror,
    w: jax.Array,
    bias: jax.Array | None,
    b: jax.Array | None,
    spread: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """The mean of x y^T over samples (or minus R's gradient at ``b``), in the layout of ``w``: (K, fan_in, fan_out)."""
    fan_in = w.shape[1]
    if not _transforms(mirror, fan_in, spread is not None):
        return _by_products(key, mirror, w, bias, b, spread)
    if fan_in < SMALL:
        return _by_transforms(key, mirror, w, bias)
    return jax.lax.platform_dependent(  # measured on CPUs alone; elsewhere products are fast
        key,
        w,
        bias,
        cpu=lambda key, w, bias: _by_transforms(key, mirror, w, bias),
        default=lambda key, w, bias: _by_products(key, mirror, w, bias, None, None),
    )


def _by_products(
    key: jax.Array,
    mirror: Mirror,
    w: jax.Array,
    bias: jax.Array | None,
    b: jax.Array | None,
    spread: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """``_estimate``, so many samples at a time."""
    blocks, fan_in, _ = w.shape
    samples = _drawn(mirror, fan_in)
    at_once = _at_once(mirror, blocks, fan_in, spread is not None)
    draw = _noise(key, mirror, (blocks, samples, fan_in), w.dtype)

    def signal(start: Any, count: int) -> jax.Array:
        x = spread(draw(start, count)) if spread else draw(start, count)
        y = jnp.einsum("kni,kio->kno", x, w)
        if bias is not None:
            y = y + bias[:, None, :]
        if mirror.activation is not None:
            y = mirror.activation(y)
        outer = lambda x, y: jnp.einsum("kni,kno->kio", x, y)
        if mirror.signal is not None:
            multiply = lambda x, w: jnp.einsum("kni,kio->kno", x, w)
            return -mirror.signal(
                Synapses(x, y, None, None, b, w, x, key, outer, multiply, float(samples), 1.0, fan_in, None)
            )
        return outer(x, y)

    more = (samples - 1) // at_once
    first = samples - more * at_once
    total = signal(0, first)
    if more:
        starts = first + at_once * jnp.arange(more, dtype=jnp.uint32)
        total, _ = jax.lax.scan(lambda total, start: (total + signal(start, at_once), None), total, starts)
    return total if mirror.signal else total / float(samples)  # which an int32 may not hold


def _bias_matrix(product: Product, bias: jax.Array, w: jax.Array) -> jax.Array:
    """A bias as a product's output sees it -> (K, outputs of one group), beside ``w`` as (*stack, *weight shape)."""
    axes = product.output_axes()
    rank = product.output_aval.ndim
    lead = bias.ndim - rank
    bias = jnp.moveaxis(bias, [lead + a for a in axes], range(lead, lead + len(axes)))
    bias = bias[(..., *[0] * (rank - len(axes)))]  # it varies along its outputs alone
    *_, split = product.axes()
    fan_out = product.fans()[1]
    bias = bias.reshape(*bias.shape[:lead], -1)
    stack = w.shape[: w.ndim - product.weight_aval.ndim]
    return jnp.broadcast_to(bias, (*stack, bias.shape[-1])).reshape(-1, fan_out // split)


def targets(rules: dict[str, Rule], analysis: Analysis) -> dict[Product, Mirror]:
    """The products that mirror mode is to reach, each with its mirror.

    Raises:
      WeightTransportError: noise alone cannot reach one.
      ValueError: it would take too much noise, or noise whose signals the weight's dtype cannot hold; or a bias is kept beside
        a gain.
    """
    wanted: dict[Product, Mirror] = {}
    for path, products in analysis.sites().items():
        mirror = rules[path].mirror
        for product in products:
            if mirror is None or not product.needs_feedback:
                continue
            reason = product.unmirrored
            if product.primitive == "conv_general_dilated" and product.weight == 0:
                reason = "it is the left operand of a convolution"
            if reason:
                raise WeightTransportError(
                    f"mirror mode cannot reach params[{path!r}] by noise alone ({reason}); give it a rule without a "
                    f'mirror mode: rule={{"{path}": wmkp.kolen_pollack(), ".*": ...}}.'
                )
            if mirror.bias == "kept" and product.bias is not None and product.scaled:
                raise ValueError(
                    f'bias="kept" at params[{path!r}], where a gain scales the weight or its bias: in mirror mode gains are 1, '
                    'and the bias would not stand to the response as in the layer; use bias="blocked".'
                )
            wanted[product] = mirror
            power, limits = mirror.noise_std**2, jnp.finfo(product.weight_aval.dtype)
            if not 64 * float(limits.tiny) <= power <= float(limits.max) / 64:
                raise ValueError(
                    f"noise_std={mirror.noise_std:g} makes signals of {power:.2g} times W at params[{path!r}], which "
                    f"{limits.dtype} cannot hold; give a noise_std nearer to 1, or keep params in a wider dtype"
                )
            fan_in, _ = product.fans()
            samples = _drawn(mirror, fan_in)
            # Twice fan_in orthogonal samples, in pairs, are exact: what a projection of any size may need.
            exact = 2 * fan_in**2 if "orthogonal" in mirror.noise else 0
            if samples * fan_in > max(MOST, exact):
                asked = f"num_samples={samples}"
                if mirror.num_samples is None and mirror.target_angle is not None:
                    asked = f"target_angle={mirror.target_angle:g}"
                raise ValueError(
                    f"{asked} takes {samples * fan_in:.2g} numbers of noise at params[{path!r}] ({samples:,} samples of "
                    f"{fan_in}), where 2^32 is the most; ask for a larger target_angle or fewer num_samples, or for "
                    'noise="orthogonal", exact at fan_in samples ("orthogonal+antithetic", at 2 fan_in, with an '
                    "activation)"
                )
    return wanted


def _without_weights(signal: Signal) -> Signal:
    """The signal, W not shown to it."""
    return lambda seen: signal(seen._replace(w=None))


def signals(
    key: jax.Array,
    rules: dict[str, Rule],
    analysis: Analysis,
    leaves: list[Any],
    feedback: list[Any],
    spread: Callable[[jax.Array], jax.Array] | None = None,
) -> list[Any]:
    """Mirror mode's signal for each parameter leaf, None for those that mirror nothing.

    ``spread`` says where among devices a projection's noise (K, N, fan_in) is drawn, if they share it.
    """
    wanted = targets(rules, analysis)
    products = list(wanted)

    def weights(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        found = collect(analysis.plan, leaves, products)
        return [compat.gathered(found[p][0]) for p in products], [compat.gathered(found[p][1]) for p in products]

    ws, pull_back, biases = jax.vjp(weights, leaves, has_aux=True)
    losses = [wanted[p].signal is not None for p in products]
    if any(losses):  # these read B, laid out as its weight is
        entries = [w if b is None or not is_array(b) else b for w, b in zip(leaves, feedback, strict=True)]
        bs = weights(entries)[0]
    mirrored, keys = [], jax.random.split(key, max(1, len(products)))
    in_work: deque[tuple[int, jax.Array]] = deque()
    room, done = TOGETHER, None
    for i, (product, w, bias) in enumerate(zip(products, ws, biases, strict=True)):
        mirror = wanted[product]
        if mirror.signal is not None and rules[analysis.paths[min(product.params)]].transports != "weights":
            mirror = mirror._replace(signal=_without_weights(mirror.signal))
        matrices = product.to_matrices(w.astype(jnp.promote_types(w.dtype, jnp.float32)))
        kept = _bias_matrix(product, bias, w) if mirror.bias == "kept" and bias is not None else None
        b = product.to_matrices(bs[i].astype(matrices.dtype)) if losses[i] else None
        own, numbers = keys[i], _numbers(mirror, matrices.shape)
        room -= numbers
        while room < 0 and in_work:
            before, done = in_work.popleft()
            room += before
        if done is not None and not spread:
            # The compiler starts whatever it can, and would hold the noise of all projections at once. On CPUs it drops barriers:
            # what is to wait must read of what it waits for (a signal of NaN, beyond help, changes the noise).
            own = keys[jnp.where(jnp.isnan(done[0, 0, 0]), 0, i)]
        signal = _estimate(own, mirror, matrices, kept, b, spread)
        in_work.append((numbers, signal))
        mirrored.append(product.from_matrices(signal, w.shape).astype(w.dtype))
    (pulled,) = pull_back(mirrored)
    reached = {leaf for product in products for leaf in product.params}
    if not all(
        p.plain and w.size == sum(leaves[i].size for i in p.params) for p, w in zip(products, ws, strict=True)
    ) or (len(reached) < sum(len(p.params) for p in products)):
        # A weight used twice, in part, or scaled: the mean over its uses, each undone to the parameter itself.
        (uses,) = pull_back(weights([jnp.ones_like(x) for x in leaves])[0])
        pulled = [s / jnp.where(u > 0, u, 1) for s, u in zip(pulled, uses, strict=True)]
    mirrors = {path for path, rule in rules.items() if rule.mirror is not None}
    return [s if i in reached and analysis.paths[i] in mirrors else None for i, s in enumerate(pulled)]


def mirror_signals(
    key: jax.Array, rule: RuleOrRules, fun: Callable[..., Any], params: Any, *args: Any, feedback: Any = None
) -> Any:
    """Mirror mode (eq. 6-8) at every projection by itself: what eq. 7 multiplies by eta_B, as the mean over samples.

    Each projection gets noise x, answers y = phi(W x + b), and the signal is the mean of x y^T over samples, of which
    the expectation is sigma^2 E[phi'] W^T (eq. 10-11). A conv's noise is patches (N, fan_in), which is unbiased and
    costs ``4 N |W|`` operations whatever the image; no data enters, only shapes. (On CPUs, orthogonal noise of up to fan_in
    samples for 256 inputs or more costs some ``|W| log2(fan_in)``, by fast transforms: the same sums in another order.)

    Args:
      key: a JAX random key.
      rule: a rule with a mirror mode, or a mapping that has one.
      fun: the function that is trained, ``fun(params, *args)``.
      params: its parameters.
      *args: its further arguments, or ShapeDtypeStructs in their place (only shapes are read).
      feedback: the feedback weights, for those rules whose signal depends on B (``Mirror.signal``): theirs is the
        whole change of B over its rate, decay and all.

    Returns:
      A pytree of params' structure with the signal of each B, in W's shape, dtype and layout; ``None`` where
      ``init_feedback`` has None, and zeros for a B whose own rule has no mirror mode.

    Raises:
      ValueError: no rule has a mirror mode; one whose signal depends on B was given no ``feedback``; or a bias is kept
        beside a gain.
      WeightTransportError: a projection that noise alone cannot reach; the message names its path and why.
    """
    checks.key(key)
    check_rule(rule)
    analysis = analyse(fun, params, *args)
    checks.alive("params", params)
    rules = resolve(rule, analysis)
    if not any(r.mirror for r in rules.values()):
        raise ValueError("no rule here has a mirror mode; weight_mirror() has")
    leaves, tree = jax.tree.flatten(params)
    projections = analysis.projections()
    if feedback is None and any(r.mirror and r.mirror.signal for r in rules.values()):
        raise ValueError("the signal of this rule depends on B: give mirror_signals feedback=")
    entries = [None] * len(leaves) if feedback is None else feedback_leaves(params, feedback)
    for path, b in zip(analysis.paths, entries, strict=True):
        mirror = rules[path].mirror if path in rules else None
        if mirror and mirror.signal and projections[path].feedback and not is_array(b):
            raise ValueError(
                f"feedback[{path!r}] is {checks.shape(b)}, but the signal of {rules[path].name} depends on B; make "
                "feedback with init_feedback for this rule."
            )
    result = signals(key, rules, analysis, leaves, entries)
    for i, path in enumerate(analysis.paths):
        if result[i] is None and path in projections and projections[path].feedback and rules[path].init is not None:
            result[i] = jnp.zeros_like(leaves[i])
    return jax.tree.unflatten(tree, result)
