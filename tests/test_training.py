"""The engaged step and the mirror step: what they change, compilation, donation, loops, and several devices."""

import copy
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import angle, normal
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from marks import some_slow

import wmkp

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
SIZES = (6, 32, 24, 5)
DEVICES = 4


def network(seed=0):
    return [
        {"w": normal(seed + i, m, n) / math.sqrt(m), "b": np.zeros(n, np.float32)}
        for i, (m, n) in enumerate(itertools.pairwise(SIZES))
    ]


def batches(count, size=8):
    return normal(10, count, size, SIZES[0]), normal(11, count, size, SIZES[-1])


def batch(i=0, size=8):
    return jax.tree.map(lambda a: a[i], batches(i + 1, size))


def forward(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, model_state, batch, key):
    x, target = batch
    return jnp.mean((forward(params, x) - target) ** 2), (model_state, {})


OPTIMIZER = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))
MIRROR = wmkp.weight_mirror("gaussian", num_samples=4000, rate=0.1, start=0)
RULES = {
    "bp": wmkp.backprop(),
    "fa": wmkp.feedback_alignment(),
    "ss": wmkp.sign_symmetry(),
    "kp": wmkp.kolen_pollack(),
    "wm": MIRROR,
    "mkp": wmkp.mirrored_kolen_pollack("gaussian", num_samples=100, rate=0.1, start=0),
}


def make(rule, loss=loss_fn, tx=OPTIMIZER, **options):
    return wmkp.make_steps(loss, rule, tx, network(), batch(), **options)


@functools.cache
def shared(rule):
    """The steps of one rule, compiled once for all tests."""
    return make(rule)


def weights(tree):
    return [layer["w"] for layer in tree]


# --- what the steps change --------------------------------------------------------------------------------------------


def test_engaged_step_is_the_rule_and_the_optimizer():
    """An engaged step gives the same state as value_and_grad and optax by hand."""
    rule, steps = RULES["kp"], shared(RULES["kp"])
    state = steps.init(KEY, network())
    assert int(state.step) == 0
    chex.assert_trees_all_equal(state.params, network())
    params, feedback = network(), jax.tree.map(np.asarray, state.feedback)
    assert weights(feedback)[0] is None
    opt, opt_b = OPTIMIZER.init(params), OPTIMIZER.init(feedback)
    gradient = wmkp.value_and_grad(lambda p, b: loss_fn(p, None, b, None)[0], rule)

    @jax.jit
    def by_hand(params, feedback, opt, opt_b, batch):
        loss, (grads, signal) = gradient(params, feedback, batch)
        change, opt = OPTIMIZER.update(grads, opt, params)
        params = optax.apply_updates(params, change)
        change, opt_b = OPTIMIZER.update(signal, opt_b, feedback)
        feedback = optax.apply_updates(feedback, change)
        return loss, params, feedback, opt, opt_b

    for i in range(3):
        state, metrics = steps.engaged_step(state, batch(i))
        loss, params, feedback, opt, opt_b = by_hand(params, feedback, opt, opt_b, batch(i))
        assert set(metrics) == {"loss"} and float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        chex.assert_trees_all_close((state.params, state.feedback), (params, feedback), rtol=1e-5, atol=1e-6)
    assert int(state.step) == 3


@pytest.mark.parametrize("name", ["kp", "wm"])
def test_mirror_step_changes_b_alone_and_only_where_the_rule_mirrors(name):
    steps = shared(RULES[name])
    state = steps.init(KEY, network())
    before = jax.tree.map(jnp.copy, state)
    state, metrics = steps.mirror_step(state)
    assert int(state.mirrored) == 1
    own = {"feedback": None, "mirrored": None, "key": None}
    mirrored = wmkp.matrix_angles(state.params, state.feedback) if name == "wm" else {}
    assert set(metrics.get("lag", {})) == set(mirrored)
    chex.assert_trees_all_equal(state._replace(**own), before._replace(**own))
    assert not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(before.key))
    if name != "wm":
        chex.assert_trees_all_equal(state.feedback, before.feedback)
        return
    # The calibrated update moves B a tenth of the way to an estimate of W^T.
    for k in (1, 2):
        w, old, new = (np.asarray(weights(t)[k]) for t in (before.params, before.feedback, state.feedback))
        estimate = old + (new - old) / 0.1
        law = math.degrees(math.atan(math.sqrt(SIZES[k] / 4000)))
        assert angle(estimate, w) == pytest.approx(law, abs=1.5)
        assert np.vdot(estimate, w) / np.vdot(w, w) == pytest.approx(1, abs=0.05)


