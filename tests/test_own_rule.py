"""User-written rules: signals, errors, noise and optimizers of B, compared with NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import jitted
import numpy as np
import optax
import pytest
from arrays import drawn_feedback
from marks import some_slow

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
    """Return W's gradients and B's signals when ``error`` changes the errors that go back through B and C."""
    h, k, e = forward()
    dk = (1 - k**2) * (error(e) @ C.T)
    dh = (1 - h**2) * (error(dk) @ B.T)
    return {"a": X.T @ dh, "b": h.T @ dk, "c": k.T @ e}, {"b": h.T @ error(dk), "c": k.T @ error(e)}


@in_float64
def test_an_error_is_made_coarse_on_its_way_back():
    """``error`` rounds the delta that goes back through B, or through W under backprop.

    W's own gradient uses the unrounded delta. Kolen-Pollack's signal for B uses the rounded one.
    """
    rule = wmkp.kolen_pollack()._replace(error=coarse)
    feedback = drawn_feedback(rule, loss, PARAMS, X, T)
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
    feedback = drawn_feedback(rule, loss, PARAMS, X, T)
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
    """The signal of B in a scan is a mean over its uses, and sees x, u, delta and B at each step.

    The gradients of W still come from errors sent back through B.
    """

    def recurrent(p, xs, t):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["w"]), None), jnp.zeros((7, 5)), xs)
        return jnp.sum((h @ p["out"] - t) ** 2) / 2

    params = {"in": normal(0, 4, 5) / 2, "w": normal(1, 5, 5) / 2, "out": normal(2, 5, 3)}
    xs, t = normal(3, 6, 7, 4), normal(4, 7, 3)
    see = lambda s: (s.outer(s.x, s.u - 2 * s.delta) / s.samples + s.b) / s.uses
    init = wmkp.feedback_alignment().init
    rule = wmkp.Rule("mine", init, lambda w, b: b, see)
    feedback = drawn_feedback(rule, recurrent, params, xs, t)
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
    """Return a B with two arrays of floats, one of them fixed, and constants that are not floats."""
    q, p = jax.random.split(key)
    return {
        "Q": jax.random.normal(q, (projection.fan_in, 2)),
        "P": wmkp.Fixed(jax.random.normal(p, (2, projection.fan_out))),
        "sign": jnp.sign(jax.random.normal(p, (projection.fan_in, 1))).astype(jnp.int8),
        "on": jnp.array([True, False]),
        "key": key,
    }


def carry(w, b):
    drawn = jax.random.normal(b["key"], w.shape)
    return (b["sign"] * b["Q"] * (1 + b["on"])) @ b["P"].array + 0.01 * drawn


def of_q(b, signal):
    """Convert a signal in W's layout into Q's layout with NumPy."""
    sign, on, p = (np.asarray(x) for x in (b["sign"], b["on"], b["P"].array))
    return sign * (signal @ p.T) * (1 + on)


MINE = lambda s: {
    "Q": s.b["sign"] * (s.x.T @ s.error @ s.b["P"].array.T) * (1 + s.b["on"]),
    **dict.fromkeys(("P", "sign", "on", "key")),
}
STEP = lambda p, m, batch, key: (loss(p, *batch), (m, {}))


def alike(a, b, atol=0.0):
    """Check that two pytrees are equal, including random keys."""
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(data(x), data(y), rtol=0, atol=atol)


@in_float64
def test_a_b_of_several_arrays_learns_in_its_own_structure():
    """A B of several arrays learns, and ``make_steps`` gives the same B as updates by hand.

    Kolen-Pollack's signal goes through ``backward``. A user-written signal may have B's structure.

    Fixed parts and constants stay bit-for-bit the same under weight decay.
    """
    h, k, e = forward()
    decayed = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    params = jax.tree.map(jnp.asarray, PARAMS)
    for signal in (wmkp.hebbian, MINE):
        rule = wmkp.Rule("rank two", rank_two, carry, signal)
        steps = wmkp.make_steps(STEP, rule, decayed, params, (X, T))
        state = steps.init(KEY, params)
        b = jax.tree.map(jnp.copy, state.feedback)
        tx, gradient = wmkp.updates.kolen_pollack(decayed), wmkp.value_and_grad(loss, rule)

        @jax.jit
        def signal_and_change(params, b, tx=tx, gradient=gradient):
            s = gradient(params, b, X, T)[1][1]
            return s, tx.update(s, tx.init(b), b)[0]

        s, change = signal_and_change(params, b)
        np.testing.assert_allclose(s["c"]["Q"], of_q(b["c"], k.T @ e), atol=1e-12)
        assert s["c"]["sign"] is s["c"]["on"] is s["c"]["key"] is None
        by_hand = jax.tree.map(lambda b, c: b if c is None else b + c, b, change)
        state, _ = steps.engaged_step(state, (X, T))
        alike(state.feedback, by_hand, 1e-12)
        np.testing.assert_allclose(by_hand["c"]["Q"], b["c"]["Q"] - 0.1 * (s["c"]["Q"] + 0.1 * b["c"]["Q"]), atol=1e-12)
        alike({**by_hand["c"], "Q": None}, {**b["c"], "Q": None})
    rules = {"b": rule._replace(optimizer=optax.adamw(0.1, weight_decay=0.1)), ".*": wmkp.weight_mirror("gaussian")}
    steps = wmkp.make_steps(STEP, rules, decayed, params, (X, T))
    state = steps.init(KEY, params)
    b = jax.tree.map(jnp.copy, state.feedback)
    state, _ = steps.mirror_step(steps.engaged_step(state, (X, T))[0])
    alike({**state.feedback["b"], "Q": None}, {**b["b"], "Q": None})
    assert np.abs(state.feedback["b"]["Q"] - b["b"]["Q"]).min() > 0.05
    with pytest.raises(ValueError, match="mirror mode needs a B that is one array"):
        wmkp.init_feedback(KEY, rule._replace(mirror=wmkp.Mirror()), loss, PARAMS, X, T)


def test_what_is_watched_of_a_b_of_several_arrays():
    """Delta angles need no signal. Angles are computed without noise, from the weights as they are."""
    rule = wmkp.Rule("rank two", rank_two, carry, MINE, noise=0.1)
    feedback = jitted.init_feedback(KEY, rule, loss, PARAMS, X, T)
    found = jax.jit(lambda p, b: wmkp.delta_angles(loss, rule, p, b, X, T))(PARAMS, feedback)
    assert found["c"] == 0 and 0 < found["b"] < 180

    @jax.jit
    def both(params, feedback):
        carried = {name: b if b is None else carry(params[name], b) for name, b in feedback.items()}
        return wmkp.matrix_angles(params, feedback, rule), wmkp.matrix_angles(params, carried)

    alike(*both(PARAMS, feedback), 1e-4)


# --- many devices, parts of a batch, and checkpoints ------------------------------------------------------------------

WIDE = {"a": normal(0, 4, 8) / 2, "b": normal(1, 8, 8) / 2, "c": normal(2, 8, 4) / 2}
WIDE = {name: w.astype(np.float32) for name, w in WIDE.items()}
DATA = tuple(normal(i, 8, 4).astype(np.float32) for i in (3, 4))
TX = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))


def mean_loss(p, m, batch, key):
    return jnp.mean((net(p, batch[0]) - batch[1]) ** 2), (m, {})


def everything(random):
    """Return a rule that sets every field, with a B of several arrays. ``random`` adds noise and a random error."""
    error = lambda d, key: d * jax.random.rademacher(key, d.shape, d.dtype) if random else jnp.abs(d)
    seen = lambda s: (
        s.outer(s.x + s.noise, s.error) if random else s.outer(s.x, s.error) - s.outer(s.x, s.u) / s.samples / 8
    )
    signal = lambda s: {"Q": s.b["sign"] * seen(s), "sign": None, "key": None}

    def init(key, projection, w):
        return {
            "Q": jax.random.normal(key, w.shape),
            "sign": jnp.sign(jax.random.normal(key, w.shape)).astype(jnp.int8),
            "key": key,
        }

    return wmkp.Rule(
        "all mine",
        init,
        lambda w, b: b["sign"] * b["Q"] + 0.01 * jax.random.normal(b["key"], w.shape),
        signal,
        optax.sgd(0.05, momentum=0.5),
        error,
        0.1 * random,
    )


def two_steps(rule, place=lambda x: x, wrap=lambda step: jax.jit(step), tx=TX, **options):
    """Take two engaged steps and return the state. ``wrap`` may save and restore the state before each step."""
    params, data = place(WIDE), place(DATA)
    steps = wmkp.make_steps(mean_loss, rule, tx, params, data, **options)
    state, step = steps.init(KEY, params), wrap(lambda s, b: steps.engaged_step(s, b)[0])
    return step(step(state, data), data)


@functools.cache
def on_one_device(random):
    return two_steps(everything(random))


@pytest.mark.parametrize("how", some_slow(["mesh", "fsdp", "shard_map", "explicit"], {"mesh"}))
def test_a_rule_of_ones_own_over_devices(how):
    """Four devices give the same result as one. On a mesh this holds with noise too."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    if how == "shard_map":
        one = lambda step: jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec())
        )
        found, random = two_steps(everything(False), wrap=one, axis_name="d"), False
    elif how == "explicit":
        explicit = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4])
        place = lambda tree: jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(explicit, PartitionSpec(None, "d"))), tree
        )
        random = True
        with jax.set_mesh(explicit):
            found = two_steps(everything(True), place)
    else:
        found, random = two_steps(everything(True), mesh=mesh, fsdp=how == "fsdp"), True
        divided = found.feedback["b"]["sign"].sharding.spec != PartitionSpec()
        assert divided == (how == "fsdp")
    alike(jax.device_get(found), jax.device_get(on_one_device(random)), 1e-5)


