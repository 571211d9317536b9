"""What every value of a jaxpr is (a constant, an activation, a weight), and what equations make of such values.

Data has touched an activation; a weight is made of parameters alone, or of parameters that data has scaled, shifted or
selected from.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from wmkp.program import compat

Gain = tuple[frozenset[int], tuple[bool, ...]]


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
    gain: Gain | None = None
    product: Any = None  # an activation that is a product's output, untouched
    stack: tuple[int, ...] = ()  # of a weight inside scans: the lengths of those along which it changes
    # Of an activation: along which axes it is the same active values over again. What weights multiply such copies by is a
    # projection written by hand: the error of a value copied is the sum of its copies' errors, each times its weight.
    copied: tuple[bool, ...] = ()
    # Of an activation that was cut or laid out anew: from which variables, and how many elements each has.
    sources: tuple[tuple[Any, int], ...] = ()
    # The weights (``copies.Fan``) that copies have just been multiplied by; what comes next may show them to be gains.
    fans: tuple[Any, ...] = ()
    # Of a weight: what other parameters have scaled it as a gain (``gain_operand``), and along which axes each did.
    scaled: tuple[tuple[bool, ...], ...] = ()

    # Of a weight: a product of parameters (which) with others of them, so that the errors of some go back through the rest.
    joint: str | None = None

    # Of what is no weight: the parameters whose synapses a comparison or a cast made it of, without a gradient.
    made_of: frozenset[int] = frozenset()

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
CAST = "a comparison or cast"  # the obstacle of values that were made of synapses so, and joined to a weight


def union_of(kinds: Sequence[Kind]) -> Kind:
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
        joint=next((k.joint for k in kinds if k.joint), None),
        made_of=frozenset().union(*(k.made_of for k in kinds)),
    )


def activation(kinds: Sequence[Kind]) -> Kind:
    return Kind(data=True, active=any(k.active for k in kinds))


def everywhere(aval: Any) -> tuple[bool, ...]:
    return tuple(size > 1 for size in getattr(aval, "shape", ()))


def layout_varying(eqn: Any, varying: tuple[bool, ...]) -> tuple[bool, ...]:
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
    if name == "unstack":
        return tuple(v for a, v in enumerate(varying) if a != eqn.params["axis"])
    if name == "reshape":
        return _reshape_varying(eqn.invars[0].aval.shape, shape, varying)
    if shape == eqn.invars[0].aval.shape:
        return varying
    if name in {"slice", "split"}:
        return tuple(v and size > 1 for v, size in zip(varying, shape, strict=True))
    return everywhere(eqn.outvars[0].aval)


def _reshape_varying(old: tuple[int, ...], new: tuple[int, ...], varying: tuple[bool, ...]) -> tuple[bool, ...]:
    """Axes are split or merged in runs of equal size; a run that varies anywhere varies along all that it becomes."""
    if 0 in old:  # of nothing, runs cannot be told apart
        return tuple(size > 1 for size in new)
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


def _places(eqn: Any) -> bool:
    """Whether an index has axes of its own: one lookup for each example."""
    if eqn.primitive.name == "dynamic_slice":
        return False
    offset = eqn.params["dimension_numbers"].offset_dims
    return any(size > 1 and a not in offset for a, size in enumerate(eqn.outvars[0].aval.shape))


def elementwise_varying(eqn: Any, kinds: Sequence[Kind]) -> tuple[bool, ...]:
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


def is_matrix_operand(eqn: Any, operand: int, varying: tuple[bool, ...]) -> bool:
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


def scaled_by_data(eqn: Any, kinds: Sequence[Kind]) -> int | None:
    """Which operand of a dot_general is a matrix that data, which no parameter enters, scales element by element."""
    if eqn.primitive.name == "dot_general":
        _, batch = eqn.params["dimension_numbers"]
        for i, (weight, by) in enumerate(zip(kinds, reversed(kinds), strict=True)):
            matrix = weight.synaptic and not weight.obstacle and _is_matrix(weight.varying)
            alone = by.data and not by.active and len(batch[0]) == eqn.invars[1 - i].aval.ndim
            if matrix and alone:
                return i
    return None


def summed(eqn: Any, kinds: Sequence[Kind]) -> tuple[int, Sequence[int]]:
    """Which operand an equation adds up, and along which of its axes (none, if it does no such thing)."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":  # with a column of constants or data (a matrix of them mixes neurons, and is no sum)
        contract, batch = params["dimension_numbers"]
        for i, column in enumerate(kinds):
            own = set(range(eqn.invars[i].aval.ndim)) - {*contract[i], *batch[i]}
            if not column.active and all(eqn.invars[i].aval.shape[a] == 1 for a in own):
                return 1 - i, contract[1 - i]
    if name == "reduce_sum":
        return 0, params["axes"]
    if name == "reduce" and any(e.primitive.name == "add" for e in compat.open_jaxpr(params["jaxpr"])[0].eqns):
        return 0, params["dimensions"]
    if name in compat.SUMMED:
        return 0, [a for a in params["axes"] if isinstance(a, int)]
    if name == "cumsum":
        return 0, [params["axis"]]
    if name == "reduce_window_sum":
        return 0, [a for a, size in enumerate(params["window_dimensions"]) if size > 1]
    if name in compat.ADDED:  # of segments, of what several synapses bring to a neuron
        window = params["dimension_numbers"].update_window_dims
        return 2, [a for a in range(eqn.invars[2].aval.ndim) if a not in window]
    return 0, []


