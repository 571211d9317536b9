"""The projections of a JAX function: where a parameter multiplies an activation."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import checks
from wmkp.program import compat
from wmkp.program.interpreter import collect
from wmkp.program.kinds import Kind, settle
from wmkp.program.plans import Analyser, Plan, Step
from wmkp.program.products import Product, WeightTransportError


@dataclasses.dataclass(frozen=True)
class Projection:
    """A place where a parameter multiplies an activation: one population of neurons projecting to another.

    Attributes:
      path: the parameter's path, as ``jax.tree_util.keystr(path, simple=True, separator="/")`` prints it.
      kind: the primitive that multiplies: ``"dot_general"`` or ``"conv_general_dilated"``, or another if there is an
        ``obstacle``.
      fan_in: how many input values one output value sums over (for a convolution, those of one patch and group).
      fan_out: how many output values there are (for a convolution, its output channels).
      feedback: whether an error must pass back through it. ``False`` for a first layer, whose input needs no gradient.
      uses: how many products the parameter takes part in.
      obstacle: the primitive through which B cannot follow the parameter, or ``None``.
      shape: the parameter's shape.
    """

    path: str
    kind: str
    fan_in: int
    fan_out: int
    feedback: bool
    uses: int
    obstacle: str | None
    shape: tuple[int, ...] = dataclasses.field(repr=False, compare=False)
    # What the two methods answer: a function that finds it, or what it has found.
    _axes: Any = dataclasses.field(repr=False, compare=False)
    _direct: Any = dataclasses.field(repr=False, compare=False)

    def matrix_axes(self, shape: tuple[int, ...]) -> "Axes":
        """Which axes of the parameter, of this shape, number its groups (and scans' steps), its inputs and its outputs.

        Raises:
          ValueError: the parameter is not one matrix (or a stack of them) used whole in one place.
        """
        if shape != self.shape:
            raise ValueError(
                f"params[{self.path!r}] has the shape {list(self.shape)}, not {list(shape)}; pass its own shape"
            )
        return _answer(self._axes)

    def direct_shape(self) -> tuple[int, ...]:
        """The shape of feedback from the network's output straight to this projection's input.

        It is (steps of a scan over stacked weights..., size of one input, size of one error). The output is that of the
        last projection. Inputs and errors are those of one sample, and of one position where both have positions.

        Raises:
          ValueError: the projections that share this parameter have inputs of different sizes.
        """
        return _answer(self._direct)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the functions hold the analysis, so what they find or raise takes their place."""
        return {**self.__dict__, "_axes": _found(self._axes), "_direct": _found(self._direct)}


Axes = tuple[list[int], list[int], list[int]]


def _found(answer: Any) -> Any:
    try:
        return answer() if callable(answer) else answer
    except ValueError as error:
        return error.with_traceback(None)


def _answer(answer: Any) -> Any:
    if isinstance(found := _found(answer), ValueError):
        raise found
    return found


class Analysis(NamedTuple):
    """A function's plan and the paths of its parameters."""

    plan: Plan
    paths: list[str]
    out_tree: Any
    shared: frozenset[int]  # parameters (leaf numbers) with other uses than their products
    others: dict[int, set[str]]  # the roles of parameters (by leaf number) besides these products: "added", "gain"

    def sites(self) -> dict[str, list[Product]]:
        """The products that each parameter takes part in, keyed by its path, in the parameters' own order."""
        found: dict[int, list[Product]] = {}
        for product in self.plan.products():
            for leaf in sorted(product.params):
                found.setdefault(leaf, []).append(product)
        return {self.paths[leaf]: found[leaf] for leaf in sorted(found)}

    def projections(self) -> dict[str, Projection]:
        """What ``wmkp.projections`` returns."""
        result = {}
        for path, products in self.sites().items():
            first = max(products, key=lambda p: p.fans()[0])
            obstacle = next((p.obstacle for p in products if p.obstacle), None)
            feedback = any(p.needs_feedback for p in products)
            shape = self.plan.jaxpr.invars[self.paths.index(path)].aval.shape
            asked = [functools.partial(ask, path, products) for ask in (self.matrix_axes, self.direct_shape)]
            result[path] = Projection(
                path, first.primitive, *first.fans(), feedback, len(products), obstacle, shape, *asked
            )
        return result

    def last(self) -> Product:
        """The last product to be evaluated: the network's output."""
        products = [product for product in self.plan.products() if not product.obstacle]
        if not products:
            raise ValueError(
                "no projection makes the output, so direct feedback has no error to send; use backprop(), or add a projection"
            )
        return products[-1]

    def matrix_axes(self, path: str, products: list[Product]) -> Axes:
        """See ``Projection.matrix_axes``."""
        product, leaf = products[0], self.paths.index(path)
        shape = self.plan.jaxpr.invars[leaf].aval.shape
        leaves: list[Any] = [None] * len(self.paths)
        indices = []  # each axis' index, in the product's layout: it varies along the groups, the inputs or the outputs
        if len(products) == 1 and product.plain and not product.unmirrored and not product.obstacle:
            with jax.ensure_compile_time_eval():
                for axis in range(len(shape)):
                    leaves[leaf] = jax.lax.broadcasted_iota(jnp.float32, shape, axis)
                    indices.append(np.asarray(collect(self.plan, leaves, [product])[product][0]))
        lead, size = len(product.stack), math.prod(shape)
        if not indices or (indices[0].ndim - product.weight_aval.ndim, indices[0].size) != (lead, size):  # or divided
            raise ValueError(
                f"params[{path!r}] is not one matrix (or a stack of them) used whole in one place, as "
                "its rule needs. Give this path another rule."
            )
        groups, inputs, _, _ = product.axes()
        roles: Axes = ([], [], [])
        for axis, index in enumerate(indices):
            along = {a - lead for a in range(index.ndim) if index.size and np.ptp(index, axis=a).any()}
            role = 1 if along <= {*inputs} else 0 if along <= {*range(-lead, 0), *groups} else 2
            roles[role].append(axis)
        return roles

    def direct_shape(self, path: str, products: list[Product]) -> tuple[int, ...]:
        """See ``Projection.direct_shape``."""
        products, error = [p for p in products if p.needs_feedback], self.last()
        around = _around(self.plan, error)
        if any(step.action in {"cond", "shard_map"} for step in around):
            raise ValueError(
                "direct feedback needs the last projection outside of any lax.cond or shard_map, so that its output has one "
                "error. Compute the output after it, or use another rule."
            )
        within = [step.plans[0] for step in around if step.action == "scan"]
        if within and _reached(self.plan, error, set())[1]:
            raise ValueError(
                f"direct feedback takes the last projection, params[{self.paths[min(error.params)]!r}], for the output, but its "
                "result enters a projection in the next step of the lax.scan. Compute the output after the state in the "
                "scan's body, pass an output that is fed back through jax.lax.stop_gradient, or use another rule."
            )
        if within and not {*products} <= {*within[-1].products()}:
            raise ValueError(
                f"params[{path!r}] is used outside of the lax.scan that makes the output. The output has an error at each step, so "
                "direct feedback has no single error to send there. Move the product into the scan, or give it another "
                f'rule: rule={{"{re.escape(path)}": wmkp.feedback_alignment(), ".*": ...}}.'
            )
        shapes, e = set(), error.output_aval.shape
        for product in products:
            x = product.input_avals[0].shape
            shared, *sizes = direct_sizes(x, e)
            if len(e) > 1 and not shared:
                raise ValueError(
                    f"direct feedback needs the batch as the first axis of each projection's input; that of params[{path!r}] "
                    f"is {list(x)} where the output is {list(e)}, so samples would get each other's errors"
                )
            shapes.add((*product.stack, *sizes))
        if len(shapes) != 1:
            raise ValueError(
                f"params[{path!r}] takes inputs of different sizes; direct feedback needs one size. Give this path another rule."
            )
        return shapes.pop()


def _around(plan: Plan, product: Product) -> list[Step]:
    """The steps around a product, outermost first."""
    for step in plan.steps:
        for inner in step.plans:
            if product in inner.products():
                return [step, *_around(inner, product)]
    return []


def _reached(plan: Plan, product: Product, live: set[int]) -> tuple[set[int], bool]:
    """Which results of a plan depend on a product (or on these inputs), and whether a projection lies between."""
    marked, met = {plan.jaxpr.invars[i] for i in live}, False
    for step in plan.steps:
        into = {i for i, v in enumerate(step.eqn.invars) if isinstance(v, compat.Var) and v in marked}
        outs = {*range(len(step.eqn.outvars))} if into or step.product is product else set()
        met |= bool(into) and step.product is not None and not step.product.pending
        for inner in step.plans:
            if product not in inner.products():
                met |= bool(into) and any(True for _ in inner.products())
                continue
            consts, carries = compat.scan_sizes(step.eqn.params) if step.action == "scan" else (0, 0)
            while True:  # a carry comes back in the next step
                outs, within = _reached(inner, product, into)
                again = {consts + i for i in outs if i < carries}
                if again <= into:
                    break
                into |= again
            met |= within
        marked |= {v for i, v in enumerate(step.eqn.outvars) if i in outs and plan.kinds[v].active}
    return {i for i, v in enumerate(plan.jaxpr.outvars) if isinstance(v, compat.Var) and v in marked}, met


def direct_sizes(x: tuple[int, ...], error: tuple[int, ...]) -> tuple[int, int, int]:
    """The number of leading axes that an input and the output's error share, and the sizes of one input and one error.

    They share the batch and, if both have positions, the positions: all equal axes before the last.
    """
    shared = 0
    for a, b in zip(x[:-1], error[:-1], strict=False):
        if a != b:
            break
        shared += 1
    return shared, math.prod(x[shared:]), math.prod(error[shared:])


def explained(fun: Callable[..., Any]) -> Callable[..., Any]:
    """``fun``, whose errors while it is traced also say which arguments wmkp passed, and what to check."""
    checks.function("fun", fun, "fun(params, *args)")

    def called(params: Any, *args: Any) -> Any:
        try:
            return fun(params, *args)
        except (WeightTransportError, RuntimeError, ZeroDivisionError, MemoryError):  # not caused by the arguments
            raise
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            shapes = ", ".join(
                f"{k}: {checks.shape(x)}" for k, x in checks.named_leaves(params, shapes_will_do=True).items()
            )
            name = getattr(fun, "__name__", "fun")
            raise kind(
                f"fun(params, *args){'' if name == 'fun' else f', here {name},'} raised {checks.first_line(error)}\n"
                "The same call raises it without wmkp. "
                "Check that these arguments are what fun takes, in this order (with feedback: params, feedback, *args). "
                f"params: {checks.short(shapes, 400)}; args: {checks.short(checks.shapes(args), 400)}"
            ) from error

    return called


def analyse(fun: Callable[..., Any], params: Any, *args: Any) -> Analysis:
    """Walks ``fun(params, *args)``. Arrays in ``args`` are data; other leaves are Python values.

    Raises TypeError for a parameter that is not a floating-point array, and where ``fun`` raises an error.
    """
    fun = explained(fun)
    named = checks.named_leaves(params, shapes_will_do=True)
    leaves, tree = jax.tree.flatten(args)
    traced = [x for x in leaves if checks.is_array(x)]

    def of_arrays(params: Any, arrays: list[Any]) -> Any:
        rest = iter(arrays)
        out = fun(params, *jax.tree.unflatten(tree, [next(rest) if checks.is_array(x) else x for x in leaves]))
        checks.traceable("what fun returns", out)
        return out

    try:
        jaxpr, out = jax.make_jaxpr(of_arrays, return_shape=True)(params, traced)
    except Exception:
        checks.traceable("params", params)
        checks.traceable("args", [x if checks.is_array(x) else None for x in leaves])
        raise
    kinds = [
        Kind(frozenset({i}), active=True, breadth=sum(n > 1 for n in leaf.shape))
        for i, leaf in enumerate(named.values())
    ]
    keys = (jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in traced)
    analyser = Analyser()
    plan = analyser.plan(jaxpr, kinds + [Kind(data=True, noise=key) for key in keys], ())
    settle([k for k in plan.outputs if not k.weight])  # a weight that is returned is state, and is used again
    shared = analyser.shared.union(*(kind.params for kind in plan.outputs))
    return Analysis(plan, list(named), jax.tree.structure(out), frozenset(shared), analyser.roles)


READS = {
    "projection": "B",
    "first layer": "nothing",
    "added": "nothing",
    "gain": "itself, neuron by neuron",
    "refused": "an error: give it wmkp.local() or wmkp.backprop()",
    "unused": "nothing",
}


class Roles(dict[str, tuple[str, ...]]):
    """``{path: roles}``, which prints as a table."""

    def __str__(self) -> str:
        """One line for each parameter: its path, its roles, and what the backward pass reads of it."""
        rows = [("parameter", "role", "the backward pass reads")]
        rows += [(path, role, READS[role]) for path, roles in self.items() for role in roles]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)