def test_mirror_step_with_an_update_of_its_own():
    """``mirror_optimizer`` replaces the calibrated update: B <- B + eta_B (signal - decay B), with signal = W^T
    exactly.
    """
    rule = wmkp.weight_mirror("orthogonal", num_samples=96, start=0)  # a common multiple of the widths
    steps = make(rule, mirror_optimizer=wmkp.updates.weight_mirror(0.3, 0.5))
    state = steps.init(KEY, network())
    before = jax.tree.map(np.asarray, state.feedback)
    state, _ = steps.mirror_step(state)
    for w, old, new in zip(weights(network())[1:], weights(before)[1:], weights(state.feedback)[1:], strict=True):
        np.testing.assert_allclose(new, old + 0.3 * (w - 0.5 * old), atol=1e-5)
    period = steps.init(KEY, network(), mirror_steps=2).feedback  # several mirror steps before training
    for w, old, new in zip(weights(network())[1:], weights(before)[1:], weights(period)[1:], strict=True):
        np.testing.assert_allclose(new, 0.85**2 * old + 0.3 * (1 + 0.85) * w, atol=1e-5)
    make(rule, mirror_optimizer=wmkp.updates.weight_mirror(0.0, 0.5))  # a rate of zero is allowed


def test_nothing_is_kept_of_the_half_of_product_feedback_that_is_fixed():
    state = jax.eval_shape(make(wmkp.product_feedback_alignment()).init, KEY, network())
    momentum = [part.shape for part in jax.tree.leaves(state.feedback_opt_state)]
    assert momentum == [entry.b.shape for entry in weights(state.feedback)[1:]]


def test_rules_by_path():
    """Each projection has its own rule. An engaged step trains only Kolen-Pollack's B, a mirror step only the mirror's
    B.
    """
    steps = make({"1/w": wmkp.kolen_pollack(), "2/w": MIRROR, ".*": wmkp.backprop()})
    state = steps.init(KEY, network())
    start = jax.tree.map(np.asarray, state.feedback)
    assert weights(start)[0] is None
    engaged, _ = steps.engaged_step(jax.tree.map(jnp.copy, state), batch())
    mirrored, _ = steps.mirror_step(state)
    changed = [
        [not np.array_equal(weights(s.feedback)[k], weights(start)[k]) for k in (1, 2)] for s in (engaged, mirrored)
    ]
    assert changed == [[True, False], [False, True]]


def test_clipping_scales_b_with_w_and_leaves_local_losses_alone():
    """``clip_norm`` limits the length of W's step, and Kolen-Pollack's B moves as W does.

    The signals of a rule with local losses are not clipped.
    """
    tx = optax.sgd(0.1)
    steps = make(wmkp.kolen_pollack(), tx=tx, clip_norm=0.01)
    state = steps.init(KEY, network())
    before = jax.tree.map(np.asarray, (state.params, state.feedback))
    state, _ = steps.engaged_step(state, batch())
    moved, moved_b = jax.tree.map(np.subtract, (state.params, state.feedback), before)
    norm = math.sqrt(sum(np.sum(np.square(w)) for w in jax.tree.leaves(moved)))
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)
    for k in (1, 2):
        b = weights(moved_b)[k]
        np.testing.assert_allclose(b, weights(moved)[k], rtol=0, atol=1e-7)
    found = []
    for clip_norm in (None, 0.01):
        steps = make(wmkp.activity_mirror(), tx=tx, clip_norm=clip_norm)
        found.append(steps.engaged_step(steps.init(KEY, network()), batch())[0].feedback)
    chex.assert_trees_all_close(*found, rtol=1e-6)


# --- before training --------------------------------------------------------------------------------------------------