def carried_gain(eqn: Any, kinds: Sequence[Kind]) -> Gain | None:
    """The gain of an activity that was just multiplied by one, laid out anew or scaled, masked, padded or looked up by what
    no parameter enters."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    gain, *others = (k.gain for k in kinds if k.active)
    if gain is None or others:
        return None
    if name in compat.LAYOUT:
        return gain[0], layout_varying(eqn, gain[1])
    if name in {"neg", "mul", "div", "select_n", "pad", "dynamic_slice"} and len(gain[1]) == out.ndim:
        return gain
    if name == "gather" and not kinds[1].data:  # by constants
        return gain[0], _gathered_varying(eqn, gain[1])
    return None


def _gathered_varying(eqn: Any, varying: tuple[bool, ...]) -> tuple[bool, ...]:
    """Along which axes a gain varies after a lookup."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    gone = [*numbers.collapsed_slice_dims, *numbers.operand_batching_dims]
    chosen = any(varying[a] for a in numbers.start_index_map)
    kept = dict(zip(numbers.offset_dims, [a for a in range(len(varying)) if a not in gone], strict=True))
    return tuple(size > 1 and (varying[kept[a]] if a in kept else chosen) for a, size in enumerate(shape))


def same_along(kind: Kind, shape: tuple[int, ...], rank: int) -> tuple[bool, ...]:
    """Along which axes of a result of this rank an operand of an elementwise equation is the same value over again."""
    copied = kind.copied or (False,) * rank
    return tuple(c or size == 1 for c, size in zip(copied, shape or (1,) * rank, strict=True))


def gain_operand(eqn: Any, kinds: Sequence[Kind]) -> int | None:
    """Which operand is a gain of the other, a weight: one factor for all of it, or one for each neuron.

    Such a factor scales the neuron's error as it scales its activity, and says nothing of single synapses: the gain over
    the norm of a weight norm, a spectral norm's largest singular value. A norm of W's is B's own norm beside B; any
    other gain is the same for both.
    """
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    for gain in {"mul": (0, 1), "div": (1,)}.get(name, ()):
        weight, factor, aval = kinds[1 - gain], kinds[gain], eqn.invars[gain].aval
        if not weight.weight or weight.obstacle or eqn.invars[1 - gain].aval.shape != shape:
            continue
        if factor.static and weight.static:
            # (Of a neuron with one synapse the gain would be that synapse.)
            if sum(factor.varying) < min(2, sum(weight.varying)):
                return gain
        elif factor.data and not factor.weight and same_along(factor, aval.shape, len(shape)).count(False) < 2:
            return gain
    return None


