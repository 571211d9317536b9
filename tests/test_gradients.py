"""With B = W the engaged gradient equals backprop's, for many kinds of models and JAX transformations."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import drawn, drawn_feedback, normal
from flax import nnx
from jax.experimental import checkify

import wmkp
import wmkp.nnx

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


def mirrored(feedback, params):
    """Feedback weights with B = W for each weight that has a B."""
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([None if b is None else w for w, b in zip(leaves, tree.flatten_up_to(feedback), strict=True)])


def check(fun, params, *args, paths=None, exact=True, has_aux=False):
    """With B = W, value and gradients equal those of jax.value_and_grad. A random B changes some gradient."""
    rule = wmkp.kolen_pollack()
    found = wmkp.projections(fun, params, *args)
    with_feedback = [path for path, p in found.items() if p.feedback]
    if paths is not None:
        assert with_feedback == paths
    feedback = drawn_feedback(rule, fun, params, *args)
    present = jax.tree_util.tree_flatten_with_path(feedback)[0]
    assert [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in present] == with_feedback
    engaged, backprop = (f(fun, *r, has_aux=has_aux) for f, *r in ((wmkp.value_and_grad, rule), (jax.value_and_grad,)))
    both = jax.jit(lambda params, feedback, *args: (engaged(params, feedback, *args), backprop(params, *args)))
    (value, (grads, signal)), (expected, expected_grads) = both(params, mirrored(feedback, params), *args)
    # The compiler fuses the two gradients differently, so they differ by rounding.
    plain = lambda t: [x for x in jax.tree.leaves(t) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    chex.assert_trees_all_close(plain(value), plain(expected), rtol=1e-5 if exact else 2e-2)
    scale = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(expected_grads))
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=(2e-6 if exact else 2e-2) * scale)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(signal, feedback)
    (_, (others, _)), _ = both(params, feedback, *args)
    differ = [not np.allclose(a, b, rtol=1e-3) for a, b in zip(*map(jax.tree.leaves, (grads, others)), strict=True)]
    assert any(differ), "a random B must change some gradient"
    return grads, signal, feedback


class LinenCNN(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
        x = nn.relu(x)
        x = nn.Conv(16, (3, 3), strides=2, feature_group_count=4, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        x = nn.Conv(16, (3, 3), kernel_dilation=2, dtype=self.dtype)(x)
        x = nn.ConvTranspose(8, (2, 2), strides=(2, 2), dtype=self.dtype)(nn.relu(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(x)
        return nn.Dense(5, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x).mean(1))


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], 1))


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_linen_cnn_with_batchnorm_attention_and_all_sorts_of_conv(dtype):
    model = LinenCNN(dtype)
    x, y = normal(0, 4, 8, 8, 3), np.arange(4)
    variables = drawn(1, jax.eval_shape(model.init, KEY, x))
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, stats, x, y):
        logits, state = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return cross_entropy(logits, y), state

    attention = "MultiHeadDotProductAttention_0"
    check(
        loss,
        params,
        stats,
        x,
        y,
        has_aux=True,
        exact=dtype == jnp.float32,
        paths=[
            "ConvTranspose_0/kernel",
            "Conv_1/kernel",
            "Conv_2/kernel",
            "Dense_0/kernel",
            *(f"{attention}/{name}/kernel" for name in ("key", "out", "query", "value")),
        ],
    )


def test_bf16_gradients_are_bit_identical_to_backprop():
    """With B = W, gradients and signals are bit-for-bit backprop's. Without jit, XLA cannot fuse them differently."""

    def loss(params, x):
        x, params = x.astype(jnp.bfloat16), jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        conv = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.conv_general_dilated(
            jnp.tanh(conv), params["grouped"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )  # fmt: skip
        x = jax.lax.dot_general(jnp.tanh(x), params["dense"], (((1, 2, 3), (0, 1, 2)), ((), ())))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    draw = lambda i, *shape: normal(i, *shape) / 3
    params = {"conv": draw(0, 3, 3, 3, 8), "grouped": draw(1, 3, 3, 2, 8), "dense": draw(2, 3, 3, 8, 5)}
    x = draw(3, 4, 8, 8, 3)
    rule = wmkp.kolen_pollack()
    feedback = {**params, "conv": None}
    _, (grads, signal) = wmkp.value_and_grad(loss, rule)(params, feedback, x)
    chex.assert_trees_all_equal(grads, jax.grad(loss)(params, x))
    chex.assert_trees_all_equal(signal, {**grads, "conv": None})
    _, engaged_signal = jax.grad(wmkp.engage(loss, rule), argnums=(0, 1))(params, feedback, x)
    chex.assert_trees_all_equal(engaged_signal, signal)  # the signal is also the gradient of engage by B


class NNXCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        x = nnx.relu(self.conv2(x)).reshape(x.shape[0], -1, 8)
        return self.head(self.dropout(self.attention(x)).mean(1))


def nnx_cnn():
    return nnx.jit(lambda: NNXCNN(nnx.Rngs(0)))()


@pytest.mark.slow
def test_nnx_cnn_with_batchnorm_and_dropout():
    apply, params, state = wmkp.nnx.pure(nnx_cnn())
    x, y = normal(0, 4, 8, 8, 3), np.arange(4)

    def loss(params, state, x, y):
        logits, state = apply(params, state, x)
        return cross_entropy(logits, y), state

    check(loss, params, state, x, y, has_aux=True)
    run = jax.jit(lambda state: apply(params, state, x))
    first, new_state = run(state)
    assert not np.allclose(new_state["norm"]["mean"].get_value(), state["norm"]["mean"].get_value())
    second, _ = run(new_state)
    assert not np.allclose(first, second), "the dropout stream must have moved on"


def test_nnx_pure_equals_the_model_itself():
    model = nnx_cnn()
    model.eval()
    x = normal(0, 2, 8, 8, 3)
    apply, params, state = wmkp.nnx.pure(model)
    pure, itself = jax.jit(lambda params: apply(params, state, x)[0]), jax.jit(lambda: model(x))()
    chex.assert_trees_all_close(pure(params), itself, rtol=1e-5, atol=1e-6)
    assert not np.allclose(pure(jax.tree.map(lambda p: p + 1, params)), itself)


def layers(num, width, seed=0):
    return normal(seed, num, width, width) / width**0.5


def test_scan_over_stacked_weights():
    def loss(w, x):
        h, hidden = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h.mean()), x, w)
        return jnp.sum(h**2) + hidden.sum()

    grads, signal, _ = check(loss, layers(4, 6), normal(0, 3, 6), paths=[""])
    chex.assert_trees_all_close(signal, grads, rtol=1e-5)


