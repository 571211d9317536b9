"""Weight transport is never silent: a use of W that B cannot follow raises an error that names a fix."""

import copy
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import drawn_feedback, normal

import wmkp

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
RULES = [wmkp.feedback_alignment(), wmkp.sign_symmetry(), wmkp.kolen_pollack(), wmkp.weight_mirror(start=0)]


def weights(*names, shape=(6, 6)):
    return {n: normal(i, *shape) / 2 for i, n in enumerate(names)}


X = normal(9, 3, 6)


def refuse(fun, params, *args, match):
    """Check that ``fun`` raises an error that names a parameter and a fix. Return the parameters that B
    cannot follow.
    """
    with pytest.raises(wmkp.WeightTransportError, match=match) as error:
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, params, *args)
    assert "params[" in str(error.value) and "wmkp.backprop()" in str(error.value)
    return [path for path, p in wmkp.projections(fun, params, *args).items() if p.obstacle]


def together(losses):
    """Return one loss, the sum of ``losses``. Its parameters are ``{name: parameters of one loss}``.

    Compiling the losses one by one would take most of the time of a test.
    """
    return lambda params, *args: sum(loss(params[name], *args) for name, loss in losses.items())


def tanh_first(params, x):
    return jnp.tanh(x @ params["first"])


def straight_through(forward):
    """Return two versions of ``forward`` that pass the error back unchanged: a custom_vjp and a custom_jvp."""
    by_vjp, by_jvp = jax.custom_vjp(forward), jax.custom_jvp(forward)
    by_vjp.defvjp(lambda w: (forward(w), None), lambda _, g: (g,))
    by_jvp.defjvp(lambda w, t: (forward(*w), t[0]))
    return by_vjp, by_jvp


binary, binary_by_jvp = straight_through(lambda w: jnp.where(w > 0, 1.0, -1.0))
ternary, _ = straight_through(lambda w: (w > 0.5).astype(jnp.float32) - (w < -0.5))
eight_bit, _ = straight_through(lambda w: (w * 100).astype(jnp.int8) / 100)
held, _ = straight_through(lambda w: jax.lax.stop_gradient(w) * 2)

UNFOLLOWABLE = {
    "a binary weight": (lambda p: binary(p["w"]), "custom_vjp_call"),
    "a binary weight, by custom_jvp": (lambda p: jax.jit(binary_by_jvp)(p["w"]), "custom_jvp_call"),
    "a ternary weight": (lambda p: 0.5 * ternary(p["w"]), "custom_vjp_call"),
    "a weight in eight bits": (lambda p: eight_bit(p["w"]).T, "custom_vjp_call"),
    "a weight held still within": (lambda p: held(p["w"]), "custom_vjp_call"),
    "binary weights chosen within a scan": (
        lambda p: jax.lax.scan(lambda c, w: (c, binary(w)), 0.0, p["w"])[1],
        "custom_vjp_call",
    ),
    "a binary weight, by stop_gradient": (
        lambda p: p["w"] + jax.lax.stop_gradient(jnp.where(p["w"] > 0, 0.5, -0.5) - p["w"]),
        "a comparison or cast",
    ),
    "a weight in eight bits, by stop_gradient": (
        lambda p: p["w"] + jax.lax.stop_gradient((p["w"] * 100).astype(jnp.int8) / 100 - p["w"]),
        "a comparison or cast",
    ),
    "signs alone": (lambda p: 0.5 - (p["w"] < 0), "a comparison or cast"),
    "signs alone, in one of two branches": (
        lambda p: jax.lax.cond(jnp.bool_(True), lambda w: 0.5 - (w < 0), jnp.zeros_like, p["w"]),
        "a comparison or cast",
    ),
    "signs alone, carried by a scan": (
        lambda p: jax.lax.scan(lambda c, _: (0.5 - (p["w"] < 0), None), jnp.zeros((6, 6)), None, 3)[0],
        "a comparison or cast",
    ),
    "a gain for each synapse": (lambda p: p["other"] / jnp.linalg.norm(p["w"], axis=0) ** p["w"], "mul"),
    "the norm of one synapse": (lambda p: (p["w"][:1] / jnp.linalg.norm(p["w"][:1], axis=0)).repeat(6, 0), "mul"),
    "a matrix laid out as gains": (
        lambda p: (jnp.stack([p["w"]] * 2, -1).reshape(36, 2) * p["other"].reshape(36, 1)).reshape(6, 6, 2)[..., 0],
        "mul",
    ),
    "two gains": (lambda p: p["w"][0] * p["other"][:, :1], "mul"),
    "gains of one column each": (
        lambda p: jnp.concatenate([(p["w"] * p["other"][:, k : k + 1])[:, :1] for k in range(6)], 1),
        "mul",
    ),
    "gains of one column each, in a scan": (
        lambda p: jax.lax.scan(lambda c, g: (c, (p["w"] * g[:, None])[:, 0]), 0.0, p["other"])[1].T,
        "scan of a weight with gains",
    ),
    "a product of two parameters": (lambda p: p["w"] @ p["other"], "dot_general of two parameters"),
    "a matrix times a vector": (lambda p: (p["w"] @ p["other"][0])[:, None], "dot_general of two parameters"),
    "two parameters multiplied": (lambda p: p["w"] * p["other"], "mul"),
    "its own transpose": (lambda p: p["w"] @ p["w"].T, "dot_general of two parameters"),
    "a nonlinearity": (lambda p: jnp.tanh(p["w"]), "tanh"),
    "a positive weight": (lambda p: jax.nn.softplus(p["w"]), "max|custom_jvp_call|log1p|logaddexp"),
    "a square": (lambda p: p["w"] ** 2, "square|integer_pow|pow|mul"),
    "a sort": (lambda p: jnp.sort(p["w"], 0), "sort"),
    "an inverse": (lambda p: jnp.linalg.inv(p["w"]), "lu|triangular|inv|custom"),
    "a low-rank change": (lambda p: p["w"] + p["other"][:, :2] @ p["other"][:2], "dot_general of two parameters"),
    "an average with another's square": (lambda p: p["w"] + p["other"] ** 2, "square|integer_pow|pow|mul"),
    "gains over a weight": (lambda p: p["other"][0] / (3 + p["w"]), "div"),
}


def through_unfollowable(name):
    return lambda params, x: jnp.sum((tanh_first(params, x) @ UNFOLLOWABLE[name][0](params)) ** 2)


@pytest.mark.parametrize("name", UNFOLLOWABLE)
def test_weights_that_feedback_cannot_follow(name):
    obstacles = refuse(through_unfollowable(name), weights("first", "other", "w"), X, match=UNFOLLOWABLE[name][1])
    assert "w" in obstacles and "first" not in obstacles


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_refuses_them_in_every_function(rule):
    fun, params = through_unfollowable("a nonlinearity"), weights("first", "other", "w")
    with pytest.raises(wmkp.WeightTransportError, match="tanh"):
        wmkp.init_feedback(KEY, rule, fun, params, X)
    with pytest.raises(wmkp.WeightTransportError, match="tanh"):
        wmkp.value_and_grad(fun, rule)(params, dict(params), X)


PLACES = np.random.default_rng(0).normal(size=(3, 6))

PARAMETERS_ALONE = {
    "learned positions times W": lambda p, h: h + p["other"][:3] @ p["w"],
    "a network on constants": lambda p, h: h + jax.nn.relu(PLACES @ p["other"]) @ p["w"],
    "positions where data says so": lambda p, h: jnp.where(h[:, :1] > 0, h, p["other"][:3] @ p["w"]),
    "gains from a network on constants": lambda p, h: h * (jnp.tanh(PLACES @ p["other"]) @ p["w"]),
    "weights with gains from one": lambda p, h: h @ (p["head"] * (jnp.tanh(PLACES @ p["other"]) @ p["w"])[0]),
    "a scan's state from two": lambda p, h: jax.lax.scan(
        lambda s, _: (jnp.tanh(s + h), None), p["other"][:3] @ p["w"], None, 2
    )[0],
}


def of_parameters_alone(name):
    return lambda params, x: jnp.sum(PARAMETERS_ALONE[name](params, tanh_first(params, x)) ** 2)


