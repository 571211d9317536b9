"""The walk over a jaxpr that finds its products: what to do at each equation, loops and branches included."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from wmkp.program import compat
from wmkp.program.copies import Twice, cut, fan_out, settle, sources
from wmkp.program.kinds import (
    CAST,
    CONSTANT,
    Gain,
    Kind,
    activation,
    carried_gain,
    everywhere,
    gain_operand,
    is_matrix_operand,
    join,
    outside,
    scaled_by_data,
    summed,
    union_of,
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


class Plan(NamedTuple):
    """A jaxpr with what to do at each of its equations, and the kinds of its values."""

    jaxpr: Any
    consts: Sequence[Any]
    steps: list[Step]
    kinds: dict[Any, Kind]
    outputs: list[Kind]
    alike: list[int]  # for each output the place of the first that has its value

    def products(self) -> Iterator[Product]:
        """Every product, those of inner plans included, in the order of evaluation."""
        for step in self.steps:
            if step.product is not None and not step.product.pending:
                yield step.product
            for plan in step.plans:
                yield from plan.products()


def _invariant(jaxpr: Any, consts: int, carries: int) -> set[Any]:
    """The variables of a scan's body that are the same in every turn."""
    kept = [v for v, out in zip(jaxpr.invars[consts:], jaxpr.outvars[:carries], strict=False) if v is out]
    same = {*jaxpr.constvars, *jaxpr.invars[:consts], *kept}
    for eqn in jaxpr.eqns:
        if not eqn.effects and all(v in same for v in eqn.invars if isinstance(v, compat.Var)):
            same.update(eqn.outvars)
    return same


def _either(a: Gain | None, b: Gain | None) -> Gain | None:
    """The gain of a value that may be either."""
    if a is None or b is None:
        return a or b
    return a[0] | b[0], tuple(map(operator.or_, a[1], b[1]))


def _keep_obstacles(first: Plan, last: Plan) -> None:
    """What B could not follow in another plan of the same jaxpr, it cannot in this."""
    for i, (before, after) in enumerate(zip(first.steps, last.steps, strict=True)):
        if after.product is None and before.product is not None and before.product.obstacle:
            last.steps[i] = after._replace(product=before.product)
        # (Inside what no error went through in the first there was nothing to plan.)
        for inner_before, inner_after in zip(before.plans, after.plans, strict=False):
            _keep_obstacles(inner_before, inner_after)