def test_mirrored_start():
    """With ``start="mirror"``, B equals W after one mirror step before training, and stays equal without more
    mirroring.
    """
    steps = make(wmkp.kolen_pollack(start="mirror"))
    state = steps.init(KEY, network())  # this rule asks for a period of one step
    for k in (1, 2):
        np.testing.assert_allclose(weights(state.feedback)[k], weights(network())[k], atol=1e-5)
    for i in range(3):
        state, _ = steps.engaged_step(state, batch(i))
    before = jax.tree.map(jnp.copy, state.feedback)
    state, metrics = steps.mirror_step(state)
    assert metrics == {}
    chex.assert_trees_all_equal(state.feedback, before)
    assert all(float(a) < 1e-3 for a in wmkp.matrix_angles(state.params, state.feedback).values())
    assert not np.allclose(weights(state.params)[1], weights(network())[1], atol=1e-3), "W must have learned"
    # With mirror_steps=0, B is the random B.
    random = make(wmkp.kolen_pollack()).init(KEY, network())
    skipped = steps.init(KEY, network(), mirror_steps=0)
    chex.assert_trees_all_equal(skipped.feedback, random.feedback)
    assert float(wmkp.matrix_angles(network(), skipped.feedback)["1/w"]) > 45


def test_init_depends_on_its_key_and_keeps_what_it_was_given():
    steps = shared(MIRROR)
    params = jax.tree.map(jnp.asarray, network())
    one, same, other = (steps.init(jax.random.key(k), params, mirror_steps=1) for k in (0, 0, 1))
    chex.assert_trees_all_equal(one.feedback, same.feedback)
    assert not np.array_equal(weights(one.feedback)[1], weights(other.feedback)[1])
    chex.assert_trees_all_equal(params, network())


def test_errors():
    for name in ("bp", "kp"):
        with pytest.raises(ValueError, match=r"mirror_steps.*no rule here has a mirror mode"):
            shared(RULES[name]).init(KEY, network(), mirror_steps=1)
    with pytest.raises(ValueError, match="mirror_steps must be an integer of at least 0 .*; got -1"):
        shared(MIRROR).init(KEY, network(), mirror_steps=-1)
    # An optimizer that breaks eq. 14 is an error under Kolen-Pollack, and under no other rule.
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    with pytest.raises(ValueError, match="Kolen-Pollack"):
        make(RULES["kp"], tx=clipped).init(KEY, network())
    make(RULES["fa"], tx=clipped).init(KEY, network())

    def transports(params, model_state, batch, key):
        w = jnp.tanh(params[0]["w"])
        return jnp.mean((batch[0] + params[0]["b"][:6]) @ w), (None, {})

    with pytest.raises(wmkp.WeightTransportError, match="'0/w'"):
        make(RULES["fa"], loss=transports)


# --- compiled once, donated, in loops ---------------------------------------------------------------------------------


def test_compiled_once():
    """Each step is traced and compiled once, and compiles nothing besides itself."""
    traces = compilations = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return loss_fn(*args)

    def listen(event, seconds, **_):
        nonlocal compilations
        compilations += event.endswith("backend_compile_duration")

    steps = make(RULES["mkp"], loss=counted)
    data = [jax.tree.map(jnp.asarray, batch(i)) for i in range(4)]
    state = steps.init(KEY, network())
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state, _ = steps.engaged_step(state, data[0])
        state, _ = steps.mirror_step(state)
        first = traces
        for i in range(3):
            state, _ = steps.engaged_step(state, data[i])
            state, _ = steps.mirror_step(state)
    finally:
        jax.monitoring.clear_event_listeners()
    assert compilations == 2
    fresh = steps.init(jax.random.key(1), jax.tree.map(jnp.asarray, network(5)))
    steps.mirror_step(steps.engaged_step(fresh, data[3])[0])
    assert traces == first
    assert steps.engaged_step._cache_size() == 1
    assert steps.mirror_step._cache_size() == 1
    steps.engaged_step(steps.init(KEY, network()), batch())  # NumPy arrays are traced as JAX arrays are
    weak = jax.tree.map(lambda w: jnp.full(w.shape, 0.5), network())  # jnp.full makes weak types, as in a LayerScale
    assert all(w.aval.weak_type for w in jax.tree.leaves(weak))
    steps.engaged_step(steps.init(KEY, weak), batch())
    assert traces == first


