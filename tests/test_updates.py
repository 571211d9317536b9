"""The updates of B: optimizers that keep eq. 14 and those that break it, clipping of W and B, and the weight mirror."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import some_slow
from optax import contrib

import wmkp
from wmkp import updates

pytestmark = pytest.mark.usefixtures("quick_compile")

ETA, LAMBDA, STEPS = 0.02, 0.3, 24


def trees(seed=0):
    """Return W's tree and B's tree. B has None where no error goes back (a first layer, biases)."""
    rng = np.random.default_rng(seed)
    shapes = {"dense": (5, 6), "conv": (3, 3, 2, 4)}
    w = {name: {"b": rng.normal(size=s[-1]), "w": rng.normal(size=s)} for name, s in shapes.items()}
    w["a first layer"] = {"b": rng.normal(size=3), "w": rng.normal(size=(4, 3))}
    b = {name: {"b": None, "w": rng.normal(size=s)} for name, s in shapes.items()}
    b["a first layer"] = {"b": None, "w": None}
    return w, b


def float32(tree, size=1.0):
    return jax.tree.map(lambda x: np.float32(size * x), tree)


def like_feedback(tree, feedback):
    """Return ``tree`` in W's structure, with None where ``feedback`` has None."""
    return jax.tree.map(lambda b, x: None if b is None else x, feedback, tree, is_leaf=lambda x: x is None)


def differences(tx, scales, first_layers):
    """Return W - B^T for each matrix, at the start and after every step.

    W and B get the same signals, of different sizes. There is one result for each of ``first_layers``, which multiplies
    the gradient of the first layer at every fourth step. The first layer has no B.

    This runs in float64 with ``tx`` itself, so it does not depend on what ``updates.kolen_pollack`` accepts.
    """
    with jax.enable_x64(True):
        w, b = jax.tree.map(jnp.asarray, trees())
        rng = np.random.default_rng(1)
        signals = jax.tree.map(lambda x: rng.normal(0.3, 1, (len(scales), *x.shape)), w)
        signals = jax.tree.map(lambda g: np.asarray(scales).reshape(-1, *[1] * (g.ndim - 1)) * g, signals)
        update = partial(optax.with_extra_args_support(tx).update, value=1.0)

        def step(carry, signal):
            w, b, state_w, state_b = carry
            change, state_w = update(signal, state_w, w)
            change_b, state_b = update(like_feedback(signal, b), state_b, b)
            w, b = optax.apply_updates(w, change), optax.apply_updates(b, change_b)
            return (w, b, state_w, state_b), (like_feedback(w, b), b)

        @jax.jit
        def apart(signals):
            _, (ws, bs) = jax.lax.scan(step, (w, b, tx.init(w), tx.init(b)), signals)
            first = jax.tree.map(jnp.subtract, like_feedback(w, b), b)
            return jax.tree.map(lambda x, ws, bs: jnp.concatenate([x[None], ws - bs]), first, ws, bs)

        found, layer = [], signals["a first layer"]
        for size in first_layers:
            g = layer["w"].copy()
            g[3::4] *= size
            found.append(jax.tree.map(np.asarray, apart({**signals, "a first layer": {**layer, "w": g}})))
        return found


def plain(rate):
    return lambda t: (1 - rate) ** t


def constant(t):
    return 1.0


def heavy_ball(momentum, nesterov=False):
    """Return the factor of W - B^T after t steps of momentum. Only the decay of W - B^T drives it."""

    def law(t):
        d, m = 1.0, 0.0
        for _ in range(t):
            m = momentum * m + LAMBDA * d
            d -= ETA * (momentum * m + LAMBDA * d if nesterov else m)
        return d

    return law


def schedule_free(t):
    """Return the factor of W - B^T after t steps. z decays by y, x is the average of z, and y, the trained value, is
    between.
    """
    x = y = z = 1.0
    for s in range(1, t + 1):
        z -= ETA * LAMBDA * y
        x += (z - x) / s
        y = 0.1 * z + 0.9 * x
    return y


def every_other(step, **extra):
    return step % 2 == 0


WARMUP = optax.warmup_cosine_decay_schedule(0.0, ETA, 6, STEPS)