def test_devices_of_a_map_draw_noise_of_their_own():
    """Each device draws its own noise, so the mean of noise^T noise has rank eight. B is equal on all devices."""
    from jax.sharding import Mesh, PartitionSpec

    covariance = lambda s: s.outer(s.noise, s.noise)
    rule = wmkp.Rule("noisy", wmkp.feedback_alignment().init, lambda w, b: b, covariance, optax.sgd(1.0), noise=1.0)
    rule = {"b": rule, ".*": wmkp.feedback_alignment()}
    steps = wmkp.make_steps(mean_loss, rule, TX, WIDE, DATA, axis_name="d")
    state, mesh = steps.init(KEY, WIDE), Mesh(np.array(jax.devices()[:4]), ("d",))
    step = jax.shard_map(
        lambda s, b: steps.engaged_step(s, b)[0].feedback["b"],
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("d")),
        out_specs=PartitionSpec(),  # shard_map checks that B is equal on all devices
    )
    assert np.linalg.matrix_rank(state.feedback["b"] - jax.jit(step)(state, DATA), tol=1e-4) == 8


def test_a_rule_of_ones_own_in_parts_of_a_batch():
    """Two half batches, collected by ``optax.MultiSteps``, give the same update as the whole batch."""
    rule, every = everything(False), lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()
    steps = wmkp.make_steps(mean_loss, rule._replace(optimizer=every(rule.optimizer)), every(TX), WIDE, DATA)
    state = steps.init(KEY, WIDE)
    for half in (slice(4), slice(4, 8)):
        state, _ = steps.engaged_step(state, tuple(x[half] for x in DATA))
    whole = wmkp.make_steps(mean_loss, rule, TX, WIDE, DATA)
    expected, _ = whole.engaged_step(whole.init(KEY, WIDE), DATA)
    alike((state.params, state.feedback), (expected.params, expected.feedback), 1e-6)


