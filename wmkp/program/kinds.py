"""The kind of each value of a jaxpr (constant, data, activation or weight), and how equations change kinds.

A weight is computed from parameters alone, or from parameters that data has scaled, masked, shifted by noise or looked up.
An activation is anything else that depends on a parameter. If an equation is not known here, its result stays a weight that
B cannot follow, so the first product that needs a B is refused.
"""

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from wmkp.program import compat

Axes = tuple[bool, ...]  # one flag for each axis


class Scaled(NamedTuple):
    """An activation that a weight has just scaled: the weight is a gain, unless a sum follows.

    Attributes:
      product: the handwritten product that this may turn out to be.
      axes: the axes along which the weight varies. A sum along one of them makes it that product.
      copies: the axes along which the weight varies and the activation is repeated. They make it that product too, unless
        they scale another activation (a normalization may scale its deviation by gains). None: it is a gain.
    """

    product: Any
    axes: Axes
    copies: Axes | None


class Kind(NamedTuple):
    """The kind of a value. ``params``: the parameters (leaf numbers) that it is computed from *as a weight*, else none."""

    params: frozenset[int] = frozenset()
    data: bool = False  # data, or an activation, has touched it
    noise: bool = False  # all of its data is random numbers
    active: bool = False  # it depends on a parameter, so an error must reach it
    varying: Axes | None = None  # the axes along which it varies (the others are broadcast); None: all
    # Only for a weight:
    breadth: int = 0  # the number of axes longer than one of its widest parameter, as in params
    obstacle: str | None = None  # the primitive through which B cannot follow it
    joint: bool = False  # a product of parameters: the errors of some would go back through others
    cast: bool = False  # a comparison or a cast to integers, which has no gradient
    unmirrored: str | None = None  # why mirror mode cannot reach it although B can follow
    per_example: int = 0  # data made one for each example (by lookup or scaling): the axes of each
    plain: bool = True  # each of its elements is one element of a parameter, unscaled
    stack: tuple[int, ...] = ()  # the lengths of the scans along which it changes
    gained: bool = False  # gains have scaled it
    # Only for an activation:
    joined: frozenset[int] = frozenset()  # the matrices (parameters) joined to it
    part: frozenset[int] = frozenset()  # the same, after a part of it was taken
    rows: frozenset[int] = frozenset()  # the parameters whose rows it is made of, and of nothing else
    product: Any = None  # the product whose unchanged output it is
    scaled: Scaled | None = None  # also for a weight that an activation has scaled

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


def rows_of(kinds: Sequence[Kind]) -> frozenset[int]:
    """The parameters whose rows data looked up, if operands are made of such rows alone; else none."""
    rows = [k.params if k.per_example == 1 else k.rows for k in kinds if k.active]
    return frozenset().union(*rows) if all(rows) else frozenset()


def activation(kinds: Sequence[Kind]) -> Kind:
    return Kind(data=True, active=any(k.active for k in kinds), rows=rows_of(kinds))


def union_of(kinds: Sequence[Kind]) -> Kind:
    """The combined kind of operands, whatever the equation does."""
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
        gained=any(k.gained for k in weights),
    )


def settle(kinds: Sequence[Kind]) -> None:
    """Marks pending products as products: nothing later can show the weight to be a gain."""
    for kind in kinds:
        if kind.scaled and kind.scaled.copies is not None:
            kind.scaled.product.pending = False


def outside(kind: Kind) -> Kind:
    """A kind outside of a loop or a branch, where its axes and products have no meaning."""
    settle([kind])
    return kind._replace(scaled=None, product=None, varying=None)


def join(a: Kind, b: Kind, name: str) -> Kind:
    """The kind of a value that may be either (a loop's carry, a branch's result)."""
    a, b = outside(a), outside(b)
    if a == b:
        return a
    union = union_of([a, b])._replace(plain=False)
    if union.params and all(k.weight or not (k.data or k.active) for k in (a, b)):
        return union._replace(unmirrored=union.unmirrored or name)
    if union.params and not any(k.activity for k in (a, b)) and union.breadth > 1 and not union.per_example:
        return union._replace(unmirrored="data")
    wide = union.params if name == "cond" and union.breadth > 1 else frozenset()  # it may be the weight
    return activation([a, b])._replace(joined=a.joined | b.joined, part=a.part | b.part | wide)