def matrices_only(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def l2(*transformations):
    return optax.chain(optax.add_decayed_weights(LAMBDA), *transformations)


ACCEPTED = {
    "sgd": (optax.sgd(ETA), constant),
    "momentum": (optax.sgd(ETA, 0.9), constant),
    "L2, a decay of more than all": (optax.chain(optax.add_decayed_weights(1.5), optax.sgd(1.0)), plain(1.5)),
    "L2, momentum": (l2(optax.sgd(ETA, 0.9)), heavy_ball(0.9)),
    "L2, nesterov": (l2(optax.sgd(ETA, 0.9, nesterov=True)), heavy_ball(0.9, nesterov=True)),
    "adam": (optax.adam(ETA), constant),
    "adamw": (optax.adamw(ETA, weight_decay=LAMBDA), plain(ETA * LAMBDA)),
    "adafactor": (optax.adafactor(ETA, multiply_by_parameter_scale=False, min_dim_size_to_factor=4), constant),
    "muon": (contrib.muon(ETA, weight_decay=LAMBDA, adam_weight_decay=LAMBDA), plain(ETA * LAMBDA)),
    "clipped by value": (optax.chain(optax.clip(0.5), l2(optax.sgd(ETA))), plain(ETA * LAMBDA)),
    "masked decay": (optax.adamw(ETA, weight_decay=LAMBDA, mask=matrices_only), plain(ETA * LAMBDA)),
    "hyperparameters": (
        optax.inject_hyperparams(optax.adamw)(learning_rate=ETA, weight_decay=LAMBDA),
        plain(ETA * LAMBDA),
    ),
    "schedule-free": (contrib.schedule_free(l2(optax.sgd(ETA)), ETA, b1=0.9), schedule_free),
    # Its updates are small differences of averages. In float32 alone, rounding would make the trial refuse it.
    "schedule-free adamw": (contrib.schedule_free_adamw(ETA, weight_decay=LAMBDA), schedule_free),
    "a scheduled hyperparameter": (
        l2(optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(ETA, 0.0, STEPS))),
        lambda t: np.prod([1 - ETA * (1 - s / STEPS) * LAMBDA for s in range(t)]),
    ),
    "every other step transformed": (
        optax.conditionally_transform(l2(optax.sgd(ETA)), every_other),
        lambda t: (1 - ETA * LAMBDA) ** ((t + 1) // 2),
    ),
    "on a plateau": (  # the loss given here never improves, so the rate is halved after every ten steps
        optax.chain(l2(optax.sgd(ETA)), contrib.reduce_on_plateau(factor=0.5, patience=10)),
        lambda t: np.prod([1 - ETA * 0.5 ** (s // 10) * LAMBDA for s in range(t)]),
    ),
    "warm-up from zero": (
        l2(optax.sgd(WARMUP)),
        lambda t: np.prod([1 - float(WARMUP(s)) * LAMBDA for s in range(t)]),
    ),
    "every third step": (
        optax.MultiSteps(optax.adamw(ETA, weight_decay=LAMBDA), 3).gradient_transformation(),
        lambda t: (1 - ETA * LAMBDA) ** (t // 3),
    ),
    "a rule a matrix": (
        optax.multi_transform(
            {"m": l2(optax.sgd(ETA)), "v": optax.adam(0.1)},
            lambda p: jax.tree.map(lambda x: "m" if x.ndim > 1 else "v", p),
        ),
        plain(ETA * LAMBDA),
    ),
}


@pytest.mark.parametrize(
    "name",
    some_slow(
        ACCEPTED,
        {
            "L2, nesterov", "adam", "momentum", "hyperparameters", "masked decay", "clipped by value", "schedule-free", "a scheduled hyperparameter",
            "every other step transformed", "a rule a matrix", "sgd", "on a plateau", "warm-up from zero",
        },
    ),
)  # fmt: skip
def test_accepts_where_equation_14_holds(name):
    tx, law = ACCEPTED[name]
    _, feedback = float32(trees())
    state = updates.kolen_pollack(tx).init(feedback)
    chex.assert_trees_all_equal(state, tx.init(feedback))
    # The only error allowed is the float32 rounding of constants in some optimizers.
    predicted = np.array([law(t) for t in range(STEPS + 1)])
    # The gradient of a parameter without B must not matter, even if it is not finite.
    trials = differences(tx, [1.0, 30.0] * (STEPS // 2), (1.0, np.nan))
    for difference in jax.tree.leaves(trials):
        scaled = predicted.reshape(-1, *[1] * (difference.ndim - 1)) * difference[0]
        np.testing.assert_allclose(difference, scaled, rtol=0, atol=1e-6)


def every_third(skip):
    return optax.MultiSteps(l2(optax.sgd(ETA)), 3, should_skip_update_fn=skip).gradient_transformation()


WEIGHTS, MOMENTS, TREE = "size of the weights", "moments", "influence each other"
REFUSED = {
    "lamb": (optax.lamb(ETA), WEIGHTS),
    "lars": (optax.lars(ETA), WEIGHTS),
    "adafactor with parameter scale": (optax.adafactor(ETA), WEIGHTS),
    "adaptive clipping": (optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(ETA)), WEIGHTS),
    "L2, adam": (l2(optax.adam(ETA)), MOMENTS),
    "L2, rmsprop": (optax.chain(optax.add_decayed_weights(1e-2), optax.rmsprop(ETA)), MOMENTS),
    "L2, clip": (l2(optax.clip(0.5), optax.sgd(ETA)), "decay"),
    "clipped by global norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(ETA)), TREE),
    # Only a finite gradient that is large shows it.
    "clipped by a huge global norm": (
        optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1e6), optax.sgd(ETA)),
        TREE,
    ),
    "clipped by global norm, labelled": (
        optax.partition(
            {"m": optax.chain(optax.clip_by_global_norm(1e6), optax.sgd(ETA)), "v": optax.sgd(ETA)},
            {name: {"b": "v", "w": "m"} for name in trees()[0]},
        ),
        TREE,
    ),
    "if finite": (optax.apply_if_finite(optax.adamw(ETA, weight_decay=LAMBDA), 5), TREE),
    "every third step that is not large": (every_third(partial(optax.skip_large_updates, max_squared_norm=1e9)), TREE),
    "normalized": (optax.chain(contrib.normalize(), optax.sgd(ETA)), TREE),
    "prodigy": (contrib.prodigy(), TREE),
    "noise": (optax.chain(optax.add_noise(0.01, 0.55, key=0), optax.sgd(ETA)), "noise"),
}


@pytest.mark.slow
def test_a_trial_is_compiled_and_goes_on_until_something_moves():
    calls = 0

    def update(gradients, state, params=None):
        nonlocal calls
        calls += 1
        return optax.adamw(ETA, weight_decay=LAMBDA).update(gradients, state, params)

    for every in (1, 100):
        tx = optax.GradientTransformation(optax.adamw(ETA, weight_decay=LAMBDA).init, update)
        updates.kolen_pollack(optax.MultiSteps(tx, every).gradient_transformation()).init(float32(trees())[1])
    assert 0 < calls < 30
    with pytest.raises(ValueError, match=WEIGHTS):
        updates.kolen_pollack(optax.MultiSteps(optax.lamb(ETA), 100).gradient_transformation()).init(
            float32(trees())[1]
        )


def test_one_that_takes_a_gradient_of_each_example_is_refused():
    with pytest.raises(ValueError, match="its updates have other shapes than the gradients"):
        updates.kolen_pollack(contrib.dpsgd(ETA, 1.0, 1.0, 0)).init(float32(trees())[1])


def test_a_decay_under_which_the_difference_grows_is_refused():
    with pytest.raises(ValueError, match=r"a step multiplies W - B\^T by -1.5, but eq. 14 needs it to shrink"):
        updates.kolen_pollack(optax.chain(optax.add_decayed_weights(2.5), optax.sgd(1.0))).init(float32(trees())[1])


def test_a_schedule_in_python_is_tried_as_it_is():
    updates.kolen_pollack(optax.sgd(lambda count: 0.1 if count < 3 else 0.2)).init(float32(trees())[1])


@pytest.mark.parametrize(
    "name",
    some_slow(
        REFUSED,
        {
            "adaptive clipping", "lars", "prodigy", "noise", "L2, clip", "L2, rmsprop", "clipped by a huge global norm", "normalized",
            "adafactor with parameter scale", "clipped by global norm, labelled",
        },
    ),
)  # fmt: skip
def test_refuses_where_equation_14_cannot_hold(name):
    tx, reason = REFUSED[name]
    _, feedback = float32(trees())
    with pytest.raises(ValueError, match=reason) as refusal:
        updates.kolen_pollack(tx).init(feedback)
    assert "Kolen-Pollack" in str(refusal.value) and len(str(refusal.value)) < 700
    # The refusal is right: no common factor explains the change of W - B^T, at least when another gradient is large or
    # not finite.
    worst = []
    for trial in differences(tx, [0.01, 1.0, 100.0] * (STEPS // 3), (1.0, 1e6, np.nan)):
        worst.append(0.0)
        for difference in jax.tree.leaves(trial):
            first, last = difference[0].ravel(), difference[-1].ravel()
            rest = last - first * (first @ last) / (first @ first)
            worst[-1] = max(worst[-1], np.nan_to_num(np.linalg.norm(rest) / np.linalg.norm(first), nan=np.inf))
    assert max(worst) > 1e-6


@pytest.mark.parametrize(
    "tx",
    [
        optax.lookahead(optax.sgd(ETA), 5, 0.5),
        contrib.sam(optax.sgd(ETA), optax.sgd(0.1), opaque_mode=True),
        optax.lbfgs(),
    ],
    ids=["lookahead", "sam", "lbfgs"],
)
def test_refuses_what_cannot_be_tried(tx):
    """These optimizers need pairs of parameters, or the loss as a function."""
    _, feedback = float32(trees())
    with pytest.raises(ValueError, match="optimizer cannot train Kolen-Pollack's B: tried .* it raised"):
        updates.kolen_pollack(tx).init(feedback)


def test_skips_for_both_or_neither_around_an_optimizer_of_both():
    """``apply_if_finite`` around one optimizer of W and B works, as its error message proposes.

    W - B^T decays at each step taken and stays the same at a skipped step.
    """
    tx = l2(optax.sgd(ETA))
    pair = optax.partition({"W": tx, "B": updates.kolen_pollack(tx)}, ("W", "B"))
    together = optax.apply_if_finite(pair, 5)
    start = float32(trees())

    @jax.jit
    def step(w, b, state, i, bad_w, bad_b):
        grads = jax.tree.map(lambda x: jnp.sin((3.0 + i) * x), w)
        signal = like_feedback(grads, b)
        grads["dense"]["b"] = grads["dense"]["b"].at[0].add(bad_w)  # only in W's gradients, because a bias has no B
        signal["dense"]["w"] = signal["dense"]["w"].at[0, 0].add(bad_b)
        change, state = together.update((grads, signal), state, (w, b))
        return *optax.apply_updates((w, b), change), state

    for bad_w, bad_b in ((np.nan, 0.0), (0.0, np.inf), (np.nan, np.inf)):
        w, b = start
        first, state = jax.tree.map(np.subtract, like_feedback(w, b), b), together.init(start)
        for i in range(4):
            before = w, b
            w, b, state = step(w, b, state, float(i), *((bad_w, bad_b) if i == 1 else (0.0, 0.0)))
            if i == 1:
                chex.assert_trees_all_equal((w, b), before)
        last = jax.tree.map(np.subtract, like_feedback(w, b), b)
        chex.assert_trees_all_close(last, jax.tree.map(lambda d: d * (1 - ETA * LAMBDA) ** 3, first), atol=1e-6)


def test_refused_whatever_tree_it_is_tried_on():
    """The trial works for any tree, such as one matrix, nested None, or a scalar. It makes its own weights."""
    ones = lambda *shape: np.ones(shape, np.float32)
    for tree in (ones(4, 3), ({"b": ones(2, 3, 4, 5), "c": ones(), "none": [None]},)):
        with pytest.raises(ValueError, match="Kolen-Pollack"):
            updates.kolen_pollack(optax.lars(ETA)).init(tree)
        updates.kolen_pollack(ACCEPTED["L2, momentum"][0]).init(tree)
    for empty in ({}, None, {"w": None}):
        updates.kolen_pollack(optax.lars(ETA)).init(empty)  # nothing learns, so nothing is refused


def test_trial_does_not_read_or_change_b():
    """The verdict does not depend on the values of B, even if B is zero or not finite."""
    for value in (0.0, np.nan):
        feedback = {"w": np.full((4, 3), value, np.float32)}
        updates.kolen_pollack(optax.sgd(ETA)).init(feedback)
        with pytest.raises(ValueError, match="Kolen-Pollack"):
            updates.kolen_pollack(optax.lars(ETA)).init(feedback)
        np.testing.assert_array_equal(feedback["w"], value)


@pytest.mark.parametrize("name", ["adamw", "every third step"])
def test_init_inside_transformations(name):
    tx = updates.kolen_pollack(ACCEPTED[name][0])
    _, feedback = float32(trees())
    expected = ACCEPTED[name][0].init(feedback)
    chex.assert_trees_all_equal(jax.jit(tx.init)(feedback), expected)
    shapes = jax.eval_shape(tx.init, feedback)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, expected)
    chex.assert_trees_all_equal_structs(jax.eval_shape(lambda: tx.init(feedback)), expected)


def test_refuses_inside_transformations():
    tx = updates.kolen_pollack(optax.lamb(ETA))
    for transformed in (jax.jit(tx.init), lambda b: jax.eval_shape(tx.init, b)):
        with pytest.raises(ValueError, match="size of the weights"):
            transformed({"w": jnp.ones((4, 3))})


def test_update_is_the_optimizers_own_and_passes_extra_arguments():
    seen = []

    def update(signal, state, params=None, *, value=None, **extra):
        seen.append(value)
        return jax.tree.map(lambda g: -ETA * g, signal), state

    tx = updates.kolen_pollack(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update))
    feedback = {"w": jnp.ones((4, 3))}
    state = tx.init(feedback)
    change, _ = tx.update({"w": jnp.full((4, 3), 2.0)}, state, feedback, value=3.0)
    np.testing.assert_allclose(change["w"], -2 * ETA, rtol=1e-6)
    assert seen[-1] == 3.0
    # An optimizer without extra arguments gets none.
    tx = updates.kolen_pollack(optax.sgd(ETA))
    change, _ = tx.update({"w": jnp.full((4, 3), 2.0)}, tx.init(feedback), feedback, value=3.0)
    np.testing.assert_allclose(change["w"], -2 * ETA, rtol=1e-6)


# --- clipping together ------------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(max_norm=st.floats(0.1, 100.0), size=st.floats(0.01, 100.0), seed=st.integers(0, 999))
def test_clip_together(max_norm, size, seed):
    grads, signal = float32(trees(seed), size)
    tx = updates.clip_together(max_norm)
    state = tx.init((grads, signal))
    clipped, clipped_signal = jax.jit(tx.update)((grads, signal), state)[0]
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    scale = min(1.0, max_norm / norm)
    chex.assert_trees_all_close(clipped, jax.tree.map(lambda g: g * scale, grads), rtol=1e-5)
    chex.assert_trees_all_close(clipped_signal, jax.tree.map(lambda g: g * scale, signal), rtol=1e-5)


def test_clip_together_edges():
    tx = updates.clip_together(1.0)
    zero, clip = {"w": np.zeros((2, 3), np.float32)}, jax.jit(lambda *pair: tx.update(pair, tx.init(pair))[0])
    chex.assert_trees_all_equal(clip(zero, zero), (zero, zero))
    mixed = {"w": np.full((2, 3), 100.0, jnp.bfloat16), "v": np.full(3, 100.0, np.float32)}
    found = jax.eval_shape(clip, mixed, {**mixed, "v": None})
    chex.assert_trees_all_equal_shapes_and_dtypes(found, (mixed, {**mixed, "v": None}))
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm"):
            updates.clip_together(bad)


def test_clip_together_keeps_equation_14():
    """Clipping W and B by one norm keeps eq. 14: their difference shrinks as without clipping."""
    w, b = float32(trees())
    clip, tx = updates.clip_together(1.0), l2(optax.sgd(ETA))
    tx_b = updates.kolen_pollack(tx)
    state, state_b = tx.init(w), tx_b.init(b)
    first = jax.tree.map(np.subtract, like_feedback(w, b), b)

    @jax.jit
    def step(w, b, state, state_b, i):
        grads = jax.tree.map(lambda x: jnp.sin((3.0 + i) * x), w)
        (grads, signal), _ = clip.update((grads, like_feedback(grads, b)), optax.EmptyState())
        change, state = tx.update(grads, state, w)
        change_b, state_b = tx_b.update(signal, state_b, b)
        return optax.apply_updates(w, change), optax.apply_updates(b, change_b), state, state_b

    for i in range(5):
        w, b, state, state_b = step(w, b, state, state_b, float(i))
    last = jax.tree.map(np.subtract, like_feedback(w, b), b)
    chex.assert_trees_all_close(last, jax.tree.map(lambda d: d * (1 - ETA * LAMBDA) ** 5, first), atol=1e-6)


# --- the weight mirror's update ---------------------------------------------------------------------------------------


def test_weight_mirror_update():
    _, feedback = float32(trees(0))
    _, signal = float32(trees(1))
    for rate, decay in ((0.1, 0.5), (0.3, 0.0), (0.0, 0.5), (jnp.float32(0.2), jnp.float32(0.7))):
        tx = updates.weight_mirror(rate, decay)
        change, state = tx.update(signal, tx.init(feedback), feedback)
        expected = jax.tree.map(lambda s, b, r=rate, d=decay: r * (s - d * b), signal, feedback)
        chex.assert_trees_all_close(change, expected, rtol=1e-6)
        assert state == optax.EmptyState()
    # B converges to signal / decay.
    tx = updates.weight_mirror(0.5, 0.5)
    for _ in range(60):
        feedback = optax.apply_updates(feedback, tx.update(signal, optax.EmptyState(), feedback)[0])
    chex.assert_trees_all_close(feedback, jax.tree.map(lambda s: s / 0.5, signal), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("std", "activation", "gain"), [(1.0, None, 1.0), (0.5, None, 0.25), (2.0, jax.nn.relu, 2.0)])
def test_calibrated_mirror_takes_a_share_of_the_way_to_w(std, activation, gain):
    """Given the mean signal gain * W^T, a step moves B by ``share`` of the way to W^T. With a share of 1, B becomes
    W^T.
    """
    rule = wmkp.weight_mirror(noise_std=std, activation=activation, rate=0.25)
    w, b = jnp.asarray([[1.0, -2.0], [3.0, 4.0]]), jnp.asarray([[0.5, 1.0], [-3.0, 0.0]])
    for tx, share in (
        (updates.calibrated_mirror(rule), 0.25),
        (updates.calibrated_mirror(rule, 1.0), 1.0),
        (updates.calibrated_mirror(rule, jnp.float32(0.5)), 0.5),
    ):
        change, _ = tx.update(gain * w, tx.init(b), b)
        np.testing.assert_allclose(b + change, b + share * (w - b), rtol=1e-5, atol=1e-6)


def test_weight_mirror_keeps_dtype():
    b = {"w": jnp.ones((3, 2), jnp.bfloat16)}
    change, _ = updates.weight_mirror(0.1, 0.5).update({"w": jnp.ones((3, 2))}, optax.EmptyState(), b)
    assert change["w"].dtype == jnp.bfloat16


def test_weight_mirror_takes_rates_that_are_not_known_yet():
    signal, b = {"w": jnp.ones((2, 3))}, {"w": jnp.full((2, 3), 2.0)}

    def step(rate, decay):
        return updates.weight_mirror(rate, decay).update(signal, optax.EmptyState(), b)[0]

    np.testing.assert_allclose(jax.jit(step)(0.5, 0.25)["w"], 0.25)
    calibrated = lambda rate: updates.calibrated_mirror(wmkp.weight_mirror(noise_std=2.0), rate)
    change = jax.jit(lambda rate: calibrated(rate).update(signal, optax.EmptyState(), b)[0])(0.5)
    np.testing.assert_allclose(change["w"], 0.5 * (1 / 4 - 2))


def test_weight_mirror_errors():
    for rate, decay, name in ((-0.1, 0.5, "learning_rate"), (0.1, -0.5, "decay"), (float("nan"), 0.5, "learning_rate")):
        with pytest.raises(ValueError, match=name):
            updates.weight_mirror(rate, decay)
    with pytest.raises(ValueError, match="feedback"):
        updates.weight_mirror(0.1, 0.5).update({"w": jnp.ones(3)}, optax.EmptyState())
    with pytest.raises(ValueError, match="no mirror mode"):
        updates.calibrated_mirror(wmkp.kolen_pollack())
