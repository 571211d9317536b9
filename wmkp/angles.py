"""Measures: matrix and delta angles, norms of errors, growth of a stream, covariances of projections' inputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmkp import checks
from wmkp.alignment import covariance
from wmkp.engaged import carried, check_loss, companions, evaluate
from wmkp.feedback import feedback_leaves
from wmkp.program.interpreter import Direct
from wmkp.program.products import Product
from wmkp.program.projections import Analysis, analyse
from wmkp.rule import Rule, RuleOrRules, check_rule, check_samples, resolve
from wmkp.rules import ProductFeedback


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """The angle between two arrays of one shape, each taken as one vector: degrees in [0, 180], NaN if one is zero.

    ``2 atan2(|a/|a| - b/|b||, |a/|a| + b/|b||)`` is accurate to rounding. arccos fails below 0.03 degrees.
    """
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a, b))
    a, b = _unit(a), _unit(b)
    return jnp.rad2deg(2 * jnp.atan2(jnp.sqrt(jnp.sum((a - b) ** 2)), jnp.sqrt(jnp.sum((a + b) ** 2))))


def _unit(a: jax.Array) -> jax.Array:
    # Divided by the largest entry first: the squares of small entries would underflow.
    a = a / jnp.max(jnp.abs(a))
    return a / jnp.sqrt(jnp.sum(a**2))


def matrix_angles(params: Any, feedback: Any, rule: Rule | None = None) -> dict[str, jax.Array]:
    """The angle between W and B of each projection that has a B, in degrees. All entries count as one vector.

    0 means equal direction, 90 that W and B have none in common. Direct feedback has another shape than W, and no
    matrix angle. Under product feedback alignment it is the angle between W and R B. Sign symmetry's B has the signs
    that W had at the start; give ``rule`` to compare with W's current signs. Entries that the model masks out count
    too.

    Args:
      params: the parameters.
      feedback: the feedback weights, in params' structure, layout and shapes.
      rule: the rule of all projections, if the array that carries errors back differs from B.

    Returns:
      ``{path: degrees}``, scalars. NaN where W or B is all zero.

    Raises:
      ValueError, TypeError: feedback does not match params, or is not ``rule``'s.

    Example:
      >>> w = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> angles = wmkp.matrix_angles({"w": w}, {"w": w + 0.1})  # {"w": degrees}
    """
    if rule is not None:
        check_rule(rule, mapping=False)
    result = {}
    for (path, w), b in zip(checks.named_leaves(params).items(), feedback_leaves(params, feedback), strict=True):
        if rule is not None and rule.backward is not None and b is not None:
            b = carried(rule, None, path, w, b)
        b = b.effective() if isinstance(b, ProductFeedback) else b
        if not (b is None or checks.is_array(b) or isinstance(b, Direct)):
            raise ValueError(
                f"feedback[{path!r}] is {checks.shapes(b)}, which is not one array; pass the rule that made it: "
                "matrix_angles(params, feedback, rule)"
            )
        if b is not None and not isinstance(b, Direct):
            result[path] = angle(w, b)
    return result


def delta_angles(
    fun: Callable[..., Any], rule: RuleOrRules, params: Any, feedback: Any, *args: Any, has_aux: bool = False
) -> dict[str, jax.Array]:
    """The angle between the error that the rule carries and backprop's, at the same weights and data.

    The error is delta, the loss's gradient at a projection's output. The whole batch counts as one vector, and so do
    all uses of a parameter. At the last projection both errors are the same, and the angle is zero.

    Args:
      fun: a loss ``fun(params, *args) -> scalar``, or ``-> (scalar, aux)`` with ``has_aux``.
      rule: a rule, or a mapping from path patterns to rules.
      params: the parameters.
      feedback: the feedback weights.
      *args: fun's further arguments.
      has_aux: whether ``fun`` returns auxiliary data beside the loss.

    Returns:
      ``{path: degrees}``, scalars, one for each projection, first layers included. NaN where an error is all zero.

    Raises:
      ValueError, TypeError, WeightTransportError: as ``value_and_grad``.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["W1"]) @ params["W2"] - 1) ** 2)
      >>> x, rule = jnp.ones((16, 4)), wmkp.feedback_alignment()
      >>> feedback = wmkp.init_feedback(jax.random.key(0), rule, loss_fn, params, x)
      >>> angles = wmkp.delta_angles(loss_fn, rule, params, feedback, x)  # {"W1": degrees, "W2": 0}
    """
    analysis, ours = _carried_deltas(fun, rule, params, feedback, args, has_aux)
    leaves = jax.tree.leaves(params)
    theirs = _by_path(analysis, _deltas(analysis, {}, leaves, leaves, args, has_aux))
    return {path: angle(delta, theirs[path]) for path, delta in ours.items()}


class DeltaNorms(NamedTuple):
    """The error that a rule carries to one projection's output, compared with backprop's error there: scalars.

    Attributes:
      angle: the angle between the two in degrees, as in ``delta_angles``.
      ratio: the norm of the carried error over that of backprop's error.
      reference: the norm of backprop's error over the whole batch, in units of the loss over the output's.
      rounding: the angle in degrees by which backprop's own error turns if every parameter moves by one rounding.
    """

    angle: jax.Array
    ratio: jax.Array
    reference: jax.Array
    rounding: jax.Array

    @property
    def is_rounding(self) -> jax.Array:
        """Whether backprop's error is zero or turns by more than 5 degrees: then ``angle`` and ``ratio`` mean nothing."""
        return ~(self.rounding < 5.0)