def _scaled(eqn: Any, kinds: Sequence[Kind]) -> tuple[tuple[bool, ...], ...]:
    """The gains of a weight's operands, laid out as the result."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    moved = []
    for kind, var in zip(kinds, eqn.invars, strict=True):
        for axes in kind.scaled:
            if name in {"broadcast_in_dim", "transpose", "squeeze", "reshape"}:
                axes = layout_varying(eqn, axes)
            elif len(var.aval.shape) != out.ndim:
                axes = everywhere(out)
            elif name == "concatenate":  # each part has its own
                axes = tuple(varies or a == eqn.params["dimension"] for a, varies in enumerate(axes))
            moved.append(axes)
    return tuple(dict.fromkeys(moved))


def _cast_from(name: str, kinds: Sequence[Kind]) -> frozenset[int]:
    """The parameters of which values come in that have no gradient (a mask may select from a weight, or multiply it)."""
    return frozenset().union(*(k.made_of for i, k in enumerate(kinds) if name != "select_n" or i > 0))


def _follows(name: str, kinds: Sequence[Kind]) -> bool:
    """Whether B can go where its weight goes: the equation is linear (or affine) in the weights among its operands."""
    if any(k.obstacle for k in kinds) or (_cast_from(name, kinds) and name not in {"mul", "div"}):
        return False
    weights = [i for i, k in enumerate(kinds) if k.weight]
    if name in compat.LAYOUT | compat.AFFINE | compat.WRITTEN or name in {"concatenate", "stack", "neg", "select_n"}:
        return True
    if name in compat.INDEXED or name == "pad" or name == "div":
        return weights == [0]
    return name == "mul" and len(weights) == 1


def weight_kind(eqn: Any, kinds: Sequence[Kind], custom: bool = False) -> Kind:
    """The kind of an equation's results where a weight enters (and nothing multiplies it with an activation).

    Inside a custom derivative (``custom``) an error may come back through what has none of its own.
    """
    name = compat.primitive_name(eqn)
    out = eqn.outvars[0].aval
    union = union_of(kinds)._replace(made_of=frozenset())
    follows, obstacle = _follows(name, kinds), name
    if _cast_from(name, kinds):
        obstacle = CAST
    # An index or a comparison has no gradient; a complex weight is not followed.
    if not jnp.issubdtype(out.dtype, jnp.floating):
        if not jnp.issubdtype(out.dtype, jnp.complexfloating) and not custom:
            # (What mirror mode cannot work out it cannot mask or select a weight by.)
            unmirrored = None if union.data else union.unmirrored or union.obstacle
            varies = layout_varying(eqn, kinds[0].varying) if name in compat.LAYOUT else elementwise_varying(eqn, kinds)
            synapses = _is_matrix(varies) and all(k.synaptic or not k.active for k in kinds)
            made_of = union.params if synapses else frozenset()
            return Kind(data=union.data, unmirrored=unmirrored, made_of=made_of)
        follows = False
    if name == "stop_gradient":
        union = union._replace(joint=None)
    factor = gain_operand(eqn, kinds)
    if factor is not None and not union.data and not kinds[factor].joint:
        return kinds[1 - factor]._replace(scaled=(*_scaled(eqn, kinds), kinds[factor].varying or (False,) * out.ndim))
    scaled = _scaled(eqn, kinds)
    if follows and any(sum(axes) > 1 for axes in scaled):  # laid out anew, it is no neuron's any more
        follows, obstacle = False, f"{name} of a weight with gains"
    if name == "stop_gradient" and union.data and not union.masked and not custom:
        return Kind(data=True, made_of=union.params if union.obstacle == CAST else frozenset())
    if name in compat.LAYOUT:
        varying = layout_varying(eqn, kinds[0].varying)
    elif name in compat.INDEXED:
        varying = everywhere(out)
    elif name in compat.ADDED and not kinds[0].weight and not _is_matrix(kinds[2].varying):
        # Biases of some neurons; or, on constants alone, synapses by their places.
        varying = (False,) * out.ndim if kinds[0].data else everywhere(out)
    else:
        varying = elementwise_varying(eqn, kinds)
    if union.data:
        # A bias, gain or threshold beside an activation leaves an activation; a matrix that data scales, masks, shifts
        # or selects from may yet multiply another activation, and must not do so unseen.
        indexed = name in compat.INDEXED and _is_matrix(kinds[0].varying)
        # With no activation beside it, a readout of one neuron (or one filter) that data masks, or shifts whole (noise), is a
        # weight still.
        shifted = name in compat.AFFINE and any(k.data and not k.weight for k in kinds)
        synapses = any(varying) and not any(k.active and not k.weight for k in kinds)
        masked = synapses and (not shifted or varying == everywhere(out))
        # There is no axis of examples.
        whole = synapses and not shifted and varying == everywhere(out) and all(k.synaptic for k in kinds if k.weight)
        carried = next((k.gain for k in kinds if k.gain and k.weight), None)
        if carried and name in compat.LAYOUT:
            carried = carried[0], layout_varying(eqn, carried[1])
        elif carried:  # (A vector with its biases added is a norm's.)
            axes = carried[1] if len(carried[1]) == out.ndim else varying
            alone = sum(k.data or k.weight for k in kinds) == 1
            carried = (carried[0], axes) if alone or _is_matrix(axes) else None
        if not follows:
            # What is made of a masked matrix is no activity of neurons: it would carry W's own transpose unseen.
            local = name in compat.LOCAL and (union.obstacle or any(k.static for k in kinds))
            if (_is_matrix(varying) and local) or (any(varying) and union.masked):
                if name in {"mul", "div"} and any(k.static for k in kinds):
                    ours = [k if k.static else CONSTANT for k in kinds]
                    carried = union_of(ours).params, elementwise_varying(eqn, ours)
                obstacle, masked = union.obstacle or obstacle, union.masked or whole
                return union._replace(obstacle=obstacle, varying=varying, gain=carried, masked=masked)
            if name in compat.LAYOUT:
                return activation(kinds)._replace(gain=carried)
            if name in {"mul", "div"} and any(k.static for k in kinds):
                return activation(kinds)._replace(gain=(union.params, varying))
            return activation(kinds)
        if not indexed and not masked and not _is_matrix(varying):
            return activation(kinds)._replace(gain=(union.params, varying) if name == "mul" else None)
        by = carried
        if name == "mul" and sum(k.data or k.weight for k in kinds) > 1:  # not by a constant
            # An activity that a parameter was added to (a learned position) may be masked, and scaled by one value for all.
            others = [
                same_along(kind, v.aval.shape, out.ndim)
                for kind, v in zip(kinds, eqn.invars, strict=True)
                if kind.active and not kind.weight
            ]
            if any(k.synaptic for k in kinds):
                by = union.params, varying
            elif others:
                by = union.params, tuple(v and not all(c) for v, *c in zip(varying, *others, strict=True))
        # (A vector that is looked up is an embedding.)
        masked = union.masked or (whole and not (indexed and (_places(eqn) or not _is_matrix(varying))))
        unmirrored = union.unmirrored or (name if name in compat.EXCHANGED else None)
        if factor is None and name not in compat.LAYOUT:
            unmirrored = unmirrored or "data"
        return union._replace(varying=varying, gain=by, unmirrored=unmirrored, masked=masked, scaled=scaled)
    if not follows:
        return union._replace(obstacle=union.obstacle or obstacle, varying=varying)
    plain = union.plain and name not in {"mul", "div", "neg", "broadcast_in_dim", "tile", *compat.WRITTEN}
    if name in {"broadcast_in_dim", "tile"}:
        plain = union.plain and math.prod(out.shape) == math.prod(eqn.invars[0].aval.shape)
    unmirrored = union.unmirrored or (name if name in compat.AFFINE | compat.EXCHANGED else None)
    return union._replace(varying=varying, plain=plain, unmirrored=unmirrored, scaled=scaled)


def join(a: Kind, b: Kind, varying: tuple[bool, ...], name: str) -> Kind:
    """The kind of a value that may be either (a loop's carry, a branch's result)."""
    a, b = outside(a), outside(b)
    if a == b:
        return a
    union = union_of([a, b])
    # Copies in one turn, or one branch, are copies there, whatever comes in the others.
    active = [k.copied for k in (a, b) if k.copied and k.active and not k.synaptic]
    copied = tuple(any(r) for r in zip(*active, strict=True))
    if not union.weight or (union.data and not _is_matrix(varying)):
        return Kind(data=union.data, active=union.active, copied=copied, made_of=union.made_of)
    scaled = tuple(dict.fromkeys((*a.scaled, *b.scaled)))
    return union._replace(
        plain=False, unmirrored=union.unmirrored or name, varying=varying, copied=copied, scaled=scaled
    )


def outside(kind: Kind) -> Kind:
    """A kind beyond a loop's or a branch's border: what it has just come from is forgotten."""
    return kind._replace(gain=None, product=None, sources=(), fans=())
