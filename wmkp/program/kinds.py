"""What every value of a jaxpr is (a constant, data, an activation, a weight), and what an equation makes of such values.

A weight is made of parameters alone, or of parameters that data has scaled, masked, shifted by noise or looked up. An
activation is anything else that depends on a parameter. Where nothing here knows what comes of a weight, it stays a weight
that B cannot follow, so that the first product that needs a B is refused.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from wmkp.program import compat

Gain = tuple[
    frozenset[int], tuple[bool, ...], bool
]  # parameters, axes along which they vary, whether in their own order still


class Kind(NamedTuple):
    """What a value is. ``params``: the parameters (leaf numbers) it is made of *as a weight*; none for the rest."""

    params: frozenset[int] = frozenset()
    data: bool = False  # data, or an activation, has touched it
    noise: bool = False  # all of its data is random numbers
    active: bool = False  # it depends on a parameter, so that an error must reach it
    varying: tuple[bool, ...] | None = None  # along which axes it varies (it is broadcast along the others); None: all
    breadth: int = 0  # of a weight: how many axes longer than one its widest parameter has, as it stands in params
    obstacle: str | None = None  # a weight that B cannot follow: through which primitive
    joint: bool = False  # a product of parameters alone, in which the errors of some would go back through others
    cast: bool = False  # a weight without a gradient: what a comparison or a cast to integers made of one
    unmirrored: str | None = None  # a weight that B can follow, but that mirror mode cannot reach: why
    # Of a weight of which data has made one for each example (a row looked up, a scaled one): how many axes each has.
    per_example: int = 0
    joined: int = (
        0  # an activation that a matrix of parameters was joined to (1), and of which a part was then taken (2)
    )
    within: frozenset[int] = frozenset()  # these parameters
    plain: bool = True  # of a weight: each of its elements is one element of a parameter, unscaled
    stack: tuple[int, ...] = ()  # of a weight inside scans: the lengths of those along which it changes
    gained: tuple[bool, ...] | None = None  # of a weight: the axes along which others have scaled it as gains
    # Of an activation that a weight has just scaled: the parameters, and the axes along which they vary.
    gain: Gain | None = None
    # Of copies of an activation that a weight has just scaled: the product by hand that they are, and the axes of the copies,
    # unless they turn out to scale another activation (a normalization's deviation meets its gains first). Of a weight that
    # an activation has scaled: the same, unless it turns out to be the weight of a product.
    fan: Any = None
    product: Any = None  # of an activation that is a product's output, untouched: the product

    @property
    def weight(self) -> bool:
        return bool(self.params)

    @property
    def static(self) -> bool:
        """A weight that no data has touched."""
        return bool(self.params) and not self.data

    @property
    def activity(self) -> bool:
        """An activation that is no weight."""
        return self.active and not self.params


CONSTANT = Kind()
CAST = "a comparison or cast"


def activation(kinds: Sequence[Kind]) -> Kind:
    return Kind(data=True, active=any(k.active for k in kinds))


def union_of(kinds: Sequence[Kind]) -> Kind:
    """What operands come to together, whatever the equation does."""
    weights = [k for k in kinds if k.weight]
    touched = [k for k in kinds if k.data]
    return Kind(
        params=frozenset().union(*(k.params for k in weights)),
        data=bool(touched),
        noise=bool(touched) and all(k.noise for k in touched),
        active=any(k.active for k in kinds),
        breadth=max((k.breadth for k in weights), default=0),
        obstacle=next((k.obstacle for k in weights if k.obstacle), None),
        joint=any(k.joint for k in weights),
        unmirrored=next((k.unmirrored for k in kinds if k.unmirrored), None),
        per_example=max((k.per_example for k in weights), default=0),
        plain=all(k.plain for k in weights),
        stack=max((k.stack for k in weights), key=len, default=()),
    )


def everywhere(aval: Any) -> tuple[bool, ...]:
    return tuple(size > 1 for size in getattr(aval, "shape", ()))


def varies(kind: Kind, aval: Any) -> tuple[bool, ...]:
    """Along which axes a value of this kind varies."""
    return everywhere(aval) if kind.varying is None else kind.varying


# --- along which axes a result varies ----------------------------------------------------------------------------------


def result_varying(eqn: Any, kinds: Sequence[Kind], result: int = 0) -> tuple[bool, ...]:
    """Along which axes a result varies by the operands of these kinds."""
    name, out = eqn.primitive.name, eqn.outvars[result].aval
    own = [varies(k, v.aval) for k, v in zip(kinds, eqn.invars, strict=True)]
    if len(kinds) == 1 and name in compat.LAYOUT | compat.SUMMED:
        return layout_varying(eqn, own[0], result)
    if name == "reduce_sum":
        return tuple(v for a, v in enumerate(own[0]) if a not in eqn.params["axes"])
    if name in {"dot_general", "conv_general_dilated"}:
        return _product_varying(eqn, own)
    if name not in compat.ELEMENTWISE:
        return everywhere(out)
    rank = len(getattr(out, "shape", ()))
    shapes = [v.aval.shape for v in eqn.invars]
    if any(s and (len(s) != rank or any(a not in (1, b) for a, b in zip(s, out.shape, strict=True))) for s in shapes):
        return everywhere(out)
    found = [v for v, s in zip(own, shapes, strict=True) if s] or [(False,) * rank]
    return tuple(any(axis) for axis in zip(*found, strict=True))


def layout_varying(eqn: Any, varying: tuple[bool, ...], result: int = 0) -> tuple[bool, ...]:
    """Along which axes a value still varies after a layout change."""
    shape, name = eqn.outvars[result].aval.shape, eqn.primitive.name
    if name == "broadcast_in_dim":
        moved = [False] * len(shape)
        for axis, out in enumerate(eqn.params["broadcast_dimensions"]):
            moved[out] = varying[axis]
        return tuple(moved)
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
    return everywhere(eqn.outvars[result].aval)


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


def _product_varying(eqn: Any, own: Sequence[tuple[bool, ...]]) -> tuple[bool, ...]:
    if eqn.primitive.name == "conv_general_dilated":
        numbers, out = eqn.params["dimension_numbers"], [False] * eqn.outvars[0].aval.ndim
        out[numbers.out_spec[0]] = own[0][numbers.lhs_spec[0]]
        out[numbers.out_spec[1]] = own[1][numbers.rhs_spec[0]]
        for axis in numbers.out_spec[2:]:
            out[axis] = any(own[0])  # (at the edges a padded constant varies, too)
        return tuple(out)
    contract, batch = eqn.params["dimension_numbers"]
    kept = [a or b for a, b in zip(*([own[i][a] for a in batch[i]] for i in (0, 1)), strict=True)]
    for i in (0, 1):
        kept += [v for a, v in enumerate(own[i]) if a not in contract[i] and a not in batch[i]]
    return tuple(kept)


# --- products ----------------------------------------------------------------------------------------------------------


def is_elementwise(eqn: Any) -> bool:
    """Whether an equation multiplies element by element: a ``dot_general`` that sums over nothing, one operand's axes all shared."""
    if eqn.primitive.name != "dot_general":
        return False
    contract, batch = eqn.params["dimension_numbers"]
    return not contract[0] and any(len(batch[i]) == eqn.invars[i].aval.ndim for i in (0, 1))