@pytest.mark.parametrize("name", PARAMETERS_ALONE)
def test_a_network_of_parameters_alone_whose_errors_come_from_activities(name):
    """A parameter multiplied by another acts as an activity, so its error would go back through the other parameter."""
    params = weights("first", "head", "other", "w")
    assert {"w", "other"} <= set(refuse(of_parameters_alone(name), params, X, match="dot_general of two parameters"))


def test_parameters_alone_that_meet_no_activity_or_get_no_error_are_let_be():
    def fun(params, x):
        product = params["other"] @ params["w"]
        h = tanh_first(params, x) + jax.lax.stop_gradient(product)[0]
        return jnp.sum((h @ params["head"]) ** 2) + jnp.sum(product**2) + jnp.sum((product @ product) ** 2)

    found = wmkp.projections(fun, weights("first", "other", "w", "head"), X)
    assert not [p.obstacle for p in found.values() if p.obstacle] and set(found) == {"first", "head"}


# A matrix meets activations element by element, or in an unknown primitive. The error would go through W.
BY_HAND = {
    "a matrix product by hand": lambda p, x: jnp.sum(x[:, :, None] * p["w"][None], axis=1),
    "a nonlinearity at each synapse": lambda p, x: jnp.tanh(x[:, :, None] * p["w"]).sum(1),
    "a maximum": lambda p, x: (x[:, :, None] * p["w"]).max(1),
    "a quotient": lambda p, x: (x[:, :, None] / p["w"]).sum(1),
    "a power": lambda p, x: (jnp.abs(p["w"]) ** x[:, :, None]).max(1),
    "copies with biases": lambda p, x: jnp.tanh((x[:, :, None] + p["w"][0]) * p["w"]).sum(1),
    "one of its rows": lambda p, x: (x * p["w"][0]).sum(1),
    "by vmap": lambda p, x: jax.vmap(lambda r: jax.vmap(lambda a, w: jnp.tanh(a * w))(r, p["w"]).sum(0))(x),
    "row by row in a scan": lambda p, x: jax.lax.scan(
        lambda total, row: (total + jnp.tanh(row[0][:, None] * row[1]), None), jnp.zeros((3, 6)), (x.T, p["w"])
    )[0],
    "row by row in a loop": lambda p, x: jax.lax.fori_loop(
        0, 6, lambda i, total: total + jnp.tanh(x[:, i][:, None] * p["w"][i]), jnp.zeros((3, 6))
    ),
    "a loop's products, summed behind it": lambda p, x: jax.lax.scan(lambda _, w: (None, w * x), None, p["w"])[1].sum(
        2
    ),
    "in a branch": lambda p, x: jax.lax.cond(
        p["w"][0, 0] > -9.0, lambda: jnp.tanh(x[:, :, None] * p["w"]).sum(1), lambda: x
    ),
    "recomputed": lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x[:, :, None] * p["w"]).sum(1))(x),
    "a matrix that is carried, then multiplies": lambda p, x: jnp.tanh(
        jax.lax.scan(lambda y, _: (y * x[:, :, None], None), jnp.broadcast_to(p["w"], (3, 6, 6)), None, length=2)[0]
    ).sum(1),
    "a matrix looked up, and bent": lambda p, x: (
        x[:, :, None] * jnp.tanh(p["w"][jnp.arange(18).reshape(3, 6) % 6])
    ).sum(1),
    "a matrix beside its gates": lambda p, x: (lambda t: jnp.tanh(t + t * x[:, None]).sum(1))(x[:, :, None] * p["w"]),
    "a selective state space": lambda p, x: jnp.exp(-x[..., None] * jnp.exp(p["w"])).sum(-1),
    "a convolution by Fourier transform": lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["w"][0]), 6),
    "a triangular solve": lambda p, x: jax.scipy.linalg.solve_triangular(p["w"] + 3 * jnp.eye(6), x.T),
    "a ragged product": lambda p, x: jax.lax.ragged_dot(x, p["w"].reshape(1, 6, 6), jnp.array([3])),
    "a masked nonlinear weight": lambda p, x: x @ (jnp.tanh(p["w"]) * (x[0] > 0)),
    "a sampled weight": lambda p, x: x @ (p["first"] + jnp.exp(p["w"]) * jnp.cos(x.T @ x)),
}
if hasattr(jax.lax, "polynomial"):  # a primitive from JAX 0.12 on
    BY_HAND["a polynomial"] = lambda p, x: jax.lax.polynomial(x[:, :, None], [0.0, p["w"][None]]).sum(1)

# Products with a weight of one axis that the analysis detects: a sum right after a gain, and one neuron that fans out.
OF_ONE_AXIS = {
    "a readout": lambda x, w: (x * w).sum(1),
    "a readout of some": lambda x, w: jnp.sum(x * w, axis=1, where=np.arange(6) > 1),
    "a readout, scaled": lambda x, w: (-2 * (x * w) * np.arange(1.0, 7.0)).sum(1),
    "a readout, padded": lambda x, w: jnp.pad(x * w, ((0, 0), (1, 2))).sum(1),
    "a readout by positive weights": lambda x, w: (x * jnp.abs(w)).sum(1),
    "a readout that divides": lambda x, w: (x / w).sum(1),
    "a readout by a column of constants": lambda x, w: (x * w) @ np.arange(6.0),
    "a readout by an einsum": lambda x, w: jnp.einsum("bi,i->b", jnp.einsum("bi,i->bi", x, w), np.arange(6.0)),
    "a readout in an order of its own": lambda x, w: (x * w).T[::-1].reshape(3, 2, 3).sum((0, 1)),
    "a readout over vmap's axis": lambda x, w: jax.vmap(
        lambda x, w: jax.lax.psum(x * w, "synapses"), (1, 0), None, axis_name="synapses"
    )(x, w),
    "a sum over segments": lambda x, w: jax.ops.segment_sum((x * w).T, jnp.array([0, 0, 1, 1, 2, 2]), 3),
    "synapses in a list": lambda x, w: jax.ops.segment_sum(
        x.T[jnp.array([5, 0, 2])] * w[:3, None], jnp.array([1, 0, 1]), 2
    ),
    "an average over windows": lambda x, w: jax.lax.reduce_window(x * w, 0.0, jax.lax.add, (1, 2), (1, 2), "VALID"),
    "sums on the way": lambda x, w: jnp.tanh(jnp.cumsum(x * w, axis=1)),
    "one neuron to many": lambda x, w: jnp.tanh(x[:, :1] * w),
    "one neuron to many, and what is masked": lambda x, w: jnp.tanh(jnp.where(jnp.arange(6) > 1, x[:, :1] * w, 0.0)),
    "a mean to many": lambda x, w: jnp.tanh(x.mean(1, keepdims=True) * w),
    "one activity to many": lambda x, w: jnp.tanh(x[0, 0] * w),
    "one neuron to many in a branch": lambda x, w: jax.lax.cond(x[0, 0] < 9, lambda: x[:, :1] * w, lambda: 2 * x),
    "one neuron to many, scaled behind a branch": lambda x, w: jnp.tanh(
        3 * jax.lax.cond(x[0, 0] < 9, lambda: x[:, :1] * w, lambda: 2 * x)
    ),
    "one neuron to many, beside a gain": lambda x, w: x[:, :1] * w + x[:, 1:2] * (x * w) + x[:, 2:3] * w,
}
# One neuron fans out through w to t. The same weights also give the gain t * x. Together they are not a gain of x.
OF_ONE_AXIS |= {
    f"one neuron to many, and {name}": lambda x, w, then=then: (lambda t: then(t, t * x))(x[:, 1:2] * w)
    for name, then in {
        "a gain apart": lambda t, gain: jnp.tanh(gain[:, :1] + t),
        "a gain in another order": lambda t, gain: gain + t[:, ::-1],
        "a gain, itself in another order": lambda t, gain: gain[:, ::-1] + t,
        "a gain that it is scattered to": lambda t, gain: gain + jnp.zeros((3, 6)).at[:, np.arange(6)[::-1]].add(t),
        "a gain joined": lambda t, gain: jnp.concatenate([gain, t], 1)[:, 6:],
        "a gain chosen": lambda t, gain: jnp.where(jnp.arange(6) < 1, gain, t),
        "a gain that is less": lambda t, gain: jnp.maximum(gain - 100, t),
        "a gain written over": lambda t, gain: jax.lax.dynamic_update_slice(gain, t[:, 1:], (0, 1)),
    }.items()
}


