"""Finds the projections of a JAX function (a parameter times an activation), and runs it with others in their place.

``analyse`` walks the function's jaxpr once and says of every value what it is: a constant, an activation (data has
touched it) or a weight (made of parameters), and of every equation what is to be done with it. ``run`` then evaluates
the function by that plan, carrying with each weight its feedback companion B through the same layout changes, and hands
each product of a weight with an activation to its caller. ``collect`` evaluates the weights alone, without any data.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import compat

Bind = Callable[..., list[Any]]


class WeightTransportError(ValueError):
    """An error signal would have to travel back through a forward weight, because feedback weights cannot follow it."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """One population of neurons projecting to another: a parameter that multiplies an activation.

    Attributes:
      path: the parameter's path, as ``jax.tree_util.keystr(path, simple=True, separator="/")`` prints it.
      kind: the primitive that multiplies, ``"dot_general"`` or ``"conv_general_dilated"`` (or, with an ``obstacle``,
        another).
      fan_in: how many presynaptic values one postsynaptic value sums over (for a conv, those of one patch and group).
      fan_out: how many postsynaptic values there are (for a conv, its output channels).
      feedback: whether an error must pass back through it: ``False`` where its input needs no gradient (a first layer).
      uses: how many products the parameter takes part in.
      obstacle: the primitive through which feedback weights cannot follow the parameter, or ``None``.
    """

    path: str
    kind: str
    fan_in: int
    fan_out: int
    feedback: bool
    uses: int
    obstacle: str | None
    analysis: "Analysis" = dataclasses.field(repr=False, compare=False)

    def matrix_axes(self, shape: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
        """Which axes of the parameter, of this shape, number its groups (and scans' steps), its inputs and its outputs.

        Raises:
          ValueError: the parameter is not one matrix (or a stack of them) that is used whole, in one place.
        """
        return self.analysis.matrix_axes(self.path, shape)

    def direct_shape(self) -> tuple[int, ...]:
        """The shape of feedback from the network's output straight to this projection's input.

        (steps of a scan over stacked weights..., size of one input, size of one error); the output is that of the last
        projection to be evaluated, and inputs and errors are those of one sample (and position, where both have it).

        Raises:
          ValueError: the projections that share this parameter have inputs of different sizes.
        """
        return self.analysis.direct_shape(self.path)


class Kind(NamedTuple):
    """What a value is. ``params``: the parameters (leaf numbers) it is made of *as a weight*; none for the rest."""

    params: frozenset[int] = frozenset()
    data: bool = False  # data has touched it
    active: bool = False  # it depends on a parameter, so that an error must reach it
    obstacle: str | None = None  # a weight that B cannot follow: through which primitive
    unmirrored: str | None = None  # a weight that B can follow, but that mirror mode cannot reach: why
    plain: bool = True  # each of its elements is one element of a parameter, unscaled
    varying: tuple[bool, ...] = ()  # of a weight: along which axes it varies (it is broadcast along the others)
    # Of an activation: which parameters it has just been multiplied by, elementwise, and along which axes these vary.
    gain: tuple[frozenset[int], tuple[bool, ...]] | None = None
    product: Any = None  # an activation that is a product's output, untouched
    stack: tuple[int, ...] = ()  # of a weight inside scans: the lengths of those along which it changes

    @property
    def weight(self) -> bool:
        return bool(self.params)

    @property
    def static(self) -> bool:
        """A weight that no data has touched."""
        return bool(self.params) and not self.data


CONSTANT = Kind()


class Product:
    """One equation that multiplies a weight with an activation (or an obstacle to doing so without transport)."""

    def __init__(
        self,
        eqn: Any,
        bind: Bind,
        weight: int,
        kinds: Sequence[Kind],
        obstacle: str | None,
        lengths: tuple[int, ...],
    ):
        kind = kinds[weight]
        others = [k for i, k in enumerate(kinds) if i != weight]
        self.primitive: str = eqn.primitive.name
        self.eqn_params: dict[str, Any] = eqn.params
        self.weight = weight  # which operand the weight is
        self.params = kind.params
        if obstacle:
            self.params = self.params.union(*(k.params for k in kinds if k.static or kind.data))
        self.obstacle = obstacle
        self.unmirrored = "data multiplies, adds to or selects from it" if kind.data else kind.unmirrored
        self.plain = kind.plain
        self.stack = kind.stack
        self.needs_feedback = any(k.active for k in others)
        self.weight_aval = eqn.invars[weight].aval
        self.input_avals = [v.aval for i, v in enumerate(eqn.invars) if i != weight]
        self.output_aval = eqn.outvars[0].aval
        self.lengths = lengths  # of the scans around it, outermost first
        self.bind = bind
        self.bias: Any = None  # the weight added to its output, if one is: (plan, variable)

    def multiply(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product itself, the equation's own."""
        return self.bind(*((w, x) if self.weight == 0 else (x, w)))[0]

    def axes(self) -> tuple[list[int], list[int], list[int], int]:
        """The weight's axes as (groups, inputs, outputs), and into how many groups a conv splits its outputs."""
        rank = self.weight_aval.ndim
        if self.primitive == "dot_general":
            contract, batch = self.eqn_params["dimension_numbers"]
            inputs, groups = list(contract[self.weight]), list(batch[self.weight])
            return groups, inputs, [a for a in range(rank) if a not in inputs and a not in groups], 1
        out, into, *space = self.eqn_params["dimension_numbers"].rhs_spec
        groups = self.eqn_params["feature_group_count"] * self.eqn_params["batch_group_count"]
        return [], [*space, into], [out], groups

    def output_axes(self) -> list[int]:
        """The output's axes that index the weight's groups and outputs, in the order (groups, outputs)."""
        if self.primitive == "dot_general":
            contract, batch = self.eqn_params["dimension_numbers"]
            groups = len(batch[0])
            free_left = len(self.input_avals[0].shape if self.weight == 1 else self.weight_aval.shape)
            free_left -= groups + len(contract[0])
            free = len(self.axes()[2])
            start = groups if self.weight == 0 else groups + free_left
            return [*range(groups), *range(start, start + free)]
        return [self.eqn_params["dimension_numbers"].out_spec[1]]

    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out)."""
        shape = self.weight_aval.shape
        if self.primitive not in compat.BILINEAR or (self.primitive == "conv_general_dilated" and self.weight == 0):
            return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        _, inputs, outputs, _ = self.axes()
        return math.prod(shape[a] for a in inputs), math.prod(shape[a] for a in outputs)

    def to_matrices(self, w: jax.Array) -> jax.Array:
        """(*stack, *weight shape) -> (K, fan_in, outputs of one group), K counting scans' steps and groups."""
        lead = w.ndim - self.weight_aval.ndim
        groups, inputs, outputs, split = self.axes()
        order = [*range(lead), *(lead + a for a in [*groups, *inputs, *outputs])]
        fan_in, fan_out = self.fans()
        w = w.transpose(order).reshape(-1, fan_in, split, fan_out // split)
        return w.swapaxes(1, 2).reshape(-1, fan_in, fan_out // split)

    def from_matrices(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of ``to_matrices``: (K, fan_in, outputs) -> ``shape`` = (*stack, *weight shape)."""
        lead = len(shape) - self.weight_aval.ndim
        groups, inputs, outputs, split = self.axes()
        order = [*range(lead), *(lead + a for a in [*groups, *inputs, *outputs])]
        m = m.reshape(-1, split, *m.shape[1:]).swapaxes(1, 2)
        return m.reshape([shape[a] for a in order]).transpose(np.argsort(order))

    def samples(self) -> int:
        """How many samples the output holds of each postsynaptic value (batch and positions)."""
        shape = self.output_aval.shape
        return math.prod(size for axis, size in enumerate(shape) if axis not in self.output_axes())

    def input_matrices(self, x: jax.Array) -> jax.Array:
        """The product's input as (K, samples, fan_in), K its groups, each sample in the order of ``to_matrices``."""
        groups, _, _, split = self.axes()
        fan_in = self.fans()[0]
        if self.primitive == "dot_general":
            contract, batch = self.eqn_params["dimension_numbers"]
            inputs, groups = list(contract[1 - self.weight]), list(batch[1 - self.weight])
            samples = [a for a in range(x.ndim) if a not in inputs and a not in groups]
            count = math.prod(x.shape[a] for a in groups)
            return x.transpose([*groups, *samples, *inputs]).reshape(count, -1, fan_in)
        p = self.eqn_params
        numbers = p["dimension_numbers"]
        if p["batch_group_count"] > 1 or self.weight == 0:
            raise ValueError("the patches of a convolution by batch groups, or by its left operand, are not supported")
        space = [self.weight_aval.shape[a] for a in numbers.rhs_spec[2:]]
        patches = jax.lax.conv_general_dilated_patches(
            x, space, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], dimension_numbers=numbers
        )
        patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)  # features come before the patch's own positions
        patches = patches.reshape(-1, split, fan_in // math.prod(space), math.prod(space))
        return patches.transpose(1, 0, 3, 2).reshape(split, -1, fan_in)


class Step(NamedTuple):
    """One equation, and what to do with it: "bind", "follow", "product", "inline", "remat", "scan" or "cond"."""

    eqn: Any
    action: str
    bind: Bind | None = None
    plans: tuple["Plan", ...] = ()
    product: Product | None = None


class Plan(NamedTuple):
    """A jaxpr with what to do at each of its equations, and the kinds of its values."""

    jaxpr: Any
    consts: Sequence[Any]
    steps: list[Step]
    kinds: dict[Any, Kind]
    outputs: list[Kind]

    def products(self) -> Iterator[Product]:
        """Every product, those of inner plans included, in the order of evaluation."""
        for step in self.steps:
            if step.product is not None:
                yield step.product
            for plan in step.plans:
                yield from plan.products()


class Analysis(NamedTuple):
    """A function's plan, beside the paths of its parameters."""

    plan: Plan
    paths: list[str]
    out_tree: Any
    shared: frozenset[int]  # the parameters (leaf numbers) with uses beside the products they are weights of

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
            result[path] = Projection(path, first.primitive, *first.fans(), feedback, len(products), obstacle, self)
        return result

    def last(self) -> Product:
        """The last product to be evaluated: the network's output."""
        return [product for product in self.plan.products() if not product.obstacle][-1]

    def direct_shape(self, path: str) -> tuple[int, ...]:
        """See ``Projection.direct_shape``."""
        products = [p for p in self.sites()[path] if p.needs_feedback]
        error = self.last()
        if error.lengths:
            raise ValueError(
                "direct feedback needs the last projection outside of any lax.scan, so that its output has one error"
            )
        shapes = {direct_sizes(p.input_avals[0].shape, error.output_aval.shape)[1:] for p in products}
        stacks = {p.stack for p in products}
        if len(shapes) != 1 or len(stacks) != 1:
            raise ValueError(f"params[{path!r}] takes inputs of different sizes; direct feedback needs one size")
        return (*stacks.pop(), *shapes.pop())

    def matrix_axes(self, path: str, shape: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
        """See ``Projection.matrix_axes``."""
        products, leaf = self.sites()[path], self.paths.index(path)
        product = products[0]
        roles: tuple[list[int], list[int], list[int]] = ([], [], [])
        whole = len(products) == 1 and product.plain and not product.unmirrored and not product.obstacle
        for axis, size in enumerate(shape):
            # Laid out as the product sees it, an axis' index varies along the groups, the inputs or the outputs.
            leaves: list[Any] = [None] * len(self.paths)
            with jax.ensure_compile_time_eval():
                leaves[leaf] = jax.lax.broadcasted_iota(jnp.float32, shape, axis)
                index = np.asarray(collect(self.plan, leaves, [product])[product][0]) if whole else np.zeros(1)
            if not whole or index.size != math.prod(shape):
                raise ValueError(
                    f"params[{path!r}] is not one matrix (or a stack of them) used whole in one place; this rule "
                    f"needs one"
                )
            groups, inputs, _, _ = product.axes()
            lead = index.ndim - product.weight_aval.ndim
            along = {a for a in range(index.ndim) if size > 1 and np.ptp(index, axis=a).any()}
            if along <= {lead + a for a in inputs}:
                roles[1].append(axis)
            else:
                roles[0 if along <= {*range(lead), *(lead + a for a in groups)} else 2].append(axis)
        return roles


def direct_sizes(x: tuple[int, ...], error: tuple[int, ...]) -> tuple[int, int, int]:
    """How many leading axes an input and the output's error share, and the sizes of one input and of one error.

    They share the batch and, where both have them, the positions: all axes but their last, as far as they agree.
    """
    shared = 0
    for a, b in zip(x[:-1], error[:-1], strict=False):
        if a != b:
            break
        shared += 1
    return shared, math.prod(x[shared:]), math.prod(error[shared:])


# --- what each equation makes of its operands -------------------------------------------------------------------------


def _union(kinds: Sequence[Kind]) -> Kind:
    """What operands come to together, whatever the equation does: parameters, data, whether a gradient flows."""
    return Kind(
        params=frozenset().union(*(k.params for k in kinds)),
        data=any(k.data for k in kinds),
        active=any(k.active for k in kinds),
        obstacle=next((k.obstacle for k in kinds if k.obstacle), None),
        unmirrored=next((k.unmirrored for k in kinds if k.unmirrored), None),
        plain=all(k.plain for k in kinds if k.weight),
        stack=max((k.stack for k in kinds if k.weight), key=len, default=()),
    )


def _activation(kinds: Sequence[Kind]) -> Kind:
    return Kind(data=True, active=any(k.active for k in kinds))


def _everywhere(aval: Any) -> tuple[bool, ...]:
    return tuple(size > 1 for size in getattr(aval, "shape", ()))


def _layout_varying(eqn: Any, varying: tuple[bool, ...]) -> tuple[bool, ...]:
    """Along which axes a weight still varies after a layout change."""
    shape, name = eqn.outvars[0].aval.shape, eqn.primitive.name
    if name == "broadcast_in_dim":
        result = [False] * len(shape)
        for axis, out in enumerate(eqn.params["broadcast_dimensions"]):
            result[out] = varying[axis]
        return tuple(result)
    if name == "transpose":
        return tuple(varying[a] for a in eqn.params["permutation"])
    if name == "squeeze":
        return tuple(v for a, v in enumerate(varying) if a not in eqn.params["dimensions"])
    if name == "reshape":
        return _reshape_varying(eqn.invars[0].aval.shape, shape, varying)
    if shape == eqn.invars[0].aval.shape:
        return varying
    return _everywhere(eqn.outvars[0].aval)


def _reshape_varying(old: tuple[int, ...], new: tuple[int, ...], varying: tuple[bool, ...]) -> tuple[bool, ...]:
    """Axes are split or merged in runs of equal size; a run that varies anywhere varies along all that it becomes."""
    result: list[bool] = []
    i = 0
    while len(result) < len(new):
        size_old, size_new, any_varies, start = 1, 1, False, len(result)
        stop = start
        while stop == start or size_old != size_new:
            if stop == start or size_new < size_old:
                size_new *= new[stop]
                stop += 1
            else:
                size_old, any_varies = size_old * old[i], any_varies | varying[i]
                i += 1
        result.extend(any_varies and size > 1 for size in new[start:stop])
    return tuple(result)


def _elementwise_varying(eqn: Any, kinds: Sequence[Kind]) -> tuple[bool, ...]:
    """Along which axes the weights among an elementwise equation's operands vary (an axis of size one is broadcast)."""
    out = eqn.outvars[0].aval
    weights = [(k.varying, v.aval.shape) for k, v in zip(kinds, eqn.invars, strict=True) if k.weight]
    for _, shape in weights:
        if shape and (len(shape) != out.ndim or any(a not in (1, b) for a, b in zip(shape, out.shape, strict=True))):
            return _everywhere(out)
    varying = [v for v, shape in weights if shape] or [(False,) * out.ndim]
    return tuple(any(axis) for axis in zip(*varying, strict=True))


def _is_matrix(varying: tuple[bool, ...]) -> bool:
    """A weight that varies along two axes can be a matrix of synapses; along one it is a gain, bias or threshold."""
    return sum(varying) >= 2


def _is_matrix_operand(eqn: Any, operand: int, varying: tuple[bool, ...]) -> bool:
    """Whether a weight varies both along the axes that a product sums over and along those that remain its own."""
    if eqn.primitive.name != "dot_general":
        return _is_matrix(varying)
    contract, batch = eqn.params["dimension_numbers"]
    inputs, groups = contract[operand], batch[operand]
    outputs = [a for a in range(len(varying)) if a not in inputs and a not in groups]
    return any(varying[a] for a in inputs) and any(varying[a] for a in outputs)


def _follows(name: str, kinds: Sequence[Kind]) -> bool:
    """Whether B can go where its weight goes: the equation is linear (or affine) in the weights among its operands."""
    if any(k.obstacle for k in kinds):
        return False
    weights = [i for i, k in enumerate(kinds) if k.weight]
    if name in compat.LAYOUT or name in compat.AFFINE or name == "concatenate" or name == "neg":
        return True
    if name in compat.INDEXED or name == "pad" or name == "div":
        return weights == [0]
    if name == "select_n":
        return 0 not in weights
    return name == "mul" and len(weights) == 1


def _weight_kind(eqn: Any, kinds: Sequence[Kind]) -> Kind:
    """The kind of an equation's results where a weight enters (and nothing multiplies it with an activation)."""
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    union = _union(kinds)
    follows = _follows(name, kinds)
    # An index or a comparison has no gradient; a complex weight is not followed.
    if not jnp.issubdtype(out.dtype, jnp.floating):
        if not jnp.issubdtype(out.dtype, jnp.complexfloating):
            return Kind(data=union.data)
        follows = False
    if name == "stop_gradient" and union.data:
        return Kind(data=True)
    if name in compat.LAYOUT:
        varying = _layout_varying(eqn, kinds[0].varying)
    elif name in compat.INDEXED:
        varying = _everywhere(out)
    else:
        varying = _elementwise_varying(eqn, kinds)
    if union.data:
        # A bias, gain or threshold beside an activation leaves an activation; a matrix that data scales, masks, shifts
        # or selects from may yet multiply another activation, and must not do so unseen.
        indexed = name in compat.INDEXED and _is_matrix(kinds[0].varying)
        if not follows:
            if name in compat.LOCAL and _is_matrix(varying) and (union.obstacle or any(k.static for k in kinds)):
                return union._replace(obstacle=union.obstacle or name, varying=varying)
            return _activation(kinds)
        if not indexed and not _is_matrix(varying):
            return _activation(kinds)._replace(gain=(union.params, varying) if name == "mul" else None)
        gain = (union.params, varying) if name == "mul" else None
        return union._replace(varying=varying, gain=gain, unmirrored="data")
    if not follows:
        return union._replace(obstacle=union.obstacle or name, varying=varying)
    plain = union.plain and name not in {"mul", "div", "neg", "broadcast_in_dim"}
    if name == "broadcast_in_dim":
        plain = union.plain and math.prod(out.shape) == math.prod(eqn.invars[0].aval.shape)
    unmirrored = union.unmirrored or (name if name in compat.AFFINE else None)
    return union._replace(varying=varying, plain=plain, unmirrored=unmirrored)


def _join(a: Kind, b: Kind, varying: tuple[bool, ...], name: str) -> Kind:
    """The kind of a value that may be either (a loop's carry, a branch's result)."""
    a, b = a._replace(gain=None, product=None), b._replace(gain=None, product=None)
    if a == b:
        return a
    union = _union([a, b])
    if not union.weight or (union.data and not _is_matrix(varying)):
        return Kind(data=union.data, active=union.active)
    return union._replace(plain=False, unmirrored=union.unmirrored or name, varying=varying)


class _Analyser:
    """Builds plans, and notes the parameters that do anything but multiply an activation."""

    def __init__(self) -> None:
        self.shared: set[int] = set()

    def plan(self, jaxpr: Any, kinds: Sequence[Kind], lengths: tuple[int, ...]) -> Plan:
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Kind] = dict(zip(jaxpr.constvars, [CONSTANT] * len(jaxpr.constvars), strict=True))
        env.update(zip(jaxpr.invars, kinds, strict=True))

        def read(v: Any) -> Kind:
            return env[v] if isinstance(v, compat.Var) else CONSTANT

        plan = Plan(jaxpr, consts, [], env, [])
        for eqn in jaxpr.eqns:
            bind = compat.binder(eqn, jaxpr)
            operands = [read(v) for v in eqn.invars]
            step, outs = self.step(eqn, bind, operands, lengths, plan)
            if not step.plans:
                self.note_uses(step, operands, outs)
            plan.steps.append(step)
            env.update(zip(eqn.outvars, outs, strict=True))
        plan.outputs.extend(read(v) for v in jaxpr.outvars)
        return plan

    def step(
        self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...], plan: Plan
    ) -> tuple[Step, list[Kind]]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        if not any(k.active for k in kinds):
            return Step(eqn, "bind", bind), [Kind(data=any(k.data for k in kinds))] * count
        if name in compat.INLINED or name in compat.REMAT:
            inner = self.plan(compat.inner_jaxpr(eqn), kinds, lengths)
            return Step(eqn, "remat" if name in compat.REMAT else "inline", None, (inner,)), inner.outputs
        if name == "scan":
            return self.scan(eqn, kinds, lengths)
        if name == "cond":
            return self.cond(eqn, kinds, lengths)
        if name in compat.BILINEAR:
            return self.bilinear(eqn, bind, kinds, lengths)
        weights = [k for k in kinds if k.weight]
        if name == "reduce_sum" and kinds[0].gain and any(kinds[0].gain[1][a] for a in eqn.params["axes"]):
            # x * w, then a sum along w: a projection written by hand.
            params = kinds[0].gain[0]
            kind = Kind(params, varying=_everywhere(eqn.invars[0].aval))
            product = Product(eqn, bind, 0, [kind, _activation(kinds)], "mul, then reduce_sum", lengths)
            product.needs_feedback = True
            return Step(eqn, "bind", bind, (), product), [_activation(kinds)] * count
        if compat.has_jaxpr(eqn):
            return self.opaque(eqn, bind, kinds, lengths)
        if not weights:
            out = _activation(kinds)
            if name in compat.LAYOUT and eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape:
                out = out._replace(gain=kinds[0].gain, product=kinds[0].product)
            if name == "stop_gradient" or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
                out = Kind(data=True)
            return Step(eqn, "bind", bind), [out] * count
        statics = [i for i, k in enumerate(kinds) if k.static]
        if statics and any(k.data for k in kinds) and name not in compat.LOCAL:
            product = Product(eqn, bind, statics[0], kinds, name, lengths)
            return Step(eqn, "bind", bind, (), product), [_activation(kinds)] * count
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating) and name == "mul" and _union(kinds).data:
            product = Product(
                eqn, bind, [k.weight for k in kinds].index(True), kinds, "mul of complex numbers", lengths
            )
            return Step(eqn, "bind", bind, (), product), [_activation(kinds)] * count
        if name in compat.AFFINE:
            self.note_bias(eqn, kinds, plan)
        out = _weight_kind(eqn, kinds)
        action = "follow" if out.weight and not out.obstacle else "bind"
        return Step(eqn, action, bind), [out] * count

    def bilinear(self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        name = eqn.primitive.name
        union = _union(kinds)
        statics = [i for i, k in enumerate(kinds) if k.static]
        weights = [i for i, k in enumerate(kinds) if k.weight]
        if not union.data:
            # No data: a map of weights alone. With a constant it is linear, but it mixes elements.
            reason = f"{name} of two parameters" if len(weights) == 2 else f"{name} with a constant array"
            out = union._replace(obstacle=union.obstacle or reason, varying=_everywhere(eqn.outvars[0].aval))
            return Step(eqn, "bind", bind), [out]
        out = Kind(data=True, active=True)
        # A weight that data has touched is an activity of neurons (a looked-up embedding, a bias added) to weights, and
        # to other activities too unless it is a matrix between the summed axes and those that remain.
        candidates = statics
        if all(k.data for k in kinds):
            candidates = [i for i in weights if _is_matrix_operand(eqn, i, kinds[i].varying)]
        if not candidates:
            return Step(eqn, "bind", bind), [out]
        weight = candidates[0]
        obstacle = kinds[weight].obstacle
        if len(candidates) == 2:
            obstacle = f"{name} of two parameters that data has touched"
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
            obstacle = f"{name} of complex numbers"
        product = Product(eqn, bind, weight, kinds, obstacle, lengths)
        step = Step(eqn, "bind" if obstacle else "product", bind, (), product)
        return step, [out._replace(product=product)]

    def note_uses(self, step: Step, kinds: list[Kind], outs: list[Kind]) -> None:
        """A weight may be laid out anew and multiply an activation; any other use adds a gradient that B has not."""
        for i, kind in enumerate(kinds):
            multiplies = step.action == "product" and step.product is not None and step.product.weight == i
            if kind.weight and not multiplies and not (step.action == "follow" and all(k.static for k in outs)):
                self.shared |= kind.params

    def note_bias(self, eqn: Any, kinds: list[Kind], plan: Plan) -> None:
        """A weight added to a product's output, and varying along nothing but its outputs, is that layer's bias."""
        for (y, _), (b, var) in (
            ((kinds[0], None), (kinds[1], eqn.invars[1])),
            ((kinds[1], None), (kinds[0], eqn.invars[0])),
        ):
            if y.product is None or not b.static or b.obstacle or eqn.primitive.name == "sub":
                continue
            if all(not v or a in y.product.output_axes() for a, v in enumerate(b.varying)):
                y.product.bias = (plan, var)

    def opaque(self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        """A call that cannot be opened: a custom derivative (its backward pass would be lost), a while, a kernel."""
        name, count = eqn.primitive.name, len(eqn.outvars)
        step = Step(eqn, "bind", bind)
        weights = [i for i, k in enumerate(kinds) if k.weight]
        if not weights:
            return step, [_activation(kinds)] * count
        if name in compat.CUSTOM:
            inner = self.plan(compat.inner_jaxpr(eqn), kinds, lengths)
            hidden = sorted(inner.products(), key=lambda p: p.obstacle is None)
            outs = [k._replace(obstacle=k.obstacle or name) if k.weight else k for k in inner.outputs]
            if not hidden:
                return step, outs
            weights = [i for i in weights if kinds[i].params & hidden[0].params] or weights
        elif not any(k.data for k in kinds):
            union = _union(kinds)
            return step, [union._replace(obstacle=name, varying=_everywhere(v.aval)) for v in eqn.outvars]
        elif name == "while":  # JAX itself has no backward pass through it
            return step, [_activation(kinds)] * count
        else:
            outs = [_activation(kinds)] * count
        product = Product(eqn, bind, weights[0], kinds, name, lengths)
        return step._replace(product=product), outs

    def cond(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        plans = tuple(self.plan(branch, kinds[1:], lengths) for branch in eqn.params["branches"])
        outs = plans[0].outputs
        for plan in plans[1:]:
            avals = [v.aval for v in eqn.outvars]
            outs = [_join(a, b, _everywhere(v), "cond") for a, b, v in zip(outs, plan.outputs, avals, strict=True)]
        if kinds[0].data:
            outs = [k._replace(data=True, unmirrored="cond") if k.weight else k._replace(data=True) for k in outs]
        return Step(eqn, "cond", None, plans), [k._replace(gain=None, product=None) for k in outs]

    def scan(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        jaxpr, _ = compat.open_jaxpr(eqn.params["jaxpr"])
        consts, carries = compat.scan_sizes(eqn.params)
        avals = [v.aval for v in jaxpr.invars]
        inner = list(kinds)
        for i, kind in enumerate(kinds):
            sliced = i >= consts + carries
            varying = kind.varying[1:] if sliced else kind.varying
            stack = (*kind.stack, eqn.params["length"]) if sliced and kind.weight else kind.stack
            inner[i] = kind._replace(varying=varying, gain=None, product=None, stack=stack)
        lengths = (*lengths, eqn.params["length"])
        while True:
            plan = self.plan(eqn.params["jaxpr"], inner, lengths)
            settled = True
            for c in range(carries):
                i = consts + c
                if jaxpr.outvars[c] is jaxpr.invars[i]:  # carried along unchanged
                    continue
                old = inner[i]
                inner[i] = _join(old, plan.outputs[c], _everywhere(avals[i]), "scan")
                if inner[i].static:
                    inner[i] = inner[i]._replace(unmirrored="scan")
                settled &= inner[i] == old
            if settled:
                break
        outs = list(inner[consts : consts + carries])
        for kind in plan.outputs[carries:]:
            varying = (kind.weight, *kind.varying)
            outs.append(kind._replace(varying=varying, gain=None, product=None, stack=kind.stack[: len(lengths) - 1]))
        return Step(eqn, "scan", None, (plan,)), outs


def analyse(fun: Callable[..., Any], params: Any, *args: Any) -> Analysis:
    """Walks ``fun(params, *args)``; arrays in ``args`` count as data, other leaves as Python values.

    Raises TypeError for a parameter that is not a floating-point array.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    for path, (_, leaf) in zip(paths, flat, strict=True):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            found = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"params[{path!r}] is {found}; parameters must be real floating-point arrays. "
                "Pass anything else as a later argument of fun."
            )
    leaves, args_tree = jax.tree.flatten(args)
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    out_tree = None

    def flat_fun(param_leaves: list[Any], arrays: list[Any]) -> list[Any]:
        nonlocal out_tree
        filled = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        out = fun(jax.tree.unflatten(tree, param_leaves), *jax.tree.unflatten(args_tree, filled))
        flat_out, out_tree = jax.tree.flatten(out)
        return flat_out

    jaxpr = jax.make_jaxpr(flat_fun)([leaf for _, leaf in flat], [leaves[i] for i in traced])
    kinds = [
        Kind(frozenset({i}), active=True, varying=_everywhere(leaf) if hasattr(leaf, "shape") else ())
        for i, (_, leaf) in enumerate(flat)
    ]
    analyser = _Analyser()
    plan = analyser.plan(jaxpr, kinds + [Kind(data=True)] * len(traced), ())
    shared = analyser.shared.union(*(kind.params for kind in plan.outputs))
    return Analysis(plan, paths, out_tree, frozenset(shared))


def is_array(leaf: Any) -> bool:
    """Whether an argument's leaf is traced: an array, a NumPy array or scalar, or a ShapeDtypeStruct."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def projections(fun: Callable[..., Any], params: Any, *args: Any) -> dict[str, Projection]:
    """Every place where a parameter of ``fun`` multiplies an activation.

    A parameter that is added to an activation, scales it neuron by neuron, or is looked up in it (a bias, a
    normalisation's gain, an embedding) is local to its neurons, and no projection.

    Args:
      fun: any JAX function ``fun(params, *args)``.
      params: its parameters, a pytree of floating-point arrays (or ShapeDtypeStructs).
      *args: its further arguments; data must come in here, not through a closure.

    Returns:
      ``{path: Projection}``, in the order of the parameters; a parameter with an ``obstacle`` can only be trained under
      ``backprop()``.

    Raises:
      TypeError: a parameter is not a real floating-point array.
    """
    return analyse(fun, params, *args).projections()


# --- running the plan -------------------------------------------------------------------------------------------------

# A value beside its companion: for a weight the feedback array that has followed it (None where there is none, the
# value itself under backprop), for all else the value.
Pair = tuple[Any, Any]


class Handler:
    """What stands in for the products while a plan runs, and what they share.

    Attributes:
      on_product: ``(product, x, w, b, tap) -> y``, called for each product of a weight with an activation.
      taps: an array for some products, with a leading axis for each scan around it; the others get ``None``.
      channel: an array that goes from each product to the next, through every loop and branch (or None): its cotangent
        travels from the last product straight to all before it.
    """

    def __init__(self, on_product: Callable[["Handler", Product, Any, Any, Any, Any], Any], taps: dict, channel: Any):
        self.on_product = on_product
        self.taps = taps
        self.channel = channel


class Direct:
    """Feedback weights of a shape of their own, which carry the output's error straight to a projection's input.

    They stay as they are while their weight is laid out anew; a scan takes a slice of both.
    """

    def __init__(self, array: Any):
        self.array = array


jax.tree_util.register_pytree_node(Direct, lambda d: ((d.array,), None), lambda _, children: Direct(*children))


def run(plan: Plan, inputs: Sequence[Pair], handler: Handler) -> list[Pair]:
    """Evaluates a plan, the handler in place of each product of a weight with an activation."""
    env: dict[Any, Pair] = {v: (c, c) for v, c in zip(plan.jaxpr.constvars, plan.consts, strict=True)}
    env.update(zip(plan.jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> Pair:
        return env[v] if isinstance(v, compat.Var) else (v.val, v.val)

    for step in plan.steps:
        operands = [read(v) for v in step.eqn.invars]
        env.update(zip(step.eqn.outvars, _evaluate(step, operands, handler), strict=True))
    return [read(v) for v in plan.jaxpr.outvars]


def _evaluate(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    values = [value for value, _ in operands]
    if step.action == "product":
        product = step.product
        assert product is not None
        w, b = operands[product.weight]
        y = handler.on_product(handler, product, values[1 - product.weight], w, b, handler.taps.get(product))
        return [(y, y)]
    if step.action == "inline":
        return run(step.plans[0], operands, handler)
    if step.action == "remat":
        return _remat(step, operands, handler)
    if step.action == "scan":
        return _scan(step, operands, handler)
    if step.action == "cond":
        return _cond(step, operands, handler)
    assert step.bind is not None
    outs = step.bind(*values)
    if step.action == "bind" or all(b is a for a, b in operands):
        return [(y, y) for y in outs]
    if any(b is None for _, b in operands):
        return [(y, None) for y in outs]
    direct = [b for _, b in operands if isinstance(b, Direct)]
    if direct:
        if any(b is not direct[0] for b in direct):
            raise ValueError("parameters joined to one weight cannot each have direct feedback; give them another rule")
        return [(y, direct[0]) for y in outs]
    return list(zip(outs, step.bind(*(_companion(pair) for pair in operands)), strict=True))


def _companion(pair: Pair) -> Any:
    """What stands for a value among feedback arrays: a weight's own B, or the value, to which no error goes twice."""
    a, b = pair
    return jax.lax.stop_gradient(a) if b is a and jnp.issubdtype(jnp.result_type(a), jnp.floating) else b


class _Packed:
    """Pairs as a flat list of arrays that can cross a tracing boundary, without sending an array twice."""

    def __init__(self, pairs: Sequence[Pair]):
        self.modes = ["same" if b is a else "none" if b is None else "own" for a, b in pairs]

    @staticmethod
    def flatten(pairs: Sequence[Pair]) -> list[Any]:
        return [x for a, b in pairs for x in ((a,) if b is a or b is None else (a, b))]

    def unflatten(self, arrays: Sequence[Any]) -> list[Pair]:
        it = iter(arrays)
        pairs = []
        for mode in self.modes:
            a = next(it)
            pairs.append((a, a if mode == "same" else None if mode == "none" else next(it)))
        return pairs


def _remat(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    packed, outs = _Packed(operands), _Packed([])
    mine = [p for p in step.plans[0].products() if p in handler.taps]

    def body(arrays: list[Any], taps: list[Any], channel: Any) -> tuple[list[Any], Any]:
        nonlocal outs
        inner = Handler(handler.on_product, dict(zip(mine, taps, strict=True)), channel)
        pairs = run(step.plans[0], packed.unflatten(arrays), inner)
        outs = _Packed(pairs)
        return _Packed.flatten(pairs), inner.channel

    options = {k: step.eqn.params[k] for k in ("prevent_cse", "policy")}
    remat = jax.checkpoint(body, **options)
    flat, handler.channel = remat(_Packed.flatten(operands), [handler.taps[p] for p in mine], handler.channel)
    return outs.unflatten(flat)


def _as_kind(pair: Pair, kind: Kind) -> Pair:
    """A value in a place where its kind may be wider than its own: an activation's companion is itself."""
    return pair if kind.weight and not kind.obstacle else (pair[0], pair[0])


def _cond(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    (index, _), rest = operands[0], operands[1:]
    kinds = [_join_all([plan.outputs[i] for plan in step.plans], v.aval) for i, v in enumerate(step.eqn.outvars)]
    followed = [i for i, k in enumerate(kinds) if k.weight and not k.obstacle]
    lost: set[int] = set()

    def branch(plan: Plan) -> Callable[[], tuple[list[Any], list[Any], Any]]:
        def evaluate() -> tuple[list[Any], list[Any], Any]:
            inner = Handler(handler.on_product, handler.taps, handler.channel)
            pairs = run(plan, rest, inner)
            lost.update(i for i in followed if pairs[i][1] is None)
            companions = [pairs[i][0] if i in lost else _companion(pairs[i]) for i in followed]
            return [a for a, _ in pairs], companions, inner.channel

        return evaluate

    values, companions, handler.channel = jax.lax.switch(index, [branch(plan) for plan in step.plans])
    outs = [(a, a) for a in values]
    for i, b in zip(followed, companions, strict=True):
        outs[i] = (values[i], None if i in lost else b)
    return outs


def _join_all(kinds: Sequence[Kind], aval: Any) -> Kind:
    out = kinds[0]
    for kind in kinds[1:]:
        out = _join(out, kind, _everywhere(aval), "cond")
    return out


def _scan(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    (plan,), params = step.plans, step.eqn.params
    consts, carries = compat.scan_sizes(params)
    kinds = [plan.kinds[v] for v in plan.jaxpr.invars]
    operands = [_as_kind(pair, kind) for pair, kind in zip(operands, kinds, strict=True)]
    fixed, init, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    # A carried weight whose companion becomes one of its own along the way needs one from the start.
    for i, kind in enumerate(kinds[consts : consts + carries]):
        if kind.weight and not kind.obstacle and init[i][1] is init[i][0] and _differs(plan, i):
            init[i] = (init[i][0], jax.lax.stop_gradient(init[i][0]))
    mine = [p for p in plan.products() if p in handler.taps]
    taps = [handler.taps[p] for p in mine]
    lost: set[int] = set()
    carry_pack = xs_pack = ys_pack = _Packed([])

    def body(
        carry: tuple[list[Any], Any], slices: tuple[list[Any], list[Any]]
    ) -> tuple[tuple[list[Any], Any], list[Any]]:
        nonlocal ys_pack
        inner = Handler(handler.on_product, dict(zip(mine, slices[1], strict=True)), carry[1])
        pairs = run(plan, [*fixed, *carry_pack.unflatten(carry[0]), *xs_pack.unflatten(slices[0])], inner)
        out = []
        for i, (pair, mode) in enumerate(zip(pairs[:carries], carry_pack.modes, strict=True)):
            out.append(pair[0])
            if mode == "own":
                if pair[1] is None:
                    lost.add(i)
                out.append(pair[0] if pair[1] is None else _companion(pair))
        ys_pack = _Packed(pairs[carries:])
        return (out, inner.channel), _Packed.flatten(pairs[carries:])

    while True:
        carry_pack, xs_pack, ys_pack = _Packed(init), _Packed(xs), _Packed([])
        inputs = (_Packed.flatten(init), handler.channel), (_Packed.flatten(xs), taps)
        if "own" not in carry_pack.modes:
            break
        # A companion that the body loses was never one: find out before the loop is built.
        jax.eval_shape(lambda c, x: body(c, jax.tree.map(lambda leaf: leaf[0], x)), *inputs)
        if not lost:
            break
        init = [(a, None) if i in lost else (a, b) for i, (a, b) in enumerate(init)]
        lost.clear()
    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    (final, handler.channel), ys = jax.lax.scan(body, *inputs, **options)
    return [*carry_pack.unflatten(final), *ys_pack.unflatten(ys)]


def _differs(plan: Plan, carry: int) -> bool:
    """Whether a scan's carry is changed by its body (rather than carried along)."""
    return plan.jaxpr.outvars[carry] not in plan.jaxpr.invars


# --- the weights alone, for mirror mode -------------------------------------------------------------------------------


class _Stacked(NamedTuple):
    """A weight, or a constant, with an axis for each scan it changes along (``levels``: how deep each is nested)."""

    value: Any
    levels: tuple[int, ...] = ()


def collect(plan: Plan, leaves: Sequence[Any], wanted: Sequence[Product]) -> dict[Product, tuple[Any, Any]]:
    """For each wanted product its weight as the product sees it, and its bias as its output sees it (or None).

    Only layout changes are evaluated: no data is needed. A product inside scans has its weight (and bias) with a
    leading axis for each scan along which the weight (or bias) changes.
    """
    found: dict[Product, tuple[Any, Any]] = {}
    inputs = [None if x is None else _Stacked(x) for x in leaves] + [None] * (len(plan.jaxpr.invars) - len(leaves))
    _collect(plan, inputs, frozenset(wanted), found, 1)
    return found


def _collect(
    plan: Plan, inputs: Sequence[_Stacked | None], wanted: frozenset[Product], found: dict[Product, Any], level: int
) -> list[_Stacked | None]:
    env: dict[Any, _Stacked | None] = {v: _Stacked(c) for v, c in zip(plan.jaxpr.constvars, plan.consts, strict=True)}
    env.update(zip(plan.jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> _Stacked | None:
        return env[v] if isinstance(v, compat.Var) else _Stacked(v.val)

    for step in plan.steps:
        operands = [read(v) for v in step.eqn.invars]
        outs: list[_Stacked | None] = [None] * len(step.eqn.outvars)
        if step.product is not None and step.product in wanted:
            w = operands[step.product.weight]
            assert w is not None  # what mirror mode can reach is made of layout changes alone
            found[step.product] = (w.value, None)
        elif step.action in {"inline", "remat"}:
            outs = _collect(step.plans[0], operands, wanted, found, level)
        elif step.action == "cond":
            for inner in step.plans:
                _collect(inner, operands[1:], wanted, found, level)
        elif step.action == "scan":
            outs = _collect_scan(step, operands, wanted, found, level)
        elif step.eqn.primitive.name == "convert_element_type" and plan.kinds[step.eqn.outvars[0]].weight:
            outs = operands  # B is mirrored at its own precision, whatever the compute dtype
        elif step.bind is not None and all(_mirrored(plan.kinds[v]) for v in step.eqn.outvars):
            present = [x for x in operands if x is not None]
            if len(present) == len(operands):
                outs = _bind_stacked(step.bind, present)
        env.update(zip(step.eqn.outvars, outs, strict=True))
    for product, (weight, _) in list(found.items()):
        if product.bias is not None and product.bias[0] is plan:
            bias = read(product.bias[1])
            found[product] = (weight, None if bias is None else bias.value)
    return [read(v) for v in plan.jaxpr.outvars]


def _mirrored(kind: Kind) -> bool:
    return not (kind.data or kind.obstacle or kind.unmirrored)


def _bind_stacked(bind: Bind, operands: Sequence[_Stacked]) -> list[_Stacked | None]:
    levels = tuple(sorted({level for x in operands for level in x.levels}))
    # Casts to a compute dtype are left out (see _collect), so a constant may have to follow its weight's dtype.
    dtype = jnp.result_type(
        *(x.value for x in operands if jnp.issubdtype(jnp.result_type(x.value), jnp.floating)), -1.0
    )
    operands = [
        _Stacked(jnp.asarray(x.value, dtype), x.levels) if jnp.issubdtype(jnp.result_type(x.value), jnp.floating) else x
        for x in operands
    ]
    for level in reversed(levels):
        bind = jax.vmap(bind, in_axes=tuple(0 if level in x.levels else None for x in operands))
    return [_Stacked(y, levels) for y in bind(*(x.value for x in operands))]


def _collect_scan(
    step: Step,
    operands: Sequence[_Stacked | None],
    wanted: frozenset[Product],
    found: dict[Product, Any],
    level: int,
) -> list[_Stacked | None]:
    (plan,) = step.plans
    consts, carries = compat.scan_sizes(step.eqn.params)
    inner: list[_Stacked | None] = []
    for i, (x, v) in enumerate(zip(operands, plan.jaxpr.invars, strict=True)):
        if x is None or not _mirrored(plan.kinds[v]):
            inner.append(None)
        elif i < consts + carries:
            inner.append(x)
        else:  # the scan's own axis comes after those of the scans around it
            inner.append(_Stacked(x.value, (*x.levels, level)))
    outs = _collect(plan, inner, wanted, found, level + 1)
    for i, y in enumerate(outs[carries:], carries):
        if y is None:
            continue
        if level in y.levels:
            outs[i] = _Stacked(y.value, y.levels[:-1])
        else:
            axis = len(y.levels)
            stacked = jnp.broadcast_to(
                jnp.expand_dims(y.value, axis),
                (*y.value.shape[:axis], step.eqn.params["length"], *y.value.shape[axis:]),
            )
            outs[i] = _Stacked(stacked, y.levels)
    return outs
