"""Runs a plan with its products replaced, while each B follows its weight; or evaluates the weights alone."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmkp.program import compat
from wmkp.program.kinds import Kind
from wmkp.program.plans import Plan, Step, either
from wmkp.program.products import Bind, Product, WeightTransportError

# --- running the plan -------------------------------------------------------------------------------------------------

# A value and its companion. A weight's companion is the feedback array that has followed it. Any other value, and a
# weight of parameters without one, is its own companion: None. So JAX takes pairs in and out of its loops and branches.
Pair = tuple[Any, Any]
Read = Callable[[Any], Any]  # a variable's value


@dataclasses.dataclass(eq=False)
class Handler:
    """What replaces the products while a plan runs, and what they share.

    Attributes:
      on_product: ``(product, x, w, b, tap) -> y``, called for each product of a weight with an activation.
      taps: an array for some products, with a leading axis for each scan (and for the devices of a shard_map) around it; all others get ``None``.
      channel: an array that goes from each product to the next, through every loop and branch (or None): its cotangent
        travels from the last product straight to all before it.
      anchor: a zero that depends on all inputs (``anchored``).
    """

    on_product: Callable[["Handler", Product, Any, Any, Any, Any], Any]
    taps: dict
    channel: Any
    anchor: jax.Array

    def within(self, taps: dict, channel: Any) -> "Handler":
        """The handler inside a loop, a branch or a call, with the taps and channel that enter it."""
        return dataclasses.replace(self, taps=taps, channel=channel)


class Direct:
    """Feedback weights that carry the output's error straight to a projection's input, with their own shape.

    They stay unchanged when their weight is rearranged. A scan takes a slice of both.
    """

    def __init__(self, array: Any):
        self.array = array


jax.tree_util.register_pytree_node(Direct, lambda d: ((d.array,), None), lambda _, children: Direct(*children))


def walk(plan: Plan, inputs: Sequence[Any], constant: Callable[[Any], Any], evaluate: Callable[..., Any]) -> Read:
    """Calls ``evaluate(step, operands) -> results`` at each equation of a plan; returns a function that reads a variable."""
    env = {v: constant(c) for v, c in zip(plan.jaxpr.constvars, plan.consts, strict=True)}
    env.update(zip(plan.jaxpr.invars, inputs, strict=True))
    read = lambda v: env[v] if isinstance(v, compat.Var) else constant(v.val)
    for step in plan.steps:
        env.update(zip(step.eqn.outvars, evaluate(step, [read(v) for v in step.eqn.invars]), strict=True))
    return read


def run(plan: Plan, inputs: Sequence[Pair], handler: Handler) -> list[Pair]:
    """Evaluates a plan. The handler replaces each product of a weight with an activation."""
    evaluate = lambda step, operands: EVALUATE.get(step.action, _bind)(step, operands, handler)
    read = walk(plan, inputs, lambda c: (c, None), evaluate)
    return [read(v) for v in plan.jaxpr.outvars]


def _product(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    product = step.product
    assert product is not None
    (x, _), (w, b) = operands[1 - product.weight], operands[product.weight]
    y = handler.on_product(handler, product, x, w, w if b is None else b, handler.taps.get(product))
    return [(y, None)]


def _bind(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    """Evaluates the equation, and again with B if B follows its weight."""
    assert step.bind is not None
    values, bs = [a for a, _ in operands], [b for _, b in operands]
    for i in step.guarded:
        if jnp.issubdtype(jnp.result_type(values[i]), jnp.inexact):
            values[i] = _guarded(values[i])
    outs = step.bind(*values)
    apart = step.eqn.primitive.name in compat.APART and len(bs) == len(outs) > 1
    if step.gain is not None:
        # B has the same gain as W (none of its own under backprop), unless the gain is a norm of W: then B has its own norm.
        if bs[1 - step.gain] is None or not step.norm or isinstance(bs[step.gain], Direct):
            bs[step.gain] = None
    elif step.action in {"own", "bind"} and not apart:
        bs = [None if step.action == "bind" or isinstance(b, Direct) else b for b in bs]
    direct = [b for b in bs if isinstance(b, Direct)]
    if direct and not apart:
        if any(b is not direct[0] for b in direct):
            raise ValueError("parameters joined to one weight cannot each have direct feedback; give them another rule")
        return [(y, direct[0]) for y in outs]
    arrays = [None if isinstance(b, Direct) else b for b in bs]
    if all(b is None for b in arrays):
        return list(zip(outs, bs if apart else [None] * len(outs), strict=True))
    companions = [_companion((a, b), handler) for (a, _), b in zip(operands, arrays, strict=True)]
    # JAX does not transpose a pad with respect to the padding alone, nor take a custom_vjp's derivative in forward mode.
    if step.eqn.primitive.name in {"pad", *compat.CUSTOM}:
        companions[0] = _beside(companions[0], handler.anchor)
    others = step.bind(*companions)
    if apart:  # each result has the B of its own operand
        others = [b if b is None or isinstance(b, Direct) else other for b, other in zip(bs, others, strict=True)]
    return list(zip(outs, others, strict=True))


@jax.custom_vjp
def _guarded(x: Any) -> Any:
    """Data that a weight scales. No error may go back to it: it would go through the weight."""
    return x


def _guarded_forward(x: Any) -> tuple[Any, None]:
    if x.perturbed:
        raise WeightTransportError(
            "a gradient was asked for at data that a parameter multiplies element by element, so the error would travel "
            "back through that parameter. Differentiate with respect to params and feedback only."
        )
    return x.value, None


_guarded.defvjp(_guarded_forward, lambda _, error: (None,), symbolic_zeros=True)


def _companion(pair: Pair, handler: Handler) -> Any:
    """A value's stand-in among feedback arrays: a weight's B, or the value itself, held so that no error reaches it twice."""
    a, b = pair
    errors = isinstance(a, jax.core.Tracer) and jnp.issubdtype(a.dtype, jnp.floating)  # whether an error could reach it
    return b if b is not None else _held(a, handler.anchor) if errors else a


@jax.custom_vjp
def _held(x: Any, anchor: jax.Array) -> Any:
    """``x``, without an error back to it. Unlike stop_gradient, it lets a gradient be differentiated by ``x`` again.

    The first derivative is cut off, whatever it is taken with respect to: it sees the anchor, which depends on all inputs.
    A derivative of that derivative sees ``x`` itself.
    """
    return x


_held.defvjp(lambda x, anchor: (x, None), lambda _, error: (None, None))


@jax.custom_vjp
def _beside(b: Any, anchor: jax.Array) -> Any:
    """``b``, which is differentiated whenever the anchor is."""
    return b


_beside.defvjp(lambda b, anchor: (b, None), lambda _, error: (error, None))


def anchored(inputs: Any) -> jax.Array:
    """A zero that depends on all inputs, as JAX sees it, but sends no error back."""

    @jax.custom_vjp
    def anchor(inputs: list[Any]) -> jax.Array:
        return jnp.zeros(())

    anchor.defvjp(lambda inputs: (jnp.zeros(()), None), lambda _, error: (None,))
    return anchor([x for x in jax.tree.leaves(inputs) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)])


def _remat(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    mine = [p for p in step.plans[0].products() if p in handler.taps]

    def body(operands: list[Pair], taps: list[Any], channel: Any) -> tuple[list[Pair], Any]:
        inner = handler.within(dict(zip(mine, taps, strict=True)), channel)
        return run(step.plans[0], operands, inner), inner.channel

    remat = jax.checkpoint(body, **{k: step.eqn.params[k] for k in ("prevent_cse", "policy")})
    outs, handler.channel = remat(operands, [handler.taps[p] for p in mine], handler.channel)
    return outs


def _shard_map(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    if handler.channel is not None:
        raise ValueError(
            "direct feedback and a rule's random numbers cannot pass a shard_map in the model; put the shard_map around the "
            "whole step"
        )
    plan, sharding = step.plans[0], compat.sharding(step.eqn.params)
    mine = [p for p in plan.products() if p in handler.taps]

    def body(operands: list[Pair], taps: list[Any]) -> list[Any]:
        own = {p: sharding.alike(tap[0], p.output_aval) for p, tap in zip(mine, taps, strict=True)}
        return [a for a, _ in run(plan, operands, handler.within(own, None))]

    spread = jax.sharding.PartitionSpec(sharding.axes)
    # A companion is divided like its value.
    mapped = sharding.map(body, (list(sharding.in_specs), [spread] * len(mine)), list(sharding.out_specs))
    return [(y, None) for y in mapped(operands, [handler.taps[p] for p in mine])]


def _has_b(kind: Kind) -> bool:
    """Whether a B follows values of this kind. If B cannot follow a weight, the weight may still be a gain, such as a norm."""
    return kind.weight and (kind.static or not kind.obstacle)


def _as_kind(pair: Pair, kind: Kind) -> Pair:
    """A pair in a place whose kind may be wider than the value's own: an activation is its own companion."""
    lost = kind.obstacle and isinstance(pair[1], Direct)
    return pair if _has_b(kind) and not lost else (pair[0], None)