def test_a_rule_of_ones_own_after_a_checkpoint(tmp_path):
    """A restored state continues bit-for-bit as the saved one."""
    import orbax.checkpoint as ocp

    def restored(step):
        def save_and_go_on(state, batch):
            with ocp.StandardCheckpointer() as checkpointer:
                path = tmp_path / str(state.step)
                checkpointer.save(path, state)
                checkpointer.wait_until_finished()
                return jax.jit(step)(checkpointer.restore(path, state), batch)

        return save_and_go_on

    alike(two_steps(everything(True), wrap=restored), on_one_device(True))


@in_float64
def test_each_rule_has_an_optimizer_of_its_own():
    """One B is updated by Adam and the other by W's optimizer. The train state holds both optimizer states."""
    rule = {"b": wmkp.kolen_pollack()._replace(optimizer=optax.adam(0.01)), ".*": wmkp.kolen_pollack()}
    step_loss = lambda p, m, batch, key: (loss(p, *batch), (m, {}))
    steps = wmkp.make_steps(step_loss, rule, optax.sgd(0.1), PARAMS, (X, T), clip_norm=1e-3)
    state = steps.init(KEY, jax.tree.map(jnp.asarray, PARAMS))
    B = {name: np.array(state.feedback[name]) for name in "bc"}
    _, (grads, signal) = jitted.value_and_grad(loss, rule)(PARAMS, state.feedback, X, T)
    scale = 1e-3 / np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    state, _ = steps.engaged_step(state, (X, T))
    assert len(state.feedback_opt_state) == 2
    np.testing.assert_allclose(state.feedback["b"], B["b"] - 0.01 * np.sign(signal["b"]), atol=1e-6)
    np.testing.assert_allclose(state.feedback["c"], B["c"] - 0.1 * scale * signal["c"], atol=1e-12)


