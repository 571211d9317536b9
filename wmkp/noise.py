"""The noise of mirror mode, in parts, and the fast transforms that replace orthogonal noise."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmkp.rule import Mirror

# With fewer rows than this, a matrix product is as fast as the fast transform.
SMALL = 256


def draw_noise(key: jax.Array, mirror: Mirror, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Noise of shape (K, N, fan_in): K projections, N samples of each.

    Orthogonal noise has X^T X = N sigma^2 I for every block of fan_in samples. A block is a Hartley matrix, made of one
    table of fan_in values, with new random signs of its columns. An incomplete last block has random rows of it.
    Antithetic noise is pairs x, -x.
    """
    return noise_in_parts(key, mirror, shape, dtype)(0, shape[1])


def noise_in_parts(
    key: jax.Array, mirror: Mirror, shape: tuple[int, int, int], dtype: Any
) -> Callable[[Any, int], jax.Array]:
    """What ``draw_noise`` draws, in parts that do not overlap: ``(start, count) -> (K, count, fan_in)``."""
    blocks, samples, fan_in = shape
    if "antithetic" in mirror.noise:
        kind = mirror.noise.replace("antithetic", "").strip("+") or "gaussian"
        half = noise_in_parts(key, mirror._replace(noise=kind), (blocks, -(-samples // 2), fan_in), dtype)

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

    This is jax.random's own cipher. On CPUs jax.random runs its rounds as a loop over memory; written out, they are one
    pass (``python -m benchmarks.noise`` times both). An element depends only on its place, so devices can share the
    work.
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

    The polynomial is a sine to float32's rounding, and fast on CPUs. jax.random.normal's inverse error function
    takes longer than the cipher there (``python -m benchmarks.noise`` times both).
    """
    if dtype != jnp.float32:
        return jax.random.normal(key, shape, dtype)
    a, b = _words(key, shape)
    angle = np.float32(np.pi) * _unit(b) - np.float32(np.pi / 2)
    return jnp.sqrt(-2 * jnp.log(1 - _unit(a))) * _sine(angle)


def _signs(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Random signs: 32 from each word, where jax.random.rademacher uses one word for each."""
    blocks, samples, fan_in = shape
    # jax.random is a loop that the compiler cannot fuse. Fused, each word would be computed again for each of its bits.
    words = jax.random.bits(key, (blocks, samples, -(-fan_in // 32)), jnp.uint32)
    places = np.arange(32, dtype=np.uint32).reshape(1, 1, 1, 32)
    bits = words[..., None] >> places & np.uint32(1)
    return (1 - 2 * bits.astype(dtype)).reshape(blocks, samples, -1)[..., :fan_in]


def hartley_draw(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The random part of orthogonal noise: column signs of each block, and the rows of an incomplete last block.

    The signs are (K, whole blocks + 1, fan_in). The rows are (K, rest), or None if the last block is complete.
    """
    blocks, samples, fan_in = shape
    whole, rest = divmod(samples, fan_in)
    if not rest:
        return _signs(key, (blocks, whole + 1, fan_in), dtype), None
    sign_key, row_key = jax.random.split(key)
    keys = jax.random.split(row_key, blocks)
    drawn = jax.vmap(lambda k: jax.random.choice(k, fan_in, (rest,), replace=False))(keys)
    return _signs(sign_key, (blocks, whole + 1, fan_in), dtype), drawn


def _cas_by_table(row: jax.Array, n: int, dtype: Any) -> jax.Array:
    """cas(2 pi j k / n) for these rows j and every k, where cas = cos + sin. On CPUs a table is faster."""
    # With j = j1 m + j2 it is cos(j1 m) cas(j2) + sin(j1 m) cas(-j2): two tables of about sqrt(n) rows.
    m = math.isqrt(n - 1) + 1
    steps = np.arange(m, dtype=np.int64)[:, None] * np.arange(n) % n * (2 * np.pi / n)
    strides = np.arange(m, dtype=np.int64)[:, None] * m * np.arange(n) % n * (2 * np.pi / n)
    cos, sin = jnp.asarray(np.cos(strides), dtype), jnp.asarray(np.sin(strides), dtype)
    ahead = jnp.asarray(np.cos(steps) + np.sin(steps), dtype)
    back = jnp.asarray(np.cos(steps) - np.sin(steps), dtype)
    # The barrier keeps the compiler from computing the whole table in advance.
    j1, j2 = jax.lax.optimization_barrier((row // m, row % m))
    return cos[j1] * ahead[j2] + sin[j1] * back[j2]


def _cas_by_angle(j: jax.Array, k: jax.Array, n: int) -> jax.Array:
    """cas(2 pi j k / n) in float32, element by element, for j, k < n < 2^16.

    An accelerator computes it inside the product that uses it, as it does Gaussian noise. It would look up the rows of
    a table, write them and read them again. cas is sqrt(2) sin(2 pi (j k / n + 1/8)); the angle is counted in integers,
    8 n to a turn.
    """
    product = j.astype(jnp.uint32) * k.astype(jnp.uint32)
    whole = (product.astype(jnp.float32) * np.float32(1 / n)).astype(
        jnp.uint32
    )  # whole turns, perhaps one off; avoids a division
    angle = 8 * (product - whole * np.uint32(n)).astype(jnp.int32) + n
    angle = jnp.where(angle > 4 * n, angle - 8 * n, angle)
    size = jnp.minimum(jnp.abs(angle), 4 * n - jnp.abs(angle))  # within a quarter of a turn, where the sine is the same
    sine = _sine(jnp.where(angle < 0, -size, size).astype(jnp.float32) * np.float32(np.pi / (4 * n)))
    return np.float32(math.sqrt(2)) * sine


def _sine(angle: jax.Array) -> jax.Array:
    """The sine to float32's rounding between -pi/2 and pi/2, by its series."""
    sine = jnp.zeros((), jnp.float32)
    for power in (11, 9, 7, 5, 3, 1):
        sine = sine * angle**2 + np.float32((-1) ** (power // 2) / math.factorial(power))
    return sine * angle


def _hartley_rows(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """Orthogonal noise of unit variance: ``places -> (K, places, fan_in)``, the samples at these of N places."""
    blocks, samples, fan_in = shape
    whole = samples // fan_in
    signs, drawn = hartley_draw(key, shape, dtype)
    chosen = jnp.arange(fan_in)[None]
    if drawn is not None:
        chosen = jnp.concatenate([jnp.broadcast_to(chosen, (blocks, fan_in)), drawn], axis=1)

    def rows(places: jax.Array) -> jax.Array:
        block, place = places // fan_in, places % fan_in
        row = chosen[:, place if drawn is None else jnp.where(block < whole, place, fan_in + place)]
        # The barrier keeps the compiler from repeating the division for each element.
        block, row = jax.lax.optimization_barrier((block, row))
        by_table = lambda row: _cas_by_table(row, fan_in, dtype)
        by_angle = lambda row: _cas_by_angle(row[..., None], jnp.arange(fan_in)[None, None], fan_in)
        exact = dtype == jnp.float32 and fan_in < 2**16
        x = jax.lax.platform_dependent(row, cpu=by_table, default=by_angle) if exact else by_table(row)
        return x * (signs[:, :1] if samples <= fan_in else signs[:, block])

    return rows


@functools.lru_cache
def _hartley_matrix(n: int, dtype: Any) -> np.ndarray:
    """cas(2 pi j k / n), one array for all projections, so a program holds it once."""
    places = np.arange(n)
    circle = np.cos(2 * np.pi / n * places) + np.sin(2 * np.pi / n * places)
    return circle.astype(dtype)[np.outer(places, places) % n]


def hartley(x: jax.Array) -> jax.Array:
    """x times the matrix cas(2 pi j k / n), over the last axis, which has n entries.

    It is Re F - Im F for a fast Fourier transform F (Bracewell 1983), or the matrix product if n is small.
    """
    n = x.shape[-1]
    if n < SMALL:
        return x @ _hartley_matrix(n, x.dtype)
    f = jnp.fft.rfft(x)  # for real x the first half; the rest is its conjugate, reversed
    return jnp.concatenate([f.real - f.imag, (f.real + f.imag)[..., (n - 1) // 2 : 0 : -1]], axis=-1)
