"""User-written rules: signals, errors, noise and optimizers of B, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wmkp

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


def normal(i, *shape):
    return np.random.default_rng(i).normal(size=shape)


def net(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def loss(p, x, t):
    return jnp.sum((net(p, x) - t) ** 2) / 2


PARAMS = {"a": normal(0, 4, 5) / 2, "b": normal(1, 5, 6) / 2, "c": normal(2, 6, 3) / 2}
X, T = normal(3, 7, 4), normal(4, 7, 3)


def coarse(delta, key):
    return jnp.round(4 * delta) / 4


def numpy_coarse(delta):
    return np.round(4 * delta) / 4


def in_float64(f):
    @functools.wraps(f)
    def test(*args, **named):
        with jax.enable_x64(True):
            return f(*args, **named)

    return test


def forward():
    h = np.tanh(X @ PARAMS["a"])
    k = np.tanh(h @ PARAMS["b"])
    return h, k, k @ PARAMS["c"] - T


def backward(B, C, error):
    """W's gradients of a net whose errors go back through B and C, as ``error`` makes them."""
    h, k, e = forward()
    dk = (1 - k**2) * (error(e) @ C.T)
    dh = (1 - h**2) * (error(dk) @ B.T)
    return {"a": X.T @ dh, "b": h.T @ dk, "c": k.T @ e}, {"b": h.T @ error(dk), "c": k.T @ error(e)}


@in_float64
def test_an_error_is_made_coarse_on_its_way_back():
    """Through B, and through W under backprop; W's own gradient keeps delta; Kolen-Pollack's B learns from what it carries."""
    rule = wmkp.kolen_pollack()._replace(error=coarse)
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    _, (grads, signal) = jax.jit(wmkp.value_and_grad(loss, rule))(PARAMS, feedback, X, T)
    expected, learned = backward(*(np.asarray(feedback[name]) for name in "bc"), numpy_coarse)
    for name in "abc":
        np.testing.assert_allclose(grads[name], expected[name], atol=1e-12)
    for name in "bc":
        np.testing.assert_allclose(signal[name], learned[name], atol=1e-12)
    rule = wmkp.backprop()._replace(error=coarse)
    _, (grads, _) = jax.jit(wmkp.value_and_grad(loss, rule))(PARAMS, dict.fromkeys("abc"), X, T)
    expected, _ = backward(PARAMS["b"], PARAMS["c"], numpy_coarse)
    for name in "abc":
        np.testing.assert_allclose(grads[name], expected[name], atol=1e-12)


@in_float64
def test_a_direct_error_is_made_coarse_at_each_projection():
    rule = wmkp.direct_kolen_pollack()._replace(error=coarse)
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    _, (grads, signal) = jax.jit(wmkp.value_and_grad(loss, rule))(PARAMS, feedback, X, T)
    h, k, e = forward()
    B, C = (np.asarray(feedback[name].array) for name in "bc")
    np.testing.assert_allclose(grads["c"], k.T @ e, atol=1e-12)
    np.testing.assert_allclose(grads["b"], h.T @ ((1 - k**2) * (numpy_coarse(e) @ C.T)), atol=1e-12)
    np.testing.assert_allclose(grads["a"], X.T @ ((1 - h**2) * (numpy_coarse(e) @ B.T)), atol=1e-12)
    np.testing.assert_allclose(signal["b"].array, h.T @ numpy_coarse(e), atol=1e-12)
    own = rule._replace(signal=lambda s: 2 * s.outer(s.x, s.error) - s.b, error=None)
    _, (_, signal) = jax.jit(wmkp.value_and_grad(loss, own))(PARAMS, feedback, X, T)
    np.testing.assert_allclose(signal["b"].array, 2 * h.T @ e - B, atol=1e-12)


