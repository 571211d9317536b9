"""The engaged gradient under combinations of JAX's transformations, and in four precisions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import KEY, assert_gradients_close, normal

import wmkp

pytestmark = pytest.mark.usefixtures("quick_compile")

RULE = wmkp.kolen_pollack()


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["first"])
    h = jnp.tanh(h @ params["middle"] + params["bias"])
    return jnp.mean((h @ params["last"] - y) ** 2)


def arrays(dtype=jnp.float32):
    draw = lambda i, *shape: jnp.asarray(normal(*shape, seed=i), dtype) / 2
    params = {"first": draw(0, 4, 5), "middle": draw(1, 5, 5), "bias": draw(2, 5), "last": draw(3, 5, 2)}
    feedback = {"first": None, "middle": draw(4, 5, 5), "bias": None, "last": draw(5, 5, 2)}
    return params, feedback, draw(6, 6, 4), draw(7, 6, 2)


def by_hand(params, feedback, x, y):
    """The loss and the gradients of Eq. 3-4 in NumPy float64."""
    p, b, x, y = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, feedback, x, y))
    h1 = np.tanh(x @ p["first"])
    h2 = np.tanh(h1 @ p["middle"] + p["bias"])
    error = h2 @ p["last"] - y
    delta3 = 2 * error / error.size
    delta2 = (delta3 @ b["last"].T) * (1 - h2**2)
    delta1 = (delta2 @ b["middle"].T) * (1 - h1**2)
    grads = {"first": x.T @ delta1, "middle": h1.T @ delta2, "bias": delta2.sum(0), "last": h2.T @ delta3}
    return np.mean(error**2), grads


gradient = wmkp.value_and_grad(loss_fn, RULE)
engaged = wmkp.engage(loss_fn, RULE)


def stacked(tree, count=3):
    return jax.tree.map(lambda a: jnp.stack([a * (1 + 0.1 * i) for i in range(count)]), tree)


def unstacked(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


ORDERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit of jit": lambda f: jax.jit(jax.jit(f)),
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "vmap of jit": lambda f: lambda *a: unstacked(jax.vmap(jax.jit(f))(*stacked(a, 2)), 0),
    "jit of vmap of vmap": lambda f: (
        lambda *a: unstacked(unstacked(jax.jit(jax.vmap(jax.vmap(f)))(*stacked(stacked(a, 2), 2)), 0), 0)
    ),
    "cond": lambda f: lambda *a: jax.lax.cond(a[2].sum() > -1e9, f, lambda *a: jax.tree.map(jnp.zeros_like, f(*a)), *a),
    "map": lambda f: lambda *a: unstacked(jax.lax.map(lambda a: f(*a), stacked(a, 1)), 0),
    "linearized": lambda f: lambda *a: jax.linearize(f, *a)[0],
    "grad of engage": lambda f: lambda *a: (engaged(*a), jax.grad(engaged, argnums=(0, 1))(*a)),
    "grad of checkpoint of engage": lambda f: lambda *a: (engaged(*a), jax.grad(jax.checkpoint(engaged), (0, 1))(*a)),
    "grad of jit of engage": lambda f: lambda *a: (engaged(*a), jax.grad(jax.jit(engaged), (0, 1))(*a)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_gives_the_engaged_gradient(name):
    params, feedback, x, y = arrays()
    loss, (grads, signal) = ORDERS[name](gradient)(params, feedback, x, y)
    expected, expected_grads = by_hand(params, feedback, x, y)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_gradients_close(grads, expected_grads, 1e-5)
    assert_gradients_close(signal, {name: expected_grads[name] for name in ("last", "middle")}, 1e-5)


def test_vmap_over_models_over_examples_and_over_both():
    params, feedback, x, y = arrays()
    ws, bs = stacked(params), stacked(feedback)
    models = jax.jit(jax.vmap(gradient, in_axes=(0, 0, None, None)))(ws, bs, x, y)
    for i in range(3):
        _, grads = by_hand(unstacked(ws, i), unstacked(bs, i), x, y)
        assert_gradients_close(unstacked(models[1][0], i), grads, 1e-5)
    examples = jax.jit(jax.vmap(gradient, in_axes=(None, None, 0, 0)))(params, feedback, x, y)
    for i in range(2):
        assert_gradients_close(
            unstacked(examples[1][0], i), by_hand(params, feedback, x[i : i + 1], y[i : i + 1])[1], 1e-5
        )
    both = jax.jit(jax.vmap(jax.vmap(gradient, (None, None, 0, 0)), (0, 0, None, None)))(ws, bs, x, y)
    mean = jax.tree.map(lambda g: g.mean(1), both[1][0])
    assert_gradients_close(mean, models[1][0], 1e-5)


def test_scan_over_steps_equals_a_loop():
    params, feedback, x, y = arrays()
    tx = optax.sgd(0.1, momentum=0.9)

    def step(carry, _):
        params, feedback, state, state_b = carry
        loss, (grads, signal) = gradient(params, feedback, x, y)
        change, state = tx.update(grads, state, params)
        change_b, state_b = tx.update(signal, state_b, feedback)
        return (optax.apply_updates(params, change), optax.apply_updates(feedback, change_b), state, state_b), loss

    carry = params, feedback, tx.init(params), tx.init(feedback)
    (ours, _, _, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 5))(carry)
    p, b, m, mb = params, feedback, *(jax.tree.map(np.zeros_like, t) for t in (params, feedback))
    for t in range(5):
        loss, grads = by_hand(p, b, x, y)
        np.testing.assert_allclose(losses[t], loss, rtol=1e-4)
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, grads)
        mb = {k: None if b[k] is None else 0.9 * mb[k] + grads[k] for k in b}
        p, b = jax.tree.map(lambda w, m: w - 0.1 * m, p, m), jax.tree.map(lambda w, m: w - 0.1 * m, b, mb)
    assert_gradients_close(ours, p, 1e-5)


def test_eval_shape_and_shapes_in_place_of_arrays():
    params, feedback, x, y = arrays()
    shapes = jax.eval_shape(lambda *a: a, params, feedback, x, y)
    loss, (grads, signal) = jax.eval_shape(gradient, *shapes)
    assert loss.shape == () and jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, signal) == jax.tree.map(jnp.shape, feedback)
    made = jax.eval_shape(lambda params: wmkp.init_feedback(KEY, RULE, loss_fn, params, *shapes[2:]), params)
    assert jax.tree.map(lambda b: (b.shape, b.dtype), made) == jax.tree.map(lambda b: (b.shape, b.dtype), feedback)
    assert wmkp.projections(loss_fn, shapes[0], *shapes[2:]).keys() == {"first", "middle", "last"}


def test_float64_to_its_own_rounding():
    with jax.enable_x64(True):
        a = arrays(jnp.float64)
        loss, (grads, _) = jax.jit(gradient)(*a)
        assert loss.dtype == jnp.float64
        assert_gradients_close(grads, by_hand(*a)[1], 1e-14)


def test_bfloat16_weights_and_gradients():
    a = arrays(jnp.bfloat16)
    _, (grads, signal) = jax.jit(gradient)(*a)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves((grads, signal)))
    assert_gradients_close(grads, by_hand(*a)[1], 0.05)


def test_float16_with_loss_scaling():
    """A scaled loss recovers gradients that float16 alone loses, in B's signal and in W's gradient."""
    params, feedback, x, y = arrays()

    def half(params, x, y, scale):
        cast = lambda t: jax.tree.map(lambda a: a.astype(jnp.float16), t)
        p, x, y = cast(params), cast(x), cast(y)
        h = jnp.tanh(x @ p["first"])
        h = jnp.tanh(h @ p["middle"] + p["bias"])
        return jnp.mean(((h @ p["last"] - y) * jnp.float16(1e-3)).astype(jnp.float32) ** 2) * scale

    run = jax.jit(wmkp.value_and_grad(half, RULE))
    _, expected = by_hand(params, feedback, x, y)
    expected = jax.tree.map(lambda g: g * 1e-6, expected)
    _, (lost, _) = run(params, feedback, x, y, 1.0)
    _, (grads, signal) = run(params, feedback, x, y, 2.0**14)
    unscaled, signal = (jax.tree.map(lambda g: np.asarray(g, np.float64) / 2**14, t) for t in (grads, signal))
    assert_close = partial(np.testing.assert_allclose, rtol=0)
    for path, g in expected.items():
        size = np.abs(g).max()
        assert np.abs(np.asarray(lost[path]) - g).max() > 0.05 * size, "float16 alone loses it"
        assert_close(unscaled[path], g, atol=0.01 * size)
        if signal[path] is not None:
            assert_close(signal[path], g, atol=0.01 * size)


def test_complex_numbers_are_refused_by_path():
    params, _, x, y = arrays()
    with pytest.raises(wmkp.WeightTransportError, match=r"params\['(middle|last)'\].*two real arrays"):
        complex_one = {**params, "middle": params["middle"].astype(jnp.complex64)}
        wmkp.init_feedback(KEY, RULE, lambda p, x, y: jnp.abs(loss_fn(p, x, y)), complex_one, x, y)
    real = lambda p, x, y: jnp.abs(loss_fn(p, x, y))
    with pytest.raises(wmkp.WeightTransportError, match=r"params\['(middle|last)'\].*complex"):
        wmkp.init_feedback(KEY, RULE, real, params, x.astype(jnp.complex64), y)


# --- derivatives of the engaged gradient ------------------------------------------------------------------------------


def masked(params, x, y):
    """A loss whose weight has a mask and a scale that depends on parameters, under scan and remat."""
    scale = 1 + jnp.tanh(x.mean() * params["bias"].sum())
    h = jnp.tanh(x @ params["first"])
    body = jax.checkpoint(
        lambda h, _: (jnp.tanh(h @ (params["middle"] * scale * (h.mean() > -9)) + params["bias"]), None)
    )
    h, _ = jax.lax.scan(body, h, None, 2)
    return jnp.mean((h @ params["last"] - y) ** 2)


def field(fun):
    """The engaged gradient as a function G(W, B)."""
    return lambda params, feedback, x, y: wmkp.value_and_grad(fun, RULE)(params, feedback, x, y)[1][0]


def central(f, at, direction, eps=1e-5):
    plus, minus = (f(jax.tree.map(lambda a, d: a + s * eps * d, at, direction)) for s in (1, -1))
    return jax.tree.map(lambda a, b: (a - b) / (2 * eps), plus, minus)


def tangents(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([jnp.asarray(normal(*a.shape, seed=seed + i), a.dtype) for i, a in enumerate(leaves)])


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("fun", [loss_fn, masked])
def test_derivatives_of_the_engaged_gradient(fun):
    """Derivatives by W at a fixed B, by B, and by the data agree with finite differences in float64."""
    with jax.enable_x64(True):
        params, feedback, x, y = arrays(jnp.float64)
        g = jax.jit(field(fun))
        u, v, z, dx = tangents(params, 10), tangents(params, 20), tangents(feedback, 30), tangents(x, 40)

        at_w = lambda p: g(p, feedback, x, y)
        forward = jax.jvp(at_w, (params,), (u,))[1]
        assert_gradients_close(forward, central(at_w, params, u), 1e-7)
        _, pull = jax.vjp(at_w, params)  # reverse mode gives the transpose of forward mode
        np.testing.assert_allclose(inner(v, forward), inner(pull(v)[0], u), rtol=1e-10)
        assert not np.isclose(inner(v, forward), inner(u, jax.jvp(at_w, (params,), (v,))[1])), "it is not symmetric"

        at_b = lambda b: g(params, b, x, y)
        assert_gradients_close(jax.jvp(at_b, (feedback,), (z,))[1], central(at_b, feedback, z), 1e-7)
        at_x = lambda x: g(params, feedback, x, y)
        assert_gradients_close(jax.jvp(at_x, (x,), (dx,))[1], central(at_x, x, dx), 1e-7)


@pytest.mark.parametrize("fun", [loss_fn, masked])
def test_with_b_and_w_tied_it_is_the_hessian(fun):
    with jax.enable_x64(True):
        params, feedback, x, y = arrays(jnp.float64)
        u = tangents(params, 10)
        tie = lambda p: {name: None if feedback[name] is None else w for name, w in p.items()}
        hessian = jax.jit(lambda p: jax.jvp(lambda p: jax.grad(fun)(p, x, y), (p,), (u,))[1])(params)
        by_value_and_grad = jax.jit(lambda p: jax.jvp(lambda p: field(fun)(p, tie(p), x, y), (p,), (u,))[1])(params)
        by_engage = jax.jvp(lambda p: jax.grad(wmkp.engage(fun, RULE))(p, tie(p), x, y), (params,), (u,))[1]
        assert_gradients_close(by_value_and_grad, hessian, 1e-12)
        assert_gradients_close(by_engage, hessian, 1e-12)


def test_jax_hessian_of_an_engaged_function_is_the_jacobian_of_its_gradient():
    params, feedback, x, y = arrays()
    hessian = jax.jit(jax.hessian(engaged))(params, feedback, x, y)
    u = tangents(params, 10)
    forward = jax.jvp(lambda p: jax.grad(engaged)(p, feedback, x, y), (params,), (u,))[1]
    product = {i: sum(jnp.tensordot(hessian[i][j], u[j], u[j].ndim) for j in params) for i in params}
    assert_gradients_close(product, forward, 1e-5)


def test_forward_mode_of_an_engaged_function_is_refused():
    params, feedback, x, y = arrays()
    ours = r"an engaged function has no forward mode.*jax\.jvp\(jax\.grad\(engaged\)"
    fun = lambda p: engaged(p, feedback, x, y)
    for transform in (jax.jacfwd(fun), lambda p: jax.jvp(fun, (p,), (p,))):
        with pytest.raises(TypeError, match=ours):
            transform(params)
    with pytest.raises(TypeError, match="forward-mode"):  # here JAX itself raises the error, after wmkp has run
        jax.jit(lambda p: jax.jvp(fun, (p,), (p,)))(params)


def test_feedback_weights_learned_by_a_gradient():
    """A gradient step on B lowers the loss after one engaged step (learning to learn)."""
    params, feedback, x, y = arrays()

    def after(feedback):
        grads = gradient(params, feedback, x, y)[1][0]
        return loss_fn(jax.tree.map(lambda w, g: w - 0.5 * g, params, grads), x, y)

    run = jax.jit(jax.value_and_grad(after))
    first, slope = run(feedback)
    assert run(jax.tree.map(lambda b, s: b - 0.1 * s, feedback, slope))[0] < first
