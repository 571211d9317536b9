"""Plain JAX models (einsum, loops, shard_map, custom derivatives, kernels), and the project's own models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import KEY, Case, Model, check, drawn, kept_weights, normal, parametrize, through_gain
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

import wmkp
from wmkp.experiments.models.lenet import LeNet
from wmkp.experiments.models.resnet import BasicBlock, ResNet
from wmkp.experiments.models.transformer import Decoder

pytestmark = pytest.mark.usefixtures("quick_compile")


def plain(apply: Callable[..., Any], shapes: dict[str, tuple[int, ...]], *shape: int, **options: Any) -> Case:
    """A case of ``apply(params, x)`` with parameters of these shapes, on an input of this shape."""
    avals = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return Case(lambda: through_gain(apply, drawn(avals), normal(*shape, seed=1)), **options)


def experts(p, x):
    """A mixture of experts written with einsum. The gate chooses the two best experts."""
    gate = jax.nn.softmax(x @ p["router"])
    best = gate * (gate >= jax.lax.top_k(gate, 2)[0][:, -1:])
    h = jax.nn.gelu(jnp.einsum("nd,edf->nef", x, p["up"]) + p["bias"])
    return jnp.einsum("ne,nef,efd->nd", best, h, p["down"])


def dispatched(p, x):
    """A mixture of experts in which one-hot matrices send each sample to one expert."""
    gate = jax.nn.softmax(x @ p["router"])
    send = jax.nn.one_hot(jnp.argmax(gate, -1), 3)
    inputs = jnp.einsum("ne,nd->end", send, x)
    h = jnp.tanh(jnp.einsum("end,edf->enf", inputs, p["up"]))
    return jnp.einsum("enf,efd,ne->nd", h, p["down"], send * gate)


def unrolled(p, x):
    h = jnp.zeros((x.shape[0], 6))
    for t in range(x.shape[1]):
        h = jnp.tanh(x[:, t] @ p["in"] + h @ p["recurrent"] + p["bias"])
    return h @ p["out"]


def attention(p, x):
    """Grouped-query attention by jax.nn.dot_product_attention, with fused projections and rotary positions."""
    q, k, v = jnp.split(x @ p["qkv"], (8, 12), axis=-1)
    heads = lambda a, n: a.reshape(*a.shape[:-1], n, 4)
    angle = jnp.arange(x.shape[1])[:, None, None] / jnp.array([1.0, 10.0])
    rotate = lambda a: jnp.concatenate(
        [a[..., :2] * jnp.cos(angle) - a[..., 2:] * jnp.sin(angle), a[..., 2:] * jnp.cos(angle) + a[..., :2] * jnp.sin(angle)],
        -1,
    )  # fmt: skip
    out = jax.nn.dot_product_attention(rotate(heads(q, 2)), rotate(heads(k, 1)), heads(v, 1), is_causal=True)
    return out.reshape(*x.shape[:-1], -1) @ p["out"]


def state_space(p, x):
    """A linear recurrence with diagonal dynamics, computed by an associative scan."""
    decay = jax.nn.sigmoid(p["decay"])
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    u = x @ p["in"]
    _, h = jax.lax.associative_scan(combine, (jnp.broadcast_to(decay, u.shape), u), axis=1)
    return jnp.tanh(h) @ p["out"]


def hypernetwork(p, x):
    """A network makes weights from the data. Those are activations; the network's own weights are not."""
    w = (jnp.tanh(x @ p["hyper"]) @ p["head"]).reshape(-1, 6, 3)
    return jnp.einsum("nd,ndf->nf", x, w)


def wavelet(p, x):
    """A convolution by jax.lax, and one as patches times a matrix."""
    x = jax.lax.conv(x, p["conv"], (1, 1), "SAME")
    patches = jax.lax.conv_general_dilated_patches(jnp.tanh(x), (2, 2), (2, 2), "VALID")
    return jnp.einsum("npij,pf->nfij", patches, p["patches"])


def layers_by_fori_loop(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["stack"][i]), x)


def by_map(p, x):
    return jax.lax.map(lambda row: jnp.tanh(row @ p["in"]) @ p["out"], x, batch_size=2)


