"""Checks of every model: B = W against jax.grad, no W in the backward pass, ten steps of KP and of WM.

Tracing and compilation take nearly all of the time, so a model compiles only two programs. One is the engaged gradient
(the same for KP and WM) beside backprop's, the other is mirror mode. NumPy makes the initial W and B, and the updates.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wmkp
from wmkp.program import compat

KEY = jax.random.key(0, impl="unsafe_rbg")
STEPS = 10
LAID_OUT = compat.LAYOUT | compat.INDEXED | compat.JOINED | compat.WRITTEN | compat.AFFINE | {"neg", "mul", "div"}
MIRROR = wmkp.weight_mirror(noise="rademacher", num_samples=64, rate=0.3, start=0)


class Model(NamedTuple):
    """A model as a loss: ``fun(params, *args) -> scalar``."""

    fun: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


class Case(NamedTuple):
    """What is expected of a model.

    Attributes:
      make: builds the model.
      local: a pattern of the parameters that have two axes or more and are no projection (biases of heads).
      first: a pattern of the projections without B, because no error passes through them.
      declared: a pattern of gains of more than one axis, which need the rule ``wmkp.local()``.
      refused: {path: primitive} of the parameters that B cannot follow. They raise an error; ``backprop()`` fixes it.
      unmirrored: a pattern of the projections that noise cannot reach. They raise an error in mirror mode; KP fixes it.
      in_part: a pattern of the parameters whose gradient differs from B's signal: tied weights, and weights under a
        weight norm.
      kept: a pattern of the weights that the backward pass keeps for another use. This is the gradient of their own
        norm, or the recomputation of a checkpoint.
      bound: the largest relative difference from jax.grad's gradient. It is relative to the gradient's largest entry,
        or to a tenth of the largest entry of all gradients.
    """

    make: Callable[[], Model]
    local: str = "bias|scale|offset|/b$"
    first: str = "$^"
    declared: str = "$^"
    refused: Mapping[str, str] = MappingProxyType({})
    unmirrored: str = "$^"
    in_part: str = "$^"
    kept: str = "$^"
    bound: float = 2e-6


def parametrize(cases: dict[str, Case]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def paths_of(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def drawn(shapes: Any, seed: int = 0) -> Any:
    """Random arrays of these shapes: matrices have LeCun's variance, other floats are about one, integers are zero."""
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> Any:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(KEY, x.shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        value = rng.normal(size=x.shape)
        value = value / np.sqrt(np.prod(x.shape[:-1])) if len(x.shape) >= 2 else 1 + 0.1 * value
        return value.astype(x.dtype)

    return jax.tree.map(draw, shapes)


def through_gain(apply: Callable[..., Any], params: Any, x: Any, *args: Any) -> Model:
    """Makes a loss of ``apply(params, x, *args)``. A parameter scales x, so that each projection needs a B."""

    def fun(params: Any, x: jax.Array, *args: Any) -> jax.Array:
        out = apply(params["model"], jnp.tanh(x * params["gain"]), *args)
        target = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.mean((out.astype(jnp.float32) - target) ** 2)

    return Model(fun, {"model": params, "gain": np.ones(x.shape[-1], np.float32)}, (x, *args))


def mirrored(params: Any, feedback: Any) -> Any:
    """Feedback weights with B = W for each weight that has a B."""
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([None if b is None else w for w, b in zip(leaves, tree.flatten_up_to(feedback), strict=True)])


def assert_gradients_close(ours: Any, theirs: Any, bound: float) -> None:
    ours, theirs = paths_of(ours), paths_of(theirs)
    assert ours.keys() == theirs.keys()
    # The gradient of a bias before a normalization is rounding alone, so the bound also uses the largest entry of all.
    largest = max(np.max(np.abs(np.asarray(g, np.float64)), initial=0) for g in theirs.values())
    for path, expected in theirs.items():
        expected = np.asarray(expected, np.float64)
        scale = max(np.max(np.abs(expected), initial=0), 0.1 * largest)
        np.testing.assert_allclose(
            np.asarray(ours[path], np.float64), expected, rtol=0, atol=bound * scale, err_msg=path
        )


def angles(params: Any, feedback: Any) -> dict[str, float]:
    """The angles between W and B in degrees, by path, computed in NumPy."""
    ws = {path: np.asarray(w, np.float64).ravel() for path, w in paths_of(params).items()}
    bs = {path: np.asarray(b, np.float64).ravel() for path, b in paths_of(feedback).items()}
    cosine = {path: ws[path] @ b / np.linalg.norm(ws[path]) / np.linalg.norm(b) for path, b in bs.items()}
    return {path: float(np.degrees(np.arccos(np.clip(c, -1, 1)))) for path, c in cosine.items()}


def differences(params: Any, feedback: Any) -> dict[str, np.ndarray]:
    """W - B, by path."""
    ws = paths_of(params)
    return {
        path: np.asarray(ws[path], np.float64) - np.asarray(b, np.float64) for path, b in paths_of(feedback).items()
    }


def kept_weights(fun: Callable[..., Any], rule: Any, params: Any, feedback: Any, args: Any) -> set[str]:
    """The paths of the parameters that the backward pass keeps, plain or in another layout. It only traces ``fun``.

    Backprop keeps every weight that an error passes. A rule with B keeps them for another use alone.
    """
    leaves, tree = jax.tree.flatten(params)
    engaged = wmkp.engage(fun, rule)

    def kept(leaves: Any, feedback: Any, args: Any) -> list[Any]:
        of_w = lambda leaves, feedback: engaged(tree.unflatten(leaves), feedback, *args)
        return jax.tree.leaves(jax.vjp(of_w, leaves, feedback)[1])

    def made_of(jaxpr: Any, inputs: list[Any]) -> list[Any]:
        """For each result, the parameters of which it is a layout, or None if it is computed in another way."""
        found = dict(zip(jaxpr.invars, inputs, strict=True))
        read = lambda v: found.get(v) if isinstance(v, compat.Var) else set()
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if eqn.primitive.name in compat.INLINED:
                outs = made_of(compat.open_jaxpr(compat.inner_jaxpr(eqn))[0], operands)
            elif eqn.primitive.name in LAID_OUT and None not in operands:
                outs = [set().union(*operands)] * len(eqn.outvars)
            else:
                outs = [None] * len(eqn.outvars)
            found.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    jaxpr = jax.make_jaxpr(kept)(leaves, feedback, args).jaxpr
    sources = [{path} for path in paths_of(params)]
    outs = made_of(jaxpr, sources + [None] * (len(jaxpr.invars) - len(sources)))
    return set().union(*filter(None, outs))


def check(case: Case) -> None:
    """Asserts everything that must hold for a model."""
    fun, params, args = case.make()
    found = wmkp.projections(fun, params, *args)
    gains = {path for path in found if re.search(case.declared, path)}
    assert all("element by element" in str(found.pop(path).obstacle) for path in gains)
    obstacles = {path: p.obstacle for path, p in found.items() if p.obstacle}
    assert obstacles.keys() == case.refused.keys(), obstacles
    for path, primitive in case.refused.items():
        assert re.search(primitive, obstacles[path]), obstacles[path]
    matrices = {path for path, w in paths_of(params).items() if w.ndim >= 2 and not re.search(case.local, path)}
    vectors = {path for path in found if paths_of(params)[path].ndim == 1}  # laid out as matrices
    assert matrices - obstacles.keys() == found.keys() - obstacles.keys() - vectors, "each matrix is a projection"
    matrices |= vectors
    with_feedback = {p for p in matrices - obstacles.keys() if not re.search(case.first, p)}

    way_out = {f"^{re.escape(path)}$": wmkp.backprop() for path in case.refused}
    way_out |= {f"^{re.escape(path)}$": wmkp.local() for path in gains}
    if case.refused:
        with pytest.raises(wmkp.WeightTransportError) as error:
            wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, params, *args)
        assert any(
            f"params[{path!r}]" in str(error.value) and obstacles[path] in str(error.value) for path in obstacles
        )
    rule = {**way_out, ".*": wmkp.kolen_pollack()}
    shapes = jax.eval_shape(lambda: wmkp.init_feedback(KEY, rule, fun, params, *args))
    assert paths_of(shapes).keys() == with_feedback
    feedback = drawn(shapes, seed=1)

    kept = kept_weights(fun, rule, params, feedback, args) & with_feedback
    assert kept == {p for p in with_feedback if re.search(case.kept, p)}, "the backward pass keeps W"

    engaged, backprop = wmkp.value_and_grad(fun, rule), jax.value_and_grad(fun)
    both = jax.jit(lambda params, feedback, *args: (engaged(params, feedback, *args), backprop(params, *args)))
    step = lambda *at: both(*at)[0]
    (loss, (grads, _)), (expected, expected_grads) = both(params, mirrored(params, feedback), *args)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_gradients_close(grads, expected_grads, case.bound)

    before, losses, (w, b) = angles(params, feedback), [], (params, feedback)
    for t in range(STEPS):
        loss, (others, signal) = step(w, b, *args)
        if t == 0 and with_feedback:
            pairs = zip(*map(jax.tree.leaves, (grads, others)), strict=True)
            assert not all(np.allclose(x, y, rtol=1e-3) for x, y in pairs), "the error must go through B"
        w, b = jax.tree.map(kolen_pollack, w, others), jax.tree.map(kolen_pollack, b, signal)
        losses.append(loss)
    assert np.isfinite(losses).all()
    angles_fall(before, angles(w, b))
    for path, difference in differences(w, b).items():  # Eq. 14 holds if B's signal is W's gradient
        expected = differences(params, feedback)[path] * 0.8**STEPS
        off = np.max(np.abs(difference - expected)) / np.max(np.abs(expected))
        assert (off > 0.1) == bool(re.search(case.in_part, path)), (path, off)

    rule = {**way_out, ".*": MIRROR}
    if case.unmirrored != "$^":
        with pytest.raises(wmkp.WeightTransportError, match="mirror mode cannot reach"):
            wmkp.mirror_signals(KEY, rule, fun, params, *args)
        rule = {**way_out, case.unmirrored: wmkp.kolen_pollack(), ".*": MIRROR}
    if any(not re.search(case.unmirrored, path) for path in with_feedback):
        mirror = jax.jit(lambda key, params: wmkp.mirror_signals(key, rule, fun, params, *args))
        losses, keys, (w, b) = [], jax.random.split(KEY, STEPS), (params, feedback)
        for t in range(STEPS):
            loss, (others, _) = step(w, b, *args)
            w = jax.tree.map(gradient_descent, w, others)
            b = jax.tree.map(weight_mirror, b, mirror(keys[t], w))
            losses.append(loss)
        assert np.isfinite(losses).all()
        after = angles(w, b)
        angles_fall(*({p: a for p, a in x.items() if not re.search(case.unmirrored, p)} for x in (before, after)))


def angles_fall(before: dict[str, float], after: dict[str, float]) -> None:
    assert before.keys() == after.keys()
    stays = {path: (before[path], after[path]) for path in before if not after[path] < before[path] - 1}
    assert not stays, "angles must fall, by more than a degree"


def kolen_pollack(w: Any, signal: Any) -> Any:
    """Updates W or B by the signal's sign, with decay, so that W - B^T shrinks to four fifths (Eq. 14)."""
    return (0.8 * np.asarray(w, np.float32) - 0.05 * np.sign(np.asarray(signal, np.float32))).astype(w.dtype)


def weight_mirror(b: Any, signal: Any) -> Any:
    """Updates B in mirror mode (Eq. 7): a leaky average of the products of noise and its linear response."""
    return (0.7 * np.asarray(b, np.float32) + 0.3 * np.asarray(signal, np.float32)).astype(b.dtype)


def gradient_descent(w: Any, gradient: Any) -> Any:
    return (np.asarray(w, np.float32) - 0.05 * np.asarray(gradient, np.float32)).astype(w.dtype)
