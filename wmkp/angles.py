"""What to watch: matrix angles and delta angles, in degrees, and the covariances of what projections get."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wmkp import checks
from wmkp.alignment import covariance
from wmkp.engaged import carried, check_loss, companions, evaluate
from wmkp.feedback import feedback_leaves
from wmkp.program.interpreter import Direct
from wmkp.program.products import Product
from wmkp.program.projections import Analysis, analyse, is_array, named_leaves
from wmkp.rules import ProductFeedback, Rule, RuleOrRules, check_rule, check_samples, resolve


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """The angle between two arrays of one shape, each taken as one vector: degrees in [0, 180], NaN if one is zero.

    ``2 atan2(|a/|a| - b/|b||, |a/|a| + b/|b||)``: accurate down to rounding where arccos loses all under 0.03 degrees.
    """
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a, b))
    a, b = _unit(a), _unit(b)
    return jnp.rad2deg(2 * jnp.atan2(jnp.sqrt(jnp.sum((a - b) ** 2)), jnp.sqrt(jnp.sum((a + b) ** 2))))


def _unit(a: jax.Array) -> jax.Array:
    # Divided by the largest entry first: the squares of small entries would underflow.
    a = a / jnp.max(jnp.abs(a))
    return a / jnp.sqrt(jnp.sum(a**2))


def matrix_angles(params: Any, feedback: Any, rule: Rule | None = None) -> dict[str, jax.Array]:
    """The angle between W and B of each projection that has a B, all entries taken as one vector.

    Under product feedback alignment it is the angle between W and R B. Direct feedback has no shape in common with W,
    and no matrix angle. Sign symmetry's B has the signs that W had when B was made; with ``rule`` it gets W's of now.
    Entries that the model masks out count like all others: where W is sparse, mask both before, or see ``delta_angles``.

    Args:
      params: the parameters.
      feedback: the feedback weights, in params' structure, layout and shapes (so that W and the paper's B^T compare
        entry by entry).
      rule: the rule of all projections, if what carries errors back is B as the rule makes it from W and B.

    Returns:
      ``{path: degrees}``, scalars; NaN where one of the two is all zero.

    Raises:
      ValueError, TypeError: feedback does not match params, or is not ``rule``'s.
    """
    if rule is not None:
        check_rule(rule, mapping=False)
    result = {}
    for (path, w), b in zip(named_leaves(params).items(), feedback_leaves(params, feedback), strict=True):
        if rule is not None and rule.backward is not None and b is not None:
            b = carried(rule, None, path, w, b)
        b = b.effective() if isinstance(b, ProductFeedback) else b
        if not (b is None or is_array(b) or isinstance(b, Direct)):
            raise ValueError(
                f"feedback[{path!r}] is {checks.shapes(b)}, a pytree of its rule's own; say how it carries errors: "
                "matrix_angles(params, feedback, rule)"
            )
        if b is not None and not isinstance(b, Direct):
            result[path] = angle(w, b)
    return result


def delta_angles(
    fun: Callable[..., Any], rule: RuleOrRules, params: Any, feedback: Any, *args: Any, has_aux: bool = False
) -> dict[str, jax.Array]:
    """The angle between delta as the rule carries it and as backprop would, at the same weights and data.

    delta is the loss's gradient at a projection's output, the whole batch (and, for a parameter used in several places,
    all its uses) taken as one vector. At the last projection both are the same, and the angle is zero.

    Args:
      fun: a loss ``fun(params, *args) -> scalar``, or ``-> (scalar, aux)`` with ``has_aux``.
      rule: a rule, or a mapping from path patterns to rules.
      params: the parameters.
      feedback: the feedback weights.
      *args: fun's further arguments.
      has_aux: whether ``fun`` returns auxiliary data beside the loss.

    Returns:
      ``{path: degrees}``, scalars, one for each projection, a first layer included; NaN where a delta is all zero.

    Raises:
      ValueError, TypeError, WeightTransportError: as ``value_and_grad``.
    """
    checks.flag("has_aux", has_aux)
    checks.values("args", args)
    analysis = analyse(fun, params, *args)
    rules = resolve(rule, analysis)
    leaves = jax.tree.leaves(params)
    carriers = companions(analysis, rules, leaves, feedback_leaves(params, feedback))
    ours = _deltas(analysis, rules, leaves, carriers, args, has_aux)
    theirs = _deltas(analysis, {}, leaves, leaves, args, has_aux)
    result = {}
    for path, products in analysis.sites().items():
        products = [p for p in products if p in ours]
        if products:
            a, b = (jnp.concatenate([d[p].ravel() for p in products]) for d in (ours, theirs))
            result[path] = angle(a, b)
    return result


def _deltas(
    analysis: Analysis, rules: dict[str, Rule], leaves: list[Any], carriers: list[Any], args: Any, has_aux: bool
) -> dict[Product, jax.Array]:
    taps = {
        p: jnp.zeros((*p.lengths, *p.output_aval.shape), p.output_aval.dtype)
        for p in analysis.plan.products()
        if not p.obstacle
    }

    def loss(taps: list[jax.Array]) -> Any:
        return evaluate(analysis, rules, leaves, carriers, args, dict(zip(products, taps, strict=True)))

    products = list(taps)
    deltas = jax.grad(check_loss(loss, has_aux), has_aux=has_aux)(list(taps.values()))
    return dict(zip(products, deltas[0] if has_aux else deltas, strict=True))


def input_covariances(fun: Callable[..., Any], params: Any, *args: Any) -> dict[str, jax.Array]:
    """E[x x^T] of the input of each projection: what mirroring on activity multiplies W^T with (eq. 5).

    Means over batch and positions (not centred); a conv's input is its patches, in the kernel's (height, width,
    channel) order. A parameter used in several places has the mean over its uses.

    Args:
      fun: any JAX function ``fun(params, *args)``.
      params: its parameters.
      *args: its further arguments.

    Returns:
      ``{path: (groups, fan_in, fan_in)}``, in the squared units of the activity; NaN where no input reaches ``fun``'s
      floating-point outputs by a gradient (in a branch not taken, before a stop_gradient or the argmax of an accuracy).

    Raises:
      TypeError: a parameter is not a real floating-point array.
      ValueError: a batch of no sample; a convolution by batch groups, or whose left operand is the weight, whose patches are not taken.
    """
    checks.values("args", args)
    analysis = analyse(fun, params, *args)
    leaves = list(named_leaves(params).values())
    check_samples(analysis)
    sites = {path: [p for p in products if not p.obstacle] for path, products in analysis.sites().items()}
    products = list(dict.fromkeys(p for found in sites.values() for p in found))
    groups = {p: (jax.eval_shape(p.input_matrices, p.input_avals[0]).shape[0], p.fans()[0]) for p in products}
    # Beside each covariance, in a row more, whether it was taken: taps in branches not taken stay zero.
    taps = [jnp.zeros((*p.lengths, k, n + 1, n)) for p, (k, n) in groups.items()]

    def outputs(taps: list[jax.Array]) -> list[jax.Array]:
        out = evaluate(analysis, {}, leaves, leaves, args, dict(zip(products, taps, strict=True)), _recorded)
        return [x for x in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

    out, vjp = jax.vjp(outputs, taps)
    found = dict(zip(products, vjp([jnp.ones_like(x) for x in out])[0], strict=True))
    sums = {p: c.reshape(-1, *c.shape[-3:]).sum(0) for p, c in found.items()}
    means = {p: c[:, :-1] / c[:, -1:] for p, c in sums.items()}
    return {path: sum(means[p] for p in site) / len(site) for path, site in sites.items() if site}


def _counted(c: jax.Array) -> jax.Array:
    """Matrices with a row of ones below each."""
    return jnp.concatenate([c, jnp.ones_like(c[:, :1])], axis=1)


def _recorded(product: Product, x: jax.Array, y: jax.Array, tap: jax.Array) -> jax.Array:
    """``y`` as it is; the tap's cotangent is the covariance of ``x``."""

    @jax.custom_vjp
    def record(y: jax.Array, x: jax.Array, tap: jax.Array) -> jax.Array:
        return y

    dtype = tap.dtype
    record.defvjp(
        lambda y, x, tap: (y, x),
        lambda x, delta: (delta, jnp.zeros_like(x), _counted(covariance(product, x)).astype(dtype)),
    )
    return record(y, x, tap)
