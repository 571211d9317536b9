"""Direct feedback in recurrent networks sends each step's error to the projections of the same step."""

import chex
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest
from arrays import drawn_feedback
from jax import lax

import wmkp
from wmkp.program.interpreter import Direct

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
TIME, BATCH, INPUTS, STATE, HIDDEN, OUT = 6, 5, 3, 8, 7, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-2])


PARAMS = {"x": normal(0, INPUTS, STATE), "h": normal(1, STATE, STATE), "m": normal(2, STATE, HIDDEN),
          "o": normal(3, HIDDEN, OUT), "bias": normal(4, 1, STATE)[0]}  # fmt: skip
B = {"h": normal(5, STATE, OUT), "m": normal(6, STATE, OUT), "o": normal(7, HIDDEN, OUT)}
XS, TARGETS = normal(8, TIME, BATCH, INPUTS), normal(9, TIME, BATCH, OUT)


def cell(params, h, x, cut):
    back = lax.stop_gradient(h) if cut else h
    h = jnp.tanh(x @ params["x"] + back @ params["h"] + params["bias"])
    return h, jnp.tanh(h @ params["m"]) @ params["o"]


def error_of(y, target):
    return jnp.sum((y - target) ** 2) / (2 * BATCH)


def stacked(params, xs, targets, cut=False, cell=cell, **options):
    _, ys = lax.scan(lambda h, x: cell(params, h, x, cut), jnp.zeros((BATCH, STATE)), xs, **options)
    return jnp.sum(jax.vmap(error_of)(ys, targets))


def summed(params, xs, targets, cut=False):
    """The scan carries the sum of the losses. No projection of the next step reads the output."""

    def tick(carry, now):
        h, total = carry
        h, y = cell(params, h, now[0], cut)
        return (h, total + error_of(y, now[1])), None

    return lax.scan(tick, (jnp.zeros((BATCH, STATE)), 0.0), (xs, targets))[0][1]