def by_hand(name):
    return lambda params, x: jnp.sum(BY_HAND[name](params, tanh_first(params, x)) ** 2)


@pytest.mark.parametrize("name", BY_HAND)
def test_products_that_are_no_product_primitive(name):
    refuse(by_hand(name), weights("first", "w"), X, match="w")


def test_a_scan_over_matrices_leaves_them_matrices():
    """A scan along a parameter's own axis has the gains of one layer. One over a stack of matrices has matrices."""
    scan = lambda p, x, gains, of: jnp.sum(
        jax.lax.scan(lambda h, w: (jnp.tanh(h * of(w)), None), tanh_first(p, x), gains)[0]
    )
    layers = lambda p, x: scan(p, x, p["w"], lambda w: w)
    assert wmkp.roles(layers, weights("first", "w"), X)["w"] == ("gain",)
    matrices = lambda p, x: scan(p, x, jnp.stack([p["w"], 2 * p["w"]]), lambda w: w[0])
    assert refuse(matrices, weights("first", "w"), X, match="element by element") == ["w"]


@pytest.mark.parametrize("name", OF_ONE_AXIS)
def test_products_of_one_axis_by_hand(name):
    """The analysis refuses these products. This test does not check them against gradients."""
    fun = lambda p, x: jnp.sum(OF_ONE_AXIS[name](tanh_first(p, x), p["w"]) ** 2)
    params = weights("first") | {"w": np.arange(1, 7, dtype=np.float32)}
    with pytest.raises(wmkp.WeightTransportError, match=r"params\['w'\].*wmkp.backprop\(\)"):
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, params, X)


@pytest.mark.parametrize("name", ["a matrix product by hand", "a power", "recomputed"])
def test_an_activity_with_places_added_is_an_activity_still(name):
    def fun(params, x):
        return jnp.sum(BY_HAND[name](params, tanh_first(params, x) + params["place"]) ** 2)

    params = {**weights("first", "w"), "place": normal(1, *X.shape)}
    assert wmkp.projections(fun, params, X)["w"].obstacle


MIX = np.cos(np.arange(36.0, dtype=np.float32)).reshape(6, 6)
# Linear maps with constant coefficients. wmkp applies the same map to B as to W.
FOLLOWED = {
    "a mean taken away": lambda w, x: w - w.mean(0),
    "a standardized weight": lambda w, x: (w - w.mean(0)) / (w - w.mean(0)).std(0),
    "a product with constants": lambda w, x: MIX @ w,
    "constants at its right": lambda w, x: w @ MIX,
    "an einsum with constants": lambda w, x: jnp.einsum(
        "io,oij->ij", w, np.arange(216.0, dtype=np.float32).reshape(6, 6, 6) / 99
    ),
    "a cumulative sum": lambda w, x: jnp.cumsum(w, 0),
    "a resize": lambda w, x: jax.image.resize(w[:4, :3], (6, 6), "linear"),
    "a mask of constants by einsum": lambda w, x: jnp.einsum("io,io->io", w, MIX),
    "a masked weight, mixed": lambda w, x: MIX @ (w * (x[0] > 0)),
    "a chosen weight, mixed": lambda w, x: MIX @ jax.lax.cond(x[0, 0] > 0, lambda: w, lambda: -w),
    "a scaled weight, smoothed": lambda w, x: jnp.convolve(
        (w * x[0, 0]).reshape(-1), np.ones(3, np.float32) / 3, mode="same"
    ).reshape(6, 6),
}


def test_b_takes_every_linear_map_that_its_weight_takes():
    """The gradients equal those of W forward and the same map of B backward, written by hand."""
    fun = together(
        {n: lambda p, x, f=f: jnp.sum(jnp.sin(tanh_first(p, x) @ f(p["w"], x))) for n, f in FOLLOWED.items()}
    )
    params, rule, stop = dict.fromkeys(FOLLOWED, weights("first", "w")), wmkp.kolen_pollack(), jax.lax.stop_gradient
    feedback = drawn_feedback(rule, fun, params, X)

    def through(p, name, b):
        h, make = tanh_first(p, X), FOLLOWED[name]
        back = h @ stop(make(b, X))
        return jnp.sum(jnp.sin(stop(h) @ make(p["w"], X) + back - stop(back)))

    gradient = lambda p, b: wmkp.value_and_grad(fun, rule)(p, b, X)[1][0]
    reference = jax.grad(lambda p, b: sum(through(p[name], name, b[name]["w"]) for name in FOLLOWED))
    both = jax.jit(lambda p, b: (gradient(p, b), reference(p, b)))
    for b in (feedback, {name: {**entry, "w": params[name]["w"]} for name, entry in feedback.items()}):
        chex.assert_trees_all_close(*both(params, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FOLLOWED)
def test_mirror_mode_says_which_linear_maps_it_cannot_undo(name):
    fun = lambda p, x: jnp.sum(jnp.sin(tanh_first(p, x) @ FOLLOWED[name](p["w"], x)))
    with pytest.raises(wmkp.WeightTransportError, match="mirror mode cannot reach params.*kolen_pollack"):
        wmkp.mirror_signals(KEY, wmkp.weight_mirror(), fun, weights("first", "w"), X)


def layer_norm(x, axes, gain):
    """Normalize in Flax's order: the deviation, one value for all neurons, is first multiplied by the gains."""
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) * (jax.lax.rsqrt(var + 1e-5) * gain)


def layer_norm_in_two_terms(x, axes, gain, bias):
    """Normalize in Keras's order: x and its mean are each multiplied by the gains."""
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    scale = jax.lax.rsqrt(var + 1e-5) * gain
    return x * scale + (-mean * scale + bias)


pairs = lambda x: x[:, :, None] * x[:, None]

# Each weight belongs to one neuron. No error goes through it to another neuron.
LOCAL = {
    "a gain of features, summed over segments": lambda p, y: jax.ops.segment_sum(y * p["v"], jnp.array([1, 0, 1]), 2),
    "a gain of features, summed over examples on the way": lambda p, y: jnp.cumsum(y * p["v"], axis=0),
    "a gain of features, scaled, masked and averaged over examples": lambda p, y: jnp.mean(
        jnp.pad(2 * y * jnp.exp(p["v"] / 9), ((1, 1), (0, 0))), 0, where=np.arange(5)[:, None] > 1, keepdims=True
    ),
    "a gain of features, averaged over windows": lambda p, y: jax.lax.reduce_window(
        y * p["v"], 0.0, jax.lax.add, (2, 1), (1, 1), "SAME"
    ),
    "gains of features, mixed": lambda p, x: (x * p["v"]) @ np.cos(np.arange(36.0)).reshape(6, 6),
    "gains of features, averaged over examples by a row": lambda p, x: np.ones((1, 3)) @ (x * p["v"]),
    "a layer norm": lambda p, x: layer_norm(x, -1, p["v"]),
    "a layer norm in two terms": lambda p, x: layer_norm_in_two_terms(x, -1, p["v"], p["u"][0]),
    "a norm over images in two terms": lambda p, x: layer_norm_in_two_terms(pairs(x), (1, 2), p["u"], p["v"]).reshape(
        3, 36
    ),
    "a norm over images": lambda p, x: layer_norm(pairs(x), (1, 2), p["u"]).reshape(3, 36),
    "a group norm": lambda p, x: layer_norm(x.reshape(3, 2, 3), 2, p["u"][:2, :3]).reshape(3, 6),
    "gains of a map": lambda p, x: (pairs(x) * p["u"]).reshape(3, 36),
    "several gains of one value": lambda p, x: jnp.tanh(x * p["u"][0]) + x * p["u"][1],
    "gains in a scan": lambda p, x: jax.lax.scan(lambda c, a: (jnp.tanh(c + x * a), None), x, p["u"])[0],
    "a gain for all": lambda p, x: (x[:, :, None] * p["v"][0]).repeat(2, 2).reshape(3, 12),
    "biases of some": lambda p, x: jnp.tanh(x.at[0].add(p["v"])) + x.at[:, 0].add(p["v"][:3]),
    "places of some": lambda p, x: jnp.tanh(x.at[:2].add(p["u"][:2]).at[1].subtract(p["v"])),
    "places, scaled and averaged": lambda p, x: (2 * (x[:, None] + p["u"])).mean(1),
    "gains of what is laid out anew": lambda p, x: (
        jnp.pad(jnp.concatenate([jnp.roll(x, 1, 1), jnp.sin(x)], 1), ((0, 0), (0, 2)))[:, 2:] * jnp.repeat(p["v"], 2)
    ),
    "coefficients of a polynomial": lambda p, x: jnp.polyval(p["u"], x),
    "knots of an interpolation": lambda p, x: jnp.interp(x, p["v"], p["u"][0]),
    "places, normalized twice": lambda p, x: layer_norm(
        layer_norm(x[:, None] + p["u"], -1, p["v"]) + p["v"], -1, 1.0
    ).reshape(3, 36),
    "places and one token, normalized": lambda p, x: layer_norm(
        layer_norm(jnp.concatenate([jnp.broadcast_to(p["v"], (3, 1, 6)), x[:, None] + p["u"]], 1), -1, p["v"])[:, 0],
        -1,
        1.0,
    ),
    "one token, normalized": lambda p, x: jnp.sin(
        layer_norm(jnp.concatenate([jnp.broadcast_to(p["v"], (3, 1, 6)), x[:, None] * x[:, :, None]], 1), -1, p["u"][0])
    ).reshape(3, 42),
    "a gain of features, of examples that are looked up": lambda p, y: (y * p["v"])[np.array([[0, 1], [2, 0]])].sum(1),
    "a gain of features, averaged over vmap's axis": lambda p, y: jax.vmap(
        lambda y: y - jax.lax.pmean(y * p["v"], "examples"), axis_name="examples"
    )(y),
    "a gain of features, the largest by a rule of one's own": lambda p, y: jax.lax.reduce(
        y * p["v"], -jnp.inf, lambda a, b: jnp.where(a > b, a, b), (1,)
    ),
    "a similarity of what has gains": lambda p, x: (x * p["v"] * jnp.sin(x)).sum(1, keepdims=True),
}