def test_noise_is_known_to_the_signal_and_another_at_each_use():
    """The signal sees the noise, which differs at each use and depends only on the key. A call without a key fails."""

    def recurrent(p, x):
        step = lambda h, _: (jnp.tanh(x @ p["in"] + 0 * (h @ p["w"])), None)
        return jnp.sum(jax.lax.scan(step, jnp.zeros((4, 3)), None, length=2000)[0] @ p["w"])

    params, x = jax.tree.map(np.float32, ({"in": np.ones((2, 3)), "w": np.eye(3)}, np.zeros((4, 2))))
    power = lambda s: s.outer(s.noise, s.noise) / s.samples / s.uses
    rule = wmkp.Rule("noisy", wmkp.feedback_alignment().init, lambda w, b: b, power, noise=0.5)
    feedback = drawn_feedback(rule, recurrent, params, x)
    gradient = jax.jit(wmkp.value_and_grad(recurrent, rule))
    value, (_, signal) = gradient(params, feedback, x, key=KEY)
    np.testing.assert_allclose(signal["w"], 0.25 * np.eye(3), atol=0.02)
    assert value != 0 and gradient(params, feedback, x, key=KEY)[0] == value
    assert gradient(params, feedback, x, key=jax.random.key(1))[0] != value
    keys = jax.random.split(KEY, 3)
    values = jax.vmap(lambda key: gradient(params, feedback, x, key=key)[0])(keys)
    assert len({float(v) for v in values}) == 3
    with pytest.raises(ValueError, match="noisy has noise in engaged mode: pass key="):
        wmkp.value_and_grad(recurrent, rule)(params, feedback, x)


@in_float64
def test_derivatives_of_derivatives_pass_errors_and_signals():
    """Derivatives of the gradient and of the signal equal finite differences."""
    rule = wmkp.Rule(
        "mine",
        wmkp.feedback_alignment().init,
        lambda w, b: b,
        lambda s: s.outer(s.x, s.u * s.error),
        error=lambda d, k: jnp.tanh(d),
    )
    feedback = drawn_feedback(rule, loss, PARAMS, X, T)
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
    drawn_feedback(rule._replace(transports="weights"), loss, PARAMS, X, T)