def is_matrix_operand(eqn: Any, operand: int, varying: tuple[bool, ...]) -> bool:
    """Whether a weight varies both along the axes that a product sums over and along those that remain its own.

    (Of a readout of one neuron none remains that could vary; a filter sums along its taps and inputs.)
    """
    if eqn.primitive.name != "dot_general":
        return operand == 1 and any(varying[a] for a in eqn.params["dimension_numbers"].rhs_spec[1:])
    contract, batch = eqn.params["dimension_numbers"]
    inputs, groups = contract[operand], batch[operand]
    outputs = [a for a in range(len(varying)) if a not in inputs and a not in groups]
    one = all(eqn.invars[operand].aval.shape[a] == 1 for a in outputs) and not any(varying[a] for a in groups)
    return any(varying[a] for a in inputs) and (one or any(varying[a] for a in outputs))


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
    """The gain of an activation that a weight just scaled, laid out anew or scaled, masked or padded by what no parameter enters."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    gains = [k.gain for k in kinds if k.active]
    scaled = next((k for k in kinds if k.gain), None)
    if scaled is None or (len(gains) > 1 and not (scaled.fan and name == "mul")):
        return None
    gain = scaled.gain
    assert gain is not None
    if len(gains) > 1:  # its copies scale another activation: a gain, whatever is summed then
        return gain[0], (False,) * out.ndim, gain[2]
    if name in compat.LAYOUT:
        return gain[0], layout_varying(eqn, gain[1]), gain[2] and name in compat.ORDERED
    if name in {"neg", "mul", "div", "select_n", "pad"} and len(gain[1]) == out.ndim:
        return (*gain[:2], gain[2] and name != "pad")
    if name in {"gather", "dynamic_slice"} and not kinds[1].active:  # what is looked up anew may lie anywhere
        return gain[0], _gathered_varying(eqn, gain[1]) if name == "gather" else gain[1], False
    return None


def _gathered_varying(eqn: Any, varying: tuple[bool, ...]) -> tuple[bool, ...]:
    """Along which axes a gain varies after a lookup."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    gone = [*numbers.collapsed_slice_dims, *numbers.operand_batching_dims]
    chosen = any(varying[a] for a in numbers.start_index_map)
    kept = dict(zip(numbers.offset_dims, [a for a in range(len(varying)) if a not in gone], strict=True))
    return tuple(size > 1 and (varying[kept[a]] if a in kept else chosen) for a, size in enumerate(shape))