def test_scan_over_time_reversed_and_nested():
    params = {"wx": layers(1, 6)[0], "wh": layers(2, 6), "h0": np.full(6, 0.1, np.float32)}

    def loss(params, xs):
        def cell(h, x):
            def deeper(h, w):
                return jnp.tanh(h @ w + x @ params["wx"]), None

            h, _ = jax.lax.scan(deeper, h, params["wh"])
            return h, h

        h, hs = jax.lax.scan(cell, jnp.broadcast_to(params["h0"], (3, 6)), xs, reverse=True)
        return jnp.sum(h**2) + jnp.sum(hs)

    check(loss, params, normal(0, 5, 3, 6), paths=["wh"])


def test_a_learned_vector_has_the_part_of_an_activity():
    """A learned vector that meets a weight before any data does is an activity.

    The vectors are a recurrent network's learned start, and a code from which a weight makes a bias.
    """
    draw = lambda i, *shape: normal(i, *shape) / 2
    params = {"wx": draw(0, 4, 6), "wh": draw(1, 6, 6), "h0": draw(2, 6), "code": draw(3, 5), "wc": draw(4, 5, 6),
              "head": draw(5, 6, 1)}  # fmt: skip
    x, multiply = draw(6, 3, 2, 4), lambda x, w, _: x @ w

    def run(params, xs, multiply, feedback):
        h = jnp.broadcast_to(params["h0"], (3, 6))
        out = jnp.sum(multiply(h, params["head"], feedback["head"]))
        for x in xs.swapaxes(0, 1):
            bias = multiply(jnp.tanh(params["code"]), params["wc"], feedback["wc"])
            h = jnp.tanh(multiply(h, params["wh"], feedback["wh"]) + x @ params["wx"] + bias)
        return out + jnp.sum(multiply(h, params["head"], feedback["head"]) ** 2)

    loss = lambda params, x: run(params, x, multiply, params)
    _, _, feedback = check(loss, params, x, paths=["head", "wc", "wh"])

    @jax.custom_vjp
    def through(x, w, b):
        return x @ w

    through.defvjp(lambda x, w, b: (x @ w, (x, b)), lambda kept, d: (d @ kept[1].T, *[jnp.outer(kept[0], d)
                   if d.ndim == 1 else kept[0].T @ d] * 2))  # fmt: skip
    expected = jax.jit(jax.grad(run, (0, 3)), static_argnums=2)(params, x, through, feedback)
    grads, signal = jax.jit(wmkp.value_and_grad(loss, wmkp.kolen_pollack()))(params, feedback, x)[1]
    chex.assert_trees_all_close((grads, signal), expected, rtol=1e-5, atol=1e-6)
    exact = wmkp.weight_mirror("orthogonal", target_angle=1e-3, rate=1.0)
    signals = jax.jit(lambda params: wmkp.mirror_signals(KEY, exact, loss, params, x))(params)
    for path, mirrored in signals.items():
        assert mirrored is None or np.allclose(mirrored, params[path], atol=1e-5)


def test_scan_that_carries_a_learned_start_beside_a_constant():
    """The gradient is right where a carry is constant in the first step and depends on data from the second on."""
    call = jax.jit(jnp.tanh)

    def loss(params, x):
        x = jnp.tanh(x @ params["in"])

        def turn(carry, _):
            start, state = carry
            return (start + x, call(state) + x), None

        start = jnp.broadcast_to(params["start"], x.shape)
        (start, state), _ = jax.lax.scan(turn, (start, jnp.zeros_like(start)), None, length=3)
        return jnp.sum((jnp.tanh(start + state) @ params["out"]) ** 2)

    draw = lambda i, *shape: normal(i, *shape) / 2
    params = {"in": draw(0, 6, 6), "start": draw(1, 6), "out": draw(2, 6, 2)}
    check(loss, params, draw(3, 4, 6), paths=["out"])


