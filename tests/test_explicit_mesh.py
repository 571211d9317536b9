"""A mesh of explicit axes gives the same results as one device, and shards B as it shards W."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import drawn_feedback, normal
from jax.sharding import NamedSharding, PartitionSpec, reshard
from marks import some_slow

import wmkp
from wmkp import mirror
from wmkp.program.projections import analyse
from wmkp.rule import resolve

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
RULES = {
    "ss": wmkp.sign_symmetry(),
    "kp": wmkp.kolen_pollack(),
    "wm": wmkp.weight_mirror("gaussian", num_samples=40, rate=0.1, start=0),
    "pfa": wmkp.product_feedback_alignment(),
}
WM_BIAS = wmkp.weight_mirror("orthogonal+antithetic", num_samples=64, activation=jax.nn.relu, bias="kept")
AA, IA = wmkp.activation_alignment(), wmkp.information_alignment()
NETS = {
    "kp, dkp": {"second": wmkp.direct_kolen_pollack(), ".*": RULES["kp"]},
    "wm": {"second": WM_BIAS, ".*": RULES["wm"]},
    "aa, ia, pfa": {"first": AA, "second": IA, ".*": RULES["pfa"]},
    "pfa, aa, ia": {"first": RULES["pfa"], "second": AA, ".*": IA},
}
OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9))
# Axis m shards the first layer's outputs and the second's inputs, so that the second's product sums over m. Axis d
# shards the third's rows, and m the kernel's outputs. Both are gathered before use.
WHERE = {"conv": (None, None, None, "m"), "first": (None, "m"), "second": ("m", None), "bias": (None,), "third": ("d",)}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("d", "m"), devices=jax.devices()[:4])


def whole():
    """Parameters and a batch on one device."""
    shapes = {"conv": (3, 3, 2, 4), "first": (64, 16), "second": (16, 12), "bias": (12,), "third": (12, 4)}
    draw = lambda i, shape: normal(i, *shape) / math.sqrt(math.prod(shape[:-1]))
    return {name: draw(i, shape) for i, (name, shape) in enumerate(shapes.items())}, normal(9, 8, 4, 4, 2)


def divided(mesh, params, x):
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return {name: put(w, *WHERE[name]) for name, w in params.items()}, put(x, "d")


def loss(params, model_state, x, key):
    """One loss for one device, where nothing is sharded, and for the mesh."""
    on_mesh = jax.typeof(x).sharding.spec[0] is not None
    to = lambda x, *spec: reshard(x, PartitionSpec(*spec)) if on_mesh else x
    out = {"out_sharding": PartitionSpec("d", None)} if on_mesh else {}
    kernel = to(params["conv"], None, None, None, None)
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(x).reshape(8, 64)
    x = jnp.tanh(x @ params["first"])
    x = jax.nn.relu(jnp.einsum("bi,io->bo", x, params["second"], **out) + params["bias"])
    y = x @ to(params["third"], None, None)
    return jnp.mean((y - 1) ** 2), (model_state, {})


def angles(rule, params, feedback, x):
    return {
        "matrix": wmkp.matrix_angles(params, feedback),
        "delta": wmkp.delta_angles(loss, rule, params, feedback, None, x, KEY, has_aux=True),
    }


def train(rule, params, x):
    """Takes two engaged steps with a mirror step after each, and returns (losses and lags, state, angles)."""
    steps = wmkp.make_steps(loss, rule, OPTIMIZER, params, x, clip_norm=1.0)

    def both(state, _):
        state, metrics = steps.engaged_step(state, x)
        state, lag = steps.mirror_step(state)
        return state, (metrics["loss"], lag)

    @jax.jit
    def run(params, x):
        state, reported = jax.lax.scan(both, steps.init(jax.random.key(1), params), None, 2)
        return reported, state, angles(rule, state.params, state.feedback, x)

    return run(params, x)


def close(ours, theirs, **how):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **how)


@pytest.mark.parametrize("name", some_slow(NETS, set(NETS) - {"kp, dkp"}))
def test_a_divided_net_learns_as_one_device_does(name, mesh):
    params, x = whole()
    reported, one, watched = train(NETS[name], params, x)
    with jax.set_mesh(mesh):
        params, x = divided(mesh, params, x)
        many_reported, many, many_watched = train(NETS[name], params, x)
    close(many_reported, reported, rtol=1e-4)
    close((many.params, many.feedback), (one.params, one.feedback), rtol=1e-4, atol=1e-5)
    close(many_watched, watched, rtol=1e-3, atol=0.05)
    for path, w in many.params.items():
        b = many.feedback[path]
        assert jax.typeof(w) == jax.typeof(params[path])
        if isinstance(b, jax.Array):
            assert jax.typeof(b) == jax.typeof(w), "B is divided as W is"


def test_lag_is_that_of_one_device(mesh):
    """For the same W, B and noise, the mesh reports the same lag as one device."""
    params, x = whole()
    analysis = analyse(loss, params, None, x, KEY)
    rules = resolve(RULES["wm"], analysis)
    noise = {name: normal(20 + i, *w.shape) * w.std() for i, (name, w) in enumerate(params.items())}

    @jax.jit
    def lags(params, noise):
        ws, mirrored = jax.tree.leaves(params), [name in rules and name != "conv" for name in sorted(params)]
        only = lambda values: [v if m else None for v, m in zip(values, mirrored, strict=True)]
        estimates = only(w + n for w, n in zip(ws, jax.tree.leaves(noise), strict=True))
        return [mirror.lags(rules, analysis, ws, only(i / 8 * w for w in ws), estimates, 2) for i in (0, 3, 8)]

    one = lags(params, noise)
    with jax.set_mesh(mesh):
        many = lags(divided(mesh, params, x)[0], divided(mesh, noise, x)[0])
    close(many, one, rtol=1e-4)
    found = np.array([[found[path] for path in ("first", "second")] for found in one])
    assert np.all(found[0] > 0) and np.all(found[-1] == 0)


@pytest.mark.slow
def test_what_is_watched_op_by_op_is_what_one_device_has(mesh):
    rule = RULES["kp"]
    loss_of = lambda p, x: loss(p, None, x, KEY)[0]
    find = lambda *args: (angles(rule, *args), wmkp.input_covariances(loss_of, args[0], args[-1]))
    params, x = whole()
    feedback = drawn_feedback(rule, loss_of, params, x)
    ours = jax.jit(find)(params, feedback, x)
    with jax.set_mesh(mesh):
        params, x = divided(mesh, params, x)
        feedback = {
            name: None if b is None else jax.device_put(b, params[name].sharding) for name, b in feedback.items()
        }
        close(find(params, feedback, x), ours, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["kp", "ss", "pfa"])
def test_gradients_are_not_backprops_unless_b_is_w(name, mesh):
    """With B made under jit, the gradients differ from backprop's. With B = W they agree (KP)."""
    loss_of = lambda p, x: loss(p, None, x, KEY)[0]
    with jax.set_mesh(mesh):
        params, x = divided(mesh, *whole())
        rule = RULES[name]
        feedback = jax.jit(lambda p, x: wmkp.init_feedback(KEY, rule, loss_of, p, x))(params, x)
        engaged = wmkp.value_and_grad(loss_of, rule)
        both = jax.jit(lambda p, b, x: (engaged(p, b, x)[1], jax.grad(loss_of)(p, x)))
        (grads, _), expected = both(params, feedback, x)
        apart = max(np.abs(np.asarray(grads[path]) - np.asarray(expected[path])).max() for path in params)
        assert apart > 1e-3, "B is not W"
        if name == "kp":
            same = {path: None if b is None else params[path] for path, b in feedback.items()}
            (grads, signal), _ = both(params, same, x)
            close(grads, expected, rtol=1e-5, atol=1e-7)
            for path, b in same.items():
                assert jax.typeof(grads[path]) == jax.typeof(params[path])
                assert b is None or jax.typeof(signal[path]) == jax.typeof(b)
