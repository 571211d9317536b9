"""Is it secretly backprop? Gives the backward pass another array in a parameter's place, and looks whether gradients move.

This module does not use wmkp's analysis of a function. It evaluates the equations of the engaged function one by one, and
gives one parameter W at a time a second array W':

1. A value made from W alone, or from W and data, is carried twice: as W makes it, and as W' makes it.
2. A product of such a value with data (``dot_general``, a convolution) is an activity, and is carried once.
3. Where a value that is carried twice meets an activity, the result and its derivative by W are those of W. The
   derivative by the activity is that of W'. This derivative sends an error through W.
4. A call with a custom derivative is one equation. All other inner programs are opened.
5. Where such a value is joined with activities, its own elements stay marked. Whoever takes them out gets the value back.

With W' = W these are the gradients of the engaged function. If they move with W', the backward pass reads W.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import checks
from wmkp.engaged import engage, feedback_leaves
from wmkp.program import compat
from wmkp.rule import RuleOrRules

# These multiply and sum: a weight and data give an activity.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
# Each result depends on the operand in the same place.
SEPARATE = frozenset({"optimization_barrier", "psum", "psum2", "psum_invariant", "pmax", "pmin", "pvary"})
# Their derivative reads which operand is greater, and nothing else.
DECIDED = frozenset({"max", "min", "clamp"})
# No error passes, so the result counts as data.
STOPPED = frozenset({"stop_gradient", "sign", "round", "floor", "ceil", "random_bits"})
# The first set lays out, joins and takes apart. The second keeps every element in its place.
MOVING = frozenset(
    "concatenate pad reshape transpose squeeze expand_dims broadcast_in_dim slice dynamic_slice dynamic_update_slice gather "
    "scatter split unstack stack rev copy copy_p".split()
)
ELEMENTWISE = frozenset(
    "add sub add_any mul div neg max min pow integer_pow square sqrt rsqrt exp log log1p expm1 tanh logistic sin cos abs erf "
    "select_n convert_element_type reduce_precision".split()
)
OPENED = frozenset(compat.INLINED) | compat.REMAT


class Moved(NamedTuple):
    """How far gradients move when the backward pass reads another array in a parameter's place.

    Attributes:
      moved: the largest move of any parameter's gradient, relative to that gradient's norm. 0 if none moves.
      gradient: the path of the parameter whose gradient moves most, or None.
      shape: the shape of the parameter that was replaced.
    """

    moved: float
    gradient: str | None
    shape: tuple[int, ...]

    @property
    def meaning(self) -> str:
        """In words: not read, read as a gain of single neurons, or read as a matrix."""
        if self.gradient is None:
            return "not read"
        return "read, a gain" if sum(n > 1 for n in self.shape) <= 1 else "READ: weight transport, unless it is local"


class Transport(dict[str, Moved]):
    """What ``wmkp.transport`` returns: ``{path: Moved}``, printed as a table."""

    def __repr__(self) -> str:
        rows = [("parameter", "shape", "moved", "gradient", "the backward pass")]
        for path, found in self.items():
            shape = "x".join(map(str, found.shape)) or "1"
            rows.append((path, shape, f"{found.moved:.2g}", found.gradient or "", found.meaning))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def transport(fun: Callable[..., Any], rule: RuleOrRules, params: Any, feedback: Any, *args: Any) -> Transport:
    """Measures which parameters the backward pass reads: is it secretly backprop?

    For each parameter it computes the gradients twice. The second time the backward pass finds another array in the
    parameter's place, while the forward pass is unchanged. If a gradient moves, the backward pass reads the parameter.

    Args:
      fun: the function to train, ``fun(params, *args)``.
      rule: a rule, or a mapping from path patterns to rules.
      params: its parameters, a pytree of floating-point arrays.
      feedback: the feedback weights, as ``init_feedback`` returns them.
      *args: its further arguments, arrays of data. A small batch is enough.

    Returns:
      ``{path: Moved}``, which prints as a table. What goes through B has 0. Gains, and parameters declared local, are
      read, and listed so. Under ``backprop()`` every matrix that an error passes is read.

    Raises:
      ValueError, TypeError, WeightTransportError: as ``engage``.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["W1"]) @ params["W2"] - 1) ** 2)
      >>> x, rule = jnp.ones((16, 4)), wmkp.feedback_alignment()
      >>> feedback = wmkp.init_feedback(jax.random.key(0), rule, loss_fn, params, x)
      >>> print(wmkp.transport(loss_fn, rule, params, feedback, x))
      parameter  shape  moved  gradient  the backward pass
      W1         4x8    0                not read
      W2         8x2    0                not read
    """
    names = [checks.path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    entries = [] if feedback is None else feedback_leaves(params, feedback)
    return measure(engage(fun, rule), names, params, feedback if entries else None, args)


def measure(engaged: Callable[..., Any], names: list[str], params: Any, feedback: Any, args: Any) -> Transport:
    """``transport`` for any function ``engaged(params, feedback, *args)``."""
    leaves, tree = jax.tree.flatten(params)
    leaves = [jnp.asarray(w) for w in leaves]
    others, others_tree = jax.tree.flatten((feedback, args))
    count = len(jax.tree.leaves(feedback))
    rng = np.random.default_rng(0)

    def flat(leaves: list[Any], others: list[Any]) -> list[Any]:
        feedback, args = jax.tree.unflatten(others_tree, others)
        return jax.tree.leaves(engaged(jax.tree.unflatten(tree, leaves), feedback, *args))

    closed = jax.make_jaxpr(flat)(leaves, others)
    kinds = [Kind(param=True)] * len(leaves) + [Kind()] * count + [Kind(data=True)] * (len(others) - count)
    result = Transport()
    for k, name in enumerate(names):
        gradient = reading(closed, kinds, k)
        here, there = (gradient(leaves, others, w) for w in (leaves[k], another(leaves[k], rng)))
        moves = [_move(a, b) for a, b in zip(here, there, strict=True)]
        most = int(np.argmax(moves))
        read = not moves[most] <= 100 * float(jnp.finfo(here[most].dtype).eps)
        result[name] = Moved(moves[most] if read else 0.0, names[most] if read else None, leaves[k].shape)
    return result


def reading(closed: Any, kinds: Sequence["Kind"], k: int) -> Callable[[list[Any], list[Any], Any], list[Any]]:
    """``(leaves, others, array) -> gradients`` when the backward pass reads the array in the place of leaf ``k``."""
    kinds = [*kinds[:k], Kind(twin=True), *kinds[k + 1 :]]
    rng = np.random.default_rng(1)
    signs = [rng.choice([-1.0, 1.0], v.aval.shape) if v.aval.shape else 1.0 for v in closed.jaxpr.outvars]

    def loss(leaves: list[Any], others: list[Any], array: Any) -> Any:
        values = [Value(x, None, kind) for x, kind in zip([*leaves, *others], kinds, strict=True)]
        values[k] = Value(leaves[k], jax.lax.stop_gradient(array), kinds[k])
        outs = evaluate(closed.jaxpr, closed.consts, values)
        return sum(jnp.sum(y.x * s) for y, s in zip(outs, signs, strict=True) if _smooth(y.x)).real

    # Without loops run op by op: each op is compiled once for all parameters.
    return jax.jit(jax.grad(loss)) if _loops(closed.jaxpr) else jax.grad(loss)


def another(w: jax.Array, rng: np.random.Generator) -> jax.Array:
    """An array in place of ``w``: its elements in another order, each times 0.5 to 1.5, with noise for zeros."""
    values = np.asarray(w)
    wide = values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)
    mixed = rng.permutation(wide.ravel()).reshape(wide.shape) * rng.uniform(0.5, 1.5, wide.shape)
    size = np.abs(wide).max(initial=0.0) or 1.0
    return jnp.asarray(np.where(mixed == 0, size * rng.uniform(0.1, 0.5, wide.shape), mixed), w.dtype)


def _move(here: jax.Array, there: jax.Array) -> float:
    """The norm of the difference, relative to the greater of the two norms."""
    a, b = (np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64) for x in (here, there))
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    size = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.nan_to_num(np.linalg.norm(a - b) / size, nan=np.inf))


# --- what a value is --------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a value depends on, relative to the parameter W that is replaced.

    ``twin``: on W, and it is carried twice. ``data``, ``param``: on data, on another parameter. ``activity``: on data and
    a parameter, or it is a product of W and data. An error may have to reach it.
    """

    twin: bool = False
    data: bool = False
    param: bool = False
    activity: bool = False


