"""What every value of a jaxpr is (a constant, an activation, a weight), and what each equation makes of its operands.

The walk goes over the jaxpr once. Data has touched an activation; a weight is made of parameters alone, or of
parameters that data has scaled, shifted or selected from. A weight that multiplies an activation is a ``Product``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmkp import compat, patches

Bind = Callable[..., list[Any]]


class Kind(NamedTuple):
    """What a value is. ``params``: the parameters (leaf numbers) it is made of *as a weight*; none for the rest."""

    params: frozenset[int] = frozenset()
    data: bool = False  # data has touched it
    active: bool = False  # it depends on a parameter, so that an error must reach it
    obstacle: str | None = None  # a weight that B cannot follow: through which primitive
    unmirrored: str | None = None  # a weight that B can follow, but that mirror mode cannot reach: why
    masked: bool = False  # a weight that data which no parameter enters has scaled, masked or selected as a whole
    plain: bool = True  # each of its elements is one element of a parameter, unscaled
    varying: tuple[bool, ...] = ()  # of a weight: along which axes it varies (it is broadcast along the others)
    # Of an activation: which parameters it has just been multiplied by, elementwise, and along which axes these vary.
    gain: tuple[frozenset[int], tuple[bool, ...]] | None = None
    product: Any = None  # an activation that is a product's output, untouched
    stack: tuple[int, ...] = ()  # of a weight inside scans: the lengths of those along which it changes
    # Of an activation: along which axes it is the same active values over again. What weights multiply such copies by is a
    # projection written by hand: the error of a value copied is the sum of its copies' errors, each times its weight.
    copied: tuple[bool, ...] = ()
    # Of an activation that was cut or laid out anew: from which variables, and how many elements each has.
    sources: tuple[tuple[Any, int], ...] = ()
    # The weights that copies have just been multiplied by; what comes next may show them to be gains.
    fans: tuple["Fan", ...] = ()

    @property
    def weight(self) -> bool:
        return bool(self.params)

    @property
    def static(self) -> bool:
        """A weight that no data has touched."""
        return bool(self.params) and not self.data

    @property
    def synaptic(self) -> bool:
        """A weight still, and no activity made of one."""
        return bool(self.params) and (not self.data or self.masked)


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
        self.lengths = lengths  # of the scans around it, outermost first (and of a shard_map, how many devices)
        # Whether a CPU takes its weight's gradient by patches.
        self.by_patches = (
            self.primitive == "conv_general_dilated"
            and weight == 1
            and patches.applies(eqn.params, self.input_avals[0], self.weight_aval, self.output_aval)
        )
        self.bind = bind
        self.pending = False  # whether what comes next may yet show it to be a gain (``Kind.fans``)
        self.bias: Any = None  # the weight added to its output, if one is: (plan, variable)

    def multiply(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product itself, the equation's own."""
        return self.bind(*((w, x) if self.weight == 0 else (x, w)))[0]

    def weight_gradient(self, x: jax.Array, delta: jax.Array) -> jax.Array:
        """delta x^T: the transpose of the product with respect to its weight."""
        aval = self.weight_aval

        def transpose(x: jax.Array, delta: jax.Array) -> jax.Array:
            (dw,) = jax.linear_transpose(lambda w: self.multiply(x, w), aval)(delta)
            return dw

        if not self.by_patches:
            return transpose(x, delta)
        by_patches = lambda x, delta: patches.weight_gradient(self.eqn_params, x, delta, aval.shape)
        return jax.lax.platform_dependent(x, delta, cpu=by_patches, default=transpose)

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


class Fan(NamedTuple):
    """A weight that copies of an activation were multiplied by: w_k x, along the axes where both are so.

    Attributes:
      varying: the axes along which the weight varies.
      moves: how it was laid out anew since.
      shifted: whether a bias was added since.
      gain: whether an activation y_k was multiplied since, with a value of its own for each w_k: w_k x y_k. Then w_k is its
        gain, and there are no axes.
    """

    product: Product
    along: tuple[bool, ...]
    varying: tuple[bool, ...] = ()
    moves: tuple[tuple[str, str], ...] = ()
    shifted: bool = False
    gain: bool = False