def _cond(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    (index, _), rest = operands[0], operands[1:]
    kinds = either(step.plans)

    def branch(plan: Plan) -> tuple[list[Pair], Any]:
        inner = handler.within(handler.taps, handler.channel)
        pairs = [_as_kind(pair, kind) for pair, kind in zip(run(plan, rest, inner), kinds, strict=True)]
        outs = [(p[0], _companion(p, handler) if _has_b(k) else None) for p, k in zip(pairs, kinds, strict=True)]
        return outs, inner.channel

    outs, handler.channel = jax.lax.switch(index, [functools.partial(branch, plan) for plan in step.plans])
    return outs


def _scan(step: Step, operands: list[Pair], handler: Handler) -> list[Pair]:
    (plan,), params = step.plans, step.eqn.params
    consts, carries = compat.scan_sizes(params)
    kinds = [plan.kinds[v] for v in plan.jaxpr.invars]
    operands = [_as_kind(pair, kind) for pair, kind in zip(operands, kinds, strict=True)]
    fixed, init, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    # If a carried weight gets a separate companion in the body, it needs one from the start.
    for i, ((a, b), kind) in enumerate(zip(init, kinds[consts:], strict=False)):
        changed = plan.jaxpr.outvars[i] not in plan.jaxpr.invars
        if b is None and changed and _has_b(kind):
            init[i] = (a, _held(jnp.copy(a), handler.anchor))  # another array, even without jit
    mine = [p for p in plan.products() if p in handler.taps]

    def body(carry: tuple[list[Pair], Any], slices: tuple[list[Pair], list[Any]]) -> tuple[Any, list[Pair]]:
        inner = handler.within(dict(zip(mine, slices[1], strict=True)), carry[1])
        pairs = run(plan, [*fixed, *carry[0], *slices[0]], inner)
        carried = [
            (p[0], b if b is None else _companion(p, handler)) for p, (_, b) in zip(pairs, carry[0], strict=False)
        ]
        return (carried, inner.channel), pairs[carries:]

    inputs = (init, handler.channel), (xs, [handler.taps[p] for p in mine])
    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    (final, handler.channel), ys = jax.lax.scan(body, *inputs, **options)
    return [*final, *ys]


EVALUATE = {
    "product": _product,
    "inline": lambda step, operands, handler: run(step.plans[0], operands, handler),
    "remat": _remat,
    "shard_map": _shard_map,
    "cond": _cond,
    "scan": _scan,
}


# --- the weights alone, for mirror mode -------------------------------------------------------------------------------


class _Stacked(NamedTuple):
    """A weight or constant with an axis for each scan along which it changes. ``levels``: how deep each scan is nested."""

    value: Any
    levels: tuple[int, ...] = ()


Maybe = _Stacked | None  # None: neither a constant nor a weight that mirror mode can reach


def collect(plan: Plan, leaves: Sequence[Any], wanted: Sequence[Product]) -> dict[Product, tuple[Any, Any]]:
    """For each wanted product its weight in the product's layout, and its bias in the output's layout (or None).

    This evaluates only layout changes and needs no data. Inside scans, the weight (or bias) has a leading axis for each
    scan along which it changes.
    """
    found: dict[Product, tuple[Any, Any]] = {}
    inputs = [None if x is None else _Stacked(x) for x in leaves] + [None] * (len(plan.jaxpr.invars) - len(leaves))
    _Collector(frozenset(wanted), found).plan(plan, inputs, 1)
    return found


def _mirrored(kind: Kind) -> bool:
    return not (kind.obstacle or kind.unmirrored) and (kind.weight or not kind.data)


class _Collector(NamedTuple):
    wanted: frozenset[Product]
    found: dict[Product, tuple[Any, Any]]

    def plan(self, plan: Plan, inputs: Sequence[Maybe], level: int) -> list[Maybe]:
        """A plan's results; ``level`` is that of the next scan inside."""
        known = [x if _mirrored(plan.kinds[v]) else None for x, v in zip(inputs, plan.jaxpr.invars, strict=True)]
        read = walk(plan, known, _Stacked, lambda step, operands: self.step(plan, step, operands, level))
        for product, (weight, _) in list(self.found.items()):
            if product.bias is not None and product.bias[0] is plan:
                bias = read(product.bias[1])
                self.found[product] = (weight, None if bias is None else bias.value)
        return [read(v) for v in plan.jaxpr.outvars]

    def step(self, plan: Plan, step: Step, operands: list[Maybe], level: int) -> Sequence[Maybe]:
        name, out_kinds = step.eqn.primitive.name, [plan.kinds[v] for v in step.eqn.outvars]
        nothing: list[Maybe] = [None] * len(out_kinds)
        if step.product is not None and step.product in self.wanted:
            w = operands[step.product.weight]
            assert w is not None  # mirror mode reaches only weights that are layout changes of parameters
            self.found[step.product] = (w.value, None)
            return nothing
        if step.action in {"inline", "remat"}:
            return self.plan(step.plans[0], operands, level)
        if step.action == "scan":
            return self.scan(step, operands, level)
        if step.action == "shard_map":
            self.shard_map(step, operands, level)
            return nothing
        if step.action == "cond":
            for inner in step.plans:
                self.plan(inner, operands[1:], level)
            return nothing
        if name in {*compat.VARIED, "stop_gradient", "optimization_barrier"}:
            return operands  # devices' parts are separate already; a frozen weight's signal must reach its B
        if name == "convert_element_type" and out_kinds[0].weight:
            return operands  # mirror mode uses B's precision, not the compute dtype
        if not out_kinds or not all(map(_mirrored, out_kinds)):
            return nothing
        if step.gain is not None:
            return [operands[1 - step.gain]]  # mirror mode sets a neuron's gain to 1, for W and for B
        present = [x for x in operands if x is not None]
        return _bind_stacked(step.bind, present) if step.bind and len(present) == len(operands) else nothing

    def scan(self, step: Step, operands: list[Maybe], level: int) -> list[Maybe]:
        consts, carries = compat.scan_sizes(step.eqn.params)
        # This scan's axis comes after those of the scans around it.
        slices = [x and _Stacked(x.value, (*x.levels, level)) for x in operands[consts + carries :]]
        outs = self.plan(step.plans[0], [*operands[: consts + carries], *slices], level + 1)
        for i, y in enumerate(outs):
            if y is not None and i >= carries:
                value, levels = y.value, tuple(at for at in y.levels if at != level)
                if levels == y.levels:  # it is the same at each step
                    value = jnp.repeat(jnp.expand_dims(value, len(levels)), step.eqn.params["length"], len(levels))
                outs[i] = _Stacked(value, levels)
        return outs

    def shard_map(self, step: Step, operands: list[Maybe], level: int) -> None:
        """Treats each device's part of a weight as one matrix, as along a scan, with a level for each axis of the mesh."""
        (plan,), sharding = step.plans, compat.sharding(step.eqn.params)
        inner: list[Maybe] = []
        for x, spec, v in zip(operands, sharding.in_specs, plan.jaxpr.invars, strict=True):
            if x is None:
                inner.append(None)
                continue
            lead = len(x.levels)
            shape, parts = list(x.value.shape[:lead]), []
            for size, split in zip(x.value.shape[lead:], (*spec, *[None] * v.aval.ndim), strict=False):
                names = () if split is None else split if isinstance(split, tuple) else (split,)
                for axis in (sharding.axes.index(name) for name in names):
                    parts.append((level + axis, len(shape)))
                    shape.append(sharding.mesh.shape[sharding.axes[axis]])
                    size //= shape[-1]
                shape.append(size)
            parts.sort()
            value = jnp.moveaxis(x.value.reshape(shape), [at for _, at in parts], range(lead, lead + len(parts)))
            inner.append(_Stacked(value, (*x.levels, *(at for at, _ in parts))))
        self.plan(plan, inner, level + len(sharding.axes))


def _bind_stacked(bind: Bind, operands: Sequence[_Stacked]) -> list[Maybe]:
    levels = tuple(sorted({level for x in operands for level in x.levels}))
    # Casts to a compute dtype are skipped, so constants are cast to their weight's dtype.
    floating = [jnp.issubdtype(jnp.result_type(x.value), jnp.floating) for x in operands]
    dtype = jnp.result_type(*(x.value for x, f in zip(operands, floating, strict=True) if f), -1.0)
    values = [jnp.asarray(x.value, dtype) if f else x.value for x, f in zip(operands, floating, strict=True)]
    for level in reversed(levels):
        bind = jax.vmap(bind, in_axes=tuple(0 if level in x.levels else None for x in operands))
    return [_Stacked(y, levels) for y in bind(*values)]