def of_neurons(name):
    return lambda p, x: jnp.sum((LOCAL[name](p, tanh_first(p, x) @ p["w"])) ** 2)


SEVERAL_AXES = {"gains of a map", "a norm over images", "a group norm", "several gains of one value"}


@pytest.mark.parametrize("name", LOCAL)
def test_weights_that_are_local_to_their_neurons(name):
    """A gain of one axis needs no declaration. A gain of more axes is refused unless it is declared local."""
    params = {**weights("first", "w", "u"), "v": np.arange(1, 7, dtype=np.float32)}
    found = set(wmkp.projections(of_neurons(name), params, X))
    assert {"first", "w"} <= found <= {"first", "w", "u"} and ("u" in found or name not in SEVERAL_AXES)
    if "u" in found:
        with pytest.raises(wmkp.WeightTransportError, match=r"\{\"u\": wmkp.local\(\)"):
            wmkp.init_feedback(KEY, wmkp.kolen_pollack(), of_neurons(name), params, X)


def test_the_gradients_of_what_is_local_to_its_neurons():
    params = {key: {**weights("first", "w", "u"), "v": np.arange(1, 7, dtype=np.float32)} for key in LOCAL}
    fun = together({name: of_neurons(name) for name in LOCAL})
    rule = {"/u$": wmkp.local(), ".*": wmkp.kolen_pollack()}
    feedback = jax.eval_shape(lambda: wmkp.init_feedback(KEY, rule, fun, params, X))
    assert all([k for k in b if b[k] is not None] == ["w"] for b in feedback.values())
    mirrored = {name: {**b, "w": params[name]["w"]} for name, b in feedback.items()}
    engaged = wmkp.value_and_grad(fun, rule)
    both = jax.jit(lambda params: (engaged(params, mirrored, X)[1][0], jax.grad(fun)(params, X)))
    found, expected = jax.tree.map(np.asarray, both(params))
    for name, grads in found.items():
        largest = max(float(np.abs(g).max()) for g in expected[name].values())  # the rounding of small gradients
        chex.assert_trees_all_close(grads, expected[name], rtol=1e-4, atol=1e-6 * max(largest, 10), custom_message=name)


def test_rows_looked_up_are_normalized_as_any_activity_is():
    """Looked-up rows may be normalized, in two orders of the product. E is then only added to the activity.

    This is the first layer of a language model without learned positions. A product of the rows with another layer's
    activity is refused.
    """

    def fun(p, ids):
        e = p["E"][ids]
        scale = jax.lax.rsqrt((e**2).mean(-1, keepdims=True) + 0.1)
        h = e + jnp.tanh((e * scale * p["v"]) @ p["a"])
        return jnp.sum(jnp.sin((h + e * (scale * p["u"])) @ p["b"]))

    params = weights("E", "a", "b") | {"u": normal(5, 6), "v": normal(6, 6)}
    ids = np.array([[1, 4], [2, 0], [5, 1]])
    found = wmkp.roles(fun, params, ids)
    assert found["E"] == ("added",) and found["u"] == found["v"] == ("gain",) and found["a"] == ("projection",)
    feedback = {"E": None, "u": None, "v": None, "a": params["a"], "b": params["b"]}
    _, (grads, _) = jax.jit(wmkp.value_and_grad(fun, wmkp.kolen_pollack()))(params, feedback, ids)
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(fun))(params, ids), rtol=1e-4, atol=1e-5)
    for path in ("a", "E"):  # the product with another layer's activity is refused, even if that layer uses E
        other = lambda p, ids, x, path=path: jnp.sum(jnp.sin((p["E"][ids] * jnp.tanh(x @ p[path])[:, None]) @ p["b"]))
        assert refuse(other, params, ids, X, match=r"params\['E'\]") == ["E"]


standardized = lambda x: (x - x.mean(-1, keepdims=True)) / (0.1 + x.std(-1, keepdims=True))
ROLES = {
    "a layer norm of data": (lambda p, x, i: standardized(x) * p["v"], {"v": "first layer"}),
    "a bias of data": (lambda p, x, i: x + p["v"], {"v": "added"}),
    "a first layer by hand": (lambda p, x, i: (x[:, :, None] * p["w"]).sum(1), {"w": "first layer"}),
    "a matrix that data scale, bent": (lambda p, x, i: jnp.tanh(p["w"] * x[:1].T), {"w": "first layer"}),
    "rows looked up, summed": (lambda p, x, i: p["w"][jnp.stack([i, i], 1)].sum(1), {"w": "added"}),
    "rows looked up, with gains": (lambda p, x, i: p["w"][i] * p["v"], {"v": "gain", "w": "added"}),
    "data with places, with gains": (lambda p, x, i: (x + p["w"][:3]) * p["v"], {"v": "gain"}),
    "rows looked up, by a matrix": (lambda p, x, i: p["w"][i] * p["u"][:3], {"u": "refused"}),
    "data with places, by a matrix": (lambda p, x, i: (x + p["w"][:3]) * p["u"][:3], {"u": "refused"}),
    "a gate of a first state": (
        lambda p, x, i: jnp.tanh(x @ p["u"]) * (jnp.zeros((3, 6)) @ p["w"] + p["v"]),
        {"w": "gain"},
    ),
    "a gate of varied constants": (lambda p, x, i: jnp.tanh(x @ p["u"]) * (jnp.eye(3, 6) @ p["w"]), {"w": "refused"}),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles_of_what_meets_data(name):
    """No error goes back to data. Looked-up rows, and data plus a parameter, are activities: errors reach them through
    gains. So does a layer's response to a uniform constant, as in an unrolled GRU's first step.
    """
    make, expected = ROLES[name]
    params = {**weights("w", "u", "out"), "v": np.arange(1, 7, dtype=np.float32)}
    found = wmkp.roles(lambda p, x, i: jnp.sum(jnp.sin(make(p, x, i) @ p["out"])), params, X, np.array([1, 4, 2]))
    assert {path: found[path] for path in expected} == {path: (role,) for path, role in expected.items()}


def test_projections_are_compared_copied_and_pickled_whole():
    params = weights("first", "w") | weights("twice", "bent")

    def fun(p, x):
        h = tanh_first(p, x) @ p["twice"] @ p["twice"]
        return jnp.sum(h @ jnp.tanh(p["bent"]) @ p["w"])

    found = wmkp.projections(fun, params, X)
    assert found == wmkp.projections(fun, params, X)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), {k: copy.copy(p) for k, p in found.items()}):
        assert again == found and pickle.loads(pickle.dumps(again)) == found
        assert again["w"].matrix_axes((6, 6)) == ([], [0], [1]) and again["w"].direct_shape() == (6, 6)
        for path, why in {
            "twice": "not one matrix",
            "bent": "not one matrix",
            "w": r"has the shape \[6, 6\], not \[6\]",
        }.items():
            with pytest.raises(ValueError, match=why):
                again[path].matrix_axes((6,) if path == "w" else (6, 6))
        with pytest.raises(ValueError, match="different sizes"):
            again["first"].direct_shape()