def test_a_state_that_starts_at_zero_is_an_activity_from_the_first_turn():
    """The first product, of the zero state and W, counts as a projection and not as another use of W."""
    from wmkp.program.projections import analyse

    def loss(params, x):
        def step(memory, x):
            k = jnp.tanh(x @ params["in"])
            memory = (
                jnp.einsum("bij,jk->bik", memory, params["w"]) + k[:, :, None] * jnp.tanh(k @ params["value"])[:, None]
            )
            return memory, jnp.einsum("bi,bij->bj", k, memory)

        return jnp.sum(jax.lax.scan(step, jnp.zeros((3, 4, 4)), x)[1] ** 2)

    draw = lambda i, *shape: normal(i, *shape) / 2
    params, x = {"in": draw(0, 5, 4), "w": draw(1, 4, 4), "value": draw(2, 4, 4)}, draw(3, 6, 3, 5)
    assert analyse(loss, params, x).shared == frozenset()
    grads, signal, _ = check(loss, params, x, paths=["value", "w"])
    chex.assert_trees_all_close(signal["w"], grads["w"], rtol=1e-4, atol=1e-5)


def test_scan_that_carries_its_weights():
    def loss(params, x):
        def body(carry, scale):
            h, w = carry
            return (jnp.tanh(h @ w) * scale, w), None

        (h, w), _ = jax.lax.scan(body, (x @ params["a"], params["w"]), jnp.arange(1.0, 4.0))
        return jnp.sum((h @ w) ** 2)

    params = {"a": layers(1, 6)[0], "w": layers(1, 6)[0]}
    check(loss, params, normal(0, 3, 6), paths=["w"])


def test_without_jit_too_a_weight_that_a_scan_makes_out_of_a_constant_has_its_own_feedback():
    def loss(params, x):
        w, _ = jax.lax.scan(lambda w, _: ((w + params[1]) / 2, None), jnp.zeros((6, 6)), None, length=2)
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params[0]) @ w) ** 2)

    params, x, rule = list(layers(2, 6)), normal(0, 3, 6), wmkp.kolen_pollack()
    arguments = params, [None, layers(1, 6, seed=7)[0]], x
    by_hand = lambda params, x: jnp.sum(jnp.tanh(jnp.tanh(x @ params[0]) @ (0.75 * params[1])) ** 2)
    expected = jax.jit(wmkp.value_and_grad(by_hand, rule))(*arguments)
    for transform in (lambda f: f, jax.jit):
        chex.assert_trees_all_close(transform(wmkp.value_and_grad(loss, rule))(*arguments), expected, rtol=1e-4)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpoint(policy):
    def block(w, x):
        return jnp.tanh(x @ w)

    def loss(ws, x):
        for w in ws:
            x = jax.checkpoint(block, policy=policy)(w, x)
        return jnp.sum(x**2)

    params, x = list(layers(3, 6)), normal(0, 3, 6)
    check(loss, params, x, paths=["1", "2"])
    # The backward pass recomputes what the checkpoint does not keep, as in backprop.
    rule = wmkp.kolen_pollack()
    engaged = jax.make_jaxpr(wmkp.value_and_grad(loss, rule))(params, [None, *params[1:]], x)
    plain = jax.make_jaxpr(jax.value_and_grad(loss))(params, x)
    assert str(engaged).count("= tanh") >= str(plain).count("= tanh") > 3


def test_linen_remat_scan_and_lstm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(6))(x)
            x = nn.RNN(nn.GRUCell(6))(x)
            block = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = block()(x, None)
            return nn.Dense(1)(x)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(6)(x)), None

    model, x = Model(), normal(0, 2, 5, 4)
    params = drawn(1, jax.eval_shape(model.init, KEY, x))
    check(lambda params, x: jnp.mean(model.apply(params, x) ** 2), params, x)


def test_vmap_over_the_function_and_of_the_weights():
    def loss(params, xs):
        first = jax.vmap(lambda x: jnp.tanh(x @ params["a"]))(xs)  # over data
        second = jax.vmap(lambda w: jnp.tanh(first @ w))(params["heads"])  # over weights
        third = jax.vmap(lambda x, w: x @ w)(second, params["out"])  # over both
        return jnp.sum(third**2)

    params = {"a": layers(1, 6)[0], "heads": layers(3, 6), "out": layers(3, 6)}
    x = normal(0, 5, 6)
    _, _, feedback = check(loss, params, x, paths=["heads", "out"])

    # vmap also works over the engaged function, with weights, feedback and data stacked.
    rule = wmkp.kolen_pollack()
    stack = lambda t: jax.tree.map(lambda a: np.stack([a, 2 * a]), t)
    engaged = wmkp.value_and_grad(loss, rule)
    together = jax.jit(jax.vmap(engaged))(stack(params), stack(feedback), np.stack([x, x]))
    apart = jax.jit(engaged)(*jax.tree.map(lambda a: 2 * a, (params, feedback)), x)
    chex.assert_trees_all_close(jax.tree.map(lambda a: np.asarray(a)[1], together), apart, rtol=1e-4, atol=1e-5)


def test_the_signal_leaves_out_what_is_no_product():
    """B's signal leaves out those parts of W's gradient that come from uses of W other than products."""

    def loss(params, x):
        w = params["w"]
        x = jnp.tanh(x @ params["in"])
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(x + h), None), w, None, length=2)
        return jnp.sum((x @ w) ** 2) + jnp.sum(h) + jnp.sum(w**2)

    params, x = {"in": layers(1, 6)[0], "w": layers(1, 6)[0]}, normal(0, 6, 6)
    grads, signal, _ = check(loss, params, x, paths=["w"])
    hidden = np.tanh(x @ params["in"])
    chex.assert_trees_all_close(signal["w"], 2 * hidden.T @ (hidden @ params["w"]), rtol=1e-4)
    assert not np.allclose(signal["w"], grads["w"], rtol=1e-2)


