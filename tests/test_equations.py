"""Training follows the paper's equations (1-4, 14-18) in NumPy, and no backward pass reads W."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import jitted
import numpy as np
import optax
import pytest
from arrays import drawn_feedback
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from marks import some_slow

import wmkp
from wmkp.program import pathways

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES = (7, 9, 8, 6, 5)  # three hidden layers
STEPS, BATCH = 30, 11
RATE, DECAY, MOMENTUM = 0.05, 0.02, 0.9
PHI = {
    "tanh": (jnp.tanh, np.tanh, lambda y: 1 - y**2),
    "sigmoid": (jax.nn.sigmoid, lambda a: 1 / (1 + np.exp(-a)), lambda y: y * (1 - y)),
}
SIGN_SCALE = 1.5
RULES = {
    "fa": wmkp.feedback_alignment(),
    "kp": wmkp.kolen_pollack(),
    "ss": wmkp.sign_symmetry(scale=SIGN_SCALE),
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def network(seed=0):
    """Initial weights and one batch per step in float64. Kernels are (in, out) and rows are samples."""
    rng = np.random.default_rng(seed)
    params = [
        {"w": rng.normal(size=(m, n)) / np.sqrt(m), "b": 0.3 * rng.normal(size=n)} for m, n in itertools.pairwise(SIZES)
    ]
    data = rng.normal(size=(STEPS, BATCH, SIZES[0])), rng.normal(size=(STEPS, BATCH, SIZES[-1]))
    return params, data


def mlp_loss(phi, params, x, target):
    """Half the squared error, averaged over samples. The last layer is linear."""
    for layer in params[:-1]:
        x = phi(x @ layer["w"] + layer["b"])
    x = x @ params[-1]["w"] + params[-1]["b"]
    return jnp.sum((x - target) ** 2) / (2 * x.shape[0])


def paper(rule, phi, slope, params, feedback, data, rate, decay, momentum):
    """Eq. 1-4 and 15-18 in the paper's layout: activities are columns, W is (out, in) and B is (in, out).

    ``slope`` is phi' as a function of phi's value. The update adds heavy-ball momentum to the paper's signal and decay.
    """
    layers = len(params)
    W = [layer["w"].T.copy() for layer in params]
    b = [layer["b"][:, None].copy() for layer in params]
    B = [None] + [np.array(layer["w"]) for layer in feedback[1:]]
    speed_W, speed_b = [np.zeros_like(w) for w in W], [np.zeros_like(v) for v in b]
    speed_B = [None] + [np.zeros_like(v) for v in B[1:]]
    for x, target in zip(*data, strict=True):
        y = [x.T]
        for k in range(layers):
            a = W[k] @ y[k] + b[k]
            y.append(phi(a) if k < layers - 1 else a)  # (1)
        back = list(B)
        if rule == "ss":
            back[1:] = [SIGN_SCALE / np.sqrt(w.shape[1]) * np.sign(w).T for w in W[1:]]
        delta = [None] * layers
        delta[-1] = (y[-1] - target.T) / x.shape[0]
        for k in reversed(range(layers - 1)):
            delta[k] = slope(y[k + 1]) * (back[k + 1] @ delta[k + 1])  # (3)
        for k in range(layers):
            signal = delta[k] @ y[k].T  # (4) and (16): delta_{k+1} y_l^T
            if rule == "kp" and k > 0:
                signal_B = y[k] @ delta[k].T  # (15) and (17): y_l delta_{k+1}^T
                speed_B[k] = momentum * speed_B[k] + signal_B + decay * B[k]
                B[k] = B[k] - rate * speed_B[k]
            speed_W[k] = momentum * speed_W[k] + signal + decay * W[k]
            W[k] = W[k] - rate * speed_W[k]
            speed_b[k] = momentum * speed_b[k] + delta[k].sum(1, keepdims=True) + decay * b[k]
            b[k] = b[k] - rate * speed_b[k]
    return W, b, B


def optimizer(decay=DECAY, momentum=MOMENTUM):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATE, momentum=momentum))


def train(rule, loss, tx, params, data, feedback):
    """The params and feedback of all steps, stacked along a leading axis, with the initial ones first."""
    learns = rule.signal is not None
    tx_b = wmkp.updates.kolen_pollack(tx)

    def step(carry, batch):
        params, feedback, state, state_b = carry
        _, (grads, signal) = wmkp.value_and_grad(loss, rule)(params, feedback, *batch)
        change, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, change)
        if learns:
            change, state_b = tx_b.update(signal, state_b, feedback)
            feedback = optax.apply_updates(feedback, change)
        return (new, feedback, state, state_b), (new, feedback)

    def run(params, feedback, data):
        init = params, feedback, tx.init(params), tx_b.init(feedback)
        _, history = lax.scan(step, init, data)
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), (params, feedback), history)

    return jax.jit(run)(params, feedback, data)


@pytest.mark.parametrize(("rule", "phi"), [("kp", "tanh"), ("ss", "sigmoid")])
def test_thirty_steps_equal_numpy(float64, rule, phi):
    params, data = network()
    activation, *numpy_phi = PHI[phi]
    loss = functools.partial(mlp_loss, activation)
    feedback = jitted.init_feedback(jax.random.key(1), RULES[rule], loss, params, data[0][0], data[1][0])
    assert feedback[0]["w"] is None and all(layer["b"] is None for layer in feedback)
    assert all(layer["w"].dtype == jnp.float64 for layer in feedback[1:])
    history, feedback_history = train(RULES[rule], loss, optimizer(), params, data, feedback)
    W, b, B = paper(rule, *numpy_phi, params, feedback, data, RATE, DECAY, MOMENTUM)
    assert all(np.max(np.abs(w - p["w"].T)) > 0.01 for w, p in zip(W, params, strict=True)), "training must move W"
    for k in range(len(params)):
        np.testing.assert_allclose(history[k]["w"][-1], W[k].T, rtol=0, atol=1e-10)
        np.testing.assert_allclose(history[k]["b"][-1], b[k][:, 0], rtol=0, atol=1e-10)
        if k:
            np.testing.assert_allclose(feedback_history[k]["w"][-1], B[k], rtol=0, atol=1e-10)
            moved = np.max(np.abs(B[k] - np.asarray(feedback[k]["w"])))
            assert moved > 0.01 if rule == "kp" else moved == 0


# --- eq. 14 -----------------------------------------------------------------------------------------------------------


def sgd_law(first, steps, decay, momentum=0.0):
    """W - B^T under SGD with decay and momentum: D_{t+1} = (1 + mu - eta lambda) D_t - mu D_{t-1}."""
    law = [1.0, 1 - RATE * decay]
    for _ in range(steps - 1):
        law.append((1 + momentum - RATE * decay) * law[-1] - momentum * law[-2])
    return np.array(law)[:, None, None] * first


def powers(first, steps, rate):
    return (rate ** np.arange(steps + 1))[:, None, None] * first


EQ14 = {
    "sgd": (optimizer(0.03, None), lambda d: powers(d, STEPS, 1 - RATE * 0.03)),
    "sgd, no decay": (optax.sgd(RATE), lambda d: powers(d, STEPS, 1)),
    "momentum": (optimizer(0.03), lambda d: sgd_law(d, STEPS, 0.03, MOMENTUM)),
    "momentum, no decay": (optax.sgd(RATE, momentum=MOMENTUM), lambda d: powers(d, STEPS, 1)),
    "adamw": (optax.adamw(0.01, weight_decay=0.4), lambda d: powers(d, STEPS, 1 - 0.01 * 0.4)),
    "adam": (optax.adam(0.01), lambda d: powers(d, STEPS, 1)),
}


@pytest.mark.parametrize("name", some_slow(EQ14, {"sgd", "momentum, no decay", "adam"}))
def test_difference_shrinks_as_equation_14_says(float64, name):
    tx, law = EQ14[name]
    params, data = network(1)
    loss = functools.partial(mlp_loss, jnp.tanh)
    feedback = drawn_feedback(RULES["kp"], loss, params, data[0][0], data[1][0])
    history, feedback_history = train(RULES["kp"], loss, tx, params, data, feedback)
    for k in range(1, len(params)):
        difference = np.asarray(history[k]["w"]) - np.asarray(feedback_history[k]["w"])
        np.testing.assert_allclose(difference, law(difference[0]), rtol=0, atol=1e-12)
        assert np.max(np.abs(history[k]["w"][-1] - history[k]["w"][0])) > 0.01, "W must have learned meanwhile"


def test_weights_of_one_sign_converge_as_fast(float64):
    """Projecting W and B onto non-negative weights keeps every entry of |W - B^T| at or below Eq. 14's value."""
    params, data = network(1)
    params = jax.tree.map(np.abs, params)
    signs = np.where(np.arange(max(SIZES)) % 4 < 3, 1.0, -1.0)[:, None]

    def loss(params, state, batch, key):
        signed = [{"w": signs[: len(layer["w"])] * layer["w"], "b": layer["b"]} for layer in params]
        return mlp_loss(jnp.tanh, signed, *batch), (state, {})

    steps = wmkp.make_steps(loss, RULES["kp"], optimizer(0.03, None), params, (data[0][0], data[1][0]))
    state = steps.init(jax.random.key(5), params)
    project = lambda tree: jax.tree.map(lambda w: np.maximum(w, 0), tree)
    state = state._replace(feedback=project(state.feedback))
    difference = lambda s: [w["w"] - b["w"] for w, b in zip(s.params[1:], s.feedback[1:], strict=True)]
    before, projected = difference(state._replace(params=params)), 0
    for x, y in zip(*data, strict=True):
        state, _ = steps.engaged_step(state, (x, y))
        projected += sum(np.sum(layer["w"] < 0) for layer in state.params)
        state = state._replace(params=project(state.params), feedback=project(state.feedback))
    assert projected > 20
    for first, last in zip(before, difference(state), strict=True):
        assert np.all(np.abs(last) <= (1 - RATE * 0.03) ** len(data[0]) * np.abs(first) + 1e-12)