# --- what comes of a weight --------------------------------------------------------------------------------------------


def gain_operand(eqn: Any, kinds: Sequence[Kind]) -> int | None:
    """Which operand is a gain of the other, a weight: one factor for all of it, or one for each neuron.

    Such a factor scales the neuron's error as it scales its activity, and says nothing of single synapses: the gain over
    the norm of a weight norm, a spectral norm's largest singular value. A norm of W's is B's own norm beside B; any
    other gain is the same for both.
    """
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    for gain in {"mul": (0, 1), "div": (1,)}.get(name, ()):
        weight, factor, aval = kinds[1 - gain], kinds[gain], eqn.invars[gain].aval
        if not weight.weight or weight.obstacle or len(eqn.invars[1 - gain].aval.shape) != len(shape):
            continue
        axes = sum(varies(factor, aval))
        if factor.weight and not factor.per_example and (weight.static or factor.data):
            # (Of a neuron with one synapse the gain would be that synapse.)
            if not (factor.cast or factor.joint) and axes < min(2, sum(varies(weight, eqn.invars[1 - gain].aval))):
                return gain
        elif factor.data and not factor.weight and axes < 2 and weight.breadth > 1:
            return gain
    return None


def _follows(eqn: Any, kinds: Sequence[Kind]) -> bool:
    """Whether B can go where its weight goes: the equation is linear (or affine) in the weights among its operands."""
    name = eqn.primitive.name
    weights = [i for i, k in enumerate(kinds) if k.weight]
    masks = {0} if name == "select_n" else {0, 1} if name == "mul" else {1} if name == "div" else set()
    if any(kinds[i].obstacle and not (kinds[i].cast and i in masks and len(weights) > 1) for i in weights):
        return False
    weights = [i for i in weights if not kinds[i].cast]
    if name in compat.LAYOUT | compat.AFFINE | compat.WRITTEN | compat.SUMMED:
        return True
    if name in {"concatenate", "stack", "neg", "select_n", "reduce_sum", "cumsum", "reduce_window_sum"}:
        return True
    if name in compat.INDEXED or name in {"pad", "div"}:
        return weights == [0]
    return name in {"mul", "dot_general", "conv_general_dilated"} and len(weights) == 1