def test_a_weight_used_twice():
    def loss(params, x):
        h = jnp.tanh(x @ params["w"])
        return jnp.sum((jnp.tanh(h @ params["w"]) @ params["w"].T) ** 2)

    grads, signal, _ = check(loss, {"w": layers(1, 6)[0]}, normal(0, 3, 6), paths=["w"])
    # The first use needs no B, but B learns from every use, as W does.
    chex.assert_trees_all_close(signal, grads, rtol=1e-5)


def test_layout_changes_on_the_way_to_the_product():
    """B follows W through slices, reshapes, scales, masks, padding, transposes, casts and concatenation."""
    mask = np.random.default_rng(0).random((6, 6)) > 0.3

    def loss(params, x):
        x = jnp.tanh(x @ params["in"])
        q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
        wq, wk = params["qkv"][:, :6], params["qkv"].reshape(6, 3, 6)[:, 1]
        x = jax.nn.softmax(q @ k.T) @ v + x @ wq + jnp.einsum("nd,de->ne", x, wk)
        x = x @ (params["scaled"] / np.sqrt(6)) + x @ jnp.where(mask, params["scaled"], 0)
        x = jnp.pad(x, ((0, 0), (1, 0)), mode="edge")[:, 1:]  # pads and removes one column of the activity
        x = x @ jnp.pad(params["padded"], ((0, 0), (1, 1)))
        x = jnp.concatenate([x, x], 1) @ jnp.concatenate([params["a"], params["b"].T[::-1]], 0)
        w = params["bank"].astype(jnp.bfloat16).astype(jnp.float32)[1]
        return jnp.sum(jnp.matmul(x, w) ** 2) + jnp.sum(x @ -params["bank"][0])

    draw = lambda *shape: normal(0, *shape) / 6**0.5
    params = {
        "in": draw(6, 6),
        "qkv": draw(6, 18),
        "scaled": draw(6, 6),
        "padded": draw(6, 4),
        "a": draw(6, 6),
        "b": draw(6, 6),
        "bank": draw(2, 6, 6),
    }
    check(loss, params, draw(3, 6), paths=["a", "b", "bank", "padded", "qkv", "scaled"])


@pytest.mark.slow
def test_tied_embedding_is_a_projection_where_it_is_attended_and_local_where_it_is_looked_up():
    class LM(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 8)
            position = self.param("position", nn.initializers.normal(1.0), (5, 8))
            x = embed(tokens) + position
            x = x + nn.SelfAttention(2)(nn.LayerNorm()(x))
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x))))
            return embed.attend(x)

    model, tokens = LM(), np.arange(15).reshape(3, 5) ** 2 % 11
    params = drawn(1, jax.eval_shape(model.init, KEY, tokens)["params"])

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)
        return cross_entropy(logits.reshape(-1, 11), tokens.reshape(-1))

    grads, signal, feedback = check(loss, params, tokens)
    assert feedback["Embed_0"]["embedding"] is not None
    assert feedback["position"] is None
    # B's signal comes from the projection alone. W's gradient also includes the rows that are looked up.
    assert not np.allclose(signal["Embed_0"]["embedding"], grads["Embed_0"]["embedding"], atol=1e-4)
    outside = jax.jit(jax.grad(wmkp.engage(loss, wmkp.kolen_pollack()), argnums=1))(
        params, mirrored(feedback, params), tokens
    )
    chex.assert_trees_all_close(signal, outside, rtol=1e-4, atol=1e-6)


def test_experts_chosen_by_data_and_masked_weights():
    """B follows W through a lookup by data, a random mask and added noise."""

    def loss(params, x, index, key):
        x, noise = jnp.tanh(x @ params["in"]), jax.random.normal(key, (6, 6))
        x = jnp.tanh(jnp.einsum("nd,nde->ne", x, params["experts"][index]))  # looks up whole matrices
        x = jnp.tanh(x @ (params["dropped"] * (noise > 0)))  # DropConnect
        one = x @ (params["one"] + noise[:, :1])  # a readout by one neuron
        return jnp.sum((x @ (params["noisy"] + noise)) ** 2) + jnp.sum(jnp.sin(one))  # a sampled weight

    params = {"in": layers(1, 6)[0], "experts": layers(3, 6), "dropped": layers(1, 6)[0], "noisy": layers(1, 6)[0]}
    params["one"] = params["noisy"][:, :1]
    args = normal(0, 4, 6), np.array([0, 2, 1, 2]), KEY
    check(loss, params, *args, paths=["dropped", "experts", "noisy", "one"])


def test_data_added_to_a_matrix_is_refused_unless_it_is_noise():
    """Data added to a matrix may be noise on weights or positions of an activity, so wmkp raises an error."""
    loss = lambda p, x, noise: jnp.sum(jnp.tanh(x @ p["in"]) @ (p["w"] + noise))
    params = {"in": layers(1, 6)[0], "w": layers(1, 6)[0]}
    args = normal(0, 4, 6), normal(1, 6, 6)
    with pytest.raises(wmkp.WeightTransportError, match="'add of data'"):
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(), loss, params, *args)


