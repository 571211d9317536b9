"""Direct feedback that learns the output's derivatives: forward mode measures what noise inside does to the output."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wmkp import checks
from wmkp.program.interpreter import Direct, Handler, anchored, run
from wmkp.program.pathways import Synapses
from wmkp.program.products import Product
from wmkp.program.projections import Analysis, direct_sizes


def forward_signal(synapses: Synapses) -> jax.Array:
    """The signal ``B - J^T``: this is B. ``value_and_grad`` subtracts the other part (``jacobians``)."""
    return synapses.b / synapses.uses


@dataclasses.dataclass(frozen=True)
class _Descend:
    """``update`` of a stateless transformation that subtracts ``rate`` times the signal."""

    rate: float

    def __call__(self, signal: Any, state: Any, feedback: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda s: -(self.rate * s).astype(s.dtype), signal), state


def _no_state(feedback: Any) -> optax.EmptyState:
    return optax.EmptyState()


def descent(rate: float) -> optax.GradientTransformation:
    """Descends the signal. Unlike optax's transformations, it can be pickled and compared, as rules are."""
    return optax.GradientTransformation(_no_state, _Descend(rate))


def jacobians(key: Any, paths: list[str], analysis: Analysis, leaves: list[Any], args: Any) -> dict[int, Direct]:
    """For these projections the mean of xi (J xi)^T, whose expectation is J^T, by their leaf numbers.

    xi is standard Gaussian noise on the projection's input, and J the Jacobian of the network's output with respect to
    that input. One pass serves all projections: to each, the effect of the others' noise is more noise.
    """
    sites = {path: [p for p in analysis.sites()[path] if p.needs_feedback] for path in paths}
    products = [p for found in sites.values() for p in found]
    if not products:
        return {}
    last = analysis.last()
    if last.lengths:
        raise ValueError(
            "forward_direct_feedback_alignment needs the last projection outside of any lax.scan; use direct_kolen_pollack()"
        )
    if any(p.stack not in ((), p.lengths) for p in products):
        raise ValueError(
            "forward_direct_feedback_alignment needs every scan around a projection to run over its weights, or none of "
            "them; use direct_kolen_pollack()"
        )
    keys = jax.random.split(key, len(products))
    avals = [jax.ShapeDtypeStruct((*p.lengths, *p.input_avals[0].shape), p.input_avals[0].dtype) for p in products]
    noise = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, avals, strict=True)]
    output = functools.partial(_output, analysis, products, last, leaves, args)
    try:
        _, change = jax.jvp(output, (jax.tree.map(jnp.zeros_like, noise),), (noise,))
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "forward_direct_feedback_alignment differentiates the network in forward mode, which a jax.custom_vjp in it does "
            "not have. Write it as a jax.custom_jvp, or use direct_kolen_pollack()."
        ) from error
    found = {p: _mean(p, xi, change) for p, xi in zip(products, noise, strict=True)}
    result = {}
    for path, site in sites.items():
        i = analysis.paths.index(path)
        if site:
            mean = jnp.stack([found[p] for p in site]).mean(0)
            result[i] = Direct(mean.astype(leaves[i].dtype))
    return result


def _output(
    analysis: Analysis, products: list[Product], last: Product, leaves: list[Any], args: Any, taps: list[jax.Array]
) -> Any:
    """The network's output, with ``taps`` added to the inputs of these products."""

    def on_product(handler: Handler, product: Product, x: Any, w: Any, b: Any, tap: Any) -> Any:
        y = product.multiply(x if tap is None else x + tap, w)
        if product is last:
            handler.channel = y
        return y

    inputs = [(x, None) for x in [*leaves, *(leaf for leaf in jax.tree.leaves(args) if checks.is_array(leaf))]]
    start = jnp.zeros(last.output_aval.shape, last.output_aval.dtype)
    handler = Handler(
        on_product, dict(zip(products, taps, strict=True)), start, anchored((inputs, analysis.plan.consts))
    )
    run(analysis.plan, inputs, handler)
    return handler.channel


def _mean(product: Product, xi: jax.Array, change: jax.Array) -> jax.Array:
    """The mean of xi (J xi)^T over samples (and over the steps of a scan that share one B), in B's shape."""
    _, inputs, errors = direct_sizes(product.input_avals[0].shape, change.shape)
    changes = change.reshape(-1, errors)
    steps = math.prod(product.lengths)
    signal = jnp.einsum("tsi,se->tie", xi.reshape(steps, -1, inputs), changes) / len(changes)
    return signal.reshape(*product.stack, inputs, errors) if product.stack else signal.mean(0)
