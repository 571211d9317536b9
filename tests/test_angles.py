"""Matrix and delta angles against NumPy in float64, from tiny angles to 180 degrees."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import drawn_feedback, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import wmkp
from wmkp.angles import angle

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


@jax.jit
def matrix_angle(a, b):
    return wmkp.matrix_angles({"w": a}, {"w": b})["w"]


def numpy_angle(a, b):
    """The arccos of the normalised dot product, which is accurate in float64 away from 0 and 180 degrees."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return np.degrees(np.arccos(a @ b / np.sqrt((a @ a) * (b @ b))))


def at_angle(degrees, shape=(30, 20), seed=0):
    """Two float64 arrays of unit norm at this angle."""
    rng = np.random.default_rng(seed)
    a, c = rng.normal(size=shape), rng.normal(size=shape)
    a /= np.linalg.norm(a)
    c -= a * np.sum(a * c)
    c /= np.linalg.norm(c)
    return a, np.cos(np.radians(degrees)) * a + np.sin(np.radians(degrees)) * c


@settings(max_examples=25, deadline=None)
@given(degrees=st.floats(0.5, 179.5), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_angle_against_numpy(degrees, seed, scale):
    a, b = (np.float32(x) for x in at_angle(degrees, seed=seed))
    found = float(matrix_angle(a, np.float32(scale) * b))
    assert found == pytest.approx(degrees, abs=1e-3)
    assert found == pytest.approx(numpy_angle(a, b), abs=1e-4)


@pytest.mark.parametrize("degrees", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_angles_in_float32(degrees):
    """The angle holds where float32 arccos fails, down to the rounding of the inputs (1e-7 per number)."""
    a, b = (np.float32(x) for x in at_angle(degrees))
    assert float(matrix_angle(a, b)) == pytest.approx(degrees, rel=0.02)
    assert float(matrix_angle(a, -b)) == pytest.approx(180 - degrees, abs=2e-5)


@pytest.mark.parametrize("degrees", [1e-5, 1e-6])
def test_tiny_angles_in_float32(degrees):
    """Angles down to 1e-6 degrees hold. Only one entry differs, so the inputs have no rounding that matters."""
    a, b = np.zeros((2, 8, 4), np.float32)
    a[0, 0] = b[0, 0] = 3.0
    b[5, 2] = 3 * np.tan(np.radians(degrees))
    assert float(matrix_angle(a, b)) == pytest.approx(degrees, rel=1e-4)
    a[1:4], b[1:4] = 1.0, 1.0
    norm = np.linalg.norm(a.astype(np.float64))
    b[5, 2] = norm * np.tan(np.radians(degrees))
    assert float(matrix_angle(a, b)) == pytest.approx(degrees, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), exponent=st.integers(-60, 60))
def test_zero_at_equality_and_180_at_negation(seed, exponent):
    a = np.random.default_rng(seed).normal(size=(30, 20)).astype(np.float32)
    scaled = a * np.float32(2.0**exponent)  # a power of two: no rounding
    # The compiler may fuse a - b with the division before it, which leaves rounding (arccos would leave 0.03 degrees).
    for other in (a, scaled, 3 * a):
        assert float(matrix_angle(a, other)) < 2e-5
    assert angle(jnp.asarray(a), jnp.asarray(a)) == 0.0
    assert float(matrix_angle(scaled, -a)) == pytest.approx(180.0, abs=2e-5)


@pytest.mark.parametrize("first", [1e-34, 1e-30, 1.0, 1e30, 1e37])
@pytest.mark.parametrize("second", [1e-30, 1.0, 1e30])
def test_scale_invariance_without_underflow_or_overflow(first, second):
    a, b = at_angle(37.0)
    a, b = a / np.max(np.abs(a)), b / np.max(np.abs(b))
    assert float(matrix_angle(np.float32(first * a), np.float32(second * b))) == pytest.approx(37.0, abs=1e-2)


def test_entries_of_very_different_sizes():
    a, b = np.ones((2, 4, 4), np.float32)
    a[0, 0], b[0, 1] = 1e25, 1e25  # their squares overflow
    assert float(matrix_angle(a, b)) == pytest.approx(90.0, abs=1e-4)
    assert float(matrix_angle(a, a)) < 5e-6


def test_bfloat16_is_measured_in_float32():
    a, b = (x.astype(jnp.bfloat16) for x in at_angle(2.0))
    found = matrix_angle(a, b)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(numpy_angle(np.asarray(a, np.float32), np.asarray(b, np.float32)), abs=1e-3)
    assert float(matrix_angle(a, a)) < 5e-6
    small = (np.float16(x * 1e-3) for x in at_angle(10.0))
    assert float(matrix_angle(*small)) == pytest.approx(10.0, abs=0.1)


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        found = matrix_angle(*at_angle(1e-9))
    assert found.dtype == np.float64 and float(found) == pytest.approx(1e-9, rel=1e-4)


def test_zero_array_gives_nan():
    a = np.float32(at_angle(1.0)[0])
    for pair in ((a, 0 * a), (0 * a, a), (0 * a, 0 * a)):
        assert np.isnan(matrix_angle(*pair))
    # The other angles are unaffected.
    found = jax.jit(wmkp.matrix_angles)({"u": a, "v": a}, {"u": 0 * a, "v": a})
    assert np.isnan(found["u"]) and found["v"] < 2e-5


def test_matrix_angles_of_a_tree():
    """There is one angle for each weight that has a B, by path, and it compares W and B at any rank."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 8), "dense": (6, 5), "first": (4, 3), "stack": (2, 5, 5)}
    params = {"net": [{k: rng.normal(size=s).astype(np.float32), "b": np.ones(3)} for k, s in shapes.items()]}
    feedback = {"net": [{k: rng.normal(size=s).astype(np.float32), "b": None} for k, s in shapes.items()]}
    feedback["net"][2]["first"] = None
    found = jax.jit(wmkp.matrix_angles)(params, feedback)
    assert list(found) == ["net/0/conv", "net/1/dense", "net/3/stack"]
    for i, name in ((0, "conv"), (1, "dense"), (3, "stack")):
        expected = numpy_angle(params["net"][i][name], feedback["net"][i][name])
        assert found[f"net/{i}/{name}"].shape == ()
        np.testing.assert_allclose(found[f"net/{i}/{name}"], expected, atol=1e-4)


def test_matrix_angles_of_what_a_rule_carries_errors_by():
    """The angle is between W and the weights that carry the error back.

    Sign symmetry carries it by |B| sign(W), product feedback by R B. Direct feedback has no angle.
    """
    params, feedback = {"first": normal(0, 4, 6), "w": normal(1, 6, 5)}, {"first": None, "w": normal(2, 6, 5)}
    fun, x = lambda p, x: jnp.tanh(x @ p["first"]) @ p["w"], np.ones((2, 4), np.float32)
    direct_rule, product_rule = wmkp.direct_feedback_alignment(), wmkp.product_feedback_alignment()
    direct, product = (drawn_feedback(rule, fun, params, x) for rule in (direct_rule, product_rule))
    assert direct["w"] is not None
    plain, signs = feedback["w"], np.abs(feedback["w"]) * np.sign(params["w"])
    both = product["w"].r[0] @ product["w"].b[0]
    cases = [(feedback, None, plain), (feedback, wmkp.backprop(), plain), (feedback, wmkp.feedback_alignment(), plain),
             (feedback, wmkp.sign_symmetry(), signs), (product, None, both), (product, product_rule, both),
             (direct, None, None), (direct, direct_rule, None)]  # fmt: skip
    found = jax.jit(lambda params: [wmkp.matrix_angles(params, b, rule) for b, rule, _ in cases])(params)
    for angles, (_, _, carried) in zip(found, cases, strict=True):
        expected = {} if carried is None else {"w": pytest.approx(numpy_angle(params["w"], carried), rel=1e-5)}
        assert angles == expected


def test_matrix_angles_errors():
    a = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"feedback\['w'\].*\[4, 3\].*\[3, 4\]"):
        wmkp.matrix_angles({"w": a}, {"w": a.T})
    with pytest.raises(ValueError, match="structure"):
        wmkp.matrix_angles({"w": a}, {"v": a})


# --- delta angles -----------------------------------------------------------------------------------------------------

SIZES = (6, 8, 7, 5, 4)


def mlp(seed=0):
    rng = np.random.default_rng(seed)
    params = [
        {"w": (rng.normal(size=(m, n)) / np.sqrt(m)).astype(np.float32), "b": rng.normal(size=n).astype(np.float32)}
        for m, n in itertools.pairwise(SIZES)
    ]
    return params, rng.normal(size=(9, SIZES[0])).astype(np.float32), rng.normal(size=(9, SIZES[-1])).astype(np.float32)


def loss(params, x, target):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    x = x @ params[-1]["w"] + params[-1]["b"]
    return jnp.mean((x - target) ** 2)


def delta_angles(fun, rule, params, feedback, *args, **kwargs):
    return jax.jit(lambda p, b: wmkp.delta_angles(fun, rule, p, b, *args, **kwargs))(params, feedback)


def numpy_deltas(params, back, x, target):
    """The deltas of Eq. 3 in float64, one sample a row, with ``back[k]`` in place of W_l."""
    w, b = ([np.asarray(layer[k], np.float64) for layer in params] for k in "wb")
    y = [np.asarray(x, np.float64)]
    for k in range(len(w)):
        a = y[k] @ w[k] + b[k]
        y.append(np.tanh(a) if k < len(w) - 1 else a)
    delta = [y[-1] - target]
    for k in reversed(range(1, len(w))):
        delta.insert(0, (1 - y[k] ** 2) * (delta[0] @ np.asarray(back[k], np.float64).T))
    return delta


@pytest.mark.parametrize("name", ["feedback_alignment", "sign_symmetry", "kolen_pollack", "weight_mirror"])
def test_delta_angles_against_numpy(name):
    params, x, target = mlp()
    rule = getattr(wmkp, name)(**({"start": 0} if name == "weight_mirror" else {}))
    feedback = drawn_feedback(rule, loss, params, x, target)
    found = delta_angles(loss, rule, params, feedback, x, target)
    w = [layer["w"] for layer in params]
    back = [np.abs(b["w"]) * np.sign(w[k]) if name == "sign_symmetry" else b["w"] for k, b in enumerate(feedback) if k]
    ours, theirs = numpy_deltas(params, [None, *back], x, target), numpy_deltas(params, w, x, target)
    assert list(found) == [f"{k}/w" for k in range(len(params))]
    for k in range(len(params) - 1):
        np.testing.assert_allclose(found[f"{k}/w"], numpy_angle(ours[k], theirs[k]), atol=1e-2)
        assert found[f"{k}/w"] > 5
    assert found[f"{len(params) - 1}/w"] == 0  # the output's delta passes no B


def test_delta_angles_are_zero_where_b_is_w():
    params, x, target = mlp()
    mirrored = [{"w": layer["w"] if k else None, "b": None} for k, layer in enumerate(params)]
    for rule in (wmkp.feedback_alignment(), wmkp.kolen_pollack()):
        found = delta_angles(loss, rule, params, mirrored, x, target)
        assert len(found) == 4 and all(float(a) < 1e-4 for a in found.values())
    # With B = 3 W every delta keeps its direction. With B = -W the delta flips at each layer.
    for factor, expected in ((3.0, [0, 0, 0, 0]), (-1.0, [180, 0, 180, 0])):
        scaled = jax.tree.map(lambda b, f=factor: f * b, mirrored)
        found = delta_angles(loss, wmkp.feedback_alignment(), params, scaled, x, target)
        np.testing.assert_allclose(list(found.values()), expected, atol=1e-3)


def test_delta_angles_with_aux_and_a_rule_a_path():
    """A B that differs from W changes the deltas below it and no others, with ``has_aux`` too."""
    params, x, target = mlp()
    rules = {"^2/": wmkp.feedback_alignment(), ".*": wmkp.backprop()}
    feedback = drawn_feedback(rules, loss, params, x, target)

    def with_aux(params, x, target):
        return loss(params, x, target), {"unused": x}

    found = delta_angles(with_aux, rules, params, feedback, x, target, has_aux=True)
    assert [float(a) < 1e-4 for a in found.values()] == [False, False, True, True]
    plain = delta_angles(loss, rules, params, feedback, x, target)
    np.testing.assert_allclose(list(found.values()), list(plain.values()), atol=1e-4)


def test_delta_angles_under_scan():
    """Weights stacked under lax.scan have one angle: that of all steps' deltas taken as one vector."""
    rng = np.random.default_rng(1)
    params = {
        "in": rng.normal(size=(6, 5)).astype(np.float32) / 2,
        "stack": rng.normal(size=(3, 5, 5)).astype(np.float32) / 2,
    }
    x, target = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)

    def scanned(params, x, target):
        y = jnp.tanh(x @ params["in"])
        y, _ = lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, params["stack"])
        return jnp.mean((y - target) ** 2)

    rule = wmkp.feedback_alignment()
    feedback = drawn_feedback(rule, scanned, params, x, target)
    found = delta_angles(scanned, rule, params, feedback, x, target)

    def deltas(back):
        y = [np.tanh(x @ params["in"])]
        for w in params["stack"]:
            y.append(np.tanh(y[-1] @ w))
        delta = [(y[-1] - target) * (1 - y[-1] ** 2)]
        for k in reversed(range(3)):
            delta.insert(0, (1 - y[k] ** 2) * (delta[0] @ np.asarray(back[k]).T))
        return delta

    ours, theirs = deltas(feedback["stack"]), deltas(params["stack"])
    np.testing.assert_allclose(found["in"], numpy_angle(ours[0], theirs[0]), atol=1e-2)
    np.testing.assert_allclose(found["stack"], numpy_angle(np.stack(ours[1:]), np.stack(theirs[1:])), atol=1e-2)
    mirrored = {"in": None, "stack": params["stack"]}
    found = delta_angles(scanned, rule, params, mirrored, x, target)
    assert all(float(a) < 1e-4 for a in found.values())


