"""A convolution's weight gradient on a CPU: by patches (wmkp/patches.py) against XLA's own.

``python -m benchmarks.conv`` times both in turns on the 3x3 convolutions of ResNet-20 (batch 128) and ResNet-18 (batch
16), and writes ``benchmarks/results/conv.json``.
"""

import functools

import jax

import benchmarks
from wmkp import patches

SHAPES = [(128, 32, 16), (128, 16, 32), (128, 8, 64), (16, 56, 64), (16, 28, 128), (16, 14, 256), (16, 7, 512)]


def measure(count: int, size: int, features: int) -> dict[str, object]:
    """Milliseconds of both, for ``count`` images of ``size`` squared."""
    x = jax.random.normal(jax.random.key(0), (count, size, size, features))
    delta = jax.random.normal(jax.random.key(1), x.shape)
    w = jax.random.normal(jax.random.key(2), (3, 3, features, features))

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (eqn,) = jax.make_jaxpr(convolve)(x, w).eqns
    xla = jax.jit(lambda x, delta: jax.linear_transpose(functools.partial(convolve, x), w)(delta)[0])
    ours = jax.jit(lambda x, delta: patches.weight_gradient(eqn.params, x, delta, w.shape))
    calls = {"xla": lambda: xla(x, delta).block_until_ready(), "patches": lambda: ours(x, delta).block_until_ready()}
    return {"images": count, "size": size, "features": features, "seconds": benchmarks.interleaved(calls, 5)}


def main() -> None:
    """Measures all shapes, prints a line each, and saves them."""
    rows = []
    for shape in SHAPES:
        row = measure(*shape)
        rows.append(row)
        times = {name: 1e3 * s["median"] for name, s in row["seconds"].items()}  # type: ignore[attr-defined]
        print(
            shape,
            f"XLA {times['xla']:.1f} ms, patches {times['patches']:.1f} ms, {times['xla'] / times['patches']:.1f}x",
        )
    benchmarks.save("conv", {"rows": rows})


if __name__ == "__main__":
    main()
