"""The walk over a jaxpr that finds its products, and what each parameter does: what to do at each equation."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmkp.program import compat
from wmkp.program.kinds import (
    CONSTANT,
    Kind,
    activation,
    carried_gain,
    gain_operand,
    is_elementwise,
    is_matrix_operand,
    join,
    layout_varying,
    outside,
    result_varying,
    summed,
    union_of,
    varies,
    weight_kind,
)
from wmkp.program.products import Bind, Product


class Step(NamedTuple):
    """One equation, and what to do: "bind", "follow", "own", "product", "inline", "remat", "scan", "cond" or "shard_map"."""

    eqn: Any
    action: str
    bind: Bind | None = None
    plans: tuple["Plan", ...] = ()
    product: Product | None = None
    gain: int | None = None  # of what is followed: the operand that scales the other (``kinds.gain_operand``)
    norm: bool = False  # whether the gain is made of the weight that it scales
    guarded: tuple[int, ...] = ()  # operands to which no error may go back: data that a weight scales by hand


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


def _constant(value: Any) -> Kind:
    """A constant; one that is the same number everywhere (a state of zeros) does not vary."""
    if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        return CONSTANT
    value = np.asarray(value)
    return Kind(varying=(False,) * value.ndim) if value.size and (value == value.flat[0]).all() else CONSTANT


def _inactive(eqn: Any, kinds: Sequence[Kind], result: int) -> Kind:
    """What constants and data make."""
    random = eqn.primitive.name.startswith(compat.RANDOM)
    data = random or any(k.data for k in kinds)
    noise = random or (data and all(k.noise for k in kinds if k.data))
    if not data and eqn.primitive.name in compat.INLINED:
        kind = Analyser().plan(compat.inner_jaxpr(eqn), kinds, ()).outputs[result]
        return kind._replace(unmirrored=eqn.primitive.name if eqn.effects else kind.unmirrored)
    unmirrored = next((k.unmirrored for k in kinds if k.unmirrored), None)
    if eqn.effects and eqn.primitive.name not in compat.VARIED:  # it asks which device this is, or the others
        unmirrored = eqn.primitive.name
    return Kind(data=data, noise=noise, varying=result_varying(eqn, kinds, result), unmirrored=unmirrored)


def _sliced(kind: Kind, length: int) -> Kind:
    """What one turn of a scan sees of a value that it goes along; a weight's own axis is one of stacked layers."""
    if not kind.weight:
        return outside(kind)._replace(joined=2 if kind.joined else 0)
    breadth = max(kind.breadth - (length > 1), 0)
    gained = kind.gained and kind.gained[1:]
    return outside(kind)._replace(breadth=breadth, stack=(*kind.stack, length), gained=gained)


def settle(kinds: Sequence[Kind]) -> None:
    """Copies of an activation that a weight scaled go where nothing can show the weight to be a gain."""
    for kind in kinds:
        if kind.fan:
            kind.fan[0].pending = False


def _fan(eqn: Any, kinds: Sequence[Kind], operand: int) -> Any:
    """What an operand's ``Kind.fan`` is in the result, or None: it is no product by hand, or settled to be one.

    Copies that a weight scaled are none where they scale another activation, which varies as the weight does; a weight that
    an activation scaled is none where it is the weight of a product.
    """
    name, (product, axes, ordered) = eqn.primitive.name, kinds[operand].fan
    if name in compat.LAYOUT and len(kinds) == 1:
        return product, layout_varying(eqn, axes), ordered and name in compat.ORDERED
    if name == "neg":
        return product, axes, ordered
    other = kinds[1 - operand] if len(kinds) == 2 else CONSTANT
    if kinds[operand].weight and name in compat.BILINEAR and other.data and not _along_inputs(eqn, operand, axes):
        return None
    if (name == "mul" or (name == "div" and operand == 0)) and not (
        other.weight or (kinds[operand].weight and other.data)
    ):
        own = varies(other, eqn.invars[1 - operand].aval)
        covers = other.active and len(own) == len(axes) and all(o for o, a in zip(own, axes, strict=True) if a)
        return None if covers else (product, axes, ordered)
    if name in {"add", "sub"}:  # w_k x z + b_k, and with it w_k x y_k, is the same gain of x (y_k + z)
        if other.static:
            return product, axes, ordered
        if ordered and other.gain and other.gain[2] and other.gain[0] == product.params:
            return None
    settle([kinds[operand]])
    return None