def test_mixture_of_experts_by_einsum():
    def loss(params, x):
        x = jnp.tanh(x @ params["in"])
        gate = jax.nn.softmax(x @ params["router"])
        h = jax.nn.relu(jnp.einsum("nd,edf->nef", x, params["up"]))
        y = jnp.einsum("nef,efd->ned", h, params["down"])
        return jnp.sum(jnp.einsum("ne,ned->nd", gate, y) ** 2)

    draw = lambda *shape: normal(0, *shape) / 6**0.5
    params = {"in": draw(6, 6), "router": draw(6, 3), "up": draw(3, 6, 8), "down": draw(3, 8, 6)}
    check(loss, params, draw(5, 6), paths=["down", "router", "up"])


def test_cond_and_switch():
    def loss(params, x, i):
        x = jnp.tanh(x @ params["in"])
        x = jax.lax.cond(i > 0, lambda x: jnp.tanh(x @ params["a"]), lambda x: x @ params["b"].T, x)
        w = jax.lax.switch(i, [lambda: params["a"], lambda: params["b"] * 2])
        return jnp.sum((x @ w) ** 2)

    params = {"in": layers(1, 6)[0], "a": layers(1, 6)[0], "b": layers(1, 6, seed=1)[0]}
    for i in (0, np.int32(1)):
        check(loss, params, normal(0, 3, 6), i, paths=["a", "b"])


def test_conv_in_one_and_three_dimensions_and_a_local_one():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(4, (3,))(x))
            x = nn.tanh(nn.Conv(4, (3,), padding="CAUSAL")(x))
            x = nn.tanh(nn.ConvLocal(4, (3,))(x))
            x = x.reshape(x.shape[0], 2, 2, 2, -1)
            return nn.Conv(3, (2, 2, 2))(x)

    model, x = Model(), normal(0, 2, 10, 3)
    params = drawn(1, jax.eval_shape(model.init, KEY, x))
    paths = ["params/ConvLocal_0/kernel", "params/Conv_1/kernel", "params/Conv_2/kernel"]
    check(lambda p, x: jnp.sum(model.apply(p, x) ** 2), params, x, paths=paths)


def test_spectral_norm_is_followed():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(6)(x))
            return nn.SpectralNorm(nn.Dense(6))(x, update_stats=True)

    model, x = Model(), normal(0, 3, 6)
    variables = drawn(1, jax.eval_shape(model.init, KEY, x))
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, rest, x):
        out, _ = model.apply({"params": params, **rest}, x, mutable=list(rest))
        return jnp.sum(out**2)

    check(loss, variables["params"], rest, x, paths=["Dense_1/kernel"])


def test_weight_norm_is_followed():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(5))(nn.tanh(nn.WeightNorm(nn.Conv(6, (3,)))(nn.tanh(nn.Dense(6)(x)))))

    model, x = Model(), normal(0, 3, 4, 6)
    loss = lambda params, x: jnp.sum(model.apply({"params": params}, x) ** 2)
    params = drawn(1, jax.eval_shape(model.init, KEY, x))["params"]
    check(loss, params, x, paths=["Conv_0/kernel", "Dense_0/kernel"])


def test_a_gain_of_other_parameters_scales_the_error_as_it_scales_the_activity():
    # y = g * (V^T h) / |V|. The error of h is B (g / |B| * delta), with B's own norm, in NumPy float64.
    rng = np.random.default_rng(0)
    u, v, b = (rng.normal(size=s) for s in ((4, 6), (6, 5), (6, 5)))
    g, x, target = rng.normal(size=5), rng.normal(size=(3, 4)), rng.normal(size=(3, 5))

    def loss(p, x, target):
        v = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]
        return jnp.sum((jnp.tanh(x @ p["u"]) @ v - target) ** 2) / 2

    h, norm = np.tanh(x @ u), np.linalg.norm(v, axis=0)
    delta = h @ (v / norm * g) - target
    du = x.T @ ((delta * (g / np.linalg.norm(b, axis=0))) @ b.T * (1 - h**2))
    outer = h.T @ delta
    dg = (outer * v / norm).sum(0)
    dv, db = ((outer - m * (outer * m).sum(0) / (m**2).sum(0)) * g / np.linalg.norm(m, axis=0) for m in (v, b))
    with jax.enable_x64(True):
        params, feedback = {"u": u, "v": v, "g": g}, {"u": None, "v": b, "g": None}
        _, (grads, signal) = jax.jit(wmkp.value_and_grad(loss, wmkp.kolen_pollack()))(params, feedback, x, target)
    chex.assert_trees_all_close(grads, {"u": du, "v": dv, "g": dg}, rtol=1e-12)
    chex.assert_trees_all_close(signal["v"], db, rtol=1e-12)


