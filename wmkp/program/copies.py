"""Copies of an activation, and the weights that multiply them: products written by hand, which B cannot follow."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wmkp.program import compat
from wmkp.program.kinds import CONSTANT, Kind, activation, elementwise_varying, layout_varying, same_along
from wmkp.program.products import Bind, Product


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


def copied_along(eqn: Any, kinds: Sequence[Kind], shape: tuple[int, ...]) -> tuple[bool, ...]:
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
    elif name in {"transpose", "squeeze", "reshape", "unstack"}:
        again = list(layout_varying(eqn, was))
    elif name == "tile":
        again = [r or reps > 1 for r, reps in zip(was, eqn.params["reps"], strict=True)]
    elif name == "dot_general":
        if len(active) == 2:
            return ()
        again = _copied_by_dot(eqn, a, was)
    elif name == "gather" and active == [0]:
        again = _copied_by_gather(eqn, old, was)
    elif len(old) == len(shape) and (name in compat.LAYOUT or name == "dynamic_slice"):
        again = list(was)
    elif name.startswith("reduce_") and "axes" in eqn.params:
        again = [r for axis, r in enumerate(was) if axis not in eqn.params["axes"]]
    elif name in compat.JOINED | compat.WRITTEN or (name in compat.ADDED and 0 not in active):
        again = _copied_by_joining(eqn, kinds, active, shape)
    else:
        again = [True] * len(shape)
        for i in active:
            old = eqn.invars[i].aval.shape
            was = kinds[i].copied or (False,) * len(old)
            if old and len(old) != len(shape):
                return ()
            if old:
                # Only an axis of one is spread; a longer one is pooled or cut.
                again = [g and (r or n == 1 != m) for g, r, n, m in zip(again, was, old, shape, strict=True)]
    return tuple(r and size > 1 for r, size in zip(again, shape, strict=True))


def _copied_by_joining(eqn: Any, kinds: Sequence[Kind], active: Sequence[int], shape: tuple[int, ...]) -> list[bool]:
    """What is joined to copies, chosen instead of them or written over a part of them leaves copies in the rest."""
    name = eqn.primitive.name
    again = [False] * len(shape)
    for i in active:
        was = list(kinds[i].copied) if math.prod(eqn.invars[i].aval.shape) else []
        if was and name == "stack":
            was.insert(eqn.params["axis"], False)
        elif was and i > 0 and name.startswith("scatter"):
            was = _copied_by_writing(eqn, was, len(shape))
        again = list(map(operator.or_, again, was or again))
    if name in {"concatenate", "stack"}:  # of more elements than there are, some are there twice
        sizes: dict[tuple[Any, int], int] = {}
        for i in active:
            *cut_from, (var, size) = sources(eqn, kinds, i)
            for source in {*cut_from, (var, size)}:
                sizes[source] = sizes.get(source, 0) + size
        along = eqn.params["dimension" if name == "concatenate" else "axis"]
        again[along] |= any(joined > whole for (_, whole), joined in sizes.items())
    return again


def _copied_by_writing(eqn: Any, was: Sequence[bool], rank: int) -> list[bool]:
    """Along which axes of an array updates are copies that are copies among themselves."""
    numbers = eqn.params["dimension_numbers"]
    places = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = dict(zip([a for a in range(rank) if a not in places], numbers.update_window_dims, strict=True))
    scattered = any(r for a, r in enumerate(was) if a not in numbers.update_window_dims)
    return [was[window[a]] if a in window else scattered for a in range(rank)]


def _source(var: Any, kind: Kind) -> tuple[Any, int]:
    """A variable, and how many elements it has, each of its copies counted once."""
    shape = var.aval.shape
    return var, math.prod(n for n, again in zip(shape, kind.copied or [False] * len(shape), strict=True) if not again)


def sources(eqn: Any, kinds: Sequence[Kind], operand: int) -> tuple[tuple[Any, int], ...]:
    """The variables that an operand was cut from, and itself, and how many elements each has; the last few."""
    return (*kinds[operand].sources[-7:], _source(eqn.invars[operand], kinds[operand]))


def cut(eqn: Any, kinds: Sequence[Kind], out: Kind) -> Kind:
    """The kind of an equation's result, with the variables that an activity in it was cut from."""
    name = eqn.primitive.name
    if not out.active or out.synaptic or (name not in compat.LAYOUT and name not in {"concatenate", "stack"}):
        return out
    parts = [sources(eqn, kinds, i) for i, k in enumerate(kinds) if k.active]
    return out._replace(sources=tuple(s for s in parts[0] if all(s in other for other in parts)))