def delta_norms(
    fun: Callable[..., Any], rule: RuleOrRules, params: Any, feedback: Any, *args: Any, has_aux: bool = False
) -> dict[str, DeltaNorms]:
    """How large the carried error is compared with backprop's, and whether that comparison means anything.

    An angle says nothing about size: an error in the right direction may still vanish or explode on its way back. And
    an angle means nothing if backprop's own error is only rounding. This costs one more backward pass than
    ``delta_angles``.

    Args:
      fun, rule, params, feedback, args, has_aux: as in ``delta_angles``.

    Returns:
      ``{path: DeltaNorms}``, one for each projection, first layers included. If ``is_rounding`` is true, ``angle`` and
      ``ratio`` mean nothing.

    Raises:
      ValueError, TypeError, WeightTransportError: as ``value_and_grad``.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["W1"]) @ params["W2"] - 1) ** 2)
      >>> x, rule = jnp.ones((16, 4)), wmkp.feedback_alignment()
      >>> feedback = wmkp.init_feedback(jax.random.key(0), rule, loss_fn, params, x)
      >>> norms = wmkp.delta_norms(loss_fn, rule, params, feedback, x)
      >>> ratios = {path: float(n.ratio) for path, n in norms.items() if not n.is_rounding}
    """
    analysis, ours = _carried_deltas(fun, rule, params, feedback, args, has_aux)
    leaves = jax.tree.leaves(params)
    nudged = _nudged(leaves, [p.output_aval.dtype for p in analysis.plan.products()])
    theirs, moved = (_by_path(analysis, _deltas(analysis, {}, w, w, args, has_aux)) for w in (leaves, nudged))
    result = {}
    for path, delta in ours.items():
        reference = norm(theirs[path])
        turned = angle(theirs[path], moved[path])
        result[path] = DeltaNorms(angle(delta, theirs[path]), norm(delta) / reference, reference, turned)
    return result


def norm(a: jax.Array) -> jax.Array:
    """The Euclidean norm of all entries, without underflow or overflow of their squares."""
    a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(a))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum((a / scale) ** 2))


def _nudged(leaves: list[Any], dtypes: list[Any]) -> list[Any]:
    """Parameters moved by the coarsest rounding of the computation, each up or down."""
    step = max(float(jnp.finfo(dtype).eps) for dtype in [*dtypes, *(jnp.result_type(w) for w in leaves)])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    signs = [jax.random.rademacher(key, jnp.shape(w), jnp.float32) for key, w in zip(keys, leaves, strict=True)]
    return [(w * (1 + step * sign)).astype(w.dtype) for w, sign in zip(leaves, signs, strict=True)]