def test_custom_derivatives_around_a_projection_are_not_thrown_away():
    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    def fun(params, x):
        return jnp.sum(linear(tanh_first(params, x), params["w"]) ** 2)

    refuse(fun, weights("first", "w"), X, match="custom_vjp_call")


def test_a_loop_with_a_derivative_of_its_own():
    """A custom derivative around a while loop is refused. JAX itself has no backward pass through a while loop."""

    def forward(x, w):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]

    def unrolled(x, w):
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return x

    solve = jax.custom_vjp(forward)
    solve.defvjp(lambda x, w: (forward(x, w), (x, w)), lambda kept, g: jax.vjp(unrolled, *kept)[1](g))

    def fun(params, x):
        return jnp.sum(solve(tanh_first(params, x), params["w"]) ** 2)

    refuse(fun, weights("first", "w"), X, match="custom_vjp_call")

    def given_all(params, x):
        """The custom derivative receives all parameters, so which of them it reads is unknown."""
        return jnp.sum((layer(tanh_first(params, x), params) @ params["head"]) ** 2)

    layer = jax.custom_vjp(lambda x, params: forward(x, params["w"]))
    unrolled_layer = lambda x, params: unrolled(x, params["w"])
    layer.defvjp(lambda x, p: (forward(x, p["w"]), (x, p)), lambda kept, g: jax.vjp(unrolled_layer, *kept)[1](g))
    assert refuse(given_all, weights("first", "w", "head"), X, match="custom_vjp_call") == ["first", "head", "w"]


def test_a_binary_product_with_a_derivative_of_its_own():
    """The comparison inside has no derivative, but the custom derivative goes through W and is refused."""

    def forward(x, w):
        return x @ jnp.where(w > 0, 1.0, -1.0)

    linear = jax.custom_vjp(forward)
    linear.defvjp(lambda x, w: (forward(x, w), (x, w)), lambda kept, g: (g @ jnp.sign(kept[1]).T, kept[0].T @ g))

    def fun(params, x):
        return jnp.sum(linear(tanh_first(params, x), params["w"]) ** 2)

    refuse(fun, weights("first", "w"), X, match="custom_vjp_call")


def test_custom_derivatives_beside_a_projection_are_kept():
    @jax.custom_jvp
    def clip(x):
        return jnp.clip(x, -1, 1)

    clip.defjvp(lambda x, t: (clip(x[0]), 7 * t[0]))  # a straight-through estimator; the factor 7 makes it recognisable

    def fun(params, x):
        return jnp.sum(clip(clip(x @ params["first"]) @ params["w"]) ** 2) + jnp.sum(clip(params["w"]))

    params = weights("first", "w")
    run = jax.jit(wmkp.value_and_grad(fun, wmkp.kolen_pollack()))
    _, (grads, _) = run(params, {"first": None, "w": params["w"]}, X)
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(fun))(params, X), rtol=1e-5)


def test_lora_as_flax_ships_it():
    from flax import nnx

    import wmkp.nnx

    apply, params, state = wmkp.nnx.pure(
        nnx.LoRA(6, 2, 6, base_module=nnx.Linear(6, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    )
    lora = lambda p, x: jnp.sum(apply(p, state, jnp.tanh(x))[0] ** 2)
    assert not any(p.obstacle for p in wmkp.projections(lora, params, X).values())  # x A B is two projections in a row


def test_feedback_missing_for_a_projection_that_needs_it():
    def fun(params, x):
        return jnp.sum(tanh_first(params, x) @ params["w"])

    with pytest.raises(ValueError, match=r"feedback\['w'\] is None.*init_feedback"):
        wmkp.value_and_grad(fun, wmkp.kolen_pollack())(weights("first", "w"), {"first": None, "w": None}, X)


def test_the_backward_pass_holds_no_forward_weight():
    """The residuals of the backward pass contain B and no W. Each weight has its own shape, so W would be found."""
    params = {"first": normal(0, 6, 5), "w": normal(1, 5, 4), "last": normal(2, 4, 3)}

    def fun(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(tanh_first(params, x) @ params["w"]) @ params["last"]))

    rule = wmkp.kolen_pollack()
    feedback = drawn_feedback(rule, fun, params, X)
    engaged = wmkp.engage(fun, rule)
    residuals = lambda fun: jax.tree.leaves(jax.jit(lambda p: jax.vjp(fun, p)[1])(params))
    kept = [np.asarray(x) for x in residuals(lambda p: engaged(p, feedback, X))]
    for name in ("w", "last"):
        assert any(np.array_equal(x, feedback[name]) for x in kept)
        assert not any(np.array_equal(x, params[name]) for x in kept)
    assert any(np.array_equal(x, params["w"]) for x in residuals(lambda p: fun(p, X))), "backprop does keep it"


def test_data_closed_over_is_an_error_that_says_so():
    fun = lambda p: jnp.sum(jnp.tanh(jnp.tanh(X @ p["first"]) @ p["w"]) ** 2)
    with pytest.raises((ValueError, wmkp.WeightTransportError), match="data as arrays in args"):
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, weights("first", "w"))


def test_parameters_that_are_no_floating_point_arrays():
    fun = lambda p, x: jnp.sum(x @ p["w"])
    for bad in (np.ones((6, 6), np.int32), 3.0, "w"):
        with pytest.raises(TypeError, match=r"params\['w'\]"):
            wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, {"w": bad}, X)