def weight_kind(eqn: Any, kinds: Sequence[Kind], result: int = 0) -> Kind:
    """The kind of an equation's result where weights meet other weights, constants and data, and no activation."""
    name, out = compat.primitive_name(eqn), eqn.outvars[result].aval
    union = union_of(kinds)
    factor = gain_operand(eqn, kinds)
    if factor is not None:
        main = kinds[1 - factor]
        axes = zip(main.gained or (False,) * out.ndim, varies(kinds[factor], eqn.invars[factor].aval), strict=False)
        gained = tuple(a or b for a, b in axes) or (False,) * out.ndim
        repeated = eqn.invars[1 - factor].aval.shape != out.shape
        return main._replace(
            gained=gained,
            data=main.data or kinds[factor].data,
            varying=result_varying(eqn, kinds),
            per_example=main.per_example or (main.breadth if repeated else 0),
            unmirrored=main.unmirrored or ("data" if repeated else None),
        )
    only = [
        k if k.weight or not k.data else Kind(varying=(False,) * v.aval.ndim)
        for k, v in zip(kinds, eqn.invars, strict=True)
    ]
    varying = result_varying(eqn, only, result)
    if not jnp.issubdtype(out.dtype, jnp.floating):
        if not jnp.issubdtype(out.dtype, jnp.complexfloating):  # an index or a comparison has no gradient
            return union._replace(varying=varying, obstacle=CAST, cast=True)
        return union._replace(varying=varying, obstacle=union.obstacle or name)
    breadth = union.breadth
    if name in {"dot_general", "conv_general_dilated"} and _by_uniform(eqn, kinds):
        breadth = sum(varying)  # a layer's answer to a uniform constant is a bias of its outputs
    looked_up = name in compat.INDEXED and any(k.data for k in kinds[1:])
    gained = _gained(eqn, kinds, result)
    split = gained is not None and sum(gained) > max(sum(k.gained or ()) for k in kinds)  # no neuron's any more
    kind = union._replace(varying=varying, breadth=breadth, gained=gained)
    if name == "stop_gradient":
        kind = kind._replace(joint=False)
    if name in compat.LAYOUT and kinds[0].cast:
        kind = kind._replace(cast=True)
    cast = any(k.cast for k in kinds)
    if not _follows(eqn, kinds) or split:
        reason = CAST if cast else f"{name} of a weight with gains" if split else name
        kind = kind._replace(obstacle=union.obstacle or reason)
    elif cast:  # masked or chosen by its own size
        kind = kind._replace(obstacle=None, unmirrored=kind.unmirrored or CAST)
    if union.data:
        return _touched(eqn, kinds, kind, looked_up)
    plain = union.plain and name not in {"mul", "div", "neg", *compat.WRITTEN}
    if name in {"broadcast_in_dim", "tile"}:
        plain = union.plain and math.prod(out.shape) == math.prod(eqn.invars[0].aval.shape)
    mixes = name in compat.AFFINE | compat.EXCHANGED | MIXING
    return kind._replace(plain=plain, unmirrored=kind.unmirrored or (name if mixes else None))


# Linear in a weight, but its elements are mixed: mirror mode cannot undo them.
MIXING = compat.SUMMED | {"reduce_sum", "cumsum", "reduce_window_sum", "dot_general", "conv_general_dilated"}


def _by_uniform(eqn: Any, kinds: Sequence[Kind]) -> bool:
    """Whether a weight meets a constant that is the same everywhere (a state of zeros), or an activity of parameters alone."""
    others = [(k, v) for k, v in zip(kinds, eqn.invars, strict=True) if not k.weight]
    return len(others) == 1 and not any(varies(others[0][0], others[0][1].aval))