@in_float64
def test_a_signal_is_a_mean_over_all_uses_in_a_scan():
    """x, u, delta, B and how often there are any, at each step of a recurrent net; and the gradients stay those of B."""

    def recurrent(p, xs, t):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["w"]), None), jnp.zeros((7, 5)), xs)
        return jnp.sum((h @ p["out"] - t) ** 2) / 2

    params = {"in": normal(0, 4, 5) / 2, "w": normal(1, 5, 5) / 2, "out": normal(2, 5, 3)}
    xs, t = normal(3, 6, 7, 4), normal(4, 7, 3)
    see = lambda s: (s.outer(s.x, s.u - 2 * s.delta) / s.samples + s.b) / s.uses
    init = wmkp.feedback_alignment().init
    rule = wmkp.Rule("mine", init, lambda w, b: b, see)
    feedback = wmkp.init_feedback(KEY, rule, recurrent, params, xs, t)
    _, (grads, signal) = jax.jit(wmkp.value_and_grad(recurrent, rule))(params, feedback, xs, t)
    hs = [np.zeros((7, 5))]
    for x in xs:
        hs.append(np.tanh(x @ params["in"] + hs[-1] @ params["w"]))
    error = (hs[-1] @ params["out"] - t) @ np.asarray(feedback["out"]).T
    B, found, dw = np.asarray(feedback["w"]), 0, 0
    for h, after in zip(hs[-2::-1], hs[:0:-1], strict=True):
        delta = (1 - after**2) * error
        found = found + h.T @ (h @ params["w"] - 2 * delta) / 7 + B
        dw = dw + h.T @ delta
        error = delta @ B.T
    np.testing.assert_allclose(grads["w"], dw, atol=1e-12)
    np.testing.assert_allclose(signal["w"], found / 6, atol=1e-12)


def rank_two(key, projection, w):
    q, p = jax.random.split(key)
    return {
        "Q": jax.random.normal(q, (projection.fan_in, 2)),
        "P": wmkp.Fixed(jax.random.normal(p, (2, projection.fan_out))),
    }


@in_float64
def test_a_b_of_several_arrays_learns_in_its_own_structure():
    """Kolen-Pollack's signal goes through ``backward``. A user's signal may have B's structure. Fixed parts stay."""
    carry = lambda w, b: b["Q"] @ b["P"].array
    mine = lambda s: {"Q": s.x.T @ (s.error @ s.b["P"].array.T), "P": None}
    h, k, e = forward()
    found = []
    decayed = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    step_loss = lambda p, m, batch, key: (loss(p, *batch), (m, {}))
    for signal in (wmkp.hebbian, mine):
        rule = wmkp.Rule("rank two", rank_two, carry, signal)
        feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
        _, (_, s) = jax.jit(wmkp.value_and_grad(loss, rule))(PARAMS, feedback, X, T)
        np.testing.assert_allclose(s["c"]["Q"], k.T @ e @ np.asarray(feedback["c"]["P"].array).T, atol=1e-12)
        steps = wmkp.make_steps(step_loss, rule, decayed, PARAMS, (X, T))
        state = steps.init(KEY, jax.tree.map(jnp.asarray, PARAMS))
        before = jax.tree.map(np.array, state.feedback)
        state, _ = steps.engaged_step(state, (X, T))
        np.testing.assert_array_equal(state.feedback["c"]["P"].array, before["c"]["P"].array)
        q, p = before["c"]["Q"], before["c"]["P"].array
        np.testing.assert_allclose(state.feedback["c"]["Q"], q - 0.1 * (k.T @ e @ p.T + 0.1 * q), atol=1e-12)
        found.append(state.feedback)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_delta_angles_ask_for_no_signal():
    """Of a B in its own structure, under a rule with noise: at the weights as they are."""
    mine = lambda s: {"Q": s.x.T @ (s.error @ s.b["P"].array.T), "P": None}
    rule = wmkp.Rule("rank two", rank_two, lambda w, b: b["Q"] @ b["P"].array, mine, noise=0.1)
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    found = wmkp.delta_angles(loss, rule, PARAMS, feedback, X, T)
    assert found["c"] == 0 and 0 < found["b"] < 180


@in_float64
def test_each_rule_has_an_optimizer_of_its_own():
    """Adam for one B, W's own for the other; both states in the train state, and a step is what each makes of its signal."""
    rule = {"b": wmkp.kolen_pollack()._replace(optimizer=optax.adam(0.01)), ".*": wmkp.kolen_pollack()}
    step_loss = lambda p, m, batch, key: (loss(p, *batch), (m, {}))
    steps = wmkp.make_steps(step_loss, rule, optax.sgd(0.1), PARAMS, (X, T), clip_norm=1e-3)
    state = steps.init(KEY, jax.tree.map(jnp.asarray, PARAMS))
    B = {name: np.array(state.feedback[name]) for name in "bc"}
    _, (grads, signal) = wmkp.value_and_grad(loss, rule)(PARAMS, state.feedback, X, T)
    scale = 1e-3 / optax.tree.norm(grads)
    state, _ = steps.engaged_step(state, (X, T))
    assert len(state.feedback_opt_state) == 2
    np.testing.assert_allclose(state.feedback["b"], B["b"] - 0.01 * np.sign(signal["b"]), atol=1e-6)
    np.testing.assert_allclose(state.feedback["c"], B["c"] - 0.1 * scale * signal["c"], atol=1e-12)