def chunked(params, xs, targets, cut=False):
    """A scan inside a checkpointed scan. Both carry the loss."""

    def chunk(carry, now):
        def tick(carry, now):
            h, y = cell(params, carry[0], now[0], cut)
            return (h, carry[1] + error_of(y, now[1])), None

        return lax.scan(tick, carry, now)[0], None

    parts = jax.tree.map(lambda a: a.reshape(2, TIME // 2, *a.shape[1:]), (xs, targets))
    return lax.scan(jax.checkpoint(chunk), (jnp.zeros((BATCH, STATE)), 0.0), parts)[0][1]


def fed_back(params, xs, targets, cut=False):
    """The output enters the next step under stop_gradient, so no error comes back from there."""

    def tick(carry, x):
        h, y = cell(params, carry[0], x + 0 * lax.stop_gradient(carry[1])[:, :INPUTS], cut)
        return (h, y), y

    start = jnp.zeros((BATCH, STATE)), jnp.zeros((BATCH, OUT))
    return jnp.sum(jax.vmap(error_of)(lax.scan(tick, start, xs)[1], targets))


LOOPS = {
    "outputs": stacked,
    "summed": summed,
    "chunked": chunked,
    "fed back": fed_back,
    "checkpointed": lambda *a, **k: stacked(*a, **k, cell=jax.checkpoint(cell, static_argnums=3)),
    "jitted": lambda *a, **k: stacked(*a, **k, cell=jax.jit(cell, static_argnums=3)),
    "unrolled in part": lambda *a, **k: stacked(*a, **k, unroll=4),
}


def by_hand(params, xs, targets, cut):
    """The gradients of direct feedback alignment and the signals of direct Kolen-Pollack, in NumPy."""
    states, hidden, errors = [np.zeros((BATCH, STATE))], [], []
    for x, target in zip(xs, targets, strict=True):
        states.append(np.tanh(x @ params["x"] + states[-1] @ params["h"] + params["bias"]))
        hidden.append(np.tanh(states[-1] @ params["m"]))
        errors.append((hidden[-1] @ params["o"] - target) / BATCH)
    grads = {k: np.zeros_like(v) for k, v in params.items()}
    learned = {k: np.zeros_like(v) for k, v in B.items()}
    for t in range(TIME):
        before, h, m, e = states[t], states[t + 1], hidden[t], errors[t]
        at_state = e @ B["m"].T
        if not cut and t + 1 < TIME:  # the next step's recurrent projection sends its own step's error to its input
            at_state = at_state + errors[t + 1] @ B["h"].T
        at_m, at_z = (1 - m**2) * (e @ B["o"].T), (1 - h**2) * at_state
        grads["o"] += m.T @ e
        grads["m"] += h.T @ at_m
        grads["h"] += before.T @ at_z
        grads["x"] += xs[t].T @ at_z
        grads["bias"] += at_z.sum(0)
        for name, seen in (("h", before), ("m", h), ("o", m)):
            learned[name] += seen.T @ e
    return grads, learned


@pytest.mark.parametrize(("name", "cut"), [*((name, False) for name in LOOPS), ("outputs", True)])
def test_each_step_gets_its_own_error(name, cut):
    """Loss, gradients and signals equal NumPy's. With ``cut``, no error goes back to the state before."""
    with jax.enable_x64(True):
        loss, rule = lambda *args: LOOPS[name](*args, cut=cut), wmkp.direct_kolen_pollack()
        start = drawn_feedback(rule, loss, PARAMS, XS, TARGETS)
        own = {k for k in B if not (cut and k == "h")}
        assert {k: b.array.shape for k, b in start.items() if b is not None} == {k: B[k].shape for k in own}
        feedback = {k: Direct(B[k]) if k in own else None for k in PARAMS}
        value, (grads, signal) = jitted.value_and_grad(loss, rule)(PARAMS, feedback, XS, TARGETS)
        assert value == pytest.approx(float(jax.jit(loss)(PARAMS, XS, TARGETS)), rel=1e-12)
        expected, learned = by_hand(PARAMS, XS, TARGETS, cut)
        chex.assert_trees_all_close(grads, expected, rtol=0, atol=1e-12)
        chex.assert_trees_all_close({k: signal[k].array for k in own}, {k: learned[k] for k in own}, rtol=0, atol=1e-12)


def readout_first(params, xs):
    """A network whose state is computed by the last projection of the step, after the output."""

    def tick(h, x):
        y = h @ params["m"]
        return jnp.tanh(x @ params["x"] + h @ params["h"]), y

    return jnp.sum(lax.scan(tick, jnp.zeros((BATCH, STATE)), xs)[1] ** 2)


def autoregressive(params, xs):
    tick = lambda carry, x: ((new := cell(params, carry[0], x + carry[1][:, :INPUTS], False)), new[1])
    return jnp.sum(lax.scan(tick, (jnp.zeros((BATCH, STATE)), jnp.ones((BATCH, OUT))), xs)[1] ** 2)


def autoregressive_chunks(params, xs):
    """A network whose output comes back through the outer of two scans."""

    def chunk(y, xs):
        h = jnp.zeros((BATCH, STATE))
        _, ys = lax.scan(lambda h, x: cell(params, h, x + y[:, :INPUTS], False), h, xs)
        return ys[-1], ys

    return jnp.sum(lax.scan(chunk, jnp.ones((BATCH, OUT)), xs.reshape(2, TIME // 2, BATCH, INPUTS))[1] ** 2)


def autoregressive_in_part(params, xs):
    """A network whose output comes back into a compiled part of the next step."""
    state = jax.jit(lambda h, x: jnp.tanh(x @ params["x"] + h @ params["h"]))
    tick = lambda carry, x: ((h := state(carry[0], x + carry[1][:, :INPUTS]), h @ params["m"]), None)
    start = jnp.zeros((BATCH, STATE)), jnp.ones((BATCH, params["m"].shape[1]))
    return jnp.sum(lax.scan(tick, start, xs)[0][1] ** 2)


def encoded(params, xs):
    h = jnp.tanh(jnp.tanh(xs[0] @ params["x"]) @ params["h"])
    return jnp.sum(lax.scan(lambda h, x: (h, h @ params["m"] + x[:, :1]), h, xs)[1] ** 2)


def branching(params, xs):
    h = jnp.tanh(xs[0] @ params["x"])
    return jnp.sum(lax.cond(xs.sum() > 0, lambda h: h @ params["h"], lambda h: h @ params["h"], h) ** 2)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (readout_first, r"params\['h'\].* enters a projection in the next step.*after the state"),
        (autoregressive, r"params\['o'\].* enters a projection in the next step.*stop_gradient"),
        (autoregressive_in_part, r"params\['m'\].* enters a projection in the next step.*stop_gradient"),
        (autoregressive_chunks, r"params\['o'\].* enters a projection in the next step.*stop_gradient"),
        (encoded, r"params\['h'\] is used outside of the lax\.scan.*rule=\{\"h\": wmkp\.feedback_alignment"),
        (branching, r"outside of any lax\.cond"),
    ],
)
def test_outputs_without_one_error_a_step_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        wmkp.init_feedback(KEY, wmkp.direct_feedback_alignment(), loss, PARAMS, XS)


def test_another_rule_outside_of_the_scan():
    """A weight outside the scan can use feedback alignment, beside direct feedback in the scan."""
    rule = {"h": wmkp.feedback_alignment(), ".*": wmkp.direct_feedback_alignment()}
    feedback = drawn_feedback(rule, encoded, PARAMS, XS)
    grads = jitted.value_and_grad(encoded, rule)(PARAMS, feedback, XS)[1][0]
    h = np.tanh(np.tanh(XS[0] @ PARAMS["x"]) @ PARAMS["h"])
    e = 2 * (h @ PARAMS["m"] + XS[:, :, :1])
    at_h = (1 - h**2) * (e.sum(0) @ np.asarray(feedback["m"].array).T)
    np.testing.assert_allclose(grads["h"], np.tanh(XS[0] @ PARAMS["x"]).T @ at_h, rtol=1e-4, atol=1e-4)


def test_joined_weights_cannot_each_have_direct_feedback():
    """B from the output has its own shape, so it cannot follow a part of a joined weight."""
    joined = lambda params, x: jnp.sum((jnp.tanh(x @ params["x"]) @ jnp.hstack([params["h"], params["m"]])) ** 2)
    feedback = drawn_feedback(wmkp.direct_feedback_alignment(), joined, PARAMS, XS[0])
    with pytest.raises(ValueError, match=r"joined to one weight cannot each have direct feedback"):
        wmkp.value_and_grad(joined, wmkp.direct_feedback_alignment())(PARAMS, feedback, XS[0])


def test_no_output_without_a_projection():
    """Where B cannot follow the only weight, no projection makes an output."""
    found = wmkp.projections(lambda p, x: jnp.sum(jnp.tanh(x * p["bias"][:INPUTS]) @ jnp.tanh(p["x"])), PARAMS, XS[0])
    with pytest.raises(ValueError, match=r"no projection makes the output"):
        found["x"].direct_shape()
