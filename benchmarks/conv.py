"""Times a convolution's weight gradient on a CPU: by patches (wmkp/program/patches.py), compared with XLA's own.

``python -m benchmarks.conv`` times both in turns on layers of ResNet-20 (batch 128), ResNet-18 (8) and ResNet-50 (4). It says
which layers wmkp computes by patches. It writes ``benchmarks/results/conv.json``.
"""

import functools

import jax

import benchmarks
from wmkp.program import patches

# Number of images, their side, features in and out, the kernel's side, stride.
SHAPES = [
    (128, 32, 3, 16, 3, 1),
    (128, 32, 16, 16, 3, 1),
    (128, 16, 32, 32, 3, 1),
    (128, 8, 64, 64, 3, 1),
    (8, 224, 3, 64, 7, 2),
    (8, 56, 64, 64, 3, 1),
    (8, 56, 64, 128, 3, 2),
    (8, 28, 128, 128, 3, 1),
    (8, 14, 256, 256, 3, 1),
    (8, 7, 512, 512, 3, 1),
    (4, 56, 64, 256, 1, 1),
    (4, 28, 512, 128, 1, 1),
    (4, 14, 1024, 256, 1, 1),
    (4, 7, 2048, 512, 1, 1),
]


def measure(count: int, size: int, features: int, outputs: int, taps: int, stride: int) -> dict[str, object]:
    """Times both ways, in seconds, on ``count`` images of ``size`` x ``size``."""
    x = jax.random.normal(jax.random.key(0), (count, size, size, features))
    w = jax.random.normal(jax.random.key(2), (taps, taps, features, outputs))

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        padding = [(taps // 2, taps // 2)] * 2
        return jax.lax.conv_general_dilated(x, w, [stride] * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (eqn,) = jax.make_jaxpr(convolve)(x, w).eqns
    out = jax.eval_shape(convolve, x, w)
    delta = jax.random.normal(jax.random.key(1), out.shape)
    xla = jax.jit(lambda x, delta: jax.linear_transpose(functools.partial(convolve, x), w)(delta)[0])
    ours = jax.jit(lambda x, delta: patches.weight_gradient(eqn.params, x, delta, w.shape))
    calls = {"xla": lambda: xla(x, delta).block_until_ready(), "patches": lambda: ours(x, delta).block_until_ready()}
    return {
        "images": count,
        "size": size,
        "features": features,
        "outputs": outputs,
        "taps": taps,
        "stride": stride,
        "by_patches": patches.applies(eqn.params, x, w, out),
        "seconds": benchmarks.interleaved(calls, 5),
    }


def main() -> None:
    """Measures all layers, prints a line for each, and saves the results."""
    rows = []
    for shape in SHAPES:
        row = measure(*shape)
        rows.append(row)
        times = {name: 1e3 * s["median"] for name, s in row["seconds"].items()}  # type: ignore[attr-defined]
        print(
            shape,
            f"XLA {times['xla']:.1f} ms, patches {times['patches']:.1f} ms, {times['xla'] / times['patches']:.2f}x",
            "by patches" if row["by_patches"] else "by XLA",
        )
    benchmarks.save("conv", {"rows": rows})


if __name__ == "__main__":
    main()