def test_noise_is_known_to_the_signal_and_another_at_each_use():
    """One step of a scan gets other noise than the next, one key always the same; without any a call is refused."""

    def recurrent(p, x):
        step = lambda h, _: (jnp.tanh(x @ p["in"] + 0 * (h @ p["w"])), None)
        return jnp.sum(jax.lax.scan(step, jnp.zeros((4, 3)), None, length=2000)[0] @ p["w"])

    params, x = {"in": jnp.ones((2, 3)), "w": jnp.eye(3)}, jnp.zeros((4, 2))
    power = lambda s: s.outer(s.noise, s.noise) / s.samples / s.uses
    rule = wmkp.Rule("noisy", wmkp.feedback_alignment().init, lambda w, b: b, power, noise=0.5)
    feedback = wmkp.init_feedback(KEY, rule, recurrent, params, x)
    gradient = jax.jit(wmkp.value_and_grad(recurrent, rule))
    value, (_, signal) = gradient(params, feedback, x, key=KEY)
    np.testing.assert_allclose(signal["w"], 0.25 * np.eye(3), atol=0.02)
    assert value != 0 and gradient(params, feedback, x, key=KEY)[0] == value
    assert gradient(params, feedback, x, key=jax.random.key(1))[0] != value
    keys = jax.random.split(KEY, 3)
    values = jax.vmap(lambda key: gradient(params, feedback, x, key=key)[0])(keys)
    assert len({float(v) for v in values}) == 3
    with pytest.raises(ValueError, match="noisy has noise in engaged mode: give key="):
        wmkp.value_and_grad(recurrent, rule)(params, feedback, x)


@in_float64
def test_derivatives_of_derivatives_pass_errors_and_signals():
    """Against differences, of both the gradient and the signal."""
    rule = wmkp.Rule(
        "mine",
        wmkp.feedback_alignment().init,
        lambda w, b: b,
        lambda s: s.outer(s.x, s.u * s.error),
        error=lambda d, k: jnp.tanh(d),
    )
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    gradient = jax.jit(lambda p: wmkp.value_and_grad(loss, rule)(p, feedback, X, T)[1])
    along = jax.tree.map(lambda w: normal(9, *w.shape), PARAMS)
    at = lambda t: gradient(jax.tree.map(lambda w, d: w + t * d, PARAMS, along))
    _, change = jax.jvp(at, (0.0,), (1.0,))
    differences = jax.tree.map(lambda a, b: (a - b) / 2e-6, at(1e-6), at(-1e-6))
    for a, b in zip(jax.tree.leaves(change), jax.tree.leaves(differences), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


READING = {
    "W itself": lambda w, b: w,
    "behind stop_gradient": lambda w, b: b + jax.lax.stop_gradient(w),
    "its signs": lambda w, b: jnp.abs(b) * jnp.sign(w),
    "in a jit": lambda w, b: jax.jit(lambda w, b: b * jnp.linalg.norm(w))(w, b),
}


@pytest.mark.parametrize("how", READING)
def test_a_rule_that_reads_w_in_silence_is_found_out(how):
    rule = wmkp.Rule("mine", wmkp.feedback_alignment().init, READING[how])
    with pytest.raises(ValueError, match=r"rule.backward of mine reads W, but rule.transports is 'nothing'"):
        wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    wmkp.init_feedback(KEY, rule._replace(transports="weights"), loss, PARAMS, X, T)


def test_a_rule_that_takes_ws_shape_alone_reads_nothing():
    unused = jax.jit(lambda w, b: (w, b * 2))
    rule = wmkp.Rule("mine", wmkp.feedback_alignment().init, lambda w, b: unused(w, b)[1] + jnp.zeros_like(w))
    wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)