def test_complex_parameters_train_under_backprop():
    """Complex parameters train under backprop. Other rules raise an error, and the fix that it names works."""
    params = {**weights("first"), "c": np.complex64(1 + 2j) * weights("w")["w"]}
    fun = lambda p, x: jnp.sum((tanh_first(p, x) @ p["c"]).real ** 2) + jnp.sum((x @ p["c"]).imag)
    with pytest.raises(wmkp.WeightTransportError, match="two real arrays, each with its own B"):
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, params, X)
    rules, expected = {"^c$": wmkp.backprop(), ".*": wmkp.kolen_pollack()}, jax.jit(jax.grad(fun))(params, X)
    for rule, feedback in ((wmkp.backprop(), None), (rules, drawn_feedback(rules, fun, params, X))):
        _, (grads, _) = jax.jit(wmkp.value_and_grad(fun, rule))(params, feedback, X)
        chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    real = {"first": params["first"], "re": params["c"].real, "im": params["c"].imag}
    parts = lambda p, x: jnp.sum((tanh_first(p, x) @ p["re"]) ** 2) + jnp.sum(x @ p["im"])
    run = jax.jit(wmkp.value_and_grad(parts, wmkp.kolen_pollack()))
    _, (grads, _) = run(real, {"first": None, "re": real["re"], "im": None}, X)
    np.testing.assert_allclose(grads["first"], expected["first"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_parameters_of_eight_bits(dtype):
    fun = lambda p, x: jnp.sum(tanh_first(p, x) @ p["w"].astype(x.dtype))
    params = {**weights("first", "w"), "w": np.ones((6, 6), dtype)}
    for rule in (wmkp.kolen_pollack(), wmkp.weight_mirror()):
        with pytest.raises(TypeError, match=rf"params\['w'\] is {jnp.dtype(dtype)},.*keep params in float32"):
            wmkp.init_feedback(KEY, rule, fun, params, X)
    with pytest.raises(TypeError, match=r"params\['w'\]"):
        wmkp.matrix_angles(params, params)


def test_patterns_that_match_nothing_and_projections_that_match_no_pattern():
    fun = lambda p, x: jnp.sum(tanh_first(p, x) @ p["w"])
    with pytest.raises(ValueError, match="'haed' matches no projection; the projections are first, w"):
        wmkp.init_feedback(KEY, {"haed": wmkp.backprop(), ".*": wmkp.kolen_pollack()}, fun, weights("first", "w"), X)
    with pytest.raises(ValueError, match="no pattern of rule matches projection 'w'"):
        wmkp.init_feedback(KEY, {"first": wmkp.backprop()}, fun, weights("first", "w"), X)
    with pytest.raises(TypeError, match="rule must be"):
        wmkp.init_feedback(KEY, "kolen_pollack", fun, weights("first", "w"), X)


def test_feedback_of_another_structure_shape_or_dtype():
    fun = lambda p, x: jnp.sum(tanh_first(p, x) @ p["w"])
    params, run = weights("first", "w"), wmkp.value_and_grad(fun, wmkp.kolen_pollack())
    with pytest.raises(ValueError, match="feedback must have the structure of params"):
        run(params, {"w": params["w"]}, X)
    with pytest.raises(ValueError, match=r"feedback\['w'\] is float32\[6, 5\] where its parameter is float32\[6, 6\]"):
        run(params, {"first": None, "w": params["w"][:, :5]}, X)
    with pytest.raises(ValueError, match=r"feedback\['w'\] is bfloat16"):
        run(params, {"first": None, "w": params["w"].astype(jnp.bfloat16)}, X)


def test_a_loss_that_is_no_scalar():
    fun = lambda p, x: tanh_first(p, x) @ p["w"]
    params = weights("first", "w")
    with pytest.raises(ValueError, match=r"scalar loss.*float32\[3, 6\]"):
        wmkp.value_and_grad(fun, wmkp.kolen_pollack())(params, {"first": None, "w": params["w"]}, X)


MASKED = {
    "a readout of one neuron": (lambda p, x, mask: x @ (p["w"] * mask), (6, 1)),
    "a readout without an axis": (lambda p, x, mask: x @ jnp.where(mask > 0, p["w"], 0.0), (6,)),
    "a filter": (lambda p, x, mask: jax.lax.conv_general_dilated(x[:, None], p["w"] * mask, (1,), "SAME"), (1, 1, 3)),
}


def test_data_that_masks_a_weight_along_one_axis():
    """A weight that data masks along one axis has a B. The error passes only the mask and B, as under DropConnect."""
    fun = together({
        name: lambda p, x, masks, name=name: jnp.sum(MASKED[name][0](p, tanh_first(p, x), masks[name]) ** 2)
        for name in MASKED
    })  # fmt: skip
    draw = lambda seed: {name: normal(seed, *shape) for name, (_, shape) in MASKED.items()}
    params = {name: {**weights("first"), "w": w} for name, w in draw(0).items()}
    masks = jax.tree.map(lambda m: np.float32(m < 0.3), draw(2))
    assert all(wmkp.projections(fun, params, X, masks)[f"{name}/w"].feedback for name in MASKED)
    stop = jax.lax.stop_gradient

    def reference(params, bs):
        total = 0.0
        for name, p in params.items():
            product, h = MASKED[name][0], tanh_first(p, X)
            back = product({"w": stop(bs[name])}, h, masks[name])
            total += jnp.sum((product(p, stop(h), masks[name]) + back - stop(back)) ** 2)
        return total

    @jax.jit
    def both(params, bs):
        feedback = {name: {"first": None, "w": b} for name, b in bs.items()}
        _, (grads, _) = wmkp.value_and_grad(fun, wmkp.kolen_pollack())(params, feedback, X, masks)
        return grads, jax.grad(reference)(params, bs)

    for bs in ({name: p["w"] for name, p in params.items()}, draw(1)):
        chex.assert_trees_all_close(*both(params, bs), rtol=1e-5, atol=1e-6)


THROUGH = {
    "tanh of a scaled one": lambda w, mask: jnp.tanh(w * mask),
    "tanh of a masked one": lambda w, mask: jnp.tanh(jnp.where(mask > 0, w, 0.0)),
    "a scaled one's softmax, laid out anew": lambda w, mask: jax.nn.softmax((w * mask).T, axis=-1).T,
}


@pytest.mark.parametrize("name", THROUGH)
def test_what_is_made_of_a_masked_weight_does_not_pass_for_an_activity(name):
    params, mask = weights("first", "w"), 1 - np.eye(6, k=1, dtype=np.float32)
    fun = lambda p, x, mask: jnp.sum((tanh_first(p, x) @ THROUGH[name](p["w"], mask)) ** 2)
    assert refuse(fun, params, X, mask, match="params.*w") == ["w"]


def test_activities_with_dropout_stay_activities():
    """Embeddings and positions stay activities after dropout, normalization and a product with data."""
    params = {"table": normal(1, 9, 6), "place": normal(2, 5, 6), **weights("w")}

    def fun(p, tokens, mask, mixing):
        x = p["table"][tokens] * mask + p["place"] * mask[0]
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        x = mixing @ jnp.tanh(x + jnp.tanh(x @ p["w"]))
        return jnp.sum((x @ p["w"] @ x.mT) ** 2)

    tokens, mask, mixing = np.arange(10).reshape(2, 5) % 9, np.ones((2, 5, 6), np.float32), normal(3, 2, 5, 5)
    mask[0, 1] = 0
    feedback = {"table": None, "place": None, "w": params["w"]}
    _, (grads, _) = jax.jit(wmkp.value_and_grad(fun, wmkp.kolen_pollack()))(params, feedback, tokens, mask, mixing)
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(fun))(params, tokens, mask, mixing), rtol=1e-4, atol=1e-5)


REJOINED = {  # the rows of a matrix that data selects, joined again: still a matrix
    "rolled": lambda w: jnp.roll(w, 1, 0),
    "columns rolled": lambda w: jnp.roll(w, 1, 1),
    "rows concatenated": lambda w: jnp.concatenate([w[1:], w[:1]]),
    "rows added": lambda w: jnp.stack([0.0 + w[0] + w[1], *w[1:]]),
    "rows padded": lambda w: jnp.pad(w[:1], ((0, 5), (0, 0))),
    "rows written": lambda w: jax.lax.dynamic_update_slice(jnp.zeros((6, 6)), w[:1], (2, 0)),
}


def test_rows_of_a_matrix_that_data_selects_make_a_matrix():
    losses = {n: lambda p, x, k, f=f: jnp.sin(tanh_first(p, x) @ f(p["w"][k])).sum() for n, f in REJOINED.items()}
    params = {key: {**weights("w", shape=(4, 6, 6)), **weights("first")} for key in REJOINED}
    arguments = together(losses), params, X, np.int32(1)
    feedback = drawn_feedback(wmkp.kolen_pollack(), *arguments)
    assert all(b["first"] is None and b["w"] is not None for b in feedback.values())

    @jax.jit
    def both(params, feedback):
        _, (grads, _) = wmkp.value_and_grad(arguments[0], wmkp.kolen_pollack())(params, feedback, *arguments[2:])
        expected = {}
        for name, make in REJOINED.items():
            (p, b), h = (params[name], feedback[name]), tanh_first(params[name], X)
            delta = jnp.cos(h @ make(p["w"][1])) @ make(b["w"][1]).T
            expected[name] = X.T @ (delta * (1 - h**2))
        return {name: grads[name]["first"] for name in REJOINED}, expected

    chex.assert_trees_all_close(*both(params, feedback), rtol=1e-4, atol=1e-5)


# --- activity that fans out through weights ---------------------------------------------------------------------------


def edges(p, h):
    source, target = jnp.arange(36) // 6, jnp.arange(36) % 6
    return jax.ops.segment_sum(h.T[source] * p["w"].reshape(36, 1), target, 6).T


def chosen(p, k):
    return jax.lax.cond(k > 0, lambda: p["w"], lambda: 2 * p["w"])


