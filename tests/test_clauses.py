"""Each model here fails if one clause of the analysis is removed (found by removing clauses one at a time)."""

import chex
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import optax
import pytest
from arrays import drawn_feedback, normal
from test_gradients import check, layers
from test_transport import KEY, X, refuse, tanh_first, weights

import wmkp

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_gain_for_each_synapse_of_a_group():
    def fun(params, x):
        w = params["w"].reshape(6, 2, 3) * params["other"][:, :2, None]
        return jnp.sum(jnp.einsum("ni,ihk->nhk", tanh_first(params, x), w) ** 2)

    refuse(fun, weights("first", "other", "w"), X, match="mul")


def test_a_gain_of_each_example_keeps_noise_out():
    def fun(params, x):
        h = tanh_first(params, x)
        return jnp.sum(jnp.einsum("ni,nio->no", h, params["w"] * jnp.exp(h.mean(1))[:, None, None]) ** 2)

    with pytest.raises(wmkp.WeightTransportError, match="data multiplies"):
        wmkp.mirror_signals(KEY, wmkp.weight_mirror(), fun, weights("first", "w"), X)


def test_gains_stay_gains_where_their_weight_is_laid_out_anew():
    def loss(p, x):
        h = jnp.tanh(x @ p["first"])
        h = jnp.tanh(h @ jnp.squeeze(p["a"][None] * p["g"][0], 0))
        h = jnp.tanh(jnp.einsum("ni,bio->bno", h, jnp.broadcast_to((p["b"] * p["g"])[None], (2, 6, 6))).sum(0))
        return jnp.sum((h @ (p["c"] * p["g"]).reshape(2, 3, 6).reshape(6, 6)) ** 2)

    params = dict(zip(("first", "a", "b", "c"), layers(4, 6), strict=True)) | {"g": normal(5, 6)}
    check(loss, params, normal(0, 3, 6), paths=["a", "b", "c"])


COMPARED = {
    "biases of some, compared": lambda p, x: x.at[0].add(p["v"]) @ x.at[1].add(p["v"]).T,
    "gains of what constants mix": lambda p, x: (x @ np.cos(np.arange(36.0, dtype=np.float32)).reshape(6, 6)) * p["v"],
    "one token, compared": lambda p, x: (lambda t: (t @ t.swapaxes(1, 2)).reshape(3, 49))(
        jnp.concatenate([jnp.broadcast_to(p["v"], (3, 1, 6)), x[:, None] * x[:, :, None]], 1)
    ),
}


@pytest.mark.parametrize("name", COMPARED)
def test_activities_with_biases_of_some_are_activities(name):
    fun = lambda p, x: jnp.sum(jnp.sin(COMPARED[name](p, tanh_first(p, x) @ p["w"])))
    params = {**weights("first", "w", "u"), "v": normal(5, 6)}
    assert set(wmkp.projections(fun, params, X)) == {"first", "w"}
    check(fun, params, X)


def test_copies_beside_synapses_that_data_looks_up():
    def fun(p, x, k):
        w = p["w"].reshape(36)[(jnp.arange(36).reshape(6, 6) + k) % 36]
        return jnp.sum(jnp.tanh(tanh_first(p, x)[:, :, None] * w) ** 2)

    refuse(fun, weights("first", "w"), X, np.int32(1), match="element by element")


def test_places_added_to_data_are_activities():
    def fun(p, x):
        h = tanh_first(p, x) @ p["w"]
        return jnp.sum(jnp.sin(h[:, :, None] * (x + p["place"])[:, None]))

    params = {**weights("first", "w"), "place": normal(5, 1, 6)}
    check(fun, params, X, paths=["w"])


def test_activity_that_scales_a_weights_inputs_is_refused():
    def fun(p, x):
        h = tanh_first(p, x)
        return jnp.sum((h @ (p["w"] * jnp.exp(h.mean(0))[:, None])) ** 2)

    with pytest.raises(wmkp.WeightTransportError, match=r"params\['w'\].*through"):
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, weights("first", "w"), X)


def test_a_weight_scaled_and_then_laid_out_is_mirrored_exactly():
    loss = lambda p, x: jnp.sum(tanh_first(p, x) @ (2 * p["w"]).T)
    rule = wmkp.weight_mirror("orthogonal", num_samples=6, rate=1.0)
    params = weights("first", "w")
    signals = jitted.mirror_signals(KEY, rule, loss, params, X)
    chex.assert_trees_all_close(signals["w"], params["w"], rtol=1e-4, atol=1e-5)


def test_what_a_rule_makes_of_w_is_no_use_of_w():
    """W's gradient stays that of backprop when B = W, although the rule's backward weights read W."""
    rule = wmkp.Rule("half", wmkp.kolen_pollack().init, lambda w, b: (w + b) / 2, wmkp.hebbian)
    params, x = list(layers(2, 6)), normal(0, 3, 6)
    loss = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) ** 2)
    for fun in (loss, lambda p, x: loss(p, x) + jnp.sum(p[1] ** 2)):  # the second loss also uses W in a penalty
        _, (grads, _) = jitted.value_and_grad(fun, rule)(params, [None, params[1]], x)
        chex.assert_trees_all_close(grads, jax.jit(jax.grad(fun))(params, x), rtol=1e-5, atol=1e-6)