class Step(NamedTuple):
    """One equation, and what to do: "bind", "follow", "product", "inline", "remat", "scan", "cond" or "shard_map"."""

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
            if step.product is not None and not step.product.pending:
                yield step.product
            for plan in step.plans:
                yield from plan.products()


# --- what each equation makes of its operands -------------------------------------------------------------------------


def _union(kinds: Sequence[Kind]) -> Kind:
    """What operands come to together, whatever the equation does: parameters, data, whether a gradient flows."""
    return Kind(
        params=frozenset().union(*(k.params for k in kinds)),
        data=any(k.data for k in kinds),
        active=any(k.active for k in kinds),
        obstacle=next((k.obstacle for k in kinds if k.obstacle), None),
        unmirrored=next((k.unmirrored for k in kinds if k.unmirrored), None),
        masked=any(k.masked for k in kinds) and all(k.synaptic or not k.active for k in kinds),
        plain=all(k.plain for k in kinds if k.weight),
        stack=max((k.stack for k in kinds if k.weight), key=len, default=()),
    )


def _activation(kinds: Sequence[Kind]) -> Kind:
    return Kind(data=True, active=any(k.active for k in kinds))


def everywhere(aval: Any) -> tuple[bool, ...]:
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
    return everywhere(eqn.outvars[0].aval)


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