copied = lambda h: h[:, :, None]
FANS = {
    "a custom derivative": lambda p, h, k: jax.nn.silu(copied(h) * p["w"]).sum(1),
    "a contraction": lambda p, h, k: jnp.einsum("njo,j->no", copied(h) * p["w"], jnp.ones(6)),
    "an outer product": lambda p, h, k: jnp.tanh(jnp.einsum("nj,o->njo", h, jnp.ones(6)) * p["w"]).sum(1),
    "copies kept in a scan": lambda p, h, k: jnp.tanh(
        jax.lax.scan(lambda c, _: (jnp.tanh(c), None), copied(h) * jnp.ones(6), None, 2)[0] * p["w"]
    ).sum(1),
    "copies taken apart": lambda p, h, k: sum(
        jnp.tanh(row * w) for row, w in zip(jnp.unstack(copied(h) * jnp.ones(6), axis=1), p["w"], strict=True)
    ),
    "copies in the first turn": lambda p, h, k: jax.lax.scan(
        lambda c, _: (jnp.tanh(c * p["w"]) + c.swapaxes(1, 2), None), copied(h) * jnp.ones(6), None, 2
    )[0],
    "edges of a graph": lambda p, h, k: edges(p, h),
    "vmap": lambda p, h, k: jax.vmap(lambda w: jnp.tanh(h * w).sum(-1), 1, 1)(p["w"]),
    "a barrier": lambda p, h, k: jnp.tanh(jax.lax.optimization_barrier((h, copied(h) * p["w"]))[1]).sum(1),
    "a modulated weight": lambda p, h, k: jnp.einsum("ni,nio->no", X, copied(h) * p["w"]),
    "a matrix that data chooses": lambda p, h, k: jnp.tanh(copied(h) * chosen(p, k)).sum(1),
    "a matrix that data looks up": lambda p, h, k: jnp.tanh(copied(h) * p["w"].reshape(1, 6, 6)[k - 1]).sum(1),
    "a nonlinear matrix that data looks up": lambda p, h, k: h @ jnp.tanh(p["w"].reshape(1, 6, 6)[k - 1]),
    "a nonlinear matrix that data chooses": lambda p, h, k: h @ jnp.tanh(chosen(p, k)),
    "a nonlinear vector that data masks": lambda p, h, k: h[:, :1] * jnp.tanh(p["w"][0] * X[0]),
}


def fanning_out(name):
    return lambda p, x, k: jnp.sum(FANS[name](p, tanh_first(p, x), k) ** 2)


@pytest.mark.parametrize("name", FANS)
def test_activity_that_fans_out_through_weights_is_refused(name):
    refuse(fanning_out(name), weights("first", "w"), X, np.int32(1), match=r"params\['w'\] meets")


def test_activity_that_fans_out_through_weights_would_transport_them():
    """The error at h depends on W even where h is zero, so W counts as transported."""

    @jax.jit
    def at_zero(w):
        found = {}
        for name, fan in FANS.items():
            out, vjp = jax.vjp(lambda h, fan=fan: fan({"w": w}, h, jnp.int32(1)), jnp.zeros((3, 6)))
            found[name] = out, vjp(normal(1, *out.shape))[0]
        return found

    w = weights("first", "w")["w"]
    one, other = at_zero(w), at_zero(1.5 * w)
    for name in FANS:
        chex.assert_trees_all_close(one[name][0], other[name][0], custom_message=name)
        assert not np.allclose(one[name][1], other[name][1]), name


NO_FANS = {
    "squeeze and excite": lambda p, h: h * jax.nn.sigmoid(h.mean(-1, keepdims=True)) * p["w"][0],
    "thresholds": lambda p, h: jnp.tanh(copied(h) + p["w"]).sum(1),
    "thresholds, the larger": lambda p, h: jnp.maximum(copied(h), p["w"]).sum(1),
    "upsampling": lambda p, h: jnp.tanh(jnp.repeat(h[:, None], 4, 1) * p["w"][0]).mean(1),
    "a gain of a layer with one input": lambda p, h: jnp.tanh((h[:, :1] @ p["w"][:1]) * p["w"][0]),
    "data's copies": lambda p, h: h + jnp.tanh(copied(X) * p["w"]).sum(1),
}


def test_gains_thresholds_and_biases_are_let_be():
    """Thresholds and biases need no declaration. Gains cut out of a matrix must be declared local."""
    params = dict.fromkeys(NO_FANS, weights("first", "w", "last"))
    losses = {n: lambda p, x, f=f: jnp.sum((f(p, tanh_first(p, x)) @ p["last"]) ** 2) for n, f in NO_FANS.items()}
    refused = {
        path.split("/")[0] for path, found in wmkp.roles(together(losses), params, X).items() if "refused" in found
    }
    assert refused == {"squeeze and excite", "upsampling", "a gain of a layer with one input"}
    rule = {f"^({'|'.join(refused)})/w$": wmkp.local(), ".*": wmkp.kolen_pollack()}
    feedback = jax.eval_shape(lambda: wmkp.init_feedback(KEY, rule, together(losses), params, X))
    mirrored = jax.tree.map(lambda w, b: None if b is None else w, params, feedback, is_leaf=lambda x: x is None)
    engaged = wmkp.value_and_grad(together(losses), rule)
    both = jax.jit(lambda params: (engaged(params, mirrored, X)[1][0], jax.grad(together(losses))(params, X)))
    chex.assert_trees_all_close(*both(params), rtol=1e-4, atol=1e-5)


SCALED = {
    "all of a weight": lambda w, h: w / jnp.linalg.norm(h),
    "its outputs": lambda w, h: w * jnp.exp(h.mean(0)),
}


def test_activity_that_scales_a_weights_outputs_is_a_gain_of_theirs():
    """x (W s) has the gradients of (x W) s, with B in place of W in the error at x."""
    params, stop = dict.fromkeys(SCALED, weights("first", "w")), jax.lax.stop_gradient
    product = lambda f, w, h: h @ f(w, h)
    losses = {n: lambda p, x, f=f: jnp.sum(product(f, p["w"], tanh_first(p, x)) ** 2) for n, f in SCALED.items()}

    def reference(params, b):
        total = 0.0
        for name, make in SCALED.items():
            p, h = params[name], tanh_first(params[name], X)
            back = h @ stop(make(b, h))
            total += jnp.sum((stop(h) @ make(p["w"], h) + back - stop(back)) ** 2)
        return total

    @jax.jit
    def both(params, b):
        feedback = {key: {"first": None, "w": b} for key in SCALED}
        _, (grads, _) = wmkp.value_and_grad(together(losses), wmkp.kolen_pollack())(params, feedback, X)
        return grads, jax.grad(reference)(params, b)

    for b in (weights("first", "w")["w"], normal(5, 6, 6)):
        chex.assert_trees_all_close(*both(params, b), rtol=1e-4, atol=1e-5)


# --- weights that data lays out or scales, and readouts that data masks -----------------------------------------------