def early_exit(p, x):
    return jax.lax.cond(x.sum() > 0, lambda x: jnp.tanh(x @ p["deep"]) @ p["out"], lambda x: x @ p["out"], x)


def equivariant(p, x):
    """A matrix that stacks rolled copies of one filter, which is a layout of a parameter."""
    matrix = jnp.stack([jnp.roll(p["filter"], i, axis=0) for i in range(6)], axis=1)
    return jnp.einsum("nd,dkf->nkf", x, matrix)


def stacked(p, x):
    """Layers that jnp.stack, tile, unstack and concatenate lay out, with entries set to zero by ``at``."""
    layers = jnp.stack([p["a"], p["c"], p["a"].at[jnp.arange(6), jnp.arange(6)].set(0)])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)
    first, second = jnp.unstack(p["pair"])
    return jnp.tanh(x @ jnp.tile(first, (1, 2))) @ jnp.concatenate([second, second.at[:, 0].set(0)])


def straight_through(p, x):
    """Binary activations with a straight-through gradient, by a custom_vjp beside the projections."""

    @jax.custom_vjp
    def sign(x):
        return jnp.sign(x)

    sign.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) < 1),))
    return sign(x @ p["in"]) @ p["out"]


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def around(p, x):
    """A custom_vjp around a projection, whose own backward pass uses W."""
    return jnp.tanh(own_product(x, p["own"])) @ p["out"]


def matmul_kernel(x, w, out):
    out[...] = x[...] @ w[...]


