"""Feedback weights: rules draw them, and they are checked against the parameters."""

from typing import Any

import jax

from wmkp import checks
from wmkp.program import compat
from wmkp.program.projections import Analysis, Projection
from wmkp.rule import Rule


def initial_feedback(key: jax.Array, rules: dict[str, Rule], analysis: Analysis, params: Any) -> Any:
    """The B that each rule draws, before any mirror step."""
    projections = analysis.projections()
    leaves, tree = jax.tree.flatten(params)
    feedback: list[Any] = [None] * len(leaves)
    for i, path in enumerate(analysis.paths):
        init = rules[path].init if path in rules else None
        if init is not None and projections[path].feedback:
            if isinstance(leaves[i], jax.ShapeDtypeStruct):
                raise TypeError(f"params[{path!r}] is a ShapeDtypeStruct; B is made for arrays: pass params themselves")
            checks.alive(f"params[{path!r}]", leaves[i])
            feedback[i] = made(rules[path], jax.random.fold_in(key, i), projections[path], leaves[i])
    return jax.tree.unflatten(tree, feedback)


def made(rule: Rule, key: jax.Array, projection: Projection, w: Any) -> Any:
    """The B that a rule starts from. If ``init`` fails or returns no B, an error names the rule."""
    assert rule.init is not None
    try:
        b = rule.init(key, projection, compat.gathered(w))
    except TypeError as error:
        raise TypeError(
            f"rule.init of {rule.name} raised {checks.first_line(error)}; write it as init(key, projection, W) -> B"
        ) from error
    parts = jax.tree.leaves(b)
    if not parts or not all(map(checks.is_array, parts)) or (checks.is_array(b) and checks.aval(b) != checks.aval(w)):
        raise ValueError(
            f"rule.init of {rule.name} made {checks.shapes(b)} for params[{projection.path!r}], which is "
            f"{checks.shape(w)}; return an array of W's shape and dtype, or a pytree of arrays that rule.backward turns into one"
        )
    if rule.mirror is not None and not checks.is_array(b):
        raise ValueError(
            f"rule {rule.name} has a mirror mode, and B is {checks.shapes(b)} at params[{projection.path!r}]: mirror mode "
            "needs a B that is one array in W's layout. Give mirror=None, or make B an array."
        )
    _check_transports(rule, w, b)
    return compat.divided_as(b, jax.typeof(w)) if checks.is_array(b) else b


def _check_transports(rule: Rule, w: Any, b: Any) -> None:
    """ValueError if ``backward`` reads W although the rule says that it transports nothing."""
    if rule.transports not in ("nothing", "changes") or rule.backward is None:
        return
    try:
        traced = jax.make_jaxpr(rule.backward)(checks.aval(w), jax.tree.map(checks.aval, b))
    except Exception:  # a failing function raises an error where it is used
        return
    if any(_made_of(traced.jaxpr, [True] + [False] * (len(traced.jaxpr.invars) - 1))):
        raise ValueError(
            f"rule.backward of {rule.name} reads W, but rule.transports is {rule.transports!r}: compute its result from B alone, "
            'or declare what it reads: transports="weights" (or "signs")'
        )


def _made_of(jaxpr: Any, given: list[bool]) -> list[bool]:
    """Which results of a jaxpr depend on the given inputs."""
    known = {v for v, known in zip(jaxpr.invars, given, strict=True) if known}
    has = lambda v: isinstance(v, compat.Var) and v in known
    for eqn in jaxpr.eqns:
        inputs = [has(v) for v in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            outputs = _made_of(eqn.params["jaxpr"].jaxpr, inputs)
        else:
            outputs = [any(inputs)] * len(eqn.outvars)
        known.update(v for v, out in zip(eqn.outvars, outputs, strict=True) if out)
    return [has(v) for v in jaxpr.outvars]


def feedback_leaves(params: Any, feedback: Any) -> list[Any]:
    """Feedback's entry for each leaf of params, None where there is none.

    Raises ValueError where the two do not match. It names the path, the expected and the found.
    """
    named = checks.named_leaves(params)
    tree: Any = jax.tree.structure(params)
    try:
        leaves = tree.flatten_up_to(feedback)
    except (ValueError, TypeError, KeyError):
        flat, found_tree = jax.tree_util.tree_flatten_with_path(feedback, is_leaf=lambda x: x is None)
        found = [checks.path_name(path) for path, _ in flat]
        under = lambda f, p: f == p or f.startswith(f"{p}/")
        missing = [p for p in named if not any(under(f, p) for f in found)]
        extra = [f for f in found if not any(under(f, p) for p in named)]
        what = checks.lacks(missing, extra) or f" is {checks.short(found_tree)} where {checks.short(tree)} is expected"
        raise ValueError(
            "feedback must have the structure of params, with None where there is no feedback path, as init_feedback "
            f"returns it, but it{what}"
        ) from None
    for (path, w), b in zip(named.items(), leaves, strict=True):
        for part in jax.tree.leaves(b):
            if not checks.is_array(part) or isinstance(part, jax.ShapeDtypeStruct):
                raise TypeError(
                    f"feedback[{path!r}] holds {type(part).__name__} where an array (or None) belongs; make feedback "
                    "with init_feedback."
                )
        if b is not None and checks.is_array(b) and checks.aval(b) != checks.aval(w):
            raise ValueError(
                f"feedback[{path!r}] is {checks.shape(b)} where its parameter is {checks.shape(w)}; make it again with "
                "init_feedback, or cast both alike."
            )
    checks.alive("feedback", feedback)
    return leaves
