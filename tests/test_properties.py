"""Properties of all models and rules, tested on random models and rules."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import drawn_feedback
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

import wmkp
from wmkp.program.interpreter import Direct
from wmkp.rules import ProductFeedback

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
BATCH, SIDE, CLASSES = 3, 4, 5

# Rules whose B has W's shape. With B = W they are backprop.
MATRIX = {
    "FA": wmkp.feedback_alignment(),
    "frSF": wmkp.sign_symmetry("fixed"),
    "KP": wmkp.kolen_pollack(),
    "KP from a mirror": wmkp.kolen_pollack(start="mirror"),
    "KP, transported": wmkp.kolen_pollack_transported(),
    "WM": wmkp.weight_mirror("gaussian", num_samples=7, rate=0.1, start=0),
    "WM, relu": wmkp.weight_mirror("orthogonal+antithetic", 0.5, 8, jax.nn.relu, "kept", rate=0.1, start=0),
    "IA": wmkp.information_alignment(),
    "SA": wmkp.symmetric_alignment(),
    "AA": wmkp.activation_alignment(),
    "activity": wmkp.activity_mirror(),
    "activity, whitened": wmkp.activity_mirror(whiten=True),
    "all five": wmkp.alignment(amplitude=1, decay=0.5, null=0.2, sparse=0.2, self_alignment=0.1, num_samples=5),
}
OTHERS = {
    "uSF": wmkp.sign_symmetry(),
    "brSF": wmkp.sign_symmetry("batch"),
    "PFA": wmkp.product_feedback_alignment(2.0),
    "DFA": wmkp.direct_feedback_alignment(),
    "DKP": wmkp.direct_kolen_pollack(),
    "BP": wmkp.backprop(),
}
RULES = {**MATRIX, **OTHERS}


# --- models -----------------------------------------------------------------------------------------------------------


def normalise(h, gain):
    axes = tuple(range(1, h.ndim))
    return gain * (h - h.mean(axes, keepdims=True)) * lax.rsqrt(h.var(axes, keepdims=True) + 1e-5)


def product(conv, h, w):
    if not conv:
        return h @ w
    return lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def block(model, h, layer):
    z = product(model["conv"], h, layer["kernel"].astype(h.dtype)) + layer["bias"].astype(h.dtype)
    if model["norm"]:
        z = normalise(z, layer["gain"].astype(h.dtype))
    z = jax.nn.gelu(z)
    return h + z if model["residual"] else z


def apply(model, params, x):
    """Apply an input layer, ``depth`` layers of one width (in a loop or one by one), and a head."""
    x = x.astype(model["dtype"])
    h = jnp.tanh(product(model["conv"], x, params["embed"]["kernel"].astype(x.dtype)))
    if model["scan"]:
        h, _ = lax.scan(lambda h, layer: (block(model, h, layer), None), h, params["hidden"])
    else:
        for i in range(model["depth"]):
            h = block(model, h, params[f"hidden{i}"])
    if model["conv"]:
        h = h.mean((1, 2))
    return h @ params["head"]["kernel"].astype(h.dtype) + params["head"]["bias"].astype(h.dtype)


def loss_fn(model, params, model_state, batch, key):
    x, labels = batch
    logits = apply(model, params, x).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (model_state, {"largest": jnp.max(jnp.abs(logits))})


def initial(model, seed):
    rng = np.random.default_rng(seed)
    width, taps = model["width"], (3, 3) if model["conv"] else ()

    def kernel(m, n, taps=taps):
        return (rng.normal(size=(*taps, m, n)) / np.sqrt(m * np.prod(taps))).astype(np.float32)

    def layer():
        bias = (0.1 * rng.normal(size=width)).astype(np.float32)
        gain = {"gain": np.full(width, 1.1, np.float32)} if model["norm"] else {}
        return {"kernel": kernel(width, width), "bias": bias, **gain}

    layers = [layer() for _ in range(model["depth"])]
    params = {
        "embed": {"kernel": kernel(2, width)},
        "head": {"kernel": kernel(width, CLASSES, ()), "bias": np.zeros(CLASSES, np.float32)},
    }
    if model["scan"]:
        params["hidden"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    else:
        params.update({f"hidden{i}": layer for i, layer in enumerate(layers)})
    shape = (BATCH, SIDE, SIDE, 2) if model["conv"] else (BATCH, 2)
    batch = rng.normal(size=shape).astype(np.float32), rng.integers(0, CLASSES, BATCH)
    return params, batch


MODELS = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 2),
        "width": st.sampled_from([4, 6]),
        "conv": st.booleans(),
        "residual": st.booleans(),
        "norm": st.booleans(),
        "scan": st.booleans(),
        "dtype": st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]),
    }
)


def choices(rules):
    """Draw one rule, or two rules: one for the head and one for the hidden layers."""
    one = st.sampled_from(sorted(rules))
    return one | st.tuples(one, one)


def chosen(choice):
    if isinstance(choice, str):
        return RULES[choice]
    head, hidden = choice
    return {"head": RULES[head], "hidden": RULES[hidden], ".*": wmkp.backprop()}


def rule_at(choice, path):
    return RULES[choice if isinstance(choice, str) else choice["head" not in path]]


def flat(tree, is_leaf=None):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def close(model, ours, theirs, tolerance=1e-4):
    """Check that two pytrees are equal up to the order of summation. In bf16 the compiler may also skip a rounding."""
    tolerance = tolerance if model["dtype"] == jnp.float32 else 0.1
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        size = np.max(np.abs(np.asarray(b, np.float32))) + 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size)


# Examples are not shrunk, because each takes a second or more to compile.
SETTINGS = settings(deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@pytest.mark.slow
@settings(SETTINGS, max_examples=5)
@given(model=MODELS, choice=choices(RULES), seed=st.integers(0, 2**16))
def test_shapes_dtypes_finiteness_and_purity(model, choice, seed):
    params, batch = initial(model, seed)
    rule = chosen(choice)
    loss = functools.partial(loss_fn, model)
    args = None, batch, KEY
    paths = wmkp.projections(loss, params, *args)
    assert {path for path in paths if path != "embed/kernel"} == {
        path for path in flat(params) if path.endswith("kernel") and "embed" not in path
    }
    steps = wmkp.make_steps(loss, rule, optax.sgd(0.01), params, batch)
    init = jax.jit(steps.init)
    feedback = init(KEY, params).feedback
    entries = flat(feedback, is_leaf=lambda b: isinstance(b, Direct | ProductFeedback))
    weights = flat(params)
    assert set(entries) == {path for path, p in paths.items() if p.feedback and rule_at(choice, path).init is not None}
    for path, b in entries.items():
        at = rule_at(choice, path)
        if at.direct:
            assert isinstance(b, Direct) and b.array.shape[-1] == CLASSES
        elif isinstance(b, ProductFeedback):
            assert b.effective().shape == weights[path].shape
        else:
            assert b.shape == weights[path].shape
        assert all(leaf.dtype == weights[path].dtype for leaf in jax.tree.leaves(b))

    compiled = jax.jit(wmkp.value_and_grad(loss, rule, has_aux=True))
    result = compiled(params, feedback, *args)
    chex.assert_trees_all_equal(result, compiled(params, feedback, *args))  # bit-for-bit
    ((value, _), (grads, signal)) = result
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(signal, feedback)
    chex.assert_tree_all_finite((value, grads, signal))
    assert any(np.any(g) for g in jax.tree.leaves(grads["embed"])), "an error must reach the first layer"
    for path, s in flat(signal, is_leaf=lambda b: isinstance(b, Direct | ProductFeedback)).items():
        at = rule_at(choice, path)
        if not at.signal:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(s)), path

    states = []
    for _ in range(2):
        state, metrics = steps.engaged_step(init(KEY, params), batch)
        state, mirrored = steps.mirror_step(state)
        states.append(jax.tree.map(np.array, (state._replace(key=jax.random.key_data(state.key)), metrics, mirrored)))
    chex.assert_trees_all_equal(*states)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.feedback, feedback)
    chex.assert_tree_all_finite((state.params, state.feedback, metrics, mirrored))
    assert int(state.step) == 1 and not np.array_equal(*(jax.random.key_data(k) for k in (state.key, KEY)))


@settings(SETTINGS, max_examples=5)
@given(model=MODELS, choice=choices(MATRIX), seed=st.integers(0, 2**16))
def test_b_equal_to_w_is_backprop(model, choice, seed):
    """With B = W, values and gradients equal those of backprop, for any model and any mix of rules."""
    params, batch = initial(model, seed)
    rule = chosen(choice)
    loss = functools.partial(loss_fn, model)
    args = None, batch, KEY
    entries = flat(drawn_feedback(rule, loss, params, *args))
    leaves, tree = jax.tree.flatten(params)
    feedback = tree.unflatten([w if path in entries else None for path, w in zip(flat(params), leaves, strict=True)])
    (value, _), (grads, _) = jax.jit(wmkp.value_and_grad(loss, rule, has_aux=True))(params, feedback, *args)
    (expected_value, _), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *args)
    close(model, grads, expected)
    assert np.isclose(value, expected_value, rtol=1e-5 if model["dtype"] == jnp.float32 else 0.05)


@settings(SETTINGS, max_examples=5)
@given(model=MODELS, choice=choices({**MATRIX, **OTHERS}), seed=st.integers(0, 2**16))
def test_error_goes_back_through_b_and_nothing_else(model, choice, seed):
    """Negating the head's B negates the gradients of the layers that get its error.

    Under sign symmetry and backprop the gradients stay the same.
    """
    model = {**model, "depth": 1, "residual": False, "dtype": jnp.float32}
    params, batch = initial(model, seed)
    rule = chosen(choice)
    loss = functools.partial(loss_fn, model)
    feedback = drawn_feedback(rule, loss, params, None, batch, KEY)
    flipped = {k: v if "hidden" in k else jax.tree.map(np.negative, v) for k, v in feedback.items()}
    if isinstance(feedback["head"]["kernel"], ProductFeedback):
        b = feedback["head"]["kernel"]
        flipped["head"] = {**feedback["head"], "kernel": ProductFeedback(b.r, -b.b, b.shape, b.order)}
    gradient = jax.jit(wmkp.value_and_grad(loss, rule, has_aux=True))
    grads, turned = (gradient(params, b, None, batch, KEY)[1][0] for b in (feedback, flipped))
    chex.assert_trees_all_equal(grads["head"], turned["head"])
    signed = rule_at(choice, "head").name.startswith("sign_symmetry") or rule_at(choice, "head").init is None
    hidden = next(k for k in params if k.startswith("hidden"))
    sign = 1 if signed else -1  # under sign symmetry B holds only magnitudes; under backprop there is no B
    close(model, turned[hidden], jax.tree.map(lambda g: sign * g, grads[hidden]))
    if not rule_at(choice, hidden).direct:
        close(model, turned["embed"], jax.tree.map(lambda g: sign * g, grads["embed"]))
    else:  # under a direct rule the head's B does not affect the first layer
        chex.assert_trees_all_equal(turned["embed"], grads["embed"])
