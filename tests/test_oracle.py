"""``wmkp.transport`` measures whether the backward pass reads W.

It does not use the analysis of the program, so it can contradict the analysis.
"""

import functools
import itertools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from marks import some_slow

import wmkp
from wmkp.transport import Kind, Transport, measure, reading

pytestmark = pytest.mark.usefixtures("quick_compile")

FA = wmkp.feedback_alignment()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw(**shapes):
    return {name: normal(i + 1, *shape) / 2 for i, (name, shape) in enumerate(shapes.items())}


def plain(fun, params, *args):
    """Return ``transport`` of a function with its own backward pass, which may read W."""
    return measure(lambda params, feedback, *args: fun(params, *args), paths_of(params), params, None, args)


def paths_of(params):
    return [
        jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def read(found: Transport):
    return {path for path, moved in found.items() if moved.moved}


def engaged(fun, params, *args, rule=FA):
    feedback = jax.jit(lambda params: wmkp.init_feedback(jax.random.key(0), rule, fun, params, *args))(params)
    return wmkp.transport(fun, rule, params, feedback, *args)


# --- backward passes that read W --------------------------------------------------------------------------------------

X = normal(0, 2, 5)


def behind_a_barrier(p, x):
    h, w = lax.optimization_barrier((jnp.tanh(x @ p["V"]), p["W"]))
    return jnp.sum(jnp.sin(h @ w))


def behind_a_barrier_with_more(p, x):
    b, w, h = lax.optimization_barrier((p["b"], p["W"], jnp.tanh(x @ p["V"])))
    return jnp.sum(jnp.sin(h @ w + b))


def edge_scales(p, x):
    curves = jnp.sin(jnp.repeat(jnp.tanh(x @ p["V"]), 4, 1) * np.arange(1.0, 25))
    return jnp.sum(jnp.sin((p["W"].reshape(1, 24) * curves).reshape(-1, 6, 4).sum(1)))


def in_a_shard_map(p, x):
    mesh = jax.make_mesh((1,), ("d",))
    h = jnp.broadcast_to(jnp.tanh(x @ p["V"])[:, :, None], (2, 6, 4))
    mapped = jax.shard_map(lambda a, w: a * w, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    return jnp.sum(jnp.sin(mapped(h, p["W"]).sum(1)))


def by_taps(p, x):
    h = jnp.tanh(x @ p["V"])
    return jnp.sum(jnp.sin(sum(jnp.roll(h, i, 1)[:, :4] * p["W"][i] for i in range(6))))


def attended(p, x):
    return jnp.sum(jnp.sin((jnp.tanh(x @ p["V"]).reshape(2, 6, 1) * p["W"]).sum(-1)))


def scanned(p, x):
    step = lambda h, _: (jnp.tanh(h @ p["S"]), None)
    return jnp.sum(lax.scan(step, jnp.tanh(x @ p["V"]), None, 3)[0] @ p["W"])


def chosen(p, x):
    h = jnp.tanh(x @ p["V"])
    return jnp.sum(lax.cond(x[0, 0] > 0, lambda: jnp.sin(h @ p["W"]), lambda: jnp.cos(h @ p["W"])))


def recomputed(p, x):
    return jnp.sum(jax.checkpoint(lambda h, w: jnp.sin(h @ w))(jnp.tanh(x @ p["V"]), p["W"]))


@jax.custom_vjp
def of_its_own(h, w):
    return jnp.sin(h @ w)


of_its_own.defvjp(lambda h, w: (jnp.sin(h @ w), (h, w)), lambda kept, e: (e @ kept[1].T, kept[0].T @ e))


@jax.custom_vjp
def passing(h, w):
    """The forward pass does not use W."""
    return h


passing.defvjp(lambda h, w: (h, w), lambda w, e: (e @ (w @ w.T), jnp.zeros_like(w)))


def joined_and_parted(p, x):
    both = jnp.concatenate([jnp.tanh(x @ p["V"]), p["W"].T]) * 2
    return jnp.sum(jnp.sin(both[:2] @ both[2:].T))


def padded_and_parted(p, x):
    both = jnp.pad(jnp.tanh(x @ p["V"]), ((0, 4), (0, 0))) + jnp.pad(p["W"].T, ((2, 0), (0, 0)))
    return jnp.sum(jnp.sin(both[:2] @ both[2:].T))


def stacked_and_multiplied(p, x):
    h, w = (jnp.broadcast_to(a, (2, 6, 4)) for a in (jnp.tanh(x @ p["V"])[:, :, None], p["W"]))
    both = jnp.stack([h, w])
    return jnp.sum(jnp.sin((both[0] * both[1]).sum(1)))


PARAMS = draw(V=(5, 6), W=(6, 4))
LEAKS = {
    behind_a_barrier: PARAMS,
    behind_a_barrier_with_more: PARAMS | {"b": jnp.ones(4)},
    edge_scales: PARAMS,
    in_a_shard_map: PARAMS,
    by_taps: PARAMS,
    joined_and_parted: PARAMS,
    padded_and_parted: PARAMS,
    stacked_and_multiplied: PARAMS,
    attended: draw(V=(5, 6), W=(6, 4)),
    scanned: draw(V=(5, 6), S=(6, 6), W=(6, 4)),
    chosen: PARAMS,
    recomputed: PARAMS,
    lambda p, x: jnp.sum(of_its_own(jnp.tanh(x @ p["V"]), p["W"])): PARAMS,
    lambda p, x: jnp.sum(passing(jnp.tanh(x @ p["V"]), p["W"]) ** 2): PARAMS,
    lambda p, x: jnp.sum(jax.jit(lambda h, w: h @ w)(jnp.tanh(x @ p["V"]), p["W"].astype(jnp.bfloat16))): PARAMS,
    lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p["V"]) @ (p["A"] @ p["B"]))): draw(V=(5, 6), A=(6, 2), B=(2, 4)),
    lambda p, x: jnp.sum(jnp.tanh(x @ p["W"]) @ p["W"].T): draw(W=(5, 6)),  # W is read for its own gradient only
    lambda p, x: jnp.sum(jnp.tanh(x @ p["V"]) @ p["E"][x.argmax()]): draw(V=(5, 6), E=(12, 6, 4)),
}