def _gained(eqn: Any, kinds: Sequence[Kind], result: int) -> tuple[bool, ...] | None:
    """The gains of a weight's operands, laid out as the result."""
    if all(k.gained is None for k in kinds):
        return None
    own = [k.gained or (False,) * v.aval.ndim for k, v in zip(kinds, eqn.invars, strict=True)]
    name = eqn.primitive.name
    moved = result_varying(eqn, [Kind(varying=v) for v in own], result)
    if name in compat.GROWN | compat.INDEXED | compat.EXCHANGED:
        same = eqn.outvars[result].aval.ndim == eqn.invars[0].aval.ndim
        along = {eqn.params["dimension"]} if name == "concatenate" else set()
        axes = [any(v[a] for v in own if len(v) > a) or a in along for a in range(len(moved))]
        moved = tuple(m and v for m, v in zip(moved, axes, strict=True)) if same else moved
    return moved


def _touched(eqn: Any, kinds: Sequence[Kind], kind: Kind, looked_up: bool) -> Kind:
    """What comes of a weight that data touches, or has touched: a weight still, or an activity."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    assert kind.varying is not None
    places = {"select_n": [0], "dynamic_update_slice": range(2, len(kinds))}.get(name, [1] if "scatter" in name else [])
    parts = [k for i, k in enumerate(kinds) if k.data and not k.weight and i not in places]
    ours = [
        k._replace(varying=(False,) * v.aval.ndim) if k.weight else k for k, v in zip(kinds, eqn.invars, strict=True)
    ]
    theirs = result_varying(eqn, ours) if len(kinds) > 1 and not looked_up else (False,) * len(kind.varying)
    spread = any(d and not w for d, w in zip(theirs, kind.varying, strict=True))
    rows = kind.per_example
    if name in compat.AFFINE | compat.JOINED | compat.WRITTEN:
        others = sum(k.weight for k in kinds) > 1 or bool(parts)
        if (parts and spread) or (rows == 1 and others):
            return activation(kinds)  # positions added to data, or to what is looked up
        if parts and not all(k.noise for k in parts):
            return kind._replace(obstacle=kind.obstacle or f"{name} of data", unmirrored="data")
    if spread and not rows and kind.breadth < 2:
        return activation(kinds)  # data, scaled
    if (rows or spread) and name == "reduce_sum":
        return activation(kinds)  # a first layer by hand
    if looked_up and name == "gather":
        numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
        spread = any(size > 1 and a not in numbers.offset_dims for a, size in enumerate(out.shape))
        rows = max(1, kind.breadth - sum(shape[a] > 1 for a in numbers.collapsed_slice_dims)) if spread else 0
    elif spread:
        rows = rows or kind.breadth
    if kind.obstacle and rows == 1:
        return activation(kinds)
    laid_out = name in compat.LAYOUT - compat.EXCHANGED
    reason = None if laid_out else name if name in compat.EXCHANGED else "data"
    return kind._replace(per_example=rows, unmirrored=kind.unmirrored or reason, plain=False)


def join(a: Kind, b: Kind, name: str) -> Kind:
    """The kind of a value that may be either (a loop's carry, a branch's result)."""
    a, b = outside(a), outside(b)
    if a == b:
        return a
    union = union_of([a, b])._replace(plain=False)
    if union.params and all(k.weight or not (k.data or k.active) for k in (a, b)):
        return union._replace(unmirrored=union.unmirrored or name, gained=None)
    if union.params and not any(k.activity for k in (a, b)) and union.breadth > 1 and not union.per_example:
        return union._replace(unmirrored="data", gained=None)
    wide = union.params if name == "cond" and union.breadth > 1 else frozenset()  # it may be the weight itself
    return activation([a, b])._replace(joined=2 if wide else max(a.joined, b.joined), within=a.within | b.within | wide)


def outside(kind: Kind) -> Kind:
    """A kind beyond a loop's or a branch's border, where axes and products are others."""
    return kind._replace(gain=None, product=None, fan=None, varying=None)