@pytest.mark.filterwarnings("error")
def test_state_is_donated():
    """Every buffer of the old state is donated. No buffer that the caller holds is."""
    params, key = jax.tree.map(jnp.asarray, network()), jax.random.key(3)
    model_state = {"mean": jnp.zeros(3)}
    mine = jax.tree.map(jnp.asarray, batch())

    def loss(params, model_state, batch, key):
        return loss_fn(params, None, batch, key)[0], ({"mean": model_state["mean"] + 1}, {})

    steps = make(RULES["mkp"], loss=loss, model_state=model_state)
    state = steps.init(key, params, model_state)
    for step in (lambda s: steps.engaged_step(s, mine), steps.mirror_step, lambda s: steps.engaged_step(s, mine)):
        old = state
        state, metrics = step(old)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, metrics)))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(old.params[0]["w"])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, key, model_state, mine)))
    np.testing.assert_array_equal(state.model_state["mean"], 2)


def test_steps_inside_scan():
    """An epoch of engaged and mirror steps in one scan equals the steps one by one."""
    steps, count = shared(RULES["mkp"]), 4

    def both(state, batch):
        state, metrics = steps.engaged_step(state, batch)
        state, change = steps.mirror_step(state)
        return state, {**metrics, **change}

    scanned, history = jax.jit(lambda s, b: lax.scan(both, s, b))(steps.init(KEY, network()), batches(count))
    state, history = steps.init(KEY, network()), jax.tree.map(np.asarray, history)
    for i in range(count):
        state, metrics = both(state, jax.tree.map(lambda a, i=i: a[i], batches(count)))
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], history), metrics, rtol=1e-4)
    chex.assert_trees_all_close(scanned._replace(key=None), state._replace(key=None), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(jax.random.key_data(scanned.key), jax.random.key_data(state.key))


def test_examples_may_be_shapes():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (network(), batch()))
    by_shape = wmkp.make_steps(loss_fn, RULES["kp"], OPTIMIZER, *shapes)
    state = by_shape.init(KEY, network())
    ours, theirs = (jax.make_jaxpr(steps.engaged_step)(state, batch()) for steps in (by_shape, shared(RULES["kp"])))
    assert str(ours) == str(theirs)


# --- what the loss is given -------------------------------------------------------------------------------------------


def test_key_and_model_state_are_threaded():
    """Dropout differs at each step, a running mean goes from step to step, and the loss's metrics are returned."""

    def loss(params, model_state, batch, key):
        x, target = batch
        kept = jax.random.bernoulli(key, 0.5, (SIZES[1],))
        h = jnp.tanh(x @ params[0]["w"]) * kept
        h = jnp.tanh(h @ params[1]["w"])
        mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x, 0)
        metrics = {"kept": jnp.sum(kept), "draw": jnp.sum(kept * jnp.arange(SIZES[1]))}
        return jnp.mean((h @ params[2]["w"] - target) ** 2), ({"mean": mean}, metrics)

    start = {"mean": np.zeros(SIZES[0], np.float32)}
    steps = make(RULES["fa"], loss=loss, tx=optax.sgd(0.0), model_state=start)
    state, expected, draws = steps.init(KEY, network(), start), np.zeros(SIZES[0]), []
    for i in range(5):
        state, metrics = steps.engaged_step(state, batch(i))
        assert set(metrics) == {"loss", "kept", "draw"}
        draws.append(int(metrics["draw"]))
        expected = 0.9 * expected + 0.1 * batch(i)[0].mean(0)
        np.testing.assert_allclose(state.model_state["mean"], expected, rtol=1e-5, atol=1e-6)
    assert len(set(draws)) == 5
    # The same key gives the same draw.
    _, again = steps.engaged_step(steps.init(KEY, network(), start), batch())
    assert int(again["draw"]) == draws[0]


def test_batch_statistics_are_differentiated_as_in_the_loss():
    """The loss at a step sees the model state that the step before returned."""

    def loss(params, model_state, batch, key):
        x, target = batch
        value = jnp.mean((forward(params, x - model_state) - target) ** 2)
        return value, (model_state + 1, {})

    steps = make(RULES["fa"], loss=loss, tx=optax.sgd(0.0), model_state=np.float32(0))
    state, alone = steps.init(KEY, network(), np.float32(0)), jax.jit(loss)
    for i in range(3):
        state, metrics = steps.engaged_step(state, batch())
        expected, _ = alone(network(), np.float32(i), batch(), None)
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-4)


# --- over devices -----------------------------------------------------------------------------------------------------