def test_delta_angles_of_a_weight_used_twice():
    """The angle takes the deltas of both uses as one vector."""
    rng = np.random.default_rng(2)
    params = {"w": rng.normal(size=(5, 5)).astype(np.float32)}
    x, c = rng.normal(size=(2, 9, 5)).astype(np.float32)
    back = rng.normal(size=(5, 5)).astype(np.float32)

    def twice(params, x, c):
        return jnp.sum((x @ params["w"]) @ params["w"] * c)

    found = delta_angles(twice, wmkp.feedback_alignment(), params, {"w": back}, x, c)
    expected = numpy_angle(np.stack([c @ back.T, c]), np.stack([c @ params["w"].T, c]))
    np.testing.assert_allclose(found["w"], expected, atol=1e-3)


def test_delta_that_is_zero_gives_nan():
    params, x, target = mlp()

    def dead(params, x, target):
        return loss(params, x, target) * 0.0

    feedback = drawn_feedback(wmkp.feedback_alignment(), dead, params, x, target)
    found = delta_angles(dead, wmkp.feedback_alignment(), params, feedback, x, target)
    assert len(found) == 4 and all(np.isnan(a) for a in found.values())


def test_delta_angles_errors():
    params, x, target = mlp()
    rule = wmkp.feedback_alignment()
    feedback = drawn_feedback(rule, loss, params, x, target)
    with pytest.raises(ValueError, match="scalar"):
        wmkp.delta_angles(lambda p, x, t: x @ p[0]["w"] @ p[1]["w"], rule, params, feedback, x, target)
    with pytest.raises(ValueError, match=r"feedback\['1/w'\] is None"):
        wmkp.delta_angles(loss, rule, params, [{"w": None, "b": None}] * 4, x, target)