@jax.custom_vjp
def pallas_product(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(matmul_kernel, out_shape=shape, interpret=True)(x, w)


pallas_product.defvjp(
    lambda x, w: (pallas_product(x, w), (x, w)),
    lambda kept, g: (pallas_product(g, kept[1].T), pallas_product(kept[0].T, g)),
)


def kernel_of_weights(p, x):
    return jnp.tanh(pallas_product(x, p["kernel"])) @ p["out"]


def double_kernel(x, out):
    out[...] = 2 * x[...]


@jax.custom_vjp
def pallas_double(x):
    return pl.pallas_call(double_kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


pallas_double.defvjp(lambda x: (pallas_double(x), None), lambda _, g: (2 * g,))


def kernel_of_activations(p, x):
    return jnp.tanh(pallas_double(x @ p["in"])) @ p["out"]


def sharded(p, x):
    """Tensor and data parallel: four devices share the hidden layer, and two share the batch."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec

    def block(up, down, x):
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

    specs = spec(None, "model"), spec("model", None), spec("data", None)
    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=spec("data", None))(p["up"], p["down"], x)


def ragged(p, x):
    return jax.lax.ragged_dot(x, p["experts"], jnp.array([1, 3])) @ p["out"]


def frequency(p, x):
    return jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["filter"]), 6)


def circulant(p, x):
    return jnp.tanh(x) @ jax.scipy.linalg.toeplitz(p["row"]) @ p["out"]


def implicit(p, x):
    """A fixed point z = tanh(z w / 3 + x), differentiated by the implicit function theorem (lax.custom_root)."""
    f = lambda z: z - jnp.tanh(z @ p["w"] / 3 + x)
    solve = lambda f, z: jax.lax.fori_loop(0, 5, lambda _, z: z - f(z), z)
    tangent = lambda g, y: jax.lax.fori_loop(0, 5, lambda _, z: y - (g(z) - z), y)
    return jax.lax.custom_root(f, jnp.zeros_like(x), solve, tangent) @ p["out"]


def implicit_scaled(p, x):
    """The implicit layer with its weight scaled by data. The scaled weight is still a weight."""
    return implicit({**p, "w": p["w"] * jax.lax.stop_gradient(x[0, 0])}, x)


def linen(module, *shape, tokens=0, **options):
    """A case of one of the project's own models. No parameter scales the input, so the first layer has no B."""

    def make():
        x = np.arange(np.prod(shape)).reshape(shape) % tokens if tokens else normal(*shape, seed=1)
        variables = drawn(jax.eval_shape(lambda: module.init(KEY, x)))
        state = {k: v for k, v in variables.items() if k != "params"}

        def fun(params, x, state):
            logits, _ = module.apply({"params": params, **state}, x, mutable=list(state))
            return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

        return Model(fun, variables["params"], (x, state))

    return Case(make, **options)


IN_OUT = {"in": (6, 6), "out": (6, 3)}

CASES = {
    "mixture of experts": plain(experts, {"router": (6, 3), "up": (3, 6, 8), "bias": (3, 8), "down": (3, 8, 6)}, 5, 6),
    "experts by dispatch": plain(dispatched, {"router": (6, 3), "up": (3, 6, 8), "down": (3, 8, 6)}, 5, 6),
    "unrolled RNN": plain(unrolled, {"in": (4, 6), "recurrent": (6, 6), "bias": (6,), "out": (6, 3)}, 2, 4, 4),
    "grouped-query attention": plain(attention, {"qkv": (6, 16), "out": (8, 6)}, 2, 4, 6),
    "state-space model": plain(state_space, {"in": (4, 6), "decay": (6,), "out": (6, 3)}, 2, 4, 4),
    "hypernetwork": plain(hypernetwork, {"hyper": (6, 4), "head": (4, 18)}, 4, 6),
    "convolution, and patches": plain(wavelet, {"conv": (4, 3, 3, 3), "patches": (16, 5)}, 2, 3, 6, 6),
    "layers by fori_loop": plain(layers_by_fori_loop, {"stack": (3, 6, 6)}, 4, 6),
    "lax.map": plain(by_map, IN_OUT, 4, 6),
    "lax.cond": plain(early_exit, {"deep": (6, 6), "out": (6, 3)}, 4, 6),
    "a filter rolled": plain(equivariant, {"filter": (6, 3)}, 4, 6),
    "stacked, tiled, written into": plain(stacked, {"a": (6, 6), "c": (6, 6), "pair": (2, 6, 6)}, 4, 6),
    "custom_vjp beside projections": plain(straight_through, IN_OUT, 4, 6),
    "custom_vjp around a projection": plain(
        around, {"own": (6, 6), "out": (6, 3)}, 4, 6, refused={"model/own": "custom_vjp_call"}
    ),
    "Pallas kernel around a projection": plain(
        kernel_of_weights, {"kernel": (6, 6), "out": (6, 3)}, 4, 6, refused={"model/kernel": "custom_vjp_call"}
    ),
    "Pallas kernel of activations": plain(kernel_of_activations, IN_OUT, 4, 6),
    "shard_map": plain(sharded, {"up": (6, 8), "down": (8, 5)}, 4, 6),
    "ragged_dot": plain(ragged, {"experts": (2, 6, 6), "out": (6, 3)}, 4, 6, refused={"model/experts": "ragged_dot"}),
    "convolution by Fourier transform": plain(frequency, {"filter": (6,)}, 4, 6, refused={"model/filter": "fft|mul"}),
    "Toeplitz matrix": plain(circulant, {"row": (6,), "out": (6, 3)}, 4, 6, unmirrored="row"),
    "implicit layer": plain(
        implicit, {"w": (6, 6), "out": (6, 3)}, 4, 6, refused={"model/w": "custom_jvp_call|CustomRoot"}
    ),
    "implicit layer, scaled": plain(
        implicit_scaled, {"w": (6, 6), "out": (6, 3)}, 4, 6, refused={"model/w": "custom_jvp_call|CustomRoot"}
    ),
    "LeNet": linen(LeNet(3), 2, 32, 32, 1, first="Conv_0"),
    "ResNet": linen(ResNet(3, (1, 1), BasicBlock, 4, False), 2, 8, 8, 3, first="stem"),
    "Decoder": linen(Decoder(7, 4, width=6, depth=1, heads=2), 2, 4, tokens=7, local="bias|positions|embedding"),
}


@parametrize(CASES)
def test_plain(case):
    check(case)


@pytest.mark.parametrize("name", ["mixture of experts", "unrolled RNN", "grouped-query attention", "Decoder"])
def test_backprop_keeps_every_weight_that_an_error_passes(name):
    """Backprop keeps every weight that an error passes, so ``kept_weights`` can detect weight transport."""
    fun, params, args = CASES[name].make()
    passed = {path for path, p in wmkp.projections(fun, params, *args).items() if p.feedback}
    nothing = jax.tree.map(lambda w: None, params)
    assert kept_weights(fun, wmkp.backprop(), params, nothing, args) & passed == passed