norm = lambda v: jnp.linalg.norm(v, axis=0)
own_norm = jax.custom_vjp(norm)
own_norm.defvjp(lambda v: (norm(v), v), lambda v, d: (d * v / norm(v),))
turns = lambda body, start: jax.lax.scan(lambda carry, _: (body(carry), None), start, None, length=2)[0]
NORMS_ELSEWHERE = {  # layers whose weight norm is taken far from the product
    "before a scan": lambda p, h, n: turns(lambda h: jnp.tanh(h @ (p["v"] * n)), h),
    "carried by a scan": lambda p, h, n: turns(lambda c: (jnp.tanh(c[0] @ (p["v"] * c[1])), 2 * c[1]), (h, n))[0],
    "made by a scan": lambda p, h, _: h @ (p["v"] * turns(lambda n: n / jnp.sqrt(norm(p["v"])), p["g"])),
    "made by a scan out of a constant": lambda p, h, _: h @ (p["v"] * turns(lambda n: n / norm(p["v"]), jnp.ones(6))),
    "before a branch": lambda p, h, n: jax.lax.cond(h[0, 0] < 9, lambda: h @ (p["v"] * n), lambda: h),
    "in a branch": lambda p, h, n: h @ (p["v"] * jax.lax.cond(p["g"][0] < 9, lambda: n, lambda: p["g"])),
    "with a derivative of its own": lambda p, h, _: h @ (p["v"] / own_norm(p["v"]) * p["g"]),
}


def test_a_gain_that_another_weight_gives_is_the_same_beside_feedback():
    """The gain scales the error as it scales the activity, although the weight that gives it has a B."""
    (u, v), r = layers(2, 6), layers(1, 6)[0][0]
    b = {"u": None, "v": layers(2, 6, seed=1)[0], "r": layers(2, 6, seed=1)[1][0]}
    x = normal(0, 3, 6)

    def loss(p, x):  # r is the readout and also the gains of v
        return jnp.sum(jnp.sin(jnp.sin(jnp.tanh(x @ p["u"]) @ (p["v"] * p["r"])) @ p["r"]))

    _, (grads, signal) = jax.jit(wmkp.value_and_grad(loss, wmkp.kolen_pollack()))({"u": u, "v": v, "r": r}, b, x)
    h = np.tanh(x @ u)
    y = h @ (v * r)
    delta = np.cos(np.sin(y) @ r)[:, None] * b["r"] * np.cos(y) * r
    chex.assert_trees_all_close(grads["u"], x.T @ (delta @ b["v"].T * (1 - h**2)), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(signal["v"], h.T @ delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMS_ELSEWHERE)
def test_a_norm_is_feedbacks_own_wherever_it_is_taken(name):
    """With B = W the engaged gradient is backprop's, and its derivative with B and W tied is the Hessian."""

    def loss(p, x):
        return jnp.sum(jnp.tanh(NORMS_ELSEWHERE[name](p, jnp.tanh(x @ p["u"]), p["g"] / norm(p["v"]))) ** 2)

    rule, x = wmkp.kolen_pollack(), normal(0, 3, 6)
    params = {**dict(zip("uv", layers(2, 6), strict=True)), "g": np.arange(1, 7, dtype=np.float32)}
    both = lambda p: (p, {"u": None, "v": p["v"], "g": None}, x)
    tied = lambda p: wmkp.value_and_grad(loss, rule)(*both(p))[1]
    tangent = jax.tree.map(np.cos, params)
    by_engage = lambda p: jax.grad(wmkp.engage(loss, rule))(*both(p))
    run = jax.jit(lambda *at: [jax.jvp(f, *at) for f in (tied, jax.grad(lambda p: loss(p, x)), by_engage)])
    ours, theirs, engaged = run((params,), (tangent,))
    for (grads, signal), expected in zip(ours, theirs, strict=True):
        chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(signal["v"], expected["v"], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(engaged, theirs, rtol=1e-4, atol=1e-4)


def test_kolen_pollack_learns_the_transpose_under_a_weight_norm():
    # Without its own norm B would miss the norm's part of W's gradient, and would stay some degrees away.
    u, v, g = (normal(i, *s) / 4 for i, s in enumerate([(8, 20), (20, 5), (5,)]))
    x, target = normal(4, 500, 32, 8), normal(5, 8, 5)

    def loss(p, x):
        y = jnp.tanh(x @ p["u"]) @ (p["v"] * p["g"] / jnp.linalg.norm(p["v"], axis=0))
        return jnp.mean((y - jnp.tanh(x @ target)) ** 2)

    def step(carry, x):
        _, signals = wmkp.value_and_grad(loss, wmkp.kolen_pollack())(*carry, x)
        return jax.tree.map(lambda w, s: 0.99 * w - 0.1 * s, carry, signals), None

    params = {"u": u, "v": v, "g": g}
    feedback = {"u": None, "v": normal(9, *v.shape) / 4, "g": None}
    (params, feedback), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, x))(params, feedback)
    assert float(wmkp.matrix_angles(params, feedback)["v"]) < 1


def test_static_arguments_and_numpy_data():
    def loss(params, x, name, train, power):
        assert name == "tanh" and train is True
        h = jnp.tanh(x @ params[0]) if train else x
        return jnp.sum((h @ params[1]) ** power)

    args = np.ones((3, 6), np.float32), "tanh", True, 2
    params, rule = list(layers(2, 6)), wmkp.kolen_pollack()
    feedback = drawn_feedback(rule, loss, params, *args)
    gradient = lambda params: wmkp.value_and_grad(loss, rule)(params, mirrored(feedback, params), *args)
    (value, (grads, _)), expected = jax.jit(lambda p: (gradient(p), jax.value_and_grad(loss)(p, *args)))(params)
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-5)