def test_momentum_clock():
    """After many steps the difference shrinks by the factor 1 - eta lambda / (1 - mu) per step."""
    law = sgd_law(np.ones((1, 1)), 400, 5e-4, 0.9)[:, 0, 0]
    assert law[-1] / law[-2] == pytest.approx(1 - RATE * 5e-4 / (1 - 0.9), abs=1e-5)


@pytest.mark.parametrize("name", some_slow(["momentum, no decay", "momentum", "adamw"], {"momentum", "adamw"}))
def test_mirrored_start_stays_mirrored(name):
    """From B = W, Kolen-Pollack keeps B = W and follows backprop's weights, in float32."""
    params, data = jax.tree.map(np.float32, network(2))
    loss = functools.partial(mlp_loss, jnp.tanh)
    tx, _ = EQ14[name]
    feedback = [{"w": layer["w"] if k else None, "b": None} for k, layer in enumerate(params)]
    history, feedback_history = train(RULES["kp"], loss, tx, params, data, feedback)
    history_bp, _ = train(wmkp.backprop(), loss, tx, params, data, feedback)
    for k in range(len(params)):
        if k:
            np.testing.assert_allclose(history[k]["w"], feedback_history[k]["w"], rtol=0, atol=1e-7)
        np.testing.assert_allclose(history[k]["w"], history_bp[k]["w"], rtol=0, atol=2e-5)