class Twice:
    """What a jaxpr computes more than once: by the same primitive, from the same values."""

    def __init__(self) -> None:
        self.first: dict[Any, Any] = {}  # by variable, the first that has its value
        self.computed: dict[Any, Sequence[Any]] = {}

    def alike(self, variables: Sequence[Any]) -> list[int]:
        """For each variable the place of the first among them that has its value."""
        first = [self.first.get(v, v) if isinstance(v, compat.Var) else v for v in variables]
        return [next(i for i, w in enumerate(first) if w is v) for v in first]

    def mark(self, eqn: Any, kinds: Sequence[Kind], outs: list[Kind], alike: Sequence[int] | None = None) -> list[Kind]:
        """The kinds of an equation's results: an activity that is there already is, as it were, cut from the first.

        ``alike`` says which results of a call are the same.
        """
        operands = [
            self.first.get(v, v) if isinstance(v, compat.Var) else (np.asarray(v.val).tobytes(), v.aval)
            for v in eqn.invars
        ]
        params = dict(eqn.params)
        if eqn.primitive.name == "slice":  # of copies, one is as good as another
            params["start_indices"], params["limit_indices"] = (
                tuple(None if r else n for r, n in zip(kinds[0].copied or [False] * len(ends), ends, strict=True))
                for ends in (params["start_indices"], params["limit_indices"])
            )
        try:
            before = self.computed.setdefault((eqn.primitive, *params.items(), *operands), eqn.outvars)
        except TypeError:  # a parameter that has no hash
            return outs
        if eqn.primitive.name in {"unstack", "split"} and kinds[0].copied and kinds[0].copied[eqn.params["axis"]]:
            before = [next(w for w in before if w.aval.shape == v.aval.shape) for v in eqn.outvars]
        if alike is not None:
            before = [before[i] for i in alike]
        pairs = [(v, w) for v, w in zip(eqn.outvars, before, strict=True) if v is not w]
        if eqn.effects or not pairs:
            return outs
        self.first.update(pairs)
        return [
            k._replace(sources=(*k.sources[-7:], _source(w, k))) if v is not w and k.active and not k.synaptic else k
            for v, w, k in zip(eqn.outvars, before, outs, strict=True)
        ]


def _copied_by_dot(eqn: Any, active: int, was: tuple[bool, ...]) -> list[bool]:
    """A product with data that sums over nothing copies the activation along the axes that are the data's alone."""
    contract, batch = eqn.params["dimension_numbers"]
    rank = [len(v.aval.shape) for v in eqn.invars]
    free = [[a for a in range(rank[i]) if a not in (*contract[i], *batch[i])] for i in (0, 1)]
    copies = all(eqn.invars[active].aval.shape[a] == 1 for a in contract[active])
    own = lambda i: [was[a] for a in free[i]] if i == active else [copies] * len(free[i])
    return [*(was[a] for a in batch[active]), *own(0), *own(1)]


def _copied_by_gather(eqn: Any, old: tuple[int, ...], was: Sequence[bool]) -> list[bool]:
    """More places than there are values to fill them repeat some (fewer are a permutation or a choice)."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    places = [a for a in range(len(shape)) if a not in numbers.offset_dims]
    from_which = [*numbers.collapsed_slice_dims, *numbers.operand_batching_dims]
    more = math.prod(shape[a] for a in places) > math.prod(old[a] for a in from_which)
    more |= any(was[a] for a in numbers.collapsed_slice_dims)
    batched = len(numbers.operand_batching_dims)
    kept = dict(zip(numbers.offset_dims, [a for a in range(len(old)) if a not in from_which], strict=True))
    return [was[kept[a]] if a in kept else more and a in places[batched:] for a in range(len(shape))]


def fan_out(
    eqn: Any, made: Product | None, bind: Bind, kinds: list[Kind], outs: list[Kind], lengths: tuple[int, ...]
) -> tuple[Product | None, list[Kind]]:
    """Finds the weights through which a neuron's activity fans out to several: w_k x, x a copy for each k.

    The error of x is the sum over k of w_k delta_k, whatever comes then, unless that is another activation y_k: for
    w_k x y_k is a gain of x y_k (a normalization's, say), and W x y a projection's output under one; and so is
    w_k x y_k + (w_k x z + b_k), of x (y_k + z).
    """
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return made, [o._replace(copied=k.copied, fans=k.fans) for o, k in zip(outs, kinds, strict=True)]
    if not any(k.active for k in outs):  # no error comes back
        return made, outs
    # What a projection makes are neurons of their own.
    copied = () if made else copied_along(eqn, kinds, eqn.outvars[0].aval.shape)
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
                along, varying = (layout_varying(eqn, axes) for axes in (fan.along, fan.varying))
                moves = (*fan.moves, (name, str(eqn.params))) if name != "convert_element_type" else fan.moves
                fans.append(fan._replace(along=along, varying=varying, moves=moves))
            elif name == "neg" or (adds and alone):
                fans.append(fan._replace(shifted=fan.shifted or name != "neg"))
            elif not fan.shifted and (name == "mul" or (name == "div" and i == 0)):
                shared = same_along(kinds[1 - i], eqn.invars[1 - i].aval.shape, len(fan.varying))
                if any(among(fan.along)):
                    fans.append(fan)
                elif not any(map(all, zip(shared, fan.varying, strict=False))):
                    fans.append(Fan(product, (), moves=fan.moves, gain=True))
            elif made is not None and not made.obstacle and made.weight == i:
                inputs, size = made.axes()[1], eqn.invars[i].aval.shape
                product.pending &= all(kind.copied[a] or size[a] == 1 for a in inputs)
            else:
                product.pending = False
    if name in compat.MULTIPLIED and any(copied):
        for i, kind in enumerate(kinds):
            along = elementwise_varying(eqn, [k if j == i else CONSTANT for j, k in enumerate(kinds)])
            if kind.synaptic and any(among(along)):
                others = [kind if j == i else activation([k]) for j, k in enumerate(kinds)]
                product = Product(eqn, bind, i, others, f"{name} by copies of an activation", lengths)
                product.pending = True
                made = product
                fans.append(Fan(product, among(along), along))
    for i, out in enumerate(outs):
        if out.active:
            again = copied if i == 0 or not any(copied) else copied_along(eqn, kinds, eqn.outvars[i].aval.shape)
            outs[i] = out._replace(copied=again, fans=tuple(fans))
    return made, outs


def settle(kinds: Sequence[Kind]) -> None:
    """What fans out here goes where nothing can show it to be a gain."""
    for kind in kinds:
        for fan in kind.fans:
            fan.product.pending &= fan.gain