def test_prints_callbacks_and_checks_are_let_be():
    """Prints, callbacks and checks of activities and weights run once per call and change no result."""
    seen = []

    def watched(params, x):
        h = jnp.tanh(x @ params["in"])
        jax.debug.callback(lambda h, w: seen.append((h, w)), h, params["w"])
        jax.debug.print("{} of {}", h.mean(), params["w"].std())
        checkify.check(h[0, 0] < 2, "h is {}", h.sum())
        checkify.check(params["w"][0, 0] < 99, "w is large")

        def tick(h, _):
            jax.debug.callback(lambda h: seen.append(h), h)
            return jnp.tanh(h @ params["w"]), None

        h, _ = jax.lax.scan(tick, h, None, 2)
        return jnp.sum(h**2)

    params, x = {"in": layers(1, 6)[0], "w": layers(1, 6)[0]}, normal(0, 3, 6)
    rule = wmkp.kolen_pollack()
    feedback = {"in": None, "w": layers(1, 6, seed=1)[0]}
    for initial in (wmkp.init_feedback, wmkp.mirror_signals):
        found = jax.jit(lambda initial=initial: initial(KEY, wmkp.weight_mirror(), watched, params, x))()
        assert list(found) == ["in", "w"] and not seen
    run = checkify.checkify(jax.jit(wmkp.value_and_grad(watched, rule)))
    error, (value, (grads, signal)) = run(params, mirrored(feedback, params), x)
    jax.effects_barrier()
    assert error.get() is None and len(seen) == 3
    (found,) = (s for s in seen if isinstance(s, tuple))
    chex.assert_trees_all_close(found, (np.tanh(x @ params["in"]), params["w"]), rtol=1e-5)
    plain = checkify.checkify(jax.jit(jax.value_and_grad(watched)))(params, x)[1]
    chex.assert_trees_all_close((value, grads), plain, rtol=1e-5)
    chex.assert_trees_all_equal(signal["w"], grads["w"])  # printing a weight is not another use of it
    error, _ = run({**params, "w": params["w"] + 100}, feedback, x)
    assert "w is large" in error.get()


def test_hessian_vector_products_through_an_engaged_function():
    def loss(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) ** 2)

    params, x = list(layers(2, 6)), normal(0, 3, 6)
    rule = wmkp.kolen_pollack()
    engaged = wmkp.engage(loss, rule)
    # With B tied to W, the derivative of the engaged gradient is the Hessian.
    both = lambda p: jax.grad(engaged)(p, [None, p[1]], x)
    run = jax.jit(lambda *at: [jax.jvp(f, *at)[1] for f in (both, lambda p: jax.grad(loss)(p, x))])
    ours, theirs = run((params,), (jax.tree.map(np.cos, params),))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)


def gated(params, x, s):
    """Data s of shape (6, 6) scales one matrix entry by entry, and another by its row."""
    h = jnp.tanh(x @ params[0])
    h = jnp.tanh(h @ (s * params[1]))
    return jnp.sum(jnp.tanh(h @ (params[2] / (1 + s[0]))) ** 2)


def gated_in_a_branch_of_a_scan(params, x, s):
    def step(h, gate):
        w = jax.lax.cond(x[0, 0] < 9, lambda: gate * params[1], lambda: gate * s)
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(step, jnp.tanh(x @ params[0]), s)
    return jnp.sum((h @ params[2]) ** 2)


def selected_and_gated_under_remat(params, x, s):
    gate = lambda w: jnp.tanh(jnp.tanh(x @ params[0]) @ (s * w[jnp.argsort(s[0])]))
    return jnp.sum(jax.checkpoint(gate)(params[1]) @ params[2])


GATED = (gated, gated_in_a_branch_of_a_scan, selected_and_gated_under_remat)


@pytest.mark.parametrize(
    "loss", [GATED[0], *(pytest.param(f, marks=pytest.mark.slow) for f in GATED[1:])], ids=lambda f: f.__name__
)
def test_an_engaged_gradient_may_be_differentiated_by_data_that_scale_a_weight(loss):
    params, x = list(layers(3, 6)), normal(0, 3, 6)
    s = np.random.default_rng(0).uniform(0.5, 1.5, (6, 6)).astype(np.float32)
    rule, feedback = wmkp.kolen_pollack(), [None, *params[1:]]
    engaged = wmkp.engage(loss, rule)
    of_data = lambda fun, *more: lambda s: fun(params, *more, x, s)
    within = lambda params, feedback, x, s: wmkp.engage(lambda p, x: loss(p, x, s), rule)(params, feedback, x)

    # B = W does not depend on s, so the engaged gradient has the same derivative by s as the gradient.
    by_value_and_grad = lambda s: wmkp.value_and_grad(loss, rule)(params, feedback, x, s)[1]
    theirs = jax.jacobian(of_data(jax.grad(loss)))
    ours = {
        "reverse": jax.jacrev(of_data(jax.grad(engaged), feedback)),
        "forward": jax.jacfwd(of_data(jax.grad(engaged), feedback)),
        "a closure": jax.jacrev(of_data(jax.grad(within), feedback)),
        "value_and_grad": jax.jacrev(by_value_and_grad),
    }
    theirs, ours = jax.jit(lambda s: (theirs(s), {name: derivative(s) for name, derivative in ours.items()}))(s)
    assert np.abs(theirs[0]).max() > 1e-3
    # B's signal equals W's gradient, also in its derivative by s.
    ours["value_and_grad"], signal = ours["value_and_grad"]
    chex.assert_trees_all_close(signal[1:], theirs[1:], rtol=1e-3, atol=1e-4)
    for name, found in ours.items():
        chex.assert_trees_all_close(found, theirs, rtol=1e-3, atol=1e-4, custom_message=name)

    # Other orders of derivatives by x and s. (For params as the second, B = W would have to move with them.)
    def orders(fun, start, *arguments):
        pairs = ((1, 2), (2, 1), (2, 2)) if loss is gated else ((1, 2),)
        return [jax.jacrev(jax.grad(fun, first + start), then + start)(*arguments) for first, then in pairs]

    both = jax.jit(lambda p, b, x, s: (orders(engaged, 1, p, b, x, s), orders(loss, 0, p, x, s)))
    found, expected = both(params, params, x, s)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