# --- along which axes a result varies ----------------------------------------------------------------------------------


def everywhere(aval: Any) -> Axes:
    return tuple(size > 1 for size in getattr(aval, "shape", ()))


def varies(kind: Kind, aval: Any) -> Axes:
    """The axes along which a value of this kind varies."""
    return everywhere(aval) if kind.varying is None else kind.varying


def varying_by(eqn: Any, kinds: Sequence[Kind], counts: Callable[[Kind], bool], result: int = 0) -> Axes:
    """The axes along which a result varies, by those of its operands that count."""
    pairs = zip(kinds, eqn.invars, strict=True)
    return moved(eqn, [varies(k, v.aval) if counts(k) else (False,) * len(v.aval.shape) for k, v in pairs], result)


def result_varying(eqn: Any, kinds: Sequence[Kind], result: int = 0) -> Axes:
    """The axes along which a result varies, given the kinds of the operands."""
    return varying_by(eqn, kinds, lambda _: True, result)


def moved(eqn: Any, own: Sequence[Axes], result: int = 0) -> Axes:
    """The axes of a result that come from these axes of the operands."""
    name, out = eqn.primitive.name, eqn.outvars[result].aval
    if name in compat.BILINEAR:
        return _product_axes(eqn, own)
    if name == "reduce_sum" or (len(own) == 1 and name in compat.LAYOUT | compat.SUMMED):
        return _laid_out(eqn, own[0], out)
    shapes = [v.aval.shape for v in eqn.invars]
    if name not in compat.ELEMENTWISE or any(len(s) not in (0, out.ndim) for s in shapes):
        return everywhere(out)
    return tuple(map(any, zip((False,) * out.ndim, *(v for v, s in zip(own, shapes, strict=True) if s), strict=True)))


def _laid_out(eqn: Any, axes: Axes, out: Any) -> Axes:
    """The axes of a result that come from these axes of a rearranged or summed operand."""
    name, params, shape = eqn.primitive.name, eqn.params, eqn.invars[0].aval.shape
    if name == "broadcast_in_dim":
        source = dict(zip(params["broadcast_dimensions"], axes, strict=True))
        return tuple(source.get(a, False) for a in range(out.ndim))
    if name == "transpose":
        return tuple(axes[a] for a in params["permutation"])
    if name in {"squeeze", "unstack", "reduce_sum"}:
        gone = [params["axis"]] if name == "unstack" else params["dimensions" if name == "squeeze" else "axes"]
        return tuple(v for a, v in enumerate(axes) if a not in gone)
    if name == "reshape" and 0 not in shape:
        # A reshape splits or merges runs of axes of equal size. A run that varies along one axis varies along all its results.
        before, after = (list(itertools.accumulate(s, operator.mul)) for s in (shape, out.shape))
        run = functools.partial(bisect.bisect_left, sorted({*before} & {*after}))
        runs = {run(end) for end, v in zip(before, axes, strict=True) if v}
        return tuple(size > 1 and run(end) in runs for end, size in zip(after, out.shape, strict=True))
    if shape == out.shape:
        return axes
    if name in {"slice", "split"}:
        return tuple(v and size > 1 for v, size in zip(axes, out.shape, strict=True))
    return everywhere(out)


def _product_axes(eqn: Any, own: Sequence[Axes]) -> Axes:
    if eqn.primitive.name == "conv_general_dilated":
        numbers, out = eqn.params["dimension_numbers"], [any(own[0])] * eqn.outvars[0].aval.ndim
        out[numbers.out_spec[0]] = own[0][numbers.lhs_spec[0]]  # a padded constant also varies in space, at the edges
        out[numbers.out_spec[1]] = own[1][numbers.rhs_spec[0]]
        return tuple(out)
    contract, batch = eqn.params["dimension_numbers"]
    kept = [own[0][a] or own[1][b] for a, b in zip(*batch, strict=True)]
    for i in (0, 1):
        kept += [v for a, v in enumerate(own[i]) if a not in contract[i] and a not in batch[i]]
    return tuple(kept)