def _split_varying(eqn: Any, kinds: Sequence[Kind]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Along which axes of a result the weights vary, and along which the activations do."""
    still = lambda k, v: k._replace(varying=(False,) * len(v.aval.shape))
    pairs = list(zip(kinds, eqn.invars, strict=True))
    ours = result_varying(eqn, [k if k.weight else still(k, v) for k, v in pairs])
    return ours, result_varying(eqn, [k if k.activity else still(k, v) for k, v in pairs])


def _shifts(eqn: Any, kinds: Sequence[Kind]) -> bool:
    """Whether an activation is added to a matrix, rather than a matrix to activations: it varies along fewer axes, or is a part."""
    if eqn.primitive.name in compat.WRITTEN | compat.ADDED:
        return kinds[0].weight
    if eqn.primitive.name not in compat.ELEMENTWISE:
        return False
    ours, theirs = _split_varying(eqn, kinds)
    return ours != theirs and all(w or not a for w, a in zip(ours, theirs, strict=True))


def _along_inputs(eqn: Any, operand: int, axes: tuple[bool, ...]) -> bool:
    """Whether any of these axes of a product's operand is summed over."""
    numbers = eqn.params["dimension_numbers"]
    inputs = numbers[0][operand] if eqn.primitive.name == "dot_general" else numbers.rhs_spec[1:]
    return any(axes[a] for a in inputs)


def _either(gains: Sequence[Any]) -> Any:
    """The gain of a value that may be any of these."""
    found = [g for g in gains if g]
    if not found:
        return None
    return frozenset().union(*(g[0] for g in found)), tuple(map(any, zip(*(g[1] for g in found), strict=True))), False


def _keep_obstacles(first: Plan, last: Plan) -> None:
    """What B could not follow in another plan of the same jaxpr, it cannot in this."""
    for i, (before, after) in enumerate(zip(first.steps, last.steps, strict=True)):
        if after.product is None and before.product is not None and before.product.obstacle:
            last.steps[i] = after._replace(product=before.product)
        # (Inside what no error went through in the first there was nothing to plan.)
        for inner_before, inner_after in zip(before.plans, after.plans, strict=False):
            _keep_obstacles(inner_before, inner_after)


def note_bias(eqn: Any, kinds: list[Kind], plan: Plan) -> None:
    """A weight added to a product's output, and varying along nothing but its outputs, is that layer's bias."""
    for i in (0, 1):
        y, b, var = kinds[i], kinds[1 - i], eqn.invars[1 - i]
        if y.product is None or not b.static or b.obstacle or eqn.primitive.name == "sub":
            continue
        if all(not v or a in y.product.output_axes() for a, v in enumerate(varies(b, var.aval))):
            y.product.bias = (plan, var)
            y.product.scaled |= b.gained is not None


class Analyser:
    """Builds plans, and notes what parameters do.

    Attributes:
      shared: the parameters that do anything but multiply an activation.
      roles: for each parameter what it does beside its products: "added", "gain".
      within: whether this is inside a custom derivative, where an error may come back through what has none of its own.
    """

    def __init__(self, within: bool = False) -> None:
        self.within = within
        self.shared: set[int] = set()
        self.roles: dict[int, set[str]] = {}

    def plan(self, jaxpr: Any, kinds: Sequence[Kind], lengths: tuple[int, ...]) -> Plan:
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Kind] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        env.update(zip(jaxpr.invars, kinds, strict=True))

        def read(v: Any) -> Kind:
            return env[v] if isinstance(v, compat.Var) else CONSTANT

        plan = Plan(jaxpr, consts, [], env, [])
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            step, outs = self.step(eqn, compat.binder(eqn, jaxpr), operands, lengths, plan)
            if not step.plans:
                self.note_uses(step, operands, outs)
            plan.steps.append(step)
            env.update(zip(eqn.outvars, outs, strict=True))
        plan.outputs.extend(read(v) for v in jaxpr.outvars)
        return plan

    def step(
        self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...], plan: Plan
    ) -> tuple[Step, list[Kind]]:
        name = compat.primitive_name(eqn)
        if not any(k.active for k in kinds):
            return Step(eqn, "bind", bind), [_inactive(eqn, kinds, i) for i in range(len(eqn.outvars))]
        if not eqn.outvars:  # a print, a check: nothing comes of it, and no error comes back
            return Step(eqn, "bind", bind), []
        if name in compat.INLINED or name in compat.REMAT:
            inner = self.plan(compat.inner_jaxpr(eqn), kinds, lengths)
            return Step(eqn, "remat" if name in compat.REMAT else "inline", None, (inner,)), inner.outputs
        if name in {"scan", "cond", "shard_map"}:
            settle(kinds)
            return getattr(self, name)(eqn, kinds, lengths)
        if name in compat.APART and len(eqn.outvars) == len(kinds) > 1:
            outs = [k if name == "optimization_barrier" else self.one(eqn, [k], i) for i, k in enumerate(kinds)]
            return Step(eqn, "follow", bind), outs
        fan = next(filter(None, [_fan(eqn, kinds, i) for i, k in enumerate(kinds) if k.fan]), None)
        weights = [i for i, k in enumerate(kinds) if k.weight]
        if not weights:
            return self.activity(eqn, bind, kinds, fan, lengths)
        if compat.has_jaxpr(eqn):
            return self.opaque(eqn, bind, kinds, lengths)
        if name in compat.BILINEAR and not is_elementwise(eqn):
            return self.bilinear(eqn, bind, kinds, lengths)
        if gain_operand(eqn, kinds) is None and any(k.activity for k in kinds):
            return self.beside(eqn, bind, kinds, fan, lengths, plan)
        if name in compat.AFFINE:
            note_bias(eqn, kinds, plan)
        outs = [self.one(eqn, kinds, i)._replace(fan=fan) for i in range(len(eqn.outvars))]
        out = outs[0]
        if out.activity or not out.weight:
            self.note(kinds, "added")
        action = "follow" if out.weight and not out.obstacle else "own" if out.static else "bind"
        gain = gain_operand(eqn, kinds) if action == "follow" else None
        if gain is not None and kinds[gain].activity:
            made = [k if i != gain else k._replace(active=True) for i, k in enumerate(kinds)]
            product = Product(eqn, bind, 1 - gain, made, f"{name} by an activation", lengths)
            product.pending = product.gain = True
            axes = varies(kinds[gain], eqn.invars[gain].aval) or (False,) * eqn.outvars[0].aval.ndim
            outs = [out._replace(fan=(product, axes, True))]
            return Step(eqn, action, bind, gain=gain, product=product), outs
        norm = gain is not None and bool(kinds[0].params & kinds[1].params)
        by_hand = name in compat.MULTIPLIED and out.activity
        guarded = tuple(i for i, k in enumerate(kinds) if by_hand and k.data and not k.active)
        return Step(eqn, action, bind, gain=gain, norm=norm, guarded=guarded), outs

    def one(self, eqn: Any, kinds: Sequence[Kind], result: int) -> Kind:
        """The kind of one result of an equation in which no activation meets a weight."""
        if not any(k.weight for k in kinds):
            return activation(kinds) if any(k.active for k in kinds) else _inactive(eqn, kinds, result)
        return weight_kind(eqn, kinds, result)

    def refused(
        self, eqn: Any, bind: Bind, kinds: list[Kind], weight: int, reason: str, lengths: tuple[int, ...]
    ) -> tuple[Step, list[Kind]]:
        """A use that sends errors through the weight: a product with an obstacle."""
        product = Product(eqn, bind, weight, kinds, reason, lengths)
        product.needs_feedback = True
        return Step(eqn, "bind", bind, (), product), [activation(kinds)] * len(eqn.outvars)

    def activity(
        self, eqn: Any, bind: Bind, kinds: list[Kind], fan: Any, lengths: tuple[int, ...]
    ) -> tuple[Step, list[Kind]]:
        """Activations, constants and data alone."""
        name = compat.primitive_name(eqn)
        terms, axes = summed(eqn, kinds)
        gain = kinds[terms].gain
        if gain and any(gain[1][a] for a in axes):  # x * w, then a sum along w
            made = [k._replace(params=gain[0], active=True) if i == terms else CONSTANT for i, k in enumerate(kinds)]
            product = Product(eqn, bind, terms, made, f"mul, then {name}", lengths)
            product.needs_feedback = product.gain = True
            return Step(eqn, "bind", bind, (), product), [activation(kinds)] * len(eqn.outvars)
        joined = max(k.joined for k in kinds)
        meets = joined == 2 and name in compat.BILINEAR | compat.MULTIPLIED and sum(k.active for k in kinds) > 1
        if meets or (joined and name in {"reduce_prod", "cumprod"}):
            cut = next(k for k in kinds if k.joined == joined)
            made = [k._replace(params=k.within) if k is cut else k for k in kinds]
            return self.refused(
                eqn, bind, made, kinds.index(cut), f"{name} with a part of what it was joined to", lengths
            )
        if name in compat.TAKES and joined:
            joined = 2
        elif name not in compat.LAYOUT | compat.JOINED | compat.WRITTEN:
            joined = 0
        within = frozenset().union(*(k.within for k in kinds)) if joined else frozenset()
        outs = []
        for i, v in enumerate(eqn.outvars):
            smooth = name != "stop_gradient" and jnp.issubdtype(v.aval.dtype, jnp.inexact)
            gain, varying = carried_gain(eqn, kinds), result_varying(eqn, kinds, i)
            outs.append(
                Kind(
                    data=True,
                    active=smooth or self.within,
                    varying=varying,
                    gain=gain,
                    fan=fan,
                    joined=joined,
                    within=within,
                )
            )
        same = name in compat.LAYOUT and eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape
        if same and name not in {"transpose", "rev"}:
            outs[0] = outs[0]._replace(product=kinds[0].product)
        return Step(eqn, "bind", bind), outs

    def beside(
        self, eqn: Any, bind: Bind, kinds: list[Kind], fan: Any, lengths: tuple[int, ...], plan: Plan
    ) -> tuple[Step, list[Kind]]:
        """A weight beside an activation, in a primitive that is no product: added, a gain, or refused."""
        name = compat.primitive_name(eqn)
        step = Step(eqn, "bind", bind)
        weights = [i for i, k in enumerate(kinds) if k.weight]
        if not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):
            return step, [Kind(data=True)] * len(eqn.outvars)  # a comparison
        masks = name == "select_n" and kinds[0].weight
        joint = [i for i in weights if kinds[i].joint and any(varies(kinds[i], eqn.invars[i].aval))]
        if joint:
            return self.refused(eqn, bind, kinds, joint[0], str(kinds[joint[0]].obstacle), lengths)
        if len(eqn.outvars) == 1 and name in compat.BESIDE and not masks:
            if kinds[weights[0]].breadth > 1 and _shifts(eqn, kinds):
                return self.refused(eqn, bind, kinds, weights[0], f"{name} of an activation to a matrix", lengths)
            if name in compat.AFFINE:
                note_bias(eqn, kinds, plan)
            self.note(kinds, "added")
            out = activation(kinds)._replace(varying=result_varying(eqn, kinds), fan=fan)
            if name in compat.JOINED | compat.WRITTEN and any(k.breadth > 1 for k in kinds):
                out = out._replace(joined=1, within=union_of(kinds).params)
            return step, [out]
        widest = max(weights, key=lambda i: kinds[i].breadth)
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
            return self.refused(eqn, bind, kinds, widest, f"{name} of complex numbers", lengths)
        if len(eqn.outvars) > 1 or not (name in compat.MULTIPLIED or masks or is_elementwise(eqn)):
            return self.refused(eqn, bind, kinds, widest, name, lengths)
        if kinds[widest].breadth > 1:
            step, outs = self.refused(eqn, bind, kinds, widest, f"{name}, element by element", lengths)
            assert step.product is not None
            step.product.gain = True
            return step, outs
        self.note(kinds, "gain")
        ours, theirs = _split_varying(eqn, kinds)
        kind = activation(kinds)._replace(
            gain=(union_of(kinds).params, ours, True), varying=tuple(a or b for a, b in zip(ours, theirs, strict=True))
        )
        if any(w and not a for w, a in zip(ours, theirs, strict=True)):
            product = Product(eqn, bind, widest, kinds, f"{name} by copies of an activation", lengths)
            product.pending = product.gain = True
            axes = tuple(w and not a for w, a in zip(ours, theirs, strict=True))
            return step._replace(product=product), [kind._replace(fan=(product, axes, True))]
        return step, [kind]

    def bilinear(self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        weights = [i for i, k in enumerate(kinds) if k.weight]
        candidates = [i for i in weights if kinds[i].static]
        matrices = [i for i in weights if is_matrix_operand(eqn, i, varies(kinds[i], eqn.invars[i].aval))]
        reason = None
        if len(weights) == 2 and not any(k.data for k in kinds):
            wide = [i for i in matrices if kinds[i].breadth > 1] or matrices
            if len(wide) == 1 and not kinds[0].params & kinds[1].params and not kinds[wide[0]].obstacle:
                # A vector (a learned initial state, a code) has the part of an activity.
                product = Product(eqn, bind, wide[0], kinds, None, lengths)
                union = union_of(kinds)._replace(obstacle=name, varying=result_varying(eqn, kinds))
                return Step(eqn, "product", bind, (), product), [union._replace(breadth=sum(union.varying or ()))]
            union = union_of(kinds)
            kind = union._replace(obstacle=f"{name} of two parameters", joint=union.joint or bool(matrices))
            return Step(eqn, "own", bind), [kind]
        if len(weights) == 1 and not kinds[1 - weights[0]].data:  # with a constant: a map of the weight
            kind = weight_kind(eqn, kinds)
            return Step(eqn, "follow" if not kind.obstacle else "own" if kind.static else "bind", bind), [kind]
        if not candidates:
            # What data has touched is an activity of neurons to weights, and to other activities too, unless it is a matrix
            # between the summed axes and those that remain.
            candidates = matrices
            if len(candidates) == 2:
                reason = f"{name} of two parameters that data has touched"
        if not candidates:
            if any(k.breadth > 1 and not k.per_example for k in kinds) and any(k.activity for k in kinds):
                return self.refused(eqn, bind, kinds, weights[0], name, lengths)
            return Step(eqn, "bind", bind), [activation(kinds)]
        weight = candidates[0]
        reason = reason or kinds[weight].obstacle
        if jnp.issubdtype(out.dtype, jnp.complexfloating):
            reason = f"{name} of complex numbers"
        product = Product(eqn, bind, weight, kinds, reason, lengths)
        if reason and not product.needs_feedback:
            product.obstacle, product.followed = None, False
        action = "bind" if product.obstacle else "product"
        return Step(eqn, action, bind, (), product), [activation(kinds)._replace(product=product)]

    def note(self, kinds: Sequence[Kind], role: str) -> None:
        for kind in kinds:
            for leaf in kind.params:
                self.roles.setdefault(leaf, set()).add(role)

    def note_uses(self, step: Step, kinds: list[Kind], outs: list[Kind]) -> None:
        """A weight may be laid out anew and multiply an activation; any other use adds a gradient that B has not."""
        for i, kind in enumerate(kinds):
            multiplies = step.action == "product" and step.product is not None and step.product.weight == i
            followed = step.action == "follow" and all(k.static for k in outs if k.params)
            if kind.weight and outs and not multiplies and not followed:
                self.shared |= kind.params

    def note_joined(self, kinds: Sequence[Kind], joined: Sequence[Kind]) -> None:
        """A weight that a loop or a branch makes an activation (an initial state) has a use of its own there."""
        for kind, out in zip(kinds, joined, strict=True):
            if kind.weight and not out.static:
                self.shared |= kind.params
                self.note([kind], "added")

    def opaque(self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        """A call that cannot be opened: a custom derivative (its backward pass would be lost), a while, a kernel."""
        name, count = compat.primitive_name(eqn), len(eqn.outvars)
        weights = [i for i, k in enumerate(kinds) if k.weight]
        union = union_of(kinds)
        widest = max(weights, key=lambda i: kinds[i].breadth)
        if (
            name == "while" and not self.within and any(k.activity for k in kinds)
        ):  # JAX itself has no backward pass through it
            return Step(eqn, "own" if not union.data else "bind", bind), [activation(kinds)] * count
        if not any(k.activity for k in kinds) and union.per_example == 1:  # of rows looked up
            self.note(kinds, "added")
            return Step(eqn, "bind", bind), [activation(kinds)] * count
        if not any(k.activity for k in kinds):
            outs = [union._replace(obstacle=union.obstacle or name) for _ in eqn.outvars]
            guarded = tuple(i for i, k in enumerate(kinds) if k.data and not k.active)
            return Step(eqn, "own" if union.static else "bind", bind, guarded=guarded), outs
        if name in compat.CUSTOM and kinds[widest].breadth < 2:  # a gain or a threshold may be in it, but no product
            within = Analyser(within=True)
            inner = within.plan(compat.inner_jaxpr(eqn), kinds, lengths)
            self.shared |= within.shared.union(*(k.params for k in kinds))
            settle(inner.outputs)
            if not any(p.needs_feedback for p in inner.products()):
                self.note(kinds, "gain")
                return Step(eqn, "bind", bind), [activation(kinds)] * count
        return self.refused(eqn, bind, kinds, widest, name, lengths)

    def shard_map(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        """Each device's part of a weight has its part of B."""
        inner = [outside(k) for k in kinds]
        plan = self.plan(compat.inner_jaxpr(eqn), inner, (*lengths, compat.sharding(eqn.params).devices))
        settle(plan.outputs)
        outs = [outside(k._replace(obstacle=k.obstacle or "shard_map") if k.weight else k) for k in plan.outputs]
        return Step(eqn, "shard_map", None, (plan,)), outs

    def cond(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        plans = tuple(self.plan(branch, kinds[1:], lengths) for branch in eqn.params["branches"])
        for plan in plans:
            settle([k for k in plan.outputs if not k.weight])
        outs = list(plans[0].outputs)
        for plan in plans[1:]:
            outs = [join(a, b, "cond") for a, b in zip(outs, plan.outputs, strict=True)]
        if kinds[0].data:
            outs = [k._replace(data=True, unmirrored="cond") if k.weight else k for k in outs]
        for plan in plans:
            self.note_joined(plan.outputs, outs)
        gains = [_either([plan.outputs[i].gain for plan in plans]) for i in range(len(outs))]
        fans = [
            next((p.outputs[i].fan for p in plans if p.outputs[i].fan and k.weight), None) for i, k in enumerate(outs)
        ]
        for i, k in enumerate(outs):
            settle([p.outputs[i] for p in plans if not k.weight])
        kept = zip(outs, gains, fans, strict=True)
        return Step(eqn, "cond", None, plans), [outside(k)._replace(gain=g, fan=f) for k, g, f in kept]

    def scan(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        jaxpr, _ = compat.open_jaxpr(eqn.params["jaxpr"])
        consts, carries = compat.scan_sizes(eqn.params)
        inner = [_sliced(k, eqn.params["length"]) if i >= consts + carries else outside(k) for i, k in enumerate(kinds)]
        lengths = (*lengths, eqn.params["length"])
        changed = [c for c in range(carries) if jaxpr.outvars[c] is not jaxpr.invars[consts + c]]
        start, shared = list(inner), set(self.shared)
        first: Plan | None = None
        while True:
            plan = self.plan(eqn.params["jaxpr"], inner, lengths)
            settle(plan.outputs)
            # A state that starts as a constant (zeros) and then is an activity is one from the start: what the first turn
            # multiplies it with is a product, and no weight.
            late = [consts + c for c in changed if start[consts + c] == CONSTANT and plan.outputs[c].data]
            if late:
                for i in late:
                    start[i] = Kind(data=True)
                inner, self.shared, first = list(start), set(shared), None
                continue
            first = first or plan
            settled = True
            for c in changed:
                i = consts + c
                old = inner[i]
                inner[i] = join(old, plan.outputs[c], "scan")
                if inner[i].static:
                    inner[i] = inner[i]._replace(unmirrored="scan")
                settled &= inner[i] == old
            if settled:
                break
        carried = inner[consts : consts + carries]
        if any(a.static and not b.static for a, b in zip(kinds[consts : consts + carries], carried, strict=True)):
            # The first turn meets the weight itself, whatever its carry is from then on.
            _keep_obstacles(first, plan)
        self.note_joined(kinds[consts : consts + carries], carried)
        # What the last turn multiplied may be summed behind the loop.
        outs = [k._replace(gain=out.gain) for k, out in zip(carried, plan.outputs[:carries], strict=True)]
        for kind in plan.outputs[carries:]:
            gain = kind.gain and (kind.gain[0], (False, *kind.gain[1]), False)
            kind = outside(kind)._replace(stack=kind.stack[: len(lengths) - 1], gain=gain)
            if kind.weight and kind.gained:
                kind = kind._replace(obstacle=kind.obstacle or "scan of a weight with gains", gained=None)
            outs.append(kind)
        return Step(eqn, "scan", None, (plan,)), outs