PRE, POST = np.arange(12) % 6, (np.arange(12) * 5 + np.arange(12) // 6) % 6
BY_DATA = {
    "synapses at places of data": lambda w, d: jnp.zeros((6, 6)).at[d["pre"], d["post"]].add(w),
    "synapses put at places of data": lambda w, d: jnp.zeros((6, 6)).at[d["pre"], d["post"]].set(w),
    "a mask by einsum": lambda w, d: jnp.einsum("io,io->io", w, d["mask"]),
    "a mask by einsum, from the left": lambda w, d: jnp.einsum("io,oi->io", d["mask"], w),
    "rows scaled by einsum": lambda w, d: jnp.einsum("i,io->io", d["mask"][0], w),
}


def test_a_weight_that_data_lays_out_or_scales_has_its_b():
    """The gradients equal those of W forward and the same layout of B backward, written by hand."""
    shapes = {name: (12,) if "places" in name else (6, 6) for name in BY_DATA}
    params = {name: weights("first") | weights("w", shape=shape) for name, shape in shapes.items()}
    data = {"pre": PRE, "post": POST, "mask": MIX}
    losses = {n: lambda p, x, d, f=f: jnp.sum(jnp.sin(tanh_first(p, x) @ f(p["w"], d))) for n, f in BY_DATA.items()}
    fun, rule, stop = together(losses), wmkp.kolen_pollack(), jax.lax.stop_gradient

    def marked(params, feedback):
        total = 0.0
        for name, make in BY_DATA.items():
            p, h = params[name], tanh_first(params[name], X)
            back = h @ make(stop(feedback[name]["w"]), data)
            total += jnp.sum(jnp.sin(stop(h) @ make(p["w"], data) + back - stop(back)))
        return total

    feedback, engaged = drawn_feedback(rule, fun, params, X, data), wmkp.value_and_grad(fun, rule)
    both = jax.jit(lambda params, b: (engaged(params, b, X, data)[1][0], jax.grad(marked)(params, b)))
    for b in (feedback, {name: {"first": None, "w": p["w"]} for name, p in params.items()}):
        chex.assert_trees_all_close(*both(params, b), rtol=1e-4, atol=1e-5)


READOUTS = {
    "where": lambda h, w, m: jnp.sum(h * w, -1, where=m > 0),
    "times a mask": lambda h, w, m: (h * w * m).sum(-1),
    "chosen by data": lambda h, w, m: jnp.where(m > 0, h * w, 0.0).sum(-1),
    "at a temperature": lambda h, w, m: (h * w / m[0, 0]).sum(-1),
    "of segments of weights": lambda h, w, m: (h * jax.ops.segment_sum(w, PRE[:6], 6)).sum(-1),
    "of synapses by copies": lambda h, w, m: (h[:, :, None] * jnp.zeros((6, 6)).at[PRE[:6], POST[:6]].add(w)).sum(1),
    "of synapses bent": lambda h, w, m: jnp.tanh(h[:, :, None] * jnp.zeros((6, 6)).at[PRE[:6], POST[:6]].add(w)),
}


MASK = np.float32(np.random.default_rng(0).integers(0, 2, (3, 6)) + 0.5)


def read_out(name):
    return lambda p, x, mask: jnp.sum(jnp.sin(READOUTS[name](tanh_first(p, x), p["w"], mask)))


@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_by_hand_that_data_masks(name):
    params = weights("first") | weights("w", shape=(6,))
    refuse(read_out(name), params, X, MASK, match="mul, then reduce_sum|mul by copies")


REFUSED = {
    "weights that feedback cannot follow": (UNFOLLOWABLE, through_unfollowable, weights("first", "other", "w"), ()),
    "parameters alone": (PARAMETERS_ALONE, of_parameters_alone, weights("first", "head", "other", "w"), ()),
    "products by hand": (BY_HAND, by_hand, weights("first", "w"), ()),
    "activity that fans out": (FANS, fanning_out, weights("first", "w"), (np.int32(1),)),
    "readouts by hand": (READOUTS, read_out, weights("first") | weights("w", shape=(6,)), (MASK,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_backprop_is_the_way_out(name):
    """With the refused parameters under backprop and B = W for the others, gradients equal those of jax.grad."""
    cases, made, params, more = REFUSED[name]
    losses = {case: made(case) for case in cases}
    fun, params, args = together(losses), dict.fromkeys(losses, params), (X, *more)
    obstacles = [path for path, p in wmkp.projections(fun, params, *args).items() if p.obstacle]
    rules = {f"^{re.escape(path)}$": wmkp.backprop() for path in obstacles} | {".*": wmkp.kolen_pollack()}
    feedback = jax.eval_shape(lambda: wmkp.init_feedback(KEY, rules, fun, params, *args))
    mirrored = jax.tree.map(lambda w, b: None if b is None else w, params, feedback, is_leaf=lambda x: x is None)
    engaged = wmkp.value_and_grad(fun, rules)
    both = jax.jit(lambda params, *args: (engaged(params, mirrored, *args), jax.value_and_grad(fun)(params, *args)))
    (found, (grads, _)), (value, expected) = both(params, *args)
    chex.assert_trees_all_close(found, value, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_synapses_drawn_with_a_chance_that_a_weight_sets():
    def fun(params, x, noise):
        w, stop = params["w"], jax.lax.stop_gradient
        return jnp.sum((tanh_first(params, x) @ (w + stop((noise < jax.nn.sigmoid(w)) - 0.5 - w))) ** 2)

    noise = np.float32(np.random.default_rng(0).uniform(size=(6, 6)))
    assert refuse(fun, weights("first", "w"), X, noise, match="a comparison or cast") == ["w"]


def test_a_frozen_weight_that_data_masks_has_its_b():
    def fun(params, x, mask):
        frozen = jax.lax.stop_gradient(params["w"] * mask)
        return jnp.sum(jnp.tanh(tanh_first(params, x) @ frozen) @ params["out"])

    params, mask = weights("first", "w", "out"), np.float32(np.random.default_rng(0).integers(0, 2, (6, 6)))
    engaged = jax.jit(wmkp.value_and_grad(fun, wmkp.feedback_alignment()))
    feedback = {"first": None, "w": params["w"], "out": params["out"]}
    expected = jax.jit(jax.grad(fun))(params, X, mask)
    chex.assert_trees_all_close(engaged(params, feedback, X, mask)[1][0], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected["first"]).max() > 0.1
    nothing = engaged(params, {**feedback, "w": np.zeros((6, 6), np.float32)}, X, mask)[1][0]
    assert not np.any(nothing["first"])


def test_a_frozen_weight_is_mirrored():
    def fun(params, x):
        return jnp.sum(jnp.tanh(tanh_first(params, x) @ jax.lax.stop_gradient(params["w"])) @ params["out"])

    params = weights("first", "w", "out")
    rule = wmkp.weight_mirror("orthogonal", num_samples=6, rate=1.0)
    found = jax.jit(lambda params: wmkp.mirror_signals(KEY, rule, fun, params, X))(params)
    for name in ("w", "out"):
        np.testing.assert_allclose(found[name], params[name], rtol=1e-4, atol=1e-5)


def mapped(params, x):
    """A loop transposes each matrix of a stack, and hands over one that stays the same."""
    each, same = jax.lax.map(lambda w: (w.T, params["out"]), params["w"].reshape(2, 3, 6))
    h = jnp.tanh(jnp.einsum("bi,kio->bko", tanh_first(params, x), each)).reshape(-1, 6)
    return jnp.sum(jnp.tanh(h @ same[0]))


def in_branches(params, x):
    w, out = (lambda h, name=name: jnp.tanh(h @ params[name]) for name in ("w", "out"))
    return jnp.sum(jax.lax.cond(x[0, 0] > 0, w, out, tanh_first(params, x)))


@pytest.mark.parametrize("fun", [mapped, in_branches])
def test_a_mirror_reaches_what_loops_and_branches_make(fun):
    params = weights("first", "w", "out")
    rule = wmkp.weight_mirror("orthogonal", num_samples=6, rate=1.0)
    found = jax.jit(lambda params: wmkp.mirror_signals(KEY, rule, fun, params, X))(params)
    for name in ("w", "out"):
        np.testing.assert_allclose(found[name], params[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [lambda x, p: x * p["v"], lambda x, p: x * p["first"][0]], ids=["gains", "a row"])
def test_no_gradient_is_had_at_data_that_a_parameter_scales(scaled):
    fun = lambda p, x: jnp.sum(jnp.tanh(scaled(x, p) @ p["w"]) @ p["out"])
    params = {**weights("first", "w", "out"), "v": np.ones(6, np.float32)}
    feedback = params | {"v": None, "first": None}
    with pytest.raises(wmkp.WeightTransportError, match="gradient was asked for at data that a parameter multiplies"):
        jax.grad(wmkp.engage(fun, wmkp.kolen_pollack()), argnums=2)(params, feedback, X)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_gradient_is_had_at_the_input_of_a_first_layer(rule):
    """A first layer has no B, so the gradient at its input would go through W. Asking for it raises an error."""
    fun = lambda p, x: jnp.sum(jnp.sin(tanh_first(p, x) @ p["w"]))
    params = weights("first", "w")
    engaged, feedback = wmkp.engage(fun, rule), {"first": None, "w": params["w"]}
    jax.jit(jax.grad(engaged))(params, feedback, X)
    of_data = lambda p, b, x: jax.grad(lambda x: jax.jit(engaged)(p, b, x))(x)
    for gradient in (jax.grad(engaged, argnums=2), jax.jit(jax.grad(engaged, argnums=(0, 2))), of_data):
        with pytest.raises(
            wmkp.WeightTransportError, match="gradient was asked for at the input of projection 'first'"
        ):
            gradient(params, feedback, X)