# --- products ----------------------------------------------------------------------------------------------------------


def is_elementwise(eqn: Any) -> bool:
    """Whether a ``dot_general`` multiplies elementwise: it sums over no axis, and shares all axes of one operand."""
    if eqn.primitive.name != "dot_general":
        return False
    contract, batch = eqn.params["dimension_numbers"]
    return not contract[0] and any(len(batch[i]) == eqn.invars[i].aval.ndim for i in (0, 1))


def input_axes(eqn: Any, operand: int) -> Sequence[int]:
    """The axes of a product's operand that are summed over (for a filter its taps and inputs)."""
    numbers = eqn.params["dimension_numbers"]
    return numbers[0][operand] if eqn.primitive.name == "dot_general" else numbers.rhs_spec[1:]


def is_matrix_operand(eqn: Any, operand: int, varying: Axes) -> bool:
    """Whether a weight varies along the axes that a product sums over, and along its remaining axes.

    A readout of one neuron has no other axes. A filter sums along its taps and inputs.
    """
    inputs = input_axes(eqn, operand)
    if eqn.primitive.name != "dot_general":
        return operand == 1 and any(varying[a] for a in inputs)
    groups = eqn.params["dimension_numbers"][1][operand]
    outputs = [a for a in range(len(varying)) if a not in inputs and a not in groups]
    one = all(eqn.invars[operand].aval.shape[a] == 1 for a in outputs) and not any(varying[a] for a in groups)
    return any(varying[a] for a in inputs) and (one or any(varying[a] for a in outputs))


def summed(eqn: Any, kinds: Sequence[Kind]) -> tuple[int, Sequence[int]]:
    """The operand that an equation sums, and the summed axes (none if it sums nothing)."""
    name, params = eqn.primitive.name, eqn.params
    if (
        name == "dot_general"
    ):  # a product with a column of constants or data is a sum (a matrix mixes neurons, and is not)
        contract, batch = params["dimension_numbers"]
        for i, column in enumerate(kinds):
            own = set(range(eqn.invars[i].aval.ndim)) - {*contract[i], *batch[i]}
            if not column.active and all(eqn.invars[i].aval.shape[a] == 1 for a in own):
                return 1 - i, contract[1 - i]
    if name in compat.ADDED:  # segment sums, such as the inputs of a neuron from several synapses
        window = params["dimension_numbers"].update_window_dims
        return 2, [a for a in range(eqn.invars[2].aval.ndim) if a not in window]
    if name == "reduce_window_sum":
        return 0, [a for a, size in enumerate(params["window_dimensions"]) if size > 1]
    if name in {"reduce_sum", "cumsum"} | compat.SUMMED:
        return 0, [a for a in params.get("axes", [params.get("axis")]) if isinstance(a, int)]
    return 0, []


def still_scaled(eqn: Any, kinds: Sequence[Kind], operand: int) -> Scaled | None:
    """An operand's ``Scaled`` in the result. None: it is settled as a gain, or as a handwritten product.

    Scaled copies are no handwritten product if they scale another activation that varies as the weight does. A scaled
    weight is none if it is the weight of a product.
    """
    name, (kind, scaled) = eqn.primitive.name, (kinds[operand], kinds[operand].scaled)
    assert scaled is not None
    other = kinds[1 - operand] if len(kinds) == 2 else CONSTANT
    gone, copies = (False,) * eqn.outvars[0].aval.ndim, scaled.copies
    if name in compat.LAYOUT and len(kinds) == 1 and (copies is None or kind.weight or name in compat.ORDERED):
        axes = moved(eqn, [scaled.axes])
        return Scaled(scaled.product, axes, copies and moved(eqn, [copies])) if any(axes) or copies else None
    alone = not any(k.active for i, k in enumerate(kinds) if i != operand)
    if alone and (name in {"neg", "mul", "select_n"} or (operand == 0 and name in {"div", "pad"})):
        return scaled if len(scaled.axes) == len(gone) else scaled._replace(axes=gone)
    if copies is None or name == "stop_gradient":
        return None
    if name == "mul" and not kind.weight and other.activity:
        own = varies(other, eqn.invars[1 - operand].aval)
        covered = all(o for o, a in zip(own, copies, strict=True) if a)
        return Scaled(scaled.product, gone, None if covered else copies)
    if name in {"add", "sub"}:  # w_k x z + b_k, and with it w_k x y_k, is the same gain of x (y_k + z)
        if other.static:
            return scaled._replace(axes=gone)
        if other.scaled and other.scaled.product is scaled.product and other.scaled.copies is None:
            return None
    if not (
        kind.weight and name in compat.BILINEAR and other.data and not any(copies[a] for a in input_axes(eqn, operand))
    ):
        settle([kind])
    return None