def test_signals_see_w_only_where_the_rule_says_so():
    seen = []
    see = lambda s: seen.append(s.w is None) or s.outer(s.x, s.delta)
    for transports in ("nothing", "weights"):
        rule = wmkp.Rule("mine", wmkp.feedback_alignment().init, lambda w, b: b, see, transports=transports)
        feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
        jax.eval_shape(wmkp.value_and_grad(loss, rule), PARAMS, feedback, X, T)
    assert set(seen[: len(seen) // 2]) == {True} and set(seen[len(seen) // 2 :]) == {False}


def test_a_signal_of_another_shape_is_refused():
    rule = wmkp.Rule("mine", wmkp.feedback_alignment().init, lambda w, b: b, lambda s: s.x)
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    with pytest.raises(ValueError, match=r"rule.signal returned .*\[7, 6\].*synapses.outer"):
        wmkp.value_and_grad(loss, rule)(PARAMS, feedback, X, T)
    rule = wmkp.Rule("mine", rank_two, lambda w, b: b["Q"] @ b["P"].array, lambda s: {"Q": s.x})
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    with pytest.raises(ValueError, match=r"rule.signal returned .*B's own structure"):
        wmkp.value_and_grad(loss, rule)(PARAMS, feedback, X, T)


# --- forward direct feedback ------------------------------------------------------------------------------------------


@in_float64
def test_forward_direct_feedback_learns_the_jacobian():
    """The mean of many estimates is that of the true Jacobian over the batch, in size too; the gradients are DFA's."""
    rule = wmkp.forward_direct_feedback_alignment(rate=0.1)
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    step = wmkp.value_and_grad(loss, rule)
    once = jax.jit(jax.vmap(lambda key: step(PARAMS, feedback, X, T, key=key)[1]))
    grads, signals = once(jax.random.split(KEY, 3000))
    h, k, e = forward()
    jacobian = {"c": PARAMS["c"], "b": np.mean([PARAMS["b"] @ np.diag(1 - row**2) @ PARAMS["c"] for row in k], 0)}
    assert feedback["a"] is None
    for name, expected in jacobian.items():
        found = np.asarray(feedback[name].array - np.asarray(signals[name].array).mean(0))
        cosine = np.vdot(found, expected) / np.linalg.norm(found) / np.linalg.norm(expected)
        assert np.degrees(np.arccos(cosine)) < 3
        assert np.linalg.norm(found - expected) < 0.06 * np.linalg.norm(expected)
    at_b = (1 - k**2) * (e @ np.asarray(feedback["c"].array).T)
    np.testing.assert_allclose(grads["b"][0], h.T @ at_b, rtol=0, atol=1e-12)


def test_forward_direct_feedback_in_steps():
    """B goes by its own rate whatever W's optimizer does, and ends at the output's Jacobian, within its law's noise."""
    rule = wmkp.forward_direct_feedback_alignment(rate=0.02)
    step_loss = lambda p, m, batch, key: (loss(p, *batch), (m, {}))
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), PARAMS)
    batch = jnp.asarray(X, jnp.float32), jnp.asarray(T, jnp.float32)
    steps = wmkp.make_steps(step_loss, rule, optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.0)), params, batch)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: steps.engaged_step(s, batch), state, length=600)[0])
    state = run(steps.init(KEY, params))
    assert np.linalg.norm(state.feedback["c"].array - params["c"]) < 0.3 * np.linalg.norm(params["c"])


def test_what_forward_direct_feedback_cannot_do_is_said():
    rule = wmkp.forward_direct_feedback_alignment()
    feedback = wmkp.init_feedback(KEY, rule, loss, PARAMS, X, T)
    with pytest.raises(ValueError, match=r"pass key=jax\.random\.key"):
        wmkp.value_and_grad(loss, rule)(PARAMS, feedback, X, T)

    @jax.custom_vjp
    def bent(x):
        return jnp.tanh(x)

    bent.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g,))
    by_hand = lambda p, x, t: jnp.sum((bent(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] - t) ** 2)
    with pytest.raises(TypeError, match=r"jax\.custom_jvp, or use direct_kolen_pollack"):
        wmkp.value_and_grad(by_hand, rule)(PARAMS, feedback, X, T, key=KEY)

    def recurrent(p, xs, t):
        tick = lambda h, x: ((new := jnp.tanh(x @ p["a"] + h)), jnp.tanh(new @ p["b"]) @ p["c"])
        return jnp.sum((jax.lax.scan(tick, jnp.zeros((7, 5)), xs)[1] - t) ** 2)

    with pytest.raises(ValueError, match=r"outside of any lax\.scan; use direct_kolen_pollack"):
        feedback = wmkp.init_feedback(KEY, rule, recurrent, PARAMS, X[None], T[None])
        wmkp.value_and_grad(recurrent, rule)(PARAMS, feedback, X[None], T[None], key=KEY)