def _copied(eqn: Any, kinds: Sequence[Kind], shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Along which axes an equation's result, of this shape, is the same active values over again.

    Weights, constants and data do not end a repetition (with zeros added, or ones multiplied, there would be one still);
    an activation that is none does.
    """
    name = eqn.primitive.name
    active = [i for i, k in enumerate(kinds) if k.active and not k.synaptic]
    if not active or name == "conv_general_dilated":
        return ()
    a = active[0]
    old = eqn.invars[a].aval.shape
    was = kinds[a].copied or (False,) * len(old)
    if name == "broadcast_in_dim":
        again = [True] * len(shape)
        for axis, out in enumerate(eqn.params["broadcast_dimensions"]):
            again[out] = was[axis] or old[axis] != shape[out]
    elif name in {"transpose", "squeeze", "reshape"}:
        again = list(_layout_varying(eqn, was))
    elif name == "tile":
        again = [r or reps > 1 for r, reps in zip(was, eqn.params["reps"], strict=True)]
    elif name == "dot_general":
        if len(active) == 2:
            return ()
        again = _copied_by_dot(eqn, a, was)
    elif name == "gather" and active == [0]:
        again = _copied_by_gather(eqn, old)
    elif len(old) == len(shape) and (name in compat.LAYOUT or name == "dynamic_slice"):
        again = list(was)
    elif name.startswith("reduce_") and "axes" in eqn.params:
        again = [r for axis, r in enumerate(was) if axis not in eqn.params["axes"]]
    else:
        again = [True] * len(shape)
        for i in active:
            old = eqn.invars[i].aval.shape
            if old and len(old) != len(shape):
                return ()
            was = kinds[i].copied or (False,) * len(old)
            if old:
                # Only an axis of one is spread; a longer one is joined to others, padded, pooled or chosen from.
                again = [g and (r or n == 1 != m) for g, r, n, m in zip(again, was, old, shape, strict=True)]
        if name == "concatenate":  # of more elements than there are, some are there twice
            sizes: dict[tuple[Any, int], int] = {}
            for i in active:
                for source in _sources(eqn, kinds, i):
                    sizes[source] = sizes.get(source, 0) + math.prod(eqn.invars[i].aval.shape)
            dimension = eqn.params["dimension"]
            again[dimension] |= any(joined > whole for (_, whole), joined in sizes.items())
            again[dimension] |= any(kinds[i].copied and kinds[i].copied[dimension] for i in active)
    return tuple(r and size > 1 for r, size in zip(again, shape, strict=True))


def _sources(eqn: Any, kinds: Sequence[Kind], operand: int) -> tuple[tuple[Any, int], ...]:
    """The variables that an operand was cut from, and itself, and how many elements each has; the last few."""
    var = eqn.invars[operand]
    return (*kinds[operand].sources[-7:], (var, math.prod(var.aval.shape)))


def _copied_by_dot(eqn: Any, active: int, was: tuple[bool, ...]) -> list[bool]:
    """A product with data that sums over nothing copies the activation along the axes that are the data's alone."""
    contract, batch = eqn.params["dimension_numbers"]
    rank = [len(v.aval.shape) for v in eqn.invars]
    free = [[a for a in range(rank[i]) if a not in (*contract[i], *batch[i])] for i in (0, 1)]
    copies = all(eqn.invars[active].aval.shape[a] == 1 for a in contract[active])
    own = lambda i: [was[a] for a in free[i]] if i == active else [copies] * len(free[i])
    return [*(was[a] for a in batch[active]), *own(0), *own(1)]


def _copied_by_gather(eqn: Any, old: tuple[int, ...]) -> list[bool]:
    """More places than there are values to fill them repeat some (fewer are a permutation or a choice)."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    places = [a for a in range(len(shape)) if a not in numbers.offset_dims]
    from_which = [*numbers.collapsed_slice_dims, *numbers.operand_batching_dims]
    more = math.prod(shape[a] for a in places) > math.prod(old[a] for a in from_which)
    batched = len(numbers.operand_batching_dims)
    return [more and a in places[batched:] for a in range(len(shape))]


def _places(eqn: Any) -> bool:
    """Whether an index has axes of its own: one lookup for each example."""
    if eqn.primitive.name == "dynamic_slice":
        return False
    offset = eqn.params["dimension_numbers"].offset_dims
    return any(size > 1 and a not in offset for a, size in enumerate(eqn.outvars[0].aval.shape))


def _elementwise_varying(eqn: Any, kinds: Sequence[Kind]) -> tuple[bool, ...]:
    """Along which axes the weights among an elementwise equation's operands vary (an axis of size one is broadcast)."""
    out = eqn.outvars[0].aval
    weights = [(k.varying, v.aval.shape) for k, v in zip(kinds, eqn.invars, strict=True) if k.weight]
    for _, shape in weights:
        if shape and (len(shape) != out.ndim or any(a not in (1, b) for a, b in zip(shape, out.shape, strict=True))):
            return everywhere(out)
    varying = [v for v, shape in weights if shape] or [(False,) * out.ndim]
    if eqn.primitive.name in compat.GROWN and not any(k.active and not k.weight for k in kinds):
        # Rows that are joined to a matrix vary from row to row. (Beside an activation they are tokens of their own.)
        varying += [tuple(a != b for a, b in zip(shape, out.shape, strict=True)) for _, shape in weights if shape]
    return tuple(any(axis) for axis in zip(*varying, strict=True))


def _is_matrix(varying: tuple[bool, ...]) -> bool:
    """A weight that varies along two axes can be a matrix of synapses; along one it is a gain, bias or threshold."""
    return sum(varying) >= 2


def _is_matrix_operand(eqn: Any, operand: int, varying: tuple[bool, ...]) -> bool:
    """Whether a weight varies both along the axes that a product sums over and along those that remain its own.

    (Of a readout of one neuron none remains that could vary; a filter sums along its taps and inputs.)
    """
    if eqn.primitive.name != "dot_general":
        return _is_matrix(varying) or (
            operand == 1 and any(varying[a] for a in eqn.params["dimension_numbers"].rhs_spec[1:])
        )
    contract, batch = eqn.params["dimension_numbers"]
    inputs, groups = contract[operand], batch[operand]
    outputs = [a for a in range(len(varying)) if a not in inputs and a not in groups]
    one = all(eqn.invars[operand].aval.shape[a] == 1 for a in outputs) and not any(varying[a] for a in groups)
    return any(varying[a] for a in inputs) and (one or any(varying[a] for a in outputs))


def _follows(name: str, kinds: Sequence[Kind]) -> bool:
    """Whether B can go where its weight goes: the equation is linear (or affine) in the weights among its operands."""
    if any(k.obstacle for k in kinds):
        return False
    weights = [i for i, k in enumerate(kinds) if k.weight]
    if name in compat.LAYOUT or name in compat.AFFINE or name in {"concatenate", "stack", "neg"}:
        return True
    if name in compat.WRITTEN:
        return set(weights) <= {0, compat.updates_operand(name)}
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
        varying = everywhere(out)
    elif name in compat.ADDED and not kinds[0].weight and not _is_matrix(kinds[2].varying):
        varying = (False,) * out.ndim  # a bias of some neurons
    else:
        varying = _elementwise_varying(eqn, kinds)
    if union.data:
        # A bias, gain or threshold beside an activation leaves an activation; a matrix that data scales, masks, shifts
        # or selects from may yet multiply another activation, and must not do so unseen.
        indexed = name in compat.INDEXED and _is_matrix(kinds[0].varying)
        # With no activation beside it, a readout of one neuron (or one filter) that data masks is a weight still.
        masked = any(varying) and name not in compat.AFFINE and not any(k.active and not k.weight for k in kinds)
        if not follows:
            # What is made of a masked matrix is no activity of neurons: it would carry W's own transpose unseen.
            local = name in compat.LOCAL and (union.obstacle or any(k.static for k in kinds))
            if (_is_matrix(varying) and local) or (any(varying) and union.masked):
                return union._replace(obstacle=union.obstacle or name, varying=varying)
            return _activation(kinds)
        if not indexed and not masked and not _is_matrix(varying):
            return _activation(kinds)._replace(gain=(union.params, varying) if name == "mul" else None)
        multiplied = name == "mul" and sum(k.data or k.weight for k in kinds) > 1  # not by a constant
        gain = (union.params, varying) if multiplied or any(k.gain for k in kinds) else None
        # There is no axis of examples. (A vector that is looked up is an embedding.)
        whole = masked and varying == everywhere(out) and not (indexed and (_places(eqn) or not _is_matrix(varying)))
        masked = union.masked or (whole and all(k.static or k.masked for k in kinds if k.weight))
        return union._replace(varying=varying, gain=gain, unmirrored="data", masked=masked)
    if not follows:
        return union._replace(obstacle=union.obstacle or name, varying=varying)
    plain = union.plain and name not in {"mul", "div", "neg", "broadcast_in_dim", "tile", *compat.WRITTEN}
    if name in {"broadcast_in_dim", "tile"}:
        plain = union.plain and math.prod(out.shape) == math.prod(eqn.invars[0].aval.shape)
    unmirrored = union.unmirrored or (name if name in compat.AFFINE else None)
    return union._replace(varying=varying, plain=plain, unmirrored=unmirrored)


def join(a: Kind, b: Kind, varying: tuple[bool, ...], name: str) -> Kind:
    """The kind of a value that may be either (a loop's carry, a branch's result)."""
    a, b = _outside(a), _outside(b)
    if a == b:
        return a
    union = _union([a, b])
    active = [k.copied for k in (a, b) if k.active and not k.synaptic]
    copied = tuple(all(r) for r in zip(*active, strict=True)) if all(active) else ()
    if not union.weight or (union.data and not _is_matrix(varying)):
        return Kind(data=union.data, active=union.active, copied=copied)
    return union._replace(plain=False, unmirrored=union.unmirrored or name, varying=varying, copied=copied)


def _outside(kind: Kind) -> Kind:
    """A kind beyond a loop's or a branch's border: what it has just come from is forgotten."""
    return kind._replace(gain=None, product=None, sources=(), fans=())


def settle(kinds: Sequence[Kind]) -> None:
    """What fans out here goes where nothing can show it to be a gain."""
    for kind in kinds:
        for fan in kind.fans:
            fan.product.pending &= fan.gain


class Analyser:
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
                step, outs = self.fan_out(step, bind, operands, outs, lengths)
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
            kinds = [k._replace(sources=_sources(eqn, kinds, i)) if k.active else k for i, k in enumerate(kinds)]
            inner = self.plan(compat.inner_jaxpr(eqn), kinds, lengths)
            return Step(eqn, "remat" if name in compat.REMAT else "inline", None, (inner,)), inner.outputs
        if name == "scan":
            return self.scan(eqn, kinds, lengths)
        if name == "cond":
            return self.cond(eqn, kinds, lengths)
        if name == "shard_map":
            return self.shard_map(eqn, kinds, lengths)
        if name in compat.BILINEAR:
            return self.bilinear(eqn, bind, kinds, lengths)
        weights = [k for k in kinds if k.weight]
        if name == "reduce_sum" and kinds[0].gain and any(kinds[0].gain[1][a] for a in eqn.params["axes"]):
            # x * w, then a sum along w: a projection written by hand.
            params = kinds[0].gain[0]
            kind = Kind(params, varying=everywhere(eqn.invars[0].aval))
            product = Product(eqn, bind, 0, [kind, _activation(kinds)], "mul, then reduce_sum", lengths)
            product.needs_feedback = True
            return Step(eqn, "bind", bind, (), product), [_activation(kinds)] * count
        if compat.has_jaxpr(eqn):
            return self.opaque(eqn, bind, kinds, lengths)
        if not weights:
            out = _activation(kinds)
            if name in compat.LAYOUT:
                out = out._replace(sources=_sources(eqn, kinds, 0))
                if kinds[0].gain:
                    out = out._replace(gain=(kinds[0].gain[0], _layout_varying(eqn, kinds[0].gain[1])))
                if eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape and name not in {"transpose", "rev"}:
                    out = out._replace(product=kinds[0].product)
            if name == "concatenate":
                parts = [_sources(eqn, kinds, i) for i, k in enumerate(kinds) if k.active]
                out = out._replace(sources=tuple(s for s in parts[0] if all(s in other for other in parts)))
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
        if not union.data or (union.masked and any(not k.data and not k.weight for k in kinds)):
            # A map of weights alone, or of one that data has masked. With a constant it is linear, but it mixes elements.
            reason = f"{name} of two parameters" if len(weights) == 2 else f"{name} with a constant array"
            out = union._replace(obstacle=union.obstacle or reason, varying=everywhere(eqn.outvars[0].aval))
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

    def fan_out(
        self, step: Step, bind: Bind, kinds: list[Kind], outs: list[Kind], lengths: tuple[int, ...]
    ) -> tuple[Step, list[Kind]]:
        """Finds the weights through which a neuron's activity fans out to several: w_k x, x a copy for each k.

        The error of x is the sum over k of w_k delta_k, whatever comes then, unless that is another activation y_k: for
        w_k x y_k is a gain of x y_k (a normalization's, say), and W x y a projection's output under one; and so is
        w_k x y_k + (w_k x z + b_k), of x (y_k + z).
        """
        eqn, name = step.eqn, step.eqn.primitive.name
        if name == "optimization_barrier":
            return step, [o._replace(copied=k.copied, fans=k.fans) for o, k in zip(outs, kinds, strict=True)]
        if not any(k.active for k in outs):  # no error comes back
            return step, outs
        # What a projection makes are neurons of their own.
        copied = () if step.product else _copied(eqn, kinds, eqn.outvars[0].aval.shape)
        among = lambda along: tuple(map(all, zip(copied, along, strict=False)))
        fans: list[Fan] = []
        # In a sum, place by place, a gain shows the same weight to be one; anything else may bring it to another neuron.
        adds = name in compat.AFFINE - compat.ADDED
        gains = {(fan.product, fan.moves) for k in kinds for fan in k.fans if fan.gain and adds}
        alone = sum(k.active and not k.synaptic for k in kinds) == 1
        for i, kind in enumerate(kinds):
            for fan in kind.fans:
                product = fan.product
                if fan.gain or (product, fan.moves) in gains:
                    if adds or name in {"neg", "convert_element_type"}:
                        fans.append(Fan(product, (), moves=fan.moves, gain=True))
                elif name in compat.LAYOUT and any(copied):
                    along, varying = (_layout_varying(eqn, axes) for axes in (fan.along, fan.varying))
                    moves = (*fan.moves, (name, str(eqn.params))) if name != "convert_element_type" else fan.moves
                    fans.append(fan._replace(along=along, varying=varying, moves=moves))
                elif name == "neg" or (adds and alone):
                    fans.append(fan._replace(shifted=fan.shifted or name != "neg"))
                elif not fan.shifted and (name == "mul" or (name == "div" and i == 0)):
                    # The other's own copies: of what it is, and by its axes of one.
                    shape = eqn.invars[1 - i].aval.shape or (1,) * len(fan.varying)
                    again = kinds[1 - i].copied or (False,) * len(shape)
                    shared = [c or n == 1 for c, n in zip(again, shape, strict=True)]
                    if any(among(fan.along)):
                        fans.append(fan)
                    elif not any(map(all, zip(shared, fan.varying, strict=False))):
                        fans.append(Fan(product, (), moves=fan.moves, gain=True))
                elif step.action == "product" and step.product is not None and step.product.weight == i:
                    inputs, size = step.product.axes()[1], eqn.invars[i].aval.shape
                    product.pending &= all(kind.copied[a] or size[a] == 1 for a in inputs)
                else:
                    product.pending = False
        if name in compat.MULTIPLIED and any(copied):
            for i, kind in enumerate(kinds):
                along = _elementwise_varying(eqn, [k if j == i else CONSTANT for j, k in enumerate(kinds)])
                if kind.synaptic and any(among(along)):
                    others = [kind if j == i else _activation([k]) for j, k in enumerate(kinds)]
                    product = Product(eqn, bind, i, others, f"{name} by copies of an activation", lengths)
                    product.pending = True
                    step = step._replace(product=product)
                    fans.append(Fan(product, among(along), along))
        for i, out in enumerate(outs):
            if out.active:
                again = copied if i == 0 or not any(copied) else _copied(eqn, kinds, eqn.outvars[i].aval.shape)
                outs[i] = out._replace(copied=again, fans=tuple(fans))
        return step, outs

    def note_uses(self, step: Step, kinds: list[Kind], outs: list[Kind]) -> None:
        """A weight may be laid out anew and multiply an activation; any other use adds a gradient that B has not."""
        for i, kind in enumerate(kinds):
            multiplies = step.action == "product" and step.product is not None and step.product.weight == i
            if kind.weight and not multiplies and not (step.action == "follow" and all(k.static for k in outs)):
                self.shared |= kind.params

    def note_joined(self, kinds: Sequence[Kind], joined: Sequence[Kind]) -> None:
        """A weight that a loop or a branch makes an activation (an initial state) has a use of its own there."""
        for kind, out in zip(kinds, joined, strict=True):
            if kind.weight and not out.static:
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
            settle(inner.outputs)
            hidden = sorted(inner.products(), key=lambda p: p.obstacle is None)
            outs = [k._replace(obstacle=k.obstacle or name) if k.weight else k for k in inner.outputs]
            if not hidden:
                return step, outs
            weights = [i for i in weights if kinds[i].params & hidden[0].params] or weights
        elif not any(k.data for k in kinds):
            union = _union(kinds)
            return step, [union._replace(obstacle=name, varying=everywhere(v.aval)) for v in eqn.outvars]
        elif name == "while":  # JAX itself has no backward pass through it
            return step, [_activation(kinds)] * count
        else:
            outs = [_activation(kinds)] * count
        product = Product(eqn, bind, weights[0], kinds, name, lengths)
        return step._replace(product=product), outs

    def shard_map(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        """Each device's part of a weight has its part of B; what mirror mode would need is the whole."""
        inner = [
            _outside(k)._replace(unmirrored=(k.unmirrored or "shard_map") if k.weight else None, copied=())
            for k in kinds
        ]
        plan = self.plan(compat.inner_jaxpr(eqn), inner, (*lengths, compat.sharding(eqn.params).devices))
        outs = [k._replace(obstacle=k.obstacle or "shard_map") if k.weight else k for k in plan.outputs]
        settle([*kinds, *outs])
        return Step(eqn, "shard_map", None, (plan,)), [_outside(k)._replace(copied=()) for k in outs]

    def cond(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        plans = tuple(self.plan(branch, kinds[1:], lengths) for branch in eqn.params["branches"])
        outs = plans[0].outputs
        for plan in plans[1:]:
            avals = [v.aval for v in eqn.outvars]
            outs = [join(a, b, everywhere(v), "cond") for a, b, v in zip(outs, plan.outputs, avals, strict=True)]
        if kinds[0].data:
            outs = [k._replace(data=True, unmirrored="cond" if k.weight else None, masked=k.synaptic) for k in outs]
        for plan in plans:
            self.note_joined(plan.outputs, outs)
        outs = [_outside(k) for k in outs]
        for plan in plans:  # what fans out in a branch goes on behind it, as long as there are copies
            for i, kind in enumerate(plan.outputs):
                fans = tuple(f for f in kind.fans if any(map(all, zip(outs[i].copied, f.along, strict=False))))
                settle([kind._replace(fans=tuple(f for f in kind.fans if f not in fans))])
                outs[i] = outs[i]._replace(fans=outs[i].fans + fans)
        return Step(eqn, "cond", None, plans), outs

    def scan(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        jaxpr, _ = compat.open_jaxpr(eqn.params["jaxpr"])
        consts, carries = compat.scan_sizes(eqn.params)
        avals = [v.aval for v in jaxpr.invars]
        inner = list(kinds)
        for i, kind in enumerate(kinds):
            sliced = i >= consts + carries
            varying = kind.varying[1:] if sliced else kind.varying
            stack = (*kind.stack, eqn.params["length"]) if sliced and kind.weight else kind.stack
            copied = kind.copied[1:] if sliced else kind.copied
            inner[i] = _outside(kind)._replace(varying=varying, stack=stack, copied=copied)
        settle(kinds)
        lengths = (*lengths, eqn.params["length"])
        while True:
            plan = self.plan(eqn.params["jaxpr"], inner, lengths)
            settle(plan.outputs)
            settled = True
            for c in range(carries):
                i = consts + c
                if jaxpr.outvars[c] is jaxpr.invars[i]:  # carried along unchanged
                    continue
                old = inner[i]
                inner[i] = join(old, plan.outputs[c], everywhere(avals[i]), "scan")
                if inner[i].static:
                    inner[i] = inner[i]._replace(unmirrored="scan")
                settled &= inner[i] == old
            if settled:
                break
        self.note_joined(kinds[consts : consts + carries], inner[consts : consts + carries])
        outs = list(inner[consts : consts + carries])
        for kind in plan.outputs[carries:]:
            varying = (kind.weight, *kind.varying)
            copied = (False, *kind.copied) if kind.copied else ()
            stack = kind.stack[: len(lengths) - 1]
            outs.append(_outside(kind)._replace(varying=varying, stack=stack, copied=copied))
        return Step(eqn, "scan", None, (plan,)), outs
