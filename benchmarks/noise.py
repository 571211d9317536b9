"""Compares the time of orthogonal noise with the time of the two matrix products of a mirror step.

``python -m benchmarks.noise`` draws one block of fan_in orthogonal samples by each method: the library's own, QR and
Hadamard matrices. The methods and the products take turns. The times go to ``benchmarks/results/noise.json``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import benchmarks
from wmkp.noise import draw_noise
from wmkp.rule import Mirror


@dataclasses.dataclass(frozen=True)
class Args:
    """Times orthogonal noise."""

    fan_in: tuple[int, ...] = (64, 147, 576, 1152, 2304, 4608)
    """Sizes to try; those of a ResNet-18's projections, and a power of two."""
    fan_out: int = 512
    """Postsynaptic neurons of the mirror's products."""
    rounds: int = 7
    """Timings of each, all methods taking turns."""
    largest_qr: int = 1152
    """QR is left out above this size: its time grows as the cube, and is beyond question by then."""
    repeats: int = 2
    """How many times the whole is measured; all are kept."""
    save: bool = True
    """Whether to write the results."""


def library(key: jax.Array, fan_in: int) -> jax.Array:
    """The noise of ``weight_mirror(noise="orthogonal")``."""
    return draw_noise(key, Mirror("orthogonal"), (1, fan_in, fan_in), jnp.float32)[0]


def gaussian(key: jax.Array, fan_in: int) -> jax.Array:
    """The same number of Gaussian samples, which are not orthogonal."""
    return draw_noise(key, Mirror("gaussian"), (1, fan_in, fan_in), jnp.float32)[0]


def jax_gaussian(key: jax.Array, fan_in: int) -> jax.Array:
    """Gaussian samples by ``jax.random``."""
    return jax.random.normal(key, (fan_in, fan_in))


def qr(key: jax.Array, fan_in: int) -> jax.Array:
    """The orthogonal factor of a Gaussian matrix, which is uniform over rotations."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (fan_in, fan_in)))
    return q * jnp.sign(jnp.diagonal(r)) * np.sqrt(fan_in)


def _power_of_two(fan_in: int) -> int:
    return 1 << (fan_in - 1).bit_length()


def hadamard(key: jax.Array, fan_in: int) -> jax.Array:
    """Sylvester's Hadamard matrix with random column signs; its entry (i, j) is (-1)^popcount(i & j).

    Its size must be a power of two, so it can need up to 2 fan_in samples.
    """
    samples = _power_of_two(fan_in)
    rows, columns = jnp.arange(samples, dtype=jnp.uint32)[:, None], jnp.arange(fan_in, dtype=jnp.uint32)
    parity = jax.lax.population_count(rows & columns) & 1
    return (1 - 2 * parity.astype(jnp.float32)) * jax.random.rademacher(key, (fan_in,), jnp.float32)


def fast_hadamard(key: jax.Array, fan_in: int) -> jax.Array:
    """The same matrix by a fast Walsh-Hadamard transform of the diagonal of signs, in log2(samples) butterflies."""
    samples = _power_of_two(fan_in)
    signs = jax.random.rademacher(key, (fan_in,), jnp.float32)
    x = jnp.zeros((samples, fan_in)).at[jnp.arange(fan_in), jnp.arange(fan_in)].set(signs)
    half = 1
    while half < samples:
        a, b = x.reshape(-1, 2, half, fan_in).swapaxes(0, 1)
        x = jnp.stack([a + b, a - b], axis=1).reshape(samples, fan_in)
        half *= 2
    return x


def products(noise: jax.Array, w: jax.Array) -> jax.Array:
    """The two products of a mirror step: y = x W, then x^T y over the samples."""
    return noise.T @ (noise @ w) / noise.shape[0]


METHODS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "gaussian": gaussian,
    "gaussian by jax.random": jax_gaussian,
    "library": library,
    "hadamard": hadamard,
    "fast hadamard": fast_hadamard,
    "qr": qr,
}


def check(noise: jax.Array) -> float:
    """The largest absolute entry of X^T X / N - I."""
    x = np.asarray(noise, np.float64)
    return float(np.max(np.abs(x.T @ x / x.shape[0] - np.eye(x.shape[1]))))


def measure(args: Args, fan_in: int) -> dict[str, Any]:
    """Returns one row: the seconds of each method, and of the products."""
    key = jax.random.key(0)
    w = jax.random.normal(jax.random.key(1), (fan_in, args.fan_out))
    calls: dict[str, Callable[[], Any]] = {}
    errors = {}
    for name, method in METHODS.items():
        if name == "qr" and fan_in > args.largest_qr:
            continue
        compiled = jax.jit(functools.partial(method, fan_in=fan_in))
        errors[name] = check(compiled(key))
        calls[name] = lambda compiled=compiled: compiled(key).block_until_ready()
    x = jax.block_until_ready(library(key, fan_in))
    product = jax.jit(products)
    calls["products"] = lambda: product(x, w).block_until_ready()
    rounds = args.rounds if fan_in < 2000 else max(3, args.rounds // 2)
    return {"fan_in": fan_in, "seconds": benchmarks.interleaved(calls, rounds), "errors": errors}


def main(args: Args) -> None:
    """Runs all sizes. Prints and saves the times, also relative to the products."""
    names = [*METHODS, "products"]
    print(f"milliseconds (share of the products' time), fan_out {args.fan_out}")
    print(f"{'fan_in':>6} " + " ".join(f"{name:>22}" for name in names))
    runs = []
    for _ in range(args.repeats):
        rows = []
        for fan_in in args.fan_in:
            row = measure(args, fan_in)
            rows.append(row)
            times = {name: s["median"] for name, s in row["seconds"].items()}
            cells = [
                f"{1e3 * times[n]:10.2f} ({times[n] / times['products']:5.2f})" if n in times else " " * 22
                for n in names
            ]
            print(f"{fan_in:6} " + " ".join(f"{c:>22}" for c in cells), flush=True)
        runs.append(rows)
    if args.save:
        benchmarks.save("noise", {"settings": dataclasses.asdict(args), "runs": runs})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