def test_params_may_be_given_as_feedback_too():
    """Derivatives by data that scale a weight are those with an equal, separate B, at first and second order."""
    params, x = list(layers(3, 6)), normal(0, 3, 6)
    s = np.random.default_rng(0).uniform(0.5, 1.5, (6, 6)).astype(np.float32)
    engaged = wmkp.engage(gated, wmkp.kolen_pollack())
    by_data = jax.grad(engaged, (2, 3))
    both = lambda p, b: (by_data(p, b, x, s), jax.jacrev(jax.grad(engaged, 3), 2)(p, b, x, s))
    same, separate = jax.jit(lambda p, b: (both(p, p), both(p, b)))(params, list(map(np.copy, params)))
    chex.assert_trees_all_close(same, separate, rtol=1e-4, atol=1e-5)


def test_inside_shard_map_and_with_shard_map_outside():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    params, x = list(layers(3, 6)), normal(0, 8, 6)

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jax.lax.pmean(jnp.sum(x**2), "d")

    rule = wmkp.kolen_pollack()
    feedback = [None, params[1], params[2]]
    sharded = jax.shard_map(
        wmkp.value_and_grad(loss, rule), mesh=mesh, in_specs=(spec(), spec(), spec("d")), out_specs=spec()
    )
    plain = jax.shard_map(jax.value_and_grad(loss), mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec())
    value, (grads, signal) = jax.jit(sharded)(params, feedback, x)
    chex.assert_trees_all_close((value, grads), jax.jit(plain)(params, x), rtol=1e-5)
    chex.assert_trees_all_close(signal[1:], grads[1:], rtol=1e-5)


def test_only_the_rule_that_learns_gets_a_signal():
    def loss(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) ** 2)

    params, x = list(layers(2, 6)), normal(0, 3, 6)
    for rule in (wmkp.feedback_alignment(), wmkp.sign_symmetry(), wmkp.weight_mirror()):
        feedback = [None, params[1]]
        _, (_, signal) = jax.jit(wmkp.value_and_grad(loss, rule))(params, feedback, x)
        assert not np.any(signal[1])
    assert wmkp.init_feedback(KEY, wmkp.backprop(), loss, params, x) == [None, None]


def test_a_thousand_layers_trace_in_linear_time():
    """The plan of a network of 1000 layers holds each equation once."""
    from wmkp.program.projections import analyse

    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    analysis = analyse(loss, [np.eye(2)] * 1000, np.ones((1, 2)))
    assert len(analysis.plan.steps) == len(analysis.plan.jaxpr.eqns) <= 2002
    assert len(analysis.projections()) == 1000


def test_the_compiled_step_has_backprops_products_and_no_more():
    """The compiled step has backprop's number of products, and needs at most B's bytes of extra temporary memory."""

    def loss(params, x):
        conv = jax.lax.conv_general_dilated(
            x, params["conv1"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.conv_general_dilated(
            jnp.tanh(conv), params["conv2"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["dense"])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return jnp.sum(x**2)

    draw = lambda i, *shape: normal(i, *shape) / 3
    params = {
        "conv1": draw(0, 3, 3, 3, 8),
        "conv2": draw(1, 3, 3, 8, 8),
        "dense": draw(2, 128, 32),
        "stack": draw(3, 5, 32, 32),
    }
    x = draw(4, 4, 8, 8, 3)
    feedback = {**params, "conv1": None}

    def update(params, grads):
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

    def backprop(params, x):
        loss_value, grads = jax.value_and_grad(loss)(params, x)
        return update(params, grads), loss_value

    def engaged(rule, params, feedback, x):
        loss_value, (grads, signal) = wmkp.value_and_grad(loss, rule)(params, feedback, x)
        return update(params, grads), update(feedback, signal), loss_value

    plain = jax.jit(backprop, donate_argnums=0).lower(params, x).compile()

    def products(compiled):
        text = compiled.as_text()
        return {op: text.count(f" {op}(") for op in ("convolution", "dot", "custom-call")}

    b_bytes = sum(b.nbytes for b in jax.tree.leaves(feedback))
    for rule in (wmkp.feedback_alignment(), wmkp.kolen_pollack()):
        step = jax.jit(functools.partial(engaged, rule), donate_argnums=(0, 1))
        ours = step.lower(params, feedback, x).compile()
        assert products(ours) == products(plain)
        assert ours.memory_analysis().temp_size_in_bytes <= plain.memory_analysis().temp_size_in_bytes + b_bytes