def union(kinds: Sequence[Kind]) -> Kind:
    """The kind of a value made from values of these kinds."""
    twin, data, param, activity = (any(flags) for flags in zip(*kinds, strict=True)) if kinds else Kind()
    activity = activity or (data and param)
    return Kind(twin and not activity, data, param, activity)


def stopped(kind: Kind) -> Kind:
    """The kind of a value where no error passes."""
    return kind if kind.twin else Kind(data=kind.data or kind.activity)


def operand(v: Any, kind: Kind) -> Kind:
    """The kind of an operand: integers and booleans pass no error."""
    return kind if jnp.issubdtype(v.aval.dtype, jnp.inexact) else stopped(kind)


def outcome(eqn: Any, kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds of an equation's results."""
    name, count = eqn.primitive.name, len(eqn.outvars)
    kinds = [operand(v, kind) for v, kind in zip(eqn.invars, kinds, strict=True)]
    if name in OPENED or name in compat.CUSTOM:
        return outcomes(compat.inner_jaxpr(eqn), kinds)
    if name == "shard_map":
        return outcomes(eqn.params["jaxpr"], kinds)
    if name == "cond":
        branches = [outcomes(branch, kinds[1:]) for branch in eqn.params["branches"]]
        return [union([stopped(kinds[0]), *same]) for same in zip(*branches, strict=True)]
    if name == "scan":
        consts, carries = compat.scan_sizes(eqn.params)
        carried = scan_carries(eqn, kinds)
        return outcomes(eqn.params["jaxpr"], [*kinds[:consts], *carried, *kinds[consts + carries :]], carried)
    if name in STOPPED:
        return [stopped(union(kinds))] * count
    if name in SEPARATE and len(kinds) == count:
        return kinds
    if name == "sort":
        keys = [stopped(kind) for kind in kinds[: eqn.params["num_keys"]]]
        return [union([*keys, kind]) for kind in kinds]
    kind = union(kinds)
    if name in PRODUCTS and kind.twin and kind.data:
        kind = Kind(data=True, param=True, activity=True)
    return [kind] * count


def outcomes(jaxpr: Any, kinds: Sequence[Kind], carried: Sequence[Kind] = ()) -> list[Kind]:
    """The kinds of a jaxpr's results. The first ones include the kinds carried in."""
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    known = {v: Kind() for v in jaxpr.constvars} | dict(zip(jaxpr.invars, kinds, strict=True))
    read = lambda v: known[v] if isinstance(v, compat.Var) else Kind()
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, outcome(eqn, [read(v) for v in eqn.invars]), strict=True))
    found = [read(v) for v in jaxpr.outvars]
    return [*(union([a, b]) for a, b in zip(found, carried, strict=False)), *found[len(carried) :]]