# --- nothing in the backward pass depends on W ------------------------------------------------------------------------

KEY = jax.random.key(0)
CONV = functools.partial(
    lax.conv_general_dilated, window_strides=(2, 2), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)
PRODUCTS = {  # multiply, x, W
    "dense": (lambda x, w: x @ w, (5, 6), (6, 4)),
    "heads": (lambda x, w: jnp.einsum("btd,dhk->bhtk", x, w), (2, 3, 6), (6, 2, 4)),
    "batched": (lambda x, w: jnp.einsum("gnd,gde->gne", x, w), (3, 5, 6), (3, 6, 4)),
    "strided conv": (CONV, (2, 6, 6, 4), (3, 3, 4, 8)),
    "grouped conv": (functools.partial(CONV, feature_group_count=2), (2, 6, 6, 4), (3, 3, 2, 8)),
}


def holds(pull_back, w):
    """Whether a vjp keeps w, in any layout."""
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    flat = np.sort(np.asarray(w), axis=None)
    return any(np.array_equal(np.sort(leaf, axis=None), flat) for leaf in kept if leaf.size == flat.size)


@pytest.mark.parametrize("name", some_slow(PRODUCTS, {"dense", "strided conv"}))
def test_product_backward_does_not_depend_on_w(name):
    multiply, x_shape, w_shape = PRODUCTS[name]
    rng = np.random.default_rng(0)
    x, w, b, other = (rng.normal(size=s).astype(np.float32) for s in (x_shape, w_shape, w_shape, w_shape))
    transpose = lambda x, delta: jax.linear_transpose(lambda w: multiply(x, w), w)(delta)[0]
    product = types.SimpleNamespace(multiply=multiply, weight_gradient=transpose, laid_out=lambda w: w)
    through = functools.partial(pathways.through_feedback, product, circuit=pathways.Circuit(pathways.hebbian))
    y, pull_back = jax.vjp(through, x, w, b)
    np.testing.assert_array_equal(y, multiply(x, w))
    delta = rng.normal(size=y.shape).astype(np.float32)
    assert not holds(pull_back, w)
    assert holds(pull_back, b), "the check must see what is kept"
    assert holds(jax.vjp(multiply, x, w)[1], w), "backprop does keep W"
    gradient = jax.jit(lambda x, w, b: jax.vjp(through, x, w, b)[1](delta))
    reference = gradient(x, w, b)
    for replaced in (other, 1e6 * w, np.full_like(w, np.nan)):
        for ours, theirs in zip(gradient(x, replaced, b), reference, strict=True):
            np.testing.assert_array_equal(ours, theirs)  # bit-for-bit, even where W is NaN
    # dx is the transpose of the product with B. dW and B's signal are the transpose of the product with x.
    dx, dw = jax.jit(lambda x, b: jax.vjp(multiply, x, b)[1](delta))(x, b)
    np.testing.assert_allclose(reference[0], dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reference[1], dw, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(reference[1], reference[2])


WIDTHS = (4, 6, 5, 7, 3)


def linear(params, x, c):
    """A linear network whose loss has a constant delta, so that deltas depend on B alone."""
    x = x + params["shift"]
    for w in params["w"]:
        x = x @ w
    return jnp.sum(x * c)


def linear_network():
    rng = np.random.default_rng(4)
    shapes = [*itertools.pairwise(WIDTHS), (8, WIDTHS[0]), (8, WIDTHS[-1])]
    *w, x, c = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return {"shift": np.zeros(WIDTHS[0], np.float32), "w": w}, x, c


@functools.cache
def linear_gradients(name):
    """(init_feedback's B, compiled gradients) of the linear network, compiled once for all examples."""
    rule = {**RULES, "wm": wmkp.weight_mirror(start=0), "bp": wmkp.backprop()}[name]
    feedback = drawn_feedback(rule, linear, *linear_network())
    return feedback, jax.jit(wmkp.value_and_grad(linear, rule))


@settings(max_examples=12, deadline=None)
@given(changed=st.integers(0, 3), seed=st.integers(0, 2**16), rule=st.sampled_from(["fa", "kp", "wm"]))
def test_input_delta_does_not_depend_on_any_w(changed, seed, rule):
    params, x, c = linear_network()
    feedback, gradient = linear_gradients(rule)
    value, (grads, _) = gradient(params, feedback, x, c)
    w = list(params["w"])
    w[changed] = np.random.default_rng(seed).normal(size=w[changed].shape).astype(np.float32)
    new_value, (new_grads, _) = gradient({**params, "w": w}, feedback, x, c)
    assert new_value != value
    # The gradient of the shift is the delta at the input. The first weight's gradient is x times its output's delta.
    np.testing.assert_array_equal(grads["shift"], new_grads["shift"])
    np.testing.assert_array_equal(grads["w"][0], new_grads["w"][0])
    expected = np.asarray(c, np.float64)
    for b in reversed(feedback["w"]):
        expected = expected @ np.asarray(b, np.float64).T
    np.testing.assert_allclose(grads["shift"], expected.sum(0), rtol=1e-4)
    _, backprop = linear_gradients("bp")
    (_, (old, _)), (_, (new, _)) = (backprop(p, None, x, c) for p in (params, {**params, "w": w}))
    assert not np.allclose(old["shift"], new["shift"], rtol=1e-3), "backprop's delta does depend on it"


def test_sign_symmetry_depends_on_signs_alone():
    params, x, c = linear_network()
    feedback, gradient = linear_gradients("ss")

    def input_delta(params):
        return gradient(params, feedback, x, c)[1][0]["shift"]

    grown = {**params, "w": [np.exp(w) * w for w in params["w"]]}
    np.testing.assert_array_equal(input_delta(params), input_delta(grown))
    flipped = {**params, "w": [w.copy() for w in params["w"]]}
    flipped["w"][0][0, 0] *= -1
    assert not np.array_equal(input_delta(params), input_delta(flipped))


def test_engaged_residuals_hold_no_w():
    """The backward pass of a nonlinear model keeps every B and no W, not even the first layer's."""
    params, data = jax.tree.map(np.float32, network())
    loss = functools.partial(mlp_loss, jnp.tanh)
    x, target = data[0][0], data[1][0]
    feedback, engaged = drawn_feedback(RULES["kp"], loss, params, x, target), wmkp.engage(loss, RULES["kp"])
    pull_back = jax.jit(lambda p, b: jax.vjp(lambda p, b: engaged(p, b, x, target), p, b)[1])(params, feedback)
    backprop = jax.jit(lambda p: jax.vjp(lambda p: loss(p, x, target), p)[1])(params)
    for k, layer in enumerate(params):
        assert not holds(pull_back, layer["w"])
        if k:
            assert holds(pull_back, feedback[k]["w"]) and holds(backprop, layer["w"])


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, delta: (delta / (1 + abs(v)) ** 2,))