class Analyser:
    """Builds plans, and notes the parameters that do anything but multiply an activation.

    Attributes:
      shared: these parameters.
      custom: whether this is inside a custom derivative, where an error may come back through what has none of its own (a
        spike, a weight's sign).
    """

    def __init__(self, custom: bool = False) -> None:
        self.shared: set[int] = set()
        self.custom = custom

    def plan(self, jaxpr: Any, kinds: Sequence[Kind], lengths: tuple[int, ...]) -> Plan:
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Kind] = dict(zip(jaxpr.constvars, [CONSTANT] * len(jaxpr.constvars), strict=True))
        env.update(zip(jaxpr.invars, kinds, strict=True))

        def read(v: Any) -> Kind:
            return env[v] if isinstance(v, compat.Var) else CONSTANT

        plan, twice = Plan(jaxpr, consts, [], env, [], []), Twice()
        for eqn in jaxpr.eqns:
            bind = compat.binder(eqn, jaxpr)
            operands = [read(v) for v in eqn.invars]
            step, outs = self.step(eqn, bind, operands, lengths, plan)
            if not step.plans:
                product, outs = fan_out(eqn, step.product, bind, operands, outs, lengths)
                step = step._replace(product=product)
                self.note_uses(step, operands, outs)
            plan.steps.append(step)
            alike = step.plans[0].alike if step.action in {"inline", "remat"} else None
            env.update(zip(eqn.outvars, twice.mark(eqn, operands, outs, alike), strict=True))
        plan.outputs.extend(read(v) for v in jaxpr.outvars)
        plan.alike.extend(twice.alike(jaxpr.outvars))
        return plan

    def step(
        self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...], plan: Plan
    ) -> tuple[Step, list[Kind]]:
        name, count = compat.primitive_name(eqn), len(eqn.outvars)
        if not any(k.active for k in kinds):
            unmirrored = next((k.unmirrored for k in kinds if k.unmirrored), None)
            if eqn.effects and name not in compat.VARIED:  # it asks which device this is, or the others
                unmirrored = name
            union = union_of(kinds)
            made_of = frozenset() if name in compat.BILINEAR else union.made_of
            return Step(eqn, "bind", bind), [Kind(data=union.data, unmirrored=unmirrored, made_of=made_of)] * count
        if not count:  # a print, a check: nothing comes of it, and no error comes back
            return Step(eqn, "bind", bind), []
        if name in compat.INLINED or name in compat.REMAT:
            kinds = [k._replace(sources=sources(eqn, kinds, i)) if k.active else k for i, k in enumerate(kinds)]
            inner = self.plan(compat.inner_jaxpr(eqn), kinds, lengths)
            # JAX's cached jaxprs have the same variables each time: those within are not told apart outside.
            known = frozenset(s for k in kinds for s in k.sources)
            outs = [k._replace(sources=tuple(s for s in k.sources if s in known)) for k in inner.outputs]
            return Step(eqn, "remat" if name in compat.REMAT else "inline", None, (inner,)), outs
        if name == "scan":
            return self.scan(eqn, kinds, lengths)
        if name == "cond":
            return self.cond(eqn, kinds, lengths)
        if name == "shard_map":
            return self.shard_map(eqn, kinds, lengths)
        terms, axes = summed(eqn, kinds)
        scaled = kinds[terms].gain
        if scaled and any(scaled[1][a] for a in axes) and not kinds[terms].masked:
            # x * w, then a sum along w: a projection written by hand. (Of synapses that data scales it is a penalty on them.)
            kind = Kind(scaled[0], varying=everywhere(eqn.invars[terms].aval))
            product = Product(eqn, bind, 0, [kind, activation(kinds)], f"mul, then {name}", lengths)
            return Step(eqn, "bind", bind, (), product), [activation(kinds)] * count
        if name in compat.BILINEAR and union_of(kinds).made_of:
            made = [k._replace(params=k.made_of) if k.made_of else k for k in kinds]
            product = Product(eqn, bind, 0 if kinds[0].made_of else 1, made, CAST, lengths)
            return Step(eqn, "bind", bind, (), product), [activation(kinds)] * count
        if name in compat.BILINEAR:
            return self.bilinear(eqn, bind, kinds, lengths)
        weights = [k for k in kinds if k.weight]
        if compat.has_jaxpr(eqn):
            return self.opaque(eqn, bind, kinds, lengths)
        if not weights:
            out = activation(kinds)._replace(gain=carried_gain(eqn, kinds))
            same_shape = eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape
            if name in compat.LAYOUT and same_shape and name not in {"transpose", "rev"}:
                out = out._replace(product=kinds[0].product)
            out = cut(eqn, kinds, out)
            smooth = name != "stop_gradient" and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
            if not smooth and not self.custom:
                out = Kind(data=True)
            return Step(eqn, "bind", bind), [out] * count
        statics = [i for i, k in enumerate(kinds) if k.static]
        joint = [i for i in statics if kinds[i].joint and any(kinds[i].varying)]
        if joint and any(k.data for k in kinds) and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
            # A network of parameters alone (a learned code times W), whose errors come back from the activities that it meets.
            product = Product(eqn, bind, joint[0], kinds, kinds[joint[0]].joint, lengths)
            return Step(eqn, "bind", bind, (), product), [activation(kinds)] * count
        if statics and any(k.data for k in kinds) and name not in compat.LOCAL:
            product = Product(eqn, bind, statics[0], kinds, name, lengths)
            return Step(eqn, "bind", bind, (), product), [activation(kinds)] * count
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating) and name == "mul" and union_of(kinds).data:
            product = Product(
                eqn, bind, [k.weight for k in kinds].index(True), kinds, "mul of complex numbers", lengths
            )
            return Step(eqn, "bind", bind, (), product), [activation(kinds)] * count
        if name in compat.AFFINE:
            self.note_bias(eqn, kinds, plan)
        out = cut(eqn, kinds, weight_kind(eqn, kinds, self.custom))
        action = "follow" if out.weight and not out.obstacle else "own" if out.static else "bind"
        gain = gain_operand(eqn, kinds) if action == "follow" else None
        norm = gain is not None and bool(kinds[0].params & kinds[1].params)
        return Step(eqn, action, bind, gain=gain, norm=norm), [out] * count

    def bilinear(self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        name = eqn.primitive.name
        union = union_of(kinds)
        if (scaled := scaled_by_data(eqn, kinds)) is not None:  # as a multiplication by a mask
            kind = kinds[scaled]
            out = kind._replace(data=True, plain=False, masked=True, unmirrored=kind.unmirrored or "data")
            return Step(eqn, "follow", bind), [out._replace(varying=everywhere(eqn.outvars[0].aval))]
        statics = [i for i, k in enumerate(kinds) if k.static]
        weights = [i for i, k in enumerate(kinds) if k.weight]
        if not union.data or (union.masked and any(not k.data and not k.weight for k in kinds)):
            # A map of weights alone, or of one that data has masked. With a constant it is linear, but it mixes elements.
            reason = f"{name} of two parameters" if len(weights) == 2 else f"{name} with a constant array"
            out = union._replace(obstacle=union.obstacle or reason, varying=everywhere(eqn.outvars[0].aval))
            if len(weights) == 2 and not kinds[0].params & kinds[1].params:
                matrices = [i for i in weights if is_matrix_operand(eqn, i, kinds[i].varying)]
                if len(matrices) == 2:  # (a vector may be the weights of one neuron)
                    matrices = [i for i in matrices if sum(kinds[i].varying) > 1] or matrices
                if len(matrices) == 1 and not kinds[matrices[0]].obstacle:
                    # A vector (a learned initial state, a code) has the part of an activity.
                    product = Product(eqn, bind, matrices[0], kinds, None, lengths)
                    return Step(eqn, "product", bind, (), product), [out]
                if matrices:
                    out = out._replace(joint=out.joint or reason)
            return Step(eqn, "own" if out.static else "bind", bind), [out]
        out = Kind(data=True, active=True)
        # A weight that data has touched is an activity of neurons (a looked-up embedding, a bias added) to weights, and
        # to other activities too unless it is a matrix between the summed axes and those that remain.
        candidates = statics
        if all(k.data for k in kinds):
            candidates = [i for i in weights if is_matrix_operand(eqn, i, kinds[i].varying)]
        if not candidates:
            return Step(eqn, "bind", bind), [out]
        weight = candidates[0]
        obstacle = kinds[weight].joint or kinds[weight].obstacle
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
            if (
                kind.weight
                and outs
                and not multiplies
                and not (step.action == "follow" and all(k.static for k in outs))
            ):
                self.shared |= kind.params

    def note_joined(self, kinds: Sequence[Kind], joined: Sequence[Kind]) -> None:
        """A weight that a loop or a branch makes an activation (an initial state) has a use of its own there."""
        for kind, out in zip(kinds, joined, strict=True):
            if kind.weight and not out.static:
                self.shared |= kind.params

    def note_bias(self, eqn: Any, kinds: list[Kind], plan: Plan) -> None:
        """A weight added to a product's output, and varying along nothing but its outputs, is that layer's bias."""
        for i in (0, 1):
            y, b, var = kinds[i], kinds[1 - i], eqn.invars[1 - i]
            if y.product is None or not b.static or b.obstacle or eqn.primitive.name == "sub":
                continue
            if all(not v or a in y.product.output_axes() for a, v in enumerate(b.varying)):
                y.product.bias = (plan, var)
                y.product.scaled |= bool(b.scaled)

    def opaque(self, eqn: Any, bind: Bind, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        """A call that cannot be opened: a custom derivative (its backward pass would be lost), a while, a kernel."""
        name, count = compat.primitive_name(eqn), len(eqn.outvars)
        weights = [i for i, k in enumerate(kinds) if k.weight]
        step = Step(eqn, "own" if weights and not union_of(kinds).data else "bind", bind)
        if not weights:
            return step, [activation(kinds)] * count
        if name in compat.CUSTOM:
            within = Analyser(custom=True)
            inner = within.plan(compat.inner_jaxpr(eqn), kinds, lengths)
            self.shared |= within.shared
            settle(inner.outputs)
            hidden = sorted(inner.products(), key=lambda p: p.obstacle is None)
            reason = union_of(kinds).obstacle or name
            outs = [k._replace(obstacle=reason) if k.weight else k for k in inner.outputs]
            if not hidden:
                return step, outs
            weights = [i for i in weights if kinds[i].params & hidden[0].params] or weights
            product = Product(eqn, bind, weights[0], kinds, name, lengths)
            product.params = frozenset().union(*(p.params for p in hidden))  # of its operands, those in products
            return step._replace(product=product), outs
        if not any(k.data for k in kinds):
            union = union_of(kinds)
            return step, [union._replace(obstacle=name, varying=everywhere(v.aval)) for v in eqn.outvars]
        outs = [activation(kinds)] * count
        if name == "while" and not self.custom:  # JAX itself has no backward pass through it
            return step, outs
        return step._replace(product=Product(eqn, bind, weights[0], kinds, name, lengths)), outs

    def shard_map(self, eqn: Any, kinds: list[Kind], lengths: tuple[int, ...]) -> tuple[Step, list[Kind]]:
        """Each device's part of a weight has its part of B."""
        inner = [outside(k)._replace(copied=()) for k in kinds]
        plan = self.plan(compat.inner_jaxpr(eqn), inner, (*lengths, compat.sharding(eqn.params).devices))
        outs = [k._replace(obstacle=k.obstacle or "shard_map") if k.weight else k for k in plan.outputs]
        settle([*kinds, *outs])
        return Step(eqn, "shard_map", None, (plan,)), [outside(k)._replace(copied=()) for k in outs]

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
        outs = [outside(k) for k in outs]
        for plan in plans:  # what fans out in a branch goes on behind it, as long as there are copies; and so do gains
            for i, kind in enumerate(plan.outputs):
                fans = tuple(f for f in kind.fans if any(map(all, zip(outs[i].copied, f.along, strict=False))))
                settle([kind._replace(fans=tuple(f for f in kind.fans if f not in fans))])
                outs[i] = outs[i]._replace(fans=outs[i].fans + fans, gain=_either(outs[i].gain, kind.gain))
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
            scaled = tuple(axes[1:] for axes in kind.scaled) if sliced else kind.scaled
            inner[i] = outside(kind)._replace(varying=varying, stack=stack, copied=copied, scaled=scaled)
        settle(kinds)
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
                inner[i] = join(old, plan.outputs[c], everywhere(avals[i]), "scan")
                if inner[i].static:
                    inner[i] = inner[i]._replace(unmirrored="scan")
                settled &= inner[i] == old
            if settled:
                break
        if any(kind.static and not inner[consts + c].static for c, kind in enumerate(kinds[consts : consts + carries])):
            # The first turn meets the weight itself, whatever its carry is from then on.
            _keep_obstacles(first, plan)
        self.note_joined(kinds[consts : consts + carries], inner[consts : consts + carries])
        # What the last turn multiplied may be summed behind the loop.
        outs = [
            kind._replace(gain=out.gain)
            for kind, out in zip(inner[consts : consts + carries], plan.outputs[:carries], strict=True)
        ]
        same = _invariant(plan.jaxpr, consts, carries)
        for kind, var in zip(plan.outputs[carries:], plan.jaxpr.outvars[carries:], strict=True):
            varying = (kind.weight, *kind.varying)
            copied = ()
            if kind.active and not kind.synaptic:
                copied = (var in same, *(kind.copied or (False,) * len(var.aval.shape)))
            stack = kind.stack[: len(lengths) - 1]
            gain = kind.gain and (kind.gain[0], (False, *kind.gain[1]))
            scaled = tuple((True, *axes) for axes in kind.scaled)  # each turn has its own
            outs.append(outside(kind)._replace(varying=varying, stack=stack, copied=copied, gain=gain, scaled=scaled))
        return Step(eqn, "scan", None, (plan,)), outs