@pytest.mark.parametrize(
    "fun",
    some_slow(LEAKS, [behind_a_barrier, edge_scales, padded_and_parted, stacked_and_multiplied]),
    ids=lambda fun: fun.__name__,
)
def test_a_backward_pass_that_reads_w_is_convicted(fun):
    params = LEAKS[fun]
    found = plain(fun, params, X)
    assert read(found) == set(params) - {"V", "b"} | ({"W"} & set(params))


def test_it_measures_the_gradient_itself():
    """With W' = W, the measured gradients equal those of ``jax.grad``."""
    params = draw(V=(5, 6), g=(6,), b=(6,), W=(6, 6), U=(6, 6), out=(6, 3))

    def fun(p, x):
        h = jnp.tanh(x @ p["V"]) * p["g"] + p["b"]
        step = lambda h, _: (jnp.tanh(h @ (p["W"] @ p["U"])) * p["g"], h.sum())
        h, sums = lax.scan(step, h, None, 3)
        return jnp.sum(jnp.sin(h @ p["out"] @ p["out"].T)) + sums.mean()

    leaves, tree = jax.tree.flatten(params)
    closed = jax.make_jaxpr(lambda leaves, x: fun(jax.tree.unflatten(tree, leaves), x))(leaves, X)
    expected = jax.tree.leaves(jax.jit(jax.grad(fun))(params, X))
    for k, w in enumerate(leaves):
        found = reading(closed, [Kind(param=True)] * len(leaves) + [Kind(data=True)], k)(leaves, [X], w)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- backward passes that do not read W -------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8)(ids)
        x = x + self.param("positions", nn.initializers.normal(), (4, 8))
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x))
        return nn.Dense(7, use_bias=False)(nn.gelu(nn.LayerNorm()(x))).mean()


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.MGUCell(5))(x)).sum()


class Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.one, self.norm = nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.two, self.out = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.two(nnx.relu(self.norm(self.one(x)))))
        return self.out(x.mean((1, 2))).sum()


def linen(module, *args):
    params = jax.jit(module.init)(jax.random.key(0), *args)["params"]
    return lambda p, *args: module.apply({"params": p}, *args), params, args


def convolutions():
    graph, params, rest = nnx.split(Convolutions(nnx.Rngs(0)), nnx.Param, ...)
    return lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), nnx.to_pure_dict(params), (normal(0, 2, 5, 5, 1),)


MODELS = {
    "Transformer": functools.partial(linen, Block(), jnp.array([[1, 2, 3, 1], [0, 5, 3, 6]])),
    "MGU": functools.partial(linen, Recurrent(), normal(0, 2, 3, 4)),
    "convolutions": convolutions,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_of_models_only_gains_are_read(name):
    fun, params, args = MODELS[name]()
    found = engaged(fun, params, *args)
    assert all(path.endswith("scale") for path in read(found)), found


def class_token(p, x):
    h = jnp.concatenate([jnp.broadcast_to(p["token"], (1, 6)), jnp.tanh(x @ p["V"])]) + p["places"]
    h = h + jax.nn.softmax((h @ p["Q"]) @ (h @ p["K"]).T) @ h
    return jnp.sum(jnp.sin(h[0] @ p["W"]))


def test_a_token_that_is_joined_is_not_read():
    params = draw(V=(5, 6), token=(6,), places=(3, 6), Q=(6, 6), K=(6, 6), W=(6, 4))
    assert not read(engaged(class_token, params, X))


def net(p, x):
    h = jnp.tanh(x @ p["V"]) * p["g"] + p["b"]
    return jnp.sum(jnp.tanh(h @ p["W"]) @ p["out"])


NET = draw(V=(5, 6), g=(6,), b=(6,), W=(6, 4), out=(4, 3))
RULES = {
    "FA": (wmkp.feedback_alignment(), set()),
    "KP": (wmkp.kolen_pollack(), set()),
    "WM": (wmkp.weight_mirror(), set()),
    "PFA": (wmkp.product_feedback_alignment(), set()),
    "DFA": (wmkp.direct_feedback_alignment(), set()),
    "DKP": (wmkp.direct_kolen_pollack(), set()),
    "SAL": (wmkp.symmetric_alignment(), set()),
    "SS": (wmkp.sign_symmetry(), {"W", "out"}),
    "BP": (wmkp.backprop(), {"W", "out"}),
    "BP for one": ({"W": wmkp.backprop(), ".*": FA}, {"W"}),
}


@pytest.mark.parametrize("name", some_slow(RULES, ["KP", "WM", "DKP", "BP for one"]))
def test_what_each_rule_reads(name):
    rule, matrices = RULES[name]
    found = engaged(net, NET, X, rule=rule)
    assert read(found) == {"g", *matrices}
    assert found["g"].meaning == "read, a gain" and found["b"].meaning == "not read"


def test_it_prints_as_a_table():
    lines = str(engaged(net, NET, X)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "moved", "gradient", "the", "backward", "pass"]
    assert len(lines) == 1 + len(NET) and lines[1].split() == ["V", "5x6", "0", "not", "read"]


# --- random programs --------------------------------------------------------------------------------------------------

SIZE = 6
CONSTANT = normal(9, SIZE, SIZE) / 2


@jax.custom_vjp
def careless(h, w):
    return h + 0 * w.sum()


careless.defvjp(lambda h, w: (h, w), lambda w, e: (e @ w, jnp.zeros_like(w)))


@jax.custom_jvp
def derived(h, w):
    return h @ w


derived.defjvp(lambda primals, tangents: (derived(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


def joined(h, w):
    both = jnp.concatenate([h, w])
    return both[:2] @ both[2:]


def written(h, w):
    both = jnp.zeros((8, SIZE)).at[:2].set(h).at[2:].set(w)
    return both[:2] @ both[2:]


def one_device(f):
    return jax.shard_map(f, mesh=jax.make_mesh((1,), ("d",)), in_specs=(P(), P()), out_specs=P())


def accumulated(h, w):
    return lax.scan(lambda c, s: (c + s[0][:, None] * s[1], None), jnp.zeros_like(h), (h.T, w))[0]


def swapped(h, w):
    h, w = lax.optimization_barrier((w, h))[::-1]
    return h @ w


PRODUCTS = {
    "h @ w": lambda h, w: h @ w, "einsum": lambda h, w: jnp.einsum("bi,ji->bj", h, w),
    "mul, sum": lambda h, w: (h[:, :, None] * w).sum(1), "mul, max": lambda h, w: (h[:, :, None] * w).max(1),
    "taps": lambda h, w: sum(jnp.roll(h, i, 1) * w[i] for i in range(3)),
    "outer, einsum": lambda h, w: jnp.einsum("bi,ij->bij", h, w).sum(1), "conv": lambda h, w: lax.conv(
        h[:, None], w[:, None], (1,), "SAME"
    ).mean(1), "edges": lambda h, w: (jnp.tile(h, (1, 6)) * w.reshape(1, 36)).reshape(2, 6, 6).sum(1),
    "gain": lambda h, w: h * w[0], "many gains": lambda h, w: (h.reshape(2, 2, 3) * w[:2, :3]).reshape(2, 6),
    "added": lambda h, w: h + w[:2], "distances": lambda h, w: jnp.abs(h - w[:2]), "careless": careless,
    "derived": derived, "joined": joined, "written": written, "accumulated": accumulated, "swapped": swapped,
    "fans": lambda h, w: (jnp.repeat(h, 6, 1) * w.ravel()) @ np.tile(np.eye(6), (6, 1)),
    "rotary": lambda h, w: jnp.concatenate([-(h @ w)[:, 3:], (h @ w)[:, :3]], 1),
    "chosen rows": lambda h, w: h * w[h[0].argmax()], "signs": lambda h, w: jnp.where(w[:2] > 0, h, -h),
    "shifted": lambda h, w: h @ (w + 0.1 * h[0, 0]),
    "patched": lambda h, w: h @ w.at[:1, :1].set(h[:1, :1]),
    "clipped": lambda h, w: h @ jnp.clip(w, h[0, 0] - 9, h[0, 0] + 9),
    "selected": lambda h, w: h @ jnp.where(h[0, 0] > 0, w, 2 * w),
}  # fmt: skip
MAPS = {
    "itself": lambda w: w, "cumsum": lambda w: jnp.cumsum(w, 0) / 3, "constant": lambda w: CONSTANT @ w,
    "centred": lambda w: w - w.mean(0), "bf16": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "norm": lambda w: w / jnp.linalg.norm(w), "tanh": jnp.tanh, "split": lambda w: jnp.concatenate(jnp.split(w, 2)[::-1]),
    "barrier": lax.optimization_barrier, "gathered": lambda w: w[np.array([2, 0, 1, 5, 4, 3])], "square": lambda w: w @ w,
}  # fmt: skip
AROUND = {
    "nothing": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint,
    "scan": lambda f: lambda h, w: lax.scan(lambda c, w: (jnp.tanh(f(c, w)), None), h, jnp.stack([w, 2 * w]))[0],
    "carried": lambda f: lambda h, w: lax.scan(lambda c, _: ((jnp.tanh(f(*c)), c[1]), None), (h, w), None, 2)[0][0],
    "cond": lambda f: lambda h, w: lax.cond(h[0, 0] < 9, f, lambda h, w: h, h, w),
    "vmap": lambda f: lambda h, w: jax.vmap(f, (0, None))(jnp.stack([h, 2 * h]), w).sum(0),
    "shard_map": one_device,
    "barrier": lambda f: lambda h, w: f(*lax.optimization_barrier((h, w))),
}  # fmt: skip
COMMON = (
    ["h @ w", "einsum", "conv", "rotary", "selected", "swapped", "added"],
    ["itself", "cumsum", "constant", "barrier"],
)
LARGE = int(os.environ.get("FUZZ_EXAMPLES", "0"))
COUNT = itertools.count(1)


@st.composite
def programs(draw):
    """Draw layers. Each has a product, a map of its weight before the product, and a transformation around both."""
    name = lambda choices, common=("nothing",): draw(st.sampled_from(sorted(choices)) | st.sampled_from(common))
    layers = [
        (name(AROUND), name(PRODUCTS, COMMON[0]), name(MAPS, COMMON[1]), draw(st.integers(0, i)))
        for i in range(draw(st.integers(1, 3)))
    ]

    def activities(p, x):
        h, found = x @ p["V"], []
        for around, product, made, i in layers:
            h = AROUND[around](PRODUCTS[product])(jnp.tanh(h), MAPS[made](p["W"][str(i)]))
            found.append(h)
        return found

    shapes = {str(i): (SIZE, SIZE) for *_, i in layers}
    params = {"V": normal(7, 5, SIZE), "W": draw_all(shapes), "out": normal(8, SIZE, 3)}
    return layers, activities, params


def draw_all(shapes):
    return {name: normal(int(name) + 20, *shape) / 2 for name, shape in shapes.items()}


def unreached(activities, params, i):
    """Return ``params`` with W moved so that no value of ``activities`` changes, or None if that is impossible."""
    values = jax.jit(
        lambda w: jnp.concatenate([a.ravel() for a in activities(params | {"W": params["W"] | {i: w}}, X)])
    )
    w = params["W"][i]
    jacobian = np.asarray(jax.jit(jax.jacobian(values))(w), np.float64).reshape(-1, w.size)
    _, sizes, directions = np.linalg.svd(jacobian)
    free = directions[np.sum(sizes > 1e-4 * max(sizes.max(initial=0), 1)) :]
    if not len(free):
        return None
    moved = w + (np.random.default_rng(0).normal(size=len(free)) @ free).reshape(w.shape).astype(w.dtype)
    return params | {"W": params["W"] | {i: moved}} if np.allclose(values(moved), values(w), atol=1e-4) else None


@pytest.mark.slow
@settings(
    deadline=None,
    derandomize=not LARGE,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    max_examples=LARGE or 8,
)
@given(programs())
def test_of_random_programs_none_reads_w(program):
    """Each random program raises an error, or has no weight transport.

    With B = W its gradients equal those of ``jax.grad``. They do not change if W moves and no value changes.
    """
    layers, activities, params = program
    note(str(layers))
    if LARGE and next(COUNT) % 50 == 0:
        jax.clear_caches()
    fun = lambda p, x: jnp.sum(jnp.sin(activities(p, x)[-1] @ p["out"]))
    try:
        feedback = jax.jit(lambda params: wmkp.init_feedback(jax.random.key(0), FA, fun, params, X))(params)
    except wmkp.WeightTransportError:
        event("refused")
        return
    event("accepted")
    gradient = jax.jit(lambda p, b: wmkp.value_and_grad(fun, FA)(p, b, X)[1][0])
    mirrored = jax.tree.map(lambda w, b: None if b is None else w, params, feedback)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, gradient(params, mirrored), jax.jit(jax.grad(fun))(params, X))
    found = wmkp.transport(fun, FA, params, feedback, X)
    assert all(sum(n > 1 for n in found[path].shape) <= 1 for path in read(found)), found
    here = gradient(params, feedback)
    for i in params["W"]:
        if (elsewhere := unreached(activities, params, i)) is not None:
            event("moved where its inputs do not reach")
            there = gradient(elsewhere, feedback)
            jax.tree.map(close, here["V"], there["V"])
            jax.tree.map(close, here["W"], there["W"] | {i: here["W"][i]})