def over_devices(how, step):
    """Run ``step`` over four devices. Inputs and outputs have a leading axis of devices."""
    if how == "pmap":
        return jax.pmap(step, axis_name="d", devices=jax.devices()[:DEVICES])
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("d",))
    vma = how == "shard_map, vma"
    # With the check, results must be equal on all devices. Without it, each device's own result is compared.
    out_specs = P() if vma else P("d")

    def one(state, *batch):
        out = step(state, *jax.tree.map(lambda a: a[0], batch))
        return out if vma else jax.tree.map(lambda a: a[None], out)

    @jax.jit
    def sharded(states, *batch):
        state, specs = jax.tree.map(lambda a: a[0], states), (P(), *[P("d")] * len(batch))
        out = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=vma)(state, *batch)
        return replicate(out) if vma else out

    return sharded


@jax.jit
def replicate(tree):
    return jax.tree.map(lambda a: jnp.stack([a] * DEVICES), tree)


HOW = ["pmap", "shard_map, vma", "shard_map, no vma"]


def split(batch):
    return jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), batch)


@functools.cache
def on_one_device():
    """Params, feedback and loss after each of two engaged steps."""
    steps, found = shared(RULES["kp"]), []
    state = steps.init(KEY, network())
    for i in range(2):
        state, metrics = steps.engaged_step(state, batch(i, 16))
        found.append(jax.tree.map(np.asarray, (state.params, state.feedback, metrics["loss"])))
    return found, np.asarray(jax.random.key_data(state.key))


@pytest.mark.parametrize("how", some_slow(HOW, HOW[:1]))
def test_devices_together_equal_one(how):
    """Gradients and B's signals are averaged: four devices with a quarter of the batch each equal one device
    with all.
    """
    expected, key = on_one_device()
    steps = make(RULES["kp"], axis_name="d")
    states, step = replicate(steps.init(KEY, network())), over_devices(how, steps.engaged_step)
    for i in range(2):
        states, metrics = step(states, split(batch(i, 16)))
        found = jax.tree.map(np.asarray, (states.params, states.feedback, metrics["loss"]))
        for device in range(DEVICES):
            mine = jax.tree.map(lambda a, d=device: a[d], found)
            chex.assert_trees_all_close(mine, expected[i], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states.step, 2)
    np.testing.assert_array_equal(np.asarray(jax.random.key_data(states.key))[1], key)


@pytest.mark.parametrize("how", some_slow(HOW, HOW[1:]))
def test_model_state_is_averaged_and_each_device_draws_its_own(how):
    def loss(params, model_state, batch, key):
        draw = jax.random.uniform(key)
        value, _ = loss_fn(params, None, batch, key)
        alike = {"count": model_state["count"] + 1, "key": jax.random.fold_in(model_state["key"], 1)}
        return value, ({"mean": jnp.mean(batch[0], 0), **alike}, {"draw": draw, "square": draw**2})

    start = {"mean": np.zeros(SIZES[0], np.float32), "count": np.int32(0), "key": jax.random.key(3)}
    steps = make(RULES["kp"], loss=loss, model_state=start, axis_name="d")
    step = over_devices(how, steps.engaged_step)
    states, metrics = step(replicate(steps.init(KEY, network(), start)), split(batch(0, 16)))
    np.testing.assert_array_equal(states.model_state["count"], 1)
    for device in range(DEVICES):
        np.testing.assert_allclose(states.model_state["mean"][device], batch(0, 16)[0].mean(0), rtol=1e-5, atol=1e-6)
    assert float(metrics["square"][0] - metrics["draw"][0] ** 2) > 1e-3, "one draw on all devices"
    states, _ = step(states, split(batch(1, 16)))
    np.testing.assert_array_equal(states.model_state["count"], 2)
    key = jax.random.fold_in(jax.random.fold_in(start["key"], 1), 1)
    np.testing.assert_array_equal(jax.random.key_data(states.model_state["key"])[-1], jax.random.key_data(key))


@pytest.mark.parametrize("how", some_slow(HOW, HOW[1:]))
def test_mirror_step_over_devices(how):
    """Each device draws its own noise and the signals are averaged, as accurate as one device with all samples."""
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(6, 128)), "w": rng.normal(size=(128, 160)) / math.sqrt(128)}
    params = jax.tree.map(np.float32, params)

    def loss(params, model_state, batch, key):
        return jnp.mean(jnp.tanh(batch @ params["first"]) @ params["w"]), (None, {})

    rule = wmkp.weight_mirror("gaussian", num_samples=64, rate=1.0, start=0)
    steps = wmkp.make_steps(loss, rule, OPTIMIZER, params, np.zeros((3, 6), np.float32), axis_name="d")
    states, _ = over_devices(how, steps.mirror_step)(replicate(steps.init(KEY, params)))
    b = np.asarray(states.feedback["w"])
    for device in range(1, DEVICES):
        np.testing.assert_array_equal(b[0], b[device])
    law = math.degrees(math.atan(math.sqrt(128 / (DEVICES * 64))))
    assert angle(b[0], params["w"]) == pytest.approx(law, abs=1)
    assert np.vdot(b[0], params["w"]) / np.vdot(params["w"], params["w"]) == pytest.approx(1, abs=0.06)