# --- what comes of a weight --------------------------------------------------------------------------------------------


def gain_operand(eqn: Any, kinds: Sequence[Kind]) -> int | None:
    """The operand that is a gain of the other one, a weight: one factor for all of it, or one for each neuron.

    Such a factor scales a neuron's error as it scales its activity, and says nothing about single synapses. Examples are
    the gain over the norm in a weight norm, and a spectral norm's largest singular value. If the gain is a norm of W, B
    has its own norm. Any other gain is the same for both; its parameter has at most one axis, unless it is one number.
    """
    for gain in {"mul": (0, 1), "div": (1,)}.get(eqn.primitive.name, ()):
        weight, factor, aval = kinds[1 - gain], kinds[gain], eqn.invars[1 - gain].aval
        if not weight.weight or weight.obstacle or aval.ndim != eqn.outvars[0].aval.ndim:
            continue
        axes = sum(varies(factor, eqn.invars[gain].aval))
        if factor.weight and not factor.per_example and (weight.static or factor.data):
            # For a neuron with one synapse the gain would be that synapse.
            wide = axes and factor.breadth > 1 and not factor.params & weight.params
            if not (factor.cast or factor.joint or wide) and axes < min(2, sum(varies(weight, aval))):
                return gain
        elif factor.data and not factor.weight and axes < 2 and weight.breadth > 1:
            return gain
    return None


# Linear in each operand, and linear only in the first.
LINEAR = compat.LAYOUT | compat.AFFINE | compat.WRITTEN | compat.SUMMED | {
    "concatenate", "stack", "neg", "select_n", "reduce_sum", "cumsum", "reduce_window_sum"
}  # fmt: skip
LINEAR_IN_FIRST = compat.INDEXED | {"pad", "div"}
# Linear in a weight, but they mix its elements: mirror mode cannot undo that.
MIXING = (
    compat.AFFINE | compat.EXCHANGED | compat.SUMMED | compat.BILINEAR | {"reduce_sum", "cumsum", "reduce_window_sum"}
)
MASKS = {"select_n": (0,), "mul": (0, 1), "div": (1,)}  # operands that may be a mask


def _follows(eqn: Any, kinds: Sequence[Kind]) -> bool:
    """Whether B can follow its weight: the equation is linear (or affine) in the weights among its operands."""
    name = eqn.primitive.name
    weights = [i for i, k in enumerate(kinds) if k.weight]
    if any(
        kinds[i].obstacle and not (kinds[i].cast and i in MASKS.get(name, ()) and len(weights) > 1) for i in weights
    ):
        return False
    weights = [i for i in weights if not kinds[i].cast]
    if name in LINEAR_IN_FIRST:
        return weights == [0]
    return name in LINEAR or (name in compat.BILINEAR | {"mul"} and len(weights) == 1)