def roles(fun: Callable[..., Any], params: Any, *args: Any) -> Roles:
    """What each parameter of ``fun`` does, and what the backward pass reads of it.

    A parameter can have several roles, one for each kind of use:

    - "projection": it multiplies an activation that an error must reach. The backward pass reads B.
    - "first layer": it multiplies data, or data scales, shifts or selects from it first. No error passes, and the
      backward pass reads nothing.
    - "added": it is added to activations, joined to them, looked up, or used as a threshold. The backward pass reads
      nothing.
    - "gain": it scales activations neuron by neuron. The backward pass reads the parameter itself.
    - "refused": an error would pass through it. Give it ``wmkp.local()`` or ``wmkp.backprop()``.
    - "unused": no gradient reaches it.

    Args:
      fun: any JAX function ``fun(params, *args)``.
      params: its parameters, a pytree of floating-point arrays (or ShapeDtypeStructs).
      *args: its further arguments.

    Returns:
      ``{path: (role, ...)}`` in the order of the parameters, which prints as a table.

    Raises:
      TypeError, ValueError: as ``projections``.

    Example:
      >>> params, x = {"b": jnp.ones(2), "w": jnp.ones((4, 2))}, jnp.ones((16, 4))
      >>> print(wmkp.roles(lambda params, x: jnp.tanh(x @ params["w"] + params["b"]), params, x))
      parameter  role         the backward pass reads
      b          added        nothing
      w          first layer  nothing
    """
    analysis = analyse(fun, params, *args)
    sites, found = analysis.sites(), Roles()
    for leaf, path in enumerate(analysis.paths):
        names = {
            "refused" if p.obstacle and p.needs_feedback else "projection" if p.needs_feedback else "first layer"
            for p in sites.get(path, [])
        } | analysis.others.get(leaf, set())
        if not names and leaf in analysis.shared:  # only data change it, or it is returned
            alone = any(leaf in kind.params and kind.static for kind in analysis.plan.outputs)
            names = {"added" if alone else "first layer"}
        found[path] = tuple(name for name in READS if name in names) or ("unused",)
    return found


def projections(fun: Callable[..., Any], params: Any, *args: Any) -> dict[str, Projection]:
    """Lists every place where a parameter of ``fun`` multiplies an activation.

    A parameter that is added to an activation, scales it neuron by neuron, or is looked up (a bias, a normalization's
    gain, an embedding) is local to its neurons, and no projection.

    Args:
      fun: any JAX function ``fun(params, *args)``.
      params: its parameters, a pytree of floating-point arrays (or ShapeDtypeStructs).
      *args: its further arguments. Data must come in here, not through a closure.

    Returns:
      ``{path: Projection}``, in the order of the parameters. A parameter with an ``obstacle`` needs ``backprop()``.

    Raises:
      TypeError: a parameter is not a real floating-point array of at least 16 bits.
      ValueError, TypeError: ``fun`` raises an error when it is called with them.

    Example:
      >>> params, x = {"W": jnp.ones((4, 2))}, jnp.ones((16, 4))
      >>> wmkp.projections(lambda params, x: x @ params["W"], params, x)["W"].fan_in
      4
    """
    return analyse(fun, params, *args).projections()