def test_backprop_leaves_no_signal_whatever_feedback_it_is_given():
    params, x = list(layers(2, 6)), normal(0, 3, 6)
    loss = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) ** 2)
    _, (grads, signal) = jitted.value_and_grad(loss, wmkp.backprop())(params, [None, params[1]], x)
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(loss))(params, x), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(signal, [None, np.zeros((6, 6), np.float32)])


def test_direct_feedback_learns_where_it_carries_an_error_alone():
    """A weight is used twice, first on data. B's signal is that of the second use alone, x e^T."""
    params, x = {"w": layers(1, 6)[0], "out": layers(2, 6)[1]}, normal(0, 3, 6)
    h = np.tanh(x @ params["w"])
    loss = lambda p, x: jnp.sum(jnp.sin(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["out"]))
    rule = wmkp.direct_kolen_pollack()
    _, (_, signal) = jitted.value_and_grad(loss, rule)(params, drawn_feedback(rule, loss, params, x), x)
    e = np.cos(np.tanh(h @ params["w"]) @ params["out"])
    chex.assert_trees_all_close(jax.tree.leaves(signal["w"])[0], h.T @ e, rtol=1e-4, atol=1e-5)


def test_direct_feedback_that_a_loss_has_no_use_for_is_let_be():
    params, x = list(layers(3, 6)), normal(0, 3, 6)
    loss = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p[1]) @ p[2]) ** 2)
    behind = lambda p, x: loss(p, jnp.tanh(x @ p[0]))
    rule = wmkp.direct_feedback_alignment()
    feedback = drawn_feedback(rule, behind, params, x)
    found, expected = (jitted.value_and_grad(loss, rule)(params, b, x) for b in (feedback, [None, None, feedback[2]]))
    chex.assert_trees_all_close((found[0], found[1][0]), (expected[0], expected[1][0]))


REFUSED = {
    "adaptive clipping of large gradients": (
        optax.chain(optax.adaptive_grad_clip(10.0), optax.sgd(0.1)),
        "differently",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_where_equation_14_cannot_hold(name):
    optimizer, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        wmkp.updates.kolen_pollack(optimizer).init({"w": np.ones((3, 4), np.float32), "v": None})


def test_clip_together_keeps_dtypes():
    grads = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}
    clipped, _ = wmkp.updates.clip_together(0.1).update((grads, {"a": None, "b": grads["b"]}), optax.EmptyState())
    assert clipped[0]["a"].dtype == jnp.float32
    assert clipped[0]["b"].dtype == clipped[1]["b"].dtype == jnp.bfloat16


PENALTIES = {
    "elastic weight consolidation": lambda w, h, d: jnp.sum(d * w**2),
    "the size of a masked weight": lambda w, h, d: jnp.sum((d * w) ** 2),
    "the cost of wiring": lambda w, h, d: jnp.sum(d * jnp.abs(w)),
    "an eligibility trace": lambda w, h, d: jnp.sum(w * jax.lax.stop_gradient(h.T @ h)),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_that_data_weighs_pass_no_error_on(name):
    def fun(p, x, d):
        h = tanh_first(p, x)
        return jnp.sum(jnp.sin(h @ p["w"])) + PENALTIES[name](p["w"], h, d)

    params = dict(zip(("first", "w"), layers(2, 6), strict=True))
    check(fun, params, X, normal(5, 6, 6), paths=["w"])


def test_backprops_weight_under_a_norm_that_it_shares():
    """Two weights share a norm, one under backprop and one under KP. The gradient equals a stop_gradient reference."""
    stop = jax.lax.stop_gradient
    norm = lambda v, w: jnp.sqrt((v**2).sum() + (w**2).sum())

    def fun(p, x):
        n = norm(p["v"], p["w"])
        return jnp.sum(jnp.sin(jnp.tanh(tanh_first(p, x) @ (p["v"] / n)) @ (p["w"] / n)))

    params, b = weights("first", "v", "w"), normal(5, 6, 6)
    rules = {"first|v": wmkp.backprop(), "w": wmkp.kolen_pollack()}
    found, _ = jitted.value_and_grad(fun, rules)(params, {"first": None, "v": None, "w": b}, X)[1]

    def reference(p):
        n, other = norm(p["v"], p["w"]), stop(b / norm(p["v"], b))
        y = jnp.tanh(tanh_first(p, X) @ (p["v"] / n))
        return jnp.sum(jnp.sin(stop(y) @ (p["w"] / n) + y @ other - stop(y @ other)))

    chex.assert_trees_all_close(found, jax.jit(jax.grad(reference))(params), atol=1e-6)