def stream_growth(activations: Sequence[jax.Array]) -> jax.Array:
    """How much a residual stream grows from block to block.

    In a pre-norm network nothing bounds the stream. Under a rule that fits badly it can grow until the blocks' errors
    vanish behind the last normalization.

    Args:
      activations: the stream before the first block and after each block, ``n + 1`` arrays.

    Returns:
      ``(n,)``: the root mean square after each block over that before it.

    Example:
      >>> wmkp.stream_growth([jnp.ones(4), 2 * jnp.ones(4), 2 * jnp.ones(4)]).tolist()
      [2.0, 1.0]
    """
    sizes = jnp.stack([norm(x) / math.sqrt(x.size) for x in activations])
    return sizes[1:] / sizes[:-1]


def _carried_deltas(
    fun: Callable[..., Any], rule: RuleOrRules, params: Any, feedback: Any, args: Any, has_aux: bool
) -> tuple[Analysis, dict[str, jax.Array]]:
    """The analysis, and the errors that the rule carries, by path."""
    checks.flag("has_aux", has_aux)
    checks.values("args", args)
    analysis = analyse(fun, params, *args)
    rules = resolve(rule, analysis)
    leaves = jax.tree.leaves(params)
    carriers = companions(analysis, rules, leaves, feedback_leaves(params, feedback))
    return analysis, _by_path(analysis, _deltas(analysis, rules, leaves, carriers, args, has_aux))


def _by_path(analysis: Analysis, deltas: dict[Product, jax.Array]) -> dict[str, jax.Array]:
    """Each parameter's deltas as one vector."""
    sites = {path: [deltas[p] for p in products if p in deltas] for path, products in analysis.sites().items()}
    return {path: jnp.concatenate([d.ravel() for d in found]) for path, found in sites.items() if found}


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
    """E[x x^T] of each projection's input: what mirroring on activity multiplies W^T by.

    See eq. 5. It is a mean over batch and positions, not centred. A convolution's input is its patches, in the kernel's
    (height, width, channel) order. A parameter with several uses has the mean over them.

    Args:
      fun: any JAX function ``fun(params, *args)``.
      params: its parameters.
      *args: its further arguments.

    Returns:
      ``{path: (groups, fan_in, fan_in)}``, in the squared units of the activity. NaN where no gradient connects the
      input with ``fun``'s floating-point outputs (a branch not taken, a stop_gradient, an argmax).

    Raises:
      TypeError: a parameter is not a real floating-point array.
      ValueError: an empty batch; a convolution by batch groups, or one whose left operand is the weight.

    Example:
      >>> params, x = {"W": jnp.ones((4, 2))}, jnp.ones((16, 4))
      >>> covariances = wmkp.input_covariances(lambda params, x: x @ params["W"], params, x)
      >>> covariances["W"].shape
      (1, 4, 4)
    """
    checks.values("args", args)
    analysis = analyse(fun, params, *args)
    leaves = list(checks.named_leaves(params).values())
    check_samples(analysis)
    sites = {path: [p for p in products if not p.obstacle] for path, products in analysis.sites().items()}
    products = list(dict.fromkeys(p for found in sites.values() for p in found))
    groups = {p: (jax.eval_shape(p.input_matrices, p.input_avals[0]).shape[0], p.fans()[0]) for p in products}
    # An extra row marks each covariance as taken: taps in branches not taken stay zero.
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
    """``y`` unchanged; the tap's cotangent is the covariance of ``x``."""

    @jax.custom_vjp
    def record(y: jax.Array, x: jax.Array, tap: jax.Array) -> jax.Array:
        return y

    dtype = tap.dtype
    record.defvjp(
        lambda y, x, tap: (y, x),
        lambda x, delta: (delta, jnp.zeros_like(x), _counted(covariance(product, x)).astype(dtype)),
    )
    return record(y, x, tap)