def weight_kind(eqn: Any, kinds: Sequence[Kind], result: int = 0) -> Kind:
    """The kind of an equation's result where weights meet other weights, constants and data, and no activation."""
    name, out, union = compat.primitive_name(eqn), eqn.outvars[result].aval, union_of(kinds)
    factor = gain_operand(eqn, kinds)
    if factor is not None:
        main = kinds[1 - factor]
        repeated = eqn.invars[1 - factor].aval.shape != out.shape
        return main._replace(
            gained=True,
            data=main.data or kinds[factor].data,
            varying=result_varying(eqn, kinds),
            per_example=main.per_example or (main.breadth if repeated else 0),
            unmirrored=main.unmirrored or ("data" if repeated else None),
            scaled=None,
        )
    varying = varying_by(eqn, kinds, lambda k: k.weight or not k.data, result)
    if not jnp.issubdtype(out.dtype, jnp.inexact):  # an index or a comparison has no gradient
        return union._replace(varying=varying, obstacle=CAST, cast=True)
    if jnp.issubdtype(out.dtype, jnp.complexfloating):
        return union._replace(varying=varying, obstacle=union.obstacle or name)
    kind = union._replace(varying=varying)
    others = [varies(k, v.aval) for k, v in zip(kinds, eqn.invars, strict=True) if not k.weight]
    if name in compat.BILINEAR and len(others) == 1 and not any(others[0]):
        kind = kind._replace(breadth=sum(varying))  # a layer's response to a uniform constant is a bias of its outputs
    if name == "stop_gradient":
        kind = kind._replace(joint=False)
    cast = any(k.cast for k in kinds)
    if not _follows(eqn, kinds):
        reason = CAST if cast else name
        kind = kind._replace(obstacle=union.obstacle or reason, cast=name in compat.LAYOUT and kinds[0].cast)
    elif cast:  # masked or selected by its own values
        kind = kind._replace(obstacle=None, unmirrored=kind.unmirrored or CAST)
    if union.data:
        return _touched(eqn, kinds, kind)
    plain = union.plain and name not in {"mul", "div", "neg", *compat.WRITTEN}
    if name in {"broadcast_in_dim", "tile"}:
        plain = plain and math.prod(out.shape) == math.prod(eqn.invars[0].aval.shape)
    return kind._replace(plain=plain, unmirrored=kind.unmirrored or (name if name in MIXING else None))


def _touched(eqn: Any, kinds: Sequence[Kind], kind: Kind) -> Kind:
    """The kind of a weight that data touches, or has touched: still a weight, or an activity."""
    name, out, rows = eqn.primitive.name, eqn.outvars[0].aval, kind.per_example
    looked_up = name in compat.INDEXED and any(k.data for k in kinds[1:])
    theirs = varying_by(eqn, kinds, lambda k: not k.weight) if len(kinds) > 1 and not looked_up else ()
    assert kind.varying is not None
    spread = any(d and not w for d, w in zip(theirs, kind.varying, strict=False))
    if name in compat.AFFINE | compat.JOINED | compat.WRITTEN:
        places = {"select_n": [0], "dynamic_update_slice": range(2, len(kinds))}.get(
            name, [1] if "scatter" in name else []
        )
        parts = [k for i, k in enumerate(kinds) if k.data and not k.weight and i not in places]
        if (parts and spread) or (rows == 1 and (parts or sum(k.weight for k in kinds) > 1)):
            return activation(kinds)  # positions added to data, or to looked-up rows
        if not all(k.noise for k in parts):
            return kind._replace(obstacle=kind.obstacle or f"{name} of data", unmirrored="data")
    if spread and not rows and kind.breadth < 2:
        return activation(kinds)  # scaled data
    if (rows or spread) and name == "reduce_sum":
        return activation(kinds)  # a handwritten first layer
    if looked_up and name == "gather":
        numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
        spread = any(size > 1 and a not in numbers.offset_dims for a, size in enumerate(out.shape))
        rows = max(1, kind.breadth - sum(shape[a] > 1 for a in numbers.collapsed_slice_dims)) if spread else 0
    elif spread:
        rows = rows or kind.breadth
    if kind.obstacle and rows == 1:
        return activation(kinds)
    reason = None if name in compat.LAYOUT - compat.EXCHANGED else name if name in compat.EXCHANGED else "data"
    return kind._replace(per_example=rows, unmirrored=kind.unmirrored or reason, plain=False)