def spiking_loss(spike, params, x, target):
    """Recurrent leaky integrate-and-fire neurons with reset by subtraction. The readout sums their spikes."""

    def step(v, x):
        s = spike(v - 1)
        return 0.8 * v + x @ params["in"] + s @ params["recurrent"] - s, s

    _, s = lax.scan(step, jnp.zeros((x.shape[1], len(params["recurrent"]))), x)
    return jnp.sum((s.sum(0) @ params["out"] - target) ** 2) / 2


@pytest.mark.parametrize(
    "spike", [pytest.param(spike, marks=pytest.mark.slow, id="plain"), pytest.param(jax.jit(spike), id="jitted")]
)
def test_spiking_network_by_surrogate_gradients_equals_numpy(float64, spike):
    """The error passes the surrogate gradient of a spike and goes back through B, as in NumPy."""
    loss = functools.partial(spiking_loss, spike)
    rng = np.random.default_rng(3)
    shapes = {"in": (6, 9), "recurrent": (9, 9), "out": (9, 4)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    feedback = {name: rng.normal(size=shape) if name != "in" else None for name, shape in shapes.items()}
    x, target = rng.normal(size=(12, 5, 6)), rng.normal(size=(5, 4))
    rule = wmkp.kolen_pollack()
    assert {k: p.feedback for k, p in wmkp.projections(loss, params, x, target).items()} == {
        "in": False,
        "recurrent": True,
        "out": True,
    }
    _, (grads, signal) = jax.jit(wmkp.value_and_grad(loss, rule))(params, feedback, x, target)

    v, s = [np.zeros((5, 9))], []
    for x_t in x:
        s.append((v[-1] > 1).astype(float))
        v.append(0.8 * v[-1] + x_t @ params["in"] + s[-1] @ params["recurrent"] - s[-1])
    assert 0.05 < np.mean(s) < 0.95
    error = sum(s) @ params["out"] - target
    expected = {name: np.zeros(shape) for name, shape in shapes.items()}
    expected["out"] = sum(s).T @ error
    delta_v = np.zeros((5, 9))
    for t in reversed(range(len(x))):
        expected["in"] += x[t].T @ delta_v
        expected["recurrent"] += s[t].T @ delta_v
        delta_s = error @ feedback["out"].T + delta_v @ feedback["recurrent"].T - delta_v
        delta_v = 0.8 * delta_v + delta_s / (1 + abs(v[t] - 1)) ** 2
    for name, gradient in expected.items():
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-9, atol=1e-9)
        if feedback[name] is not None:
            np.testing.assert_allclose(signal[name], gradient, rtol=1e-9, atol=1e-9)