def test_a_rule_that_takes_ws_shape_alone_reads_nothing():
    unused = jax.jit(lambda w, b: (w, b * 2))
    rule = wmkp.Rule("mine", wmkp.feedback_alignment().init, lambda w, b: unused(w, b)[1] + jnp.zeros_like(w))
    drawn_feedback(rule, loss, PARAMS, X, T)


def test_signals_see_w_only_where_the_rule_says_so():
    seen = []
    see = lambda s: seen.append(s.w is None) or s.outer(s.x, s.delta)
    for transports in ("nothing", "weights"):
        rule = wmkp.Rule("mine", wmkp.feedback_alignment().init, lambda w, b: b, see, transports=transports)
        feedback = drawn_feedback(rule, loss, PARAMS, X, T)
        jax.eval_shape(wmkp.value_and_grad(loss, rule), PARAMS, feedback, X, T)
    assert set(seen[: len(seen) // 2]) == {True} and set(seen[len(seen) // 2 :]) == {False}


def test_a_signal_of_another_shape_is_refused():
    rule = wmkp.Rule("mine", wmkp.feedback_alignment().init, lambda w, b: b, lambda s: s.x)
    feedback = drawn_feedback(rule, loss, PARAMS, X, T)
    with pytest.raises(ValueError, match=r"rule.signal returned .*\[7, 6\].*synapses.outer"):
        jax.eval_shape(wmkp.value_and_grad(loss, rule), PARAMS, feedback, X, T)
    rule = wmkp.Rule("mine", rank_two, lambda w, b: b["Q"] @ b["P"].array, lambda s: {"Q": s.x})
    feedback = jitted.init_feedback(KEY, rule, loss, PARAMS, X, T)
    with pytest.raises(ValueError, match=r"rule.signal returned .*B's own structure"):
        jax.eval_shape(wmkp.value_and_grad(loss, rule), PARAMS, feedback, X, T)


# --- forward direct feedback ------------------------------------------------------------------------------------------


@in_float64
def test_forward_direct_feedback_learns_the_jacobian():
    """The mean of many estimates is the mean Jacobian over the batch, in direction and size.

    The gradients are those of DFA.
    """
    rule = wmkp.forward_direct_feedback_alignment(rate=0.1)
    feedback = drawn_feedback(rule, loss, PARAMS, X, T)
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
    """B learns at its own rate, independent of W's optimizer, and ends near the Jacobian of the output."""
    rule = wmkp.forward_direct_feedback_alignment(rate=0.02)
    step_loss = lambda p, m, batch, key: (loss(p, *batch), (m, {}))
    params, batch = jax.tree.map(np.float32, (PARAMS, (X, T)))
    steps = wmkp.make_steps(step_loss, rule, optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.0)), params, batch)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: steps.engaged_step(s, batch), state, length=600)[0])
    state = run(steps.init(KEY, params))
    assert np.linalg.norm(state.feedback["c"].array - params["c"]) < 0.3 * np.linalg.norm(params["c"])


def test_what_forward_direct_feedback_cannot_do_is_said():
    rule = wmkp.forward_direct_feedback_alignment()
    feedback = drawn_feedback(rule, loss, PARAMS, X, T)
    traced = lambda fun, *args, **key: jax.eval_shape(lambda *a: wmkp.value_and_grad(fun, rule)(*a, **key), *args)
    with pytest.raises(ValueError, match=r"pass key=jax\.random\.key"):
        traced(loss, PARAMS, feedback, X, T)

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
        feedback = drawn_feedback(rule, recurrent, PARAMS, X[None], T[None])
        traced(recurrent, PARAMS, feedback, X[None], T[None], key=KEY)