def test_delta_norms_are_the_norms_by_hand():
    """Under FA the ratio is that of the norms of (B delta) phi' and (W delta) phi'; the angle is delta_angles's."""
    w, v, b, x, target = (normal(i, *s) for i, s in enumerate(((5, 7), (7, 3), (7, 3), (11, 5), (11, 3))))
    params, feedback = {"a": w, "b": v}, {"a": None, "b": b}
    loss = lambda p, x: jnp.sum((jnp.tanh(x @ p["a"]) @ p["b"] - target) ** 2)
    watched = jax.jit(
        lambda *args: [f(loss, wmkp.feedback_alignment(), *args) for f in (wmkp.delta_norms, wmkp.delta_angles)]
    )
    found, angles = watched(params, feedback, x)
    h = np.tanh(np.asarray(x, np.float64) @ np.asarray(w, np.float64))
    error = 2 * (h @ np.asarray(v, np.float64) - np.asarray(target, np.float64))
    ours, theirs = ((error @ np.asarray(m, np.float64).T) * (1 - h**2) for m in (b, v))
    assert found["a"].ratio == pytest.approx(np.linalg.norm(ours) / np.linalg.norm(theirs), rel=1e-5)
    assert found["a"].reference == pytest.approx(np.linalg.norm(theirs), rel=1e-5)
    assert found["b"].ratio == 1 and found["b"].reference == pytest.approx(np.linalg.norm(error), rel=1e-5)
    assert {path: float(norms.angle) for path, norms in found.items()} == {p: float(a) for p, a in angles.items()}
    assert not any(norms.is_rounding for norms in found.values())


def test_delta_norms_flag_an_error_of_rounding_alone():
    """``is_rounding`` is set if backprop's error is rounding alone or zero, and not if the target is off by one."""
    w, x = normal(0, 64, 64), normal(1, 8, 64)
    met = np.float32(x.astype(np.float64) @ w.astype(np.float64))

    @jax.jit
    def norms(target, factor):
        loss = lambda p, x: factor * jnp.sum((x @ p["w"] - target) ** 2)
        return wmkp.delta_norms(loss, wmkp.feedback_alignment(), {"w": w}, {"w": None}, x)["w"]

    assert norms(met, 1.0).is_rounding and not norms(met + 1, 1.0).is_rounding
    zero = norms(met + 1, 0.0)
    assert zero.is_rounding and zero.reference == 0


def test_stream_growth_is_the_ratio_of_root_mean_squares():
    x = normal(0, 4, 5)
    np.testing.assert_allclose(wmkp.stream_growth([x, 3 * x, 1e-30 * x, x]), [3, 1e-30 / 3, 1e30], rtol=1e-5)