def scan_carries(eqn: Any, kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds of a scan's carried values after any number of steps."""
    consts, carries = compat.scan_sizes(eqn.params)
    carried = list(kinds[consts : consts + carries])
    while True:
        inside = [*kinds[:consts], *carried, *kinds[consts + carries :]]
        after = outcomes(eqn.params["jaxpr"], inside, carried)[:carries]
        if after == carried:
            return carried
        carried = after


# --- the evaluation ---------------------------------------------------------------------------------------------------


class Value(NamedTuple):
    """A value, the one that W' makes in its place (None if it is carried once), and its kind.

    ``parts``: for a joined array, by element: 1 if it is W's alone, 2 if it is active, else 0.
    """

    x: Any
    other: Any
    kind: Kind
    parts: Any = None

    def second(self) -> Any:
        return self.x if self.other is None else self.other

    def as_kind(self, kind: Kind) -> "Value":
        return Value(self.x, jax.lax.stop_gradient(self.second()) if kind.twin else None, kind)


def evaluate(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """A jaxpr's results, with the derivatives that W' gives to activities."""
    env = {v: Value(c, None, Kind()) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    env.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda v: env[v] if isinstance(v, compat.Var) else Value(v.val, None, Kind())
    for eqn in jaxpr.eqns:
        outs = _equation(eqn, jaxpr, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, parent: Any, values: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in OPENED:
        inner, consts = compat.open_jaxpr(compat.inner_jaxpr(eqn))
        return evaluate(inner, consts, values)
    bind = compat.binder(eqn, parent)
    kinds = outcome(eqn, [value.kind for value in values])
    parts = _parts(eqn, bind, values)
    if parts is None:
        values = [v if v.kind.twin else Value(v.x, None, v.kind) for v in values]
    if not any(value.other is not None for value in values):
        outs = bind(*(v.x for v in values))
        return [
            _result(y, None, kind, part) for y, kind, part in zip(outs, kinds, parts or [None] * len(outs), strict=True)
        ]
    if name in {"scan", "cond", "shard_map"}:
        return {"scan": _scan, "cond": _cond, "shard_map": _shard_map}[name](eqn, values, kinds)
    stop = jax.lax.stop_gradient
    own = bind(*(v.x for v in values))  # with the derivatives of W
    others = bind(*(stop(v.second()) for v in values))
    active = [not v.kind.twin and operand(var, v.kind).activity for v, var in zip(values, eqn.invars, strict=True)]
    if any(active) and name not in DECIDED | SEPARATE:
        at_other = [v.x if v.other is None else grafted(stop(v.other), v.x, jnp.zeros_like(v.x)) for v in values]
        toward = bind(*(x if a else stop(v.second()) for v, x, a in zip(values, at_other, active, strict=True)))
        local = bind(*(stop(v.x) if a else v.x for v, a in zip(values, active, strict=True)))
        own = [grafted(stop(y), a, b) if _smooth(y) else y for y, a, b in zip(own, toward, local, strict=True)]
    results = zip(own, others, kinds, parts or [None] * len(own), strict=True)
    return [_result(y, stop(other), kind, part) for y, other, kind, part in results]


def _result(y: Any, other: Any, kind: Kind, parts: Any) -> Value:
    if parts is not None and kind.activity:
        if parts.max(initial=0) == 1:  # only W's own elements
            return Value(y, other, Kind(twin=True, param=kind.param), parts)
        return Value(y, other if (parts == 1).any() else None, kind, parts if parts.min(initial=2) < 2 else None)
    return Value(y, other if kind.twin else None, kind, parts if kind.twin else None)


def _parts(eqn: Any, bind: Callable[..., list[Any]], values: Sequence[Value]) -> list[Any] | None:
    """The class of each element of the results if W is joined with activities (``Value.parts``), else None."""
    name = eqn.primitive.name
    kinds = [operand(v, value.kind) for v, value in zip(eqn.invars, values, strict=True)]
    classes = [1 if k.twin else 2 if k.activity else 0 for k in kinds]
    floats = {c for c, v in zip(classes, eqn.invars, strict=True) if jnp.issubdtype(v.aval.dtype, jnp.inexact)}
    known = any(v.parts is not None for v in values)
    if not known and not (len(floats) > 1 if name in MOVING else {1, 2} <= floats):
        return None
    parts = [np.full(np.shape(v.x), c) if v.parts is None else v.parts for v, c in zip(values, classes, strict=True)]
    if name in ELEMENTWISE:
        shape = eqn.outvars[0].aval.shape
        return [functools.reduce(np.maximum, (np.broadcast_to(p, shape) for p in parts))]
    if name not in MOVING:
        return None
    counted = [not jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars]
    if any(c and isinstance(v.x, jax.core.Tracer) for c, v in zip(counted, values, strict=True)):
        return None  # unknown places
    with jax.ensure_compile_time_eval():
        arrays = [
            v.x if c else jnp.asarray(p, var.aval.dtype)
            for v, c, p, var in zip(values, counted, parts, eqn.invars, strict=True)
        ]
        return [np.asarray(p).real.astype(int) for p in bind(*arrays)]


def _smooth(y: Any) -> bool:
    return y is not None and jnp.issubdtype(jnp.result_type(y), jnp.inexact)


@jax.custom_jvp
def grafted(y: jax.Array, toward: jax.Array, local: jax.Array) -> jax.Array:
    """``y``, with the derivatives of ``toward`` and ``local`` instead of its own."""
    return y


@grafted.defjvp
def _grafted_jvp(primals: Any, tangents: Any) -> Any:
    _, toward, local = tangents
    return primals[0], toward + local


def _packed(values: Sequence[Value]) -> list[Any]:
    return [x for v in values for x in ((v.x, v.other) if v.kind.twin else (v.x,))]  # a joined value is an activity


def _unpacked(arrays: Sequence[Any], kinds: Sequence[Kind]) -> list[Value]:
    left = iter(arrays)
    return [Value(next(left), next(left) if kind.twin else None, kind) for kind in kinds]


def _inside(jaxpr: Any, arrays: Sequence[Any], kinds: Sequence[Kind], results: Sequence[Kind]) -> list[Any]:
    inner, consts = compat.open_jaxpr(jaxpr)
    outs = evaluate(inner, consts, _unpacked(arrays, kinds))
    return _packed([y.as_kind(kind) for y, kind in zip(outs, results, strict=True)])


def _cond(eqn: Any, values: list[Value], results: list[Kind]) -> list[Value]:
    kinds = [v.kind for v in values[1:]]
    branches = [lambda xs, b=branch: _inside(b, xs, kinds, results) for branch in eqn.params["branches"]]
    return _unpacked(jax.lax.switch(values[0].x, branches, _packed(values[1:])), results)


def _scan(eqn: Any, values: list[Value], results: list[Kind]) -> list[Value]:
    consts, carries = compat.scan_sizes(eqn.params)
    kinds = [v.kind for v in values]
    carried = scan_carries(eqn, kinds)
    start = [v.as_kind(kind) for v, kind in zip(values[consts : consts + carries], carried, strict=True)]
    fixed = _packed(values[:consts])

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        inside = [*kinds[:consts], *carried, *kinds[consts + carries :]]
        arrays = _inside(eqn.params["jaxpr"], [*fixed, *carry, *xs], inside, results)
        return arrays[: len(carry)], arrays[len(carry) :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(step, _packed(start), _packed(values[consts + carries :]), **options)
    return _unpacked([*carry, *ys], results)


def _shard_map(eqn: Any, values: list[Value], results: list[Kind]) -> list[Value]:
    sharding, kinds = compat.sharding(eqn.params), [v.kind for v in values]
    twice = lambda specs, kinds: [s for s, kind in zip(specs, kinds, strict=True) for _ in range(1 + kind.twin)]
    body = lambda *arrays: _inside(eqn.params["jaxpr"], arrays, kinds, results)
    mapped = sharding.map(body, tuple(twice(sharding.in_specs, kinds)), twice(sharding.out_specs, results))
    return _unpacked(mapped(*_packed(values)), results)


def _loops(jaxpr: Any) -> bool:
    """Whether a jaxpr holds loops, branches or shard_maps, which are compiled as a whole."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in {"scan", "while", "cond", "shard_map"}:
            return True
        if name in OPENED and _loops(compat.open_jaxpr(compat.inner_jaxpr(eqn))[0]):
            return True
    return False