def test_steps_under_scan_inside_shard_map():
    """Both steps run in a scan on every device, as in the experiments."""
    many = make(MIRROR, axis_name="d")
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("d",))

    def epoch(state, batches):
        def both(state, batch):
            state, metrics = many.engaged_step(state, batch)
            return many.mirror_step(state)[0], metrics

        return lax.scan(both, state, batches)

    data = batches(3, 16)
    run = jax.jit(jax.shard_map(epoch, mesh=mesh, in_specs=(P(), P(None, "d")), out_specs=P()))
    state, metrics = run(many.init(KEY, network()), data)
    assert metrics["loss"].shape == (3,) and int(state.step) == 3
    expected, _ = jax.jit(loss_fn)(network(), None, jax.tree.map(lambda a: a[0], data), None)
    assert float(metrics["loss"][0]) == pytest.approx(float(expected), rel=1e-5)
    assert all(float(a) < 75 for a in wmkp.matrix_angles(state.params, state.feedback).values())


def test_a_mirrored_start_is_exact_whatever_optimizer_mirrors_later():
    rule = {"^1/": wmkp.kolen_pollack(start="mirror"), ".*": wmkp.weight_mirror(num_samples=4, start=0)}
    steps = make(rule, mirror_optimizer=wmkp.updates.weight_mirror(0.1, 1.0))
    state = steps.init(KEY, network())
    np.testing.assert_allclose(weights(state.feedback)[1], weights(network())[1], atol=1e-5)
    assert not np.allclose(weights(state.feedback)[2], weights(network())[2], atol=0.1)


def test_steps_can_be_copied_and_name_a_wrong_keyword():
    steps = shared(RULES["kp"])
    again = copy.deepcopy(steps.engaged_step)
    state, _ = again(steps.init(KEY, network()), batch(0))
    assert int(state.step) == 1
    with pytest.raises(TypeError, match="lr"):
        steps.engaged_step(steps.init(KEY, network()), batch(0), lr=0.1)


def test_a_mirrored_start_is_exact_in_bfloat16_too():
    """The first estimate replaces B, so no part of the random B and no rounding of it remains."""

    def loss_fn(params, model_state, x, key):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params[0]) @ params[1])), (model_state, {})

    params = [normal(i, 16, 16).astype(jnp.bfloat16) for i in range(2)]
    x = np.ones((4, 16), jnp.bfloat16)
    steps = wmkp.make_steps(loss_fn, wmkp.kolen_pollack(start="mirror"), optax.sgd(0.1), params, x)
    state = steps.init(jax.random.key(2), params)
    assert wmkp.matrix_angles(state.params, state.feedback)["1"] < 0.01


NUMPYS_RATES = {
    "0|1": wmkp.weight_mirror(num_samples=4, rate=np.float64(0.1)),
    "2": wmkp.alignment(amplitude=1.0, decay=1.0, rate=np.float64(0.1), num_samples=4),
    "3": wmkp.activity_mirror(rate=np.float64(0.1)),
}


def test_a_rate_of_numpys_leaves_b_in_its_dtype():
    """A NumPy rate keeps B's dtype for a leaky average, a loss on noise and a loss on activity."""
    params = [normal(i, 16, 16).astype(jnp.bfloat16) for i in range(4)]

    def loss(params, model_state, x, key):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x), (model_state, {})

    x = np.ones((4, 16), jnp.bfloat16)
    steps = wmkp.make_steps(loss, NUMPYS_RATES, optax.sgd(0.1), params, x)
    state = jax.eval_shape(steps.init, KEY, params)
    state = jax.eval_shape(lambda state: steps.mirror_step(steps.engaged_step(state, x)[0])[0], state)
    assert [b.dtype for b in state.feedback[1:]] == [jnp.bfloat16] * 3
