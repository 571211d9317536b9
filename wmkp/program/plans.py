"""The walk over a jaxpr that finds its products and the roles of parameters, and plans each equation."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmkp.program import compat
from wmkp.program.kinds import (
    CONSTANT,
    Kind,
    Scaled,
    activation,
    gain_operand,
    is_elementwise,
    is_matrix_operand,
    join,
    outside,
    result_varying,
    rows_of,
    settle,
    still_scaled,
    summed,
    union_of,
    varies,
    varying_by,
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
    gain: int | None = None  # if followed: the operand that scales the other (``kinds.gain_operand``)
    norm: bool = False  # whether the gain is computed from the weight that it scales
    guarded: tuple[int, ...] = ()  # operands to which no error may go back: data that a weight scales elementwise


class Plan(NamedTuple):
    """A jaxpr with what to do at each of its equations, and the kinds of its values.

    ``refused``: what B cannot follow in a scan's first turn, where a carry is a weight still.
    """

    jaxpr: Any
    consts: Sequence[Any]
    steps: list[Step]
    kinds: dict[Any, Kind]
    outputs: list[Kind]
    refused: list[Product]

    def products(self) -> Iterator[Product]:
        """Every product, also of inner plans, in the order of evaluation."""
        yield from self.refused
        for step in self.steps:
            if step.product is not None and not step.product.pending:
                yield step.product
            for plan in step.plans:
                yield from plan.products()


Found = tuple[Step, list[Kind]]  # the step for an equation, and the kinds of its results


class Site(NamedTuple):
    """An equation and its place: the kinds of its operands, its plan, and the lengths of the loops around it."""

    eqn: Any
    bind: Bind
    kinds: list[Kind]
    lengths: tuple[int, ...]
    plan: Plan

    @property
    def name(self) -> str:
        return compat.primitive_name(self.eqn)

    @property
    def weights(self) -> list[int]:
        """Which operands are weights."""
        return [i for i, k in enumerate(self.kinds) if k.weight]

    @property
    def widest(self) -> int:
        """The weight whose parameter has the most axes."""
        return max(self.weights, key=lambda i: self.kinds[i].breadth)

    def gains_of_data(self) -> list[int]:
        """The parameters that elementwise multiply what another parameter and data make (such as looked-up rows)."""
        mixed = any(k.data and (k.obstacle or k.per_example == 1) for k in self.kinds)
        if not mixed or self.name not in compat.MULTIPLIED or gain_operand(self.eqn, self.kinds) is not None:
            return []
        return [i for i in self.weights if not self.kinds[i].data]

    def product(self, weight: int, obstacle: str | None, kinds: list[Kind] | None = None) -> Product:
        return Product(self.eqn, self.bind, weight, kinds or self.kinds, obstacle, self.lengths)

    def activations(self, action: str = "bind", product: Product | None = None) -> Found:
        """Results that are plain activations."""
        return Step(self.eqn, action, self.bind, (), product), [activation(self.kinds)] * len(self.eqn.outvars)

    def refused(self, weight: int, reason: str, *, gain: bool = False) -> Found:
        """A use that sends errors through the weight: a product with an obstacle. ``local`` allows it if it is a gain."""
        product = self.product(weight, reason)
        product.needs_feedback, product.gain = True, gain
        return self.activations("bind", product)


def _constant(value: Any) -> Kind:
    """The kind of a constant. If all its elements are equal (a state of zeros), it does not vary."""
    if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        return CONSTANT
    value = np.asarray(value)
    return Kind(varying=(False,) * value.ndim) if value.size and (value == value.flat[0]).all() else CONSTANT


def _inactive(eqn: Any, kinds: Sequence[Kind], result: int) -> Kind:
    """The kind of a result of constants and data."""
    random = eqn.primitive.name.startswith(compat.RANDOM)
    data = random or any(k.data for k in kinds)
    noise = random or (data and all(k.noise for k in kinds if k.data))
    unmirrored = next((k.unmirrored for k in kinds if k.unmirrored), None)
    if eqn.effects and eqn.primitive.name not in compat.VARIED:  # it depends on the device, or on other devices
        unmirrored = eqn.primitive.name
    return Kind(data=data, noise=noise, varying=result_varying(eqn, kinds, result), unmirrored=unmirrored)


def _sliced(kind: Kind, aval: Any) -> Kind:
    """The kind of one slice of a scanned value. The scanned axis is a parameter's own, of stacked layers, or a new one."""
    if not kind.weight:
        return outside(kind)._replace(joined=frozenset(), part=kind.joined | kind.part)
    axes = varies(kind, aval)
    own = axes[0] and sum(axes) <= kind.breadth  # a stack of whole parameters has an axis more than they
    return outside(kind)._replace(breadth=kind.breadth - own, stack=(*kind.stack, aval.shape[0]))


def either(plans: Sequence[Plan]) -> list[Kind]:
    """The kinds of the results of one of several branches."""
    bare = lambda kind: kind._replace(scaled=None) if kind.weight else kind
    outputs = zip(*(map(bare, plan.outputs) for plan in plans), strict=True)
    return [outside(functools.reduce(lambda a, b: join(a, b, "cond"), kinds)) for kinds in outputs]


def _sides(site: Site) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """The axes of a result along which the weights vary, and those along which the activations vary."""
    by = lambda counts: varying_by(site.eqn, site.kinds, counts)
    return by(lambda k: k.weight), by(lambda k: k.activity)


def _shifts(site: Site) -> bool:
    """Whether an activation is added to a matrix, not a matrix to activations: it varies along fewer axes, or is a part."""
    if site.name in compat.WRITTEN | compat.ADDED:
        return site.kinds[0].weight
    if site.name not in compat.ELEMENTWISE:
        return False
    ours, theirs = _sides(site)
    return ours != theirs and all(w or not a for w, a in zip(ours, theirs, strict=True))


def _note_bias(site: Site) -> None:
    """Notes a layer's bias: a weight added to a product's output that varies only along the outputs."""
    for i in (0, 1):
        y, b, var = site.kinds[i], site.kinds[1 - i], site.eqn.invars[1 - i]
        if y.product is None or not b.static or b.obstacle or site.name == "sub":
            continue
        if all(not v or a in y.product.output_axes() for a, v in enumerate(varies(b, var.aval))):
            y.product.bias = (site.plan, var)
            y.product.scaled |= b.gained


class Analyser:
    """Builds plans, and notes the roles of parameters.

    Attributes:
      shared: the parameters with other uses than multiplying an activation.
      roles: the other roles of each parameter: "added", "gain".
    """

    def __init__(self) -> None:
        self.shared: set[int] = set()
        self.roles: dict[int, set[str]] = {}

    def plan(self, jaxpr: Any, kinds: Sequence[Kind], lengths: tuple[int, ...]) -> Plan:
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Kind] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        env.update(zip(jaxpr.invars, kinds, strict=True))
        read = lambda v: env[v] if isinstance(v, compat.Var) else CONSTANT
        plan = Plan(jaxpr, consts, [], env, [], [])
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            step, outs = self.step(Site(eqn, compat.binder(eqn, jaxpr), operands, lengths, plan))
            if not step.plans:
                self.note_uses(step, operands, outs)
            plan.steps.append(step)
            env.update(zip(eqn.outvars, outs, strict=True))
        plan.outputs.extend(read(v) for v in jaxpr.outvars)
        return plan

    def step(self, site: Site) -> Found:
        eqn, bind, kinds, name = site.eqn, site.bind, site.kinds, site.name
        active = any(k.active for k in kinds)
        if name in compat.INLINED or (active and name in compat.REMAT):
            inner = self.plan(compat.inner_jaxpr(eqn), kinds, site.lengths)
            return Step(eqn, "remat" if name in compat.REMAT else "inline", None, (inner,)), inner.outputs
        if not active:
            return Step(eqn, "bind", bind), [_inactive(eqn, kinds, i) for i in range(len(eqn.outvars))]
        if not eqn.outvars:  # a print or a check: it has no result and gets no error
            return Step(eqn, "bind", bind), []
        if name in {"scan", "cond", "shard_map"}:
            return getattr(self, name)(site)
        if name in compat.APART and len(eqn.outvars) == len(kinds) > 1:
            outs = [k if name == "optimization_barrier" else self.one(eqn, [k], i) for i, k in enumerate(kinds)]
            return Step(eqn, "follow", bind), outs
        if any(k.activity for k in kinds) and any(k.weight for k in kinds) and len(rows_of(kinds)) == 1:
            # Rows looked up, and what is made of them (their norm): the errors are theirs alone.
            self.note(kinds, "added")
            kinds = [activation([k]) if k.weight else k for k in kinds]
            site = site._replace(kinds=kinds)
        scaled = next(filter(None, [still_scaled(eqn, kinds, i) for i, k in enumerate(kinds) if k.scaled]), None)
        if not site.weights:
            step, outs = self.activity(site)
        elif compat.has_jaxpr(eqn):
            step, outs = self.opaque(site)
        elif name in compat.BILINEAR and not is_elementwise(eqn):
            step, outs = self.bilinear(site)
        elif gain_operand(eqn, kinds) is None and any(k.activity for k in kinds):
            step, outs = self.beside(site)
        else:
            step, outs = self.weight(site)
        if scaled and len(outs) == 1 and not outs[0].scaled:
            outs = [outs[0]._replace(scaled=scaled)]
        return step, outs

    def one(self, eqn: Any, kinds: Sequence[Kind], result: int) -> Kind:
        """The kind of one result of an equation in which no activation meets a weight."""
        if not any(k.weight for k in kinds):
            return activation(kinds) if any(k.active for k in kinds) else _inactive(eqn, kinds, result)
        return weight_kind(eqn, kinds, result)

    def weight(self, site: Site) -> Found:
        """Plans an equation of weights, constants and data; or of an activation that scales a weight or its neurons."""
        eqn, bind, kinds, name = site.eqn, site.bind, site.kinds, site.name
        gains = site.gains_of_data()
        for i in gains:
            if kinds[i].breadth > 1:
                return site.refused(i, f"{name}, element by element", gain=True)
            self.note([kinds[i]], "gain")
        if name in compat.AFFINE:
            _note_bias(site)
        outs = [self.one(eqn, kinds, i)._replace(scaled=None) for i in range(len(eqn.outvars))]
        out = outs[0]
        if out.activity or not out.weight:
            for i in set(site.weights) - set(gains):
                scaled = name in compat.MULTIPLIED and not kinds[i].data
                by_hand = kinds[i].per_example == kinds[i].breadth > 1  # (a row looked up has fewer axes)
                self.note([kinds[i]], "first layer" if scaled or by_hand else "added")
        action = "follow" if out.weight and not out.obstacle else "own" if out.static else "bind"
        gain = gain_operand(eqn, kinds) if action == "follow" else None
        if gain is not None and kinds[gain].activity:
            made = [k if i != gain else k._replace(active=True) for i, k in enumerate(kinds)]
            product = site.product(1 - gain, f"{name} by an activation", made)
            product.pending = product.gain = True
            none = (False,) * eqn.outvars[0].aval.ndim
            outs = [out._replace(scaled=Scaled(product, none, varies(kinds[gain], eqn.invars[gain].aval) or none))]
            return Step(eqn, action, bind, gain=gain, product=product), outs
        norm = gain is not None and bool(kinds[0].params & kinds[1].params)
        spread = out.per_example > max(k.per_example for k in kinds)  # one for each example, made here
        by_hand = name in compat.MULTIPLIED and (out.activity or spread)
        guarded = tuple(i for i, k in enumerate(kinds) if by_hand and k.data and not k.active)
        return Step(eqn, action, bind, gain=gain, norm=norm, guarded=guarded), outs

    def activity(self, site: Site) -> Found:
        """Plans an equation of activations, constants and data."""
        eqn, kinds, name = site.eqn, site.kinds, site.name
        terms, axes = summed(eqn, kinds)
        scaled = kinds[terms].scaled
        if scaled and any(scaled.axes[a] for a in axes):  # x * w, then a sum along w
            scaled.product.obstacle, scaled.product.pending = f"mul, then {name}", False
            return site.activations()
        joined, part = (frozenset().union(*(getattr(k, field) for k in kinds)) for field in ("joined", "part"))
        meets = part and name in compat.BILINEAR | compat.MULTIPLIED and sum(k.active for k in kinds) > 1
        if meets or ((joined or part) and name in {"reduce_prod", "cumprod"}):
            at = next(i for i, k in enumerate(kinds) if k.part or (k.joined and not meets))
            made = [k._replace(params=joined | part) if i == at else k for i, k in enumerate(kinds)]
            return site._replace(kinds=made).refused(at, f"{name} with a part of what it was joined to")
        if name in compat.TAKES:
            joined, part = frozenset(), joined | part
        elif name not in compat.LAYOUT | compat.JOINED | compat.WRITTEN:
            joined = part = frozenset()
        outs = []
        for i, v in enumerate(eqn.outvars):
            smooth = name != "stop_gradient" and jnp.issubdtype(v.aval.dtype, jnp.inexact)
            varying = result_varying(eqn, kinds, i)
            outs.append(Kind(data=True, active=smooth, varying=varying, joined=joined, part=part, rows=rows_of(kinds)))
        same = name in compat.LAYOUT and eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape
        if same and name not in {"transpose", "rev"}:
            outs[0] = outs[0]._replace(product=kinds[0].product)
        return Step(eqn, "bind", site.bind), outs

    def beside(self, site: Site) -> Found:
        """Plans an equation of a weight and an activation that is no product: added, a gain, or refused."""
        eqn, kinds, name, weights, widest = site.eqn, site.kinds, site.name, site.weights, site.widest
        if not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):
            return Step(eqn, "bind", site.bind), [Kind(data=True)] * len(eqn.outvars)  # a comparison
        for i in weights:
            if kinds[i].joint and any(varies(kinds[i], eqn.invars[i].aval)):
                return site.refused(i, str(kinds[i].obstacle))
        wide = kinds[widest].breadth > 1
        masks = name == "select_n" and kinds[0].weight
        if len(eqn.outvars) == 1 and name in compat.BESIDE and not masks:
            if wide and _shifts(site):
                return site.refused(widest, f"{name} of an activation to a matrix")
            if name in compat.AFFINE:
                _note_bias(site)
            self.note(kinds, "added")
            joined = union_of(kinds).params if wide and name in compat.JOINED | compat.WRITTEN else frozenset()
            out = activation(kinds)._replace(varying=result_varying(eqn, kinds), joined=joined)
            return Step(eqn, "bind", site.bind), [out]
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
            return site.refused(widest, f"{name} of complex numbers")
        if len(eqn.outvars) > 1 or not (name in compat.MULTIPLIED or masks or is_elementwise(eqn)):
            return site.refused(widest, name)
        if wide:
            return site.refused(widest, f"{name}, element by element", gain=True)
        self.note(kinds, "gain")
        ours, theirs = _sides(site)
        product = site.product(widest, f"{name} by copies of an activation")
        product.pending = product.gain = True
        copies = tuple(w and not a for w, a in zip(ours, theirs, strict=True))
        varying = tuple(a or b for a, b in zip(ours, theirs, strict=True))
        scaled = Scaled(product, ours, copies if any(copies) else None)
        rows = rows_of([k for k in kinds if not k.weight])  # (the gain's own error goes no further)
        out = activation(kinds)._replace(varying=varying, scaled=scaled, rows=rows)
        return Step(eqn, "bind", site.bind, product=product), [out]

    def bilinear(self, site: Site) -> Found:
        eqn, kinds, name, weights = site.eqn, site.kinds, site.name, site.weights
        candidates = [i for i in weights if kinds[i].static]
        matrices = [i for i in weights if is_matrix_operand(eqn, i, varies(kinds[i], eqn.invars[i].aval))]
        reason = None
        if len(weights) == 2 and not any(k.data for k in kinds):
            union = union_of(kinds)
            wide = [i for i in matrices if kinds[i].breadth > 1] or matrices
            if len(wide) == 1 and not kinds[0].params & kinds[1].params and not kinds[wide[0]].obstacle:
                # A vector (a learned initial state, a code) acts as an activity.
                varying = result_varying(eqn, kinds)
                kind = union._replace(obstacle=name, varying=varying, breadth=sum(varying))
                return Step(eqn, "product", site.bind, (), site.product(wide[0], None)), [kind]
            kind = union._replace(obstacle=f"{name} of two parameters", joint=union.joint or bool(matrices))
            return Step(eqn, "own", site.bind), [kind]
        if len(weights) == 1 and not kinds[1 - weights[0]].data:  # with a constant: a linear map of the weight
            kind = weight_kind(eqn, kinds)
            return Step(eqn, "follow" if not kind.obstacle else "own" if kind.static else "bind", site.bind), [kind]
        if not candidates:
            # A weight that data has touched counts as an activity, unless it is a matrix between the summed and the other
            # axes.
            candidates = matrices
            if len(candidates) == 2:
                reason = f"{name} of two parameters that data has touched"
        if not candidates:
            if any(k.breadth > 1 and not k.per_example for k in kinds) and any(k.activity for k in kinds):
                return site.refused(weights[0], name)
            return site.activations()
        weight = candidates[0]
        reason = reason or kinds[weight].obstacle
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
            reason = f"{name} of complex numbers"
        product = site.product(weight, reason)
        if reason and not product.needs_feedback:
            product.obstacle, product.followed = None, False
        step, (out,) = site.activations("bind" if product.obstacle else "product", product)
        return step, [out._replace(product=product)]

    def note(self, kinds: Sequence[Kind], role: str) -> None:
        for kind in kinds:
            for leaf in kind.params:
                self.roles.setdefault(leaf, set()).add(role)

    def note_uses(self, step: Step, kinds: list[Kind], outs: list[Kind]) -> None:
        """Notes weights with other uses than a rearrangement or a product: those uses add a gradient that B does not get."""
        for i, kind in enumerate(kinds):
            multiplies = step.action == "product" and step.product is not None and step.product.weight == i
            followed = step.action == "follow" and all(k.static for k in outs if k.params)
            if kind.weight and outs and not multiplies and not followed:
                self.shared |= kind.params

    def note_joined(self, kinds: Sequence[Kind], joined: Sequence[Kind]) -> None:
        """Notes weights that a loop or a branch turns into activations (an initial state): that is another use."""
        for kind, out in zip(kinds, joined, strict=True):
            if kind.weight and not out.static:
                self.shared |= kind.params
                self.note([kind], "added")

    def opaque(self, site: Site) -> Found:
        """Plans a call that cannot be opened: a custom derivative (opened, it would be lost), a while loop, a kernel."""
        eqn, kinds, name, union = site.eqn, site.kinds, site.name, union_of(site.kinds)
        meets = any(k.activity for k in kinds)
        if name == "while" and meets:  # JAX has no backward pass through it
            return site.activations()
        if not meets and union.per_example == 1:  # rows that were looked up
            self.note(kinds, "added")
            return site.activations()
        if not meets:
            outs = [union._replace(obstacle=union.obstacle or name) for _ in eqn.outvars]
            guarded = tuple(i for i, k in enumerate(kinds) if k.data and not k.active)
            return Step(eqn, "own" if union.static else "bind", site.bind, guarded=guarded), outs
        return site.refused(site.widest, name)

    def shard_map(self, site: Site) -> Found:
        """Plans a shard_map: each device's part of a weight has its part of B."""
        lengths = (*site.lengths, compat.sharding(site.eqn.params).devices)
        plan = self.plan(compat.inner_jaxpr(site.eqn), [outside(k) for k in site.kinds], lengths)
        outs = [k._replace(obstacle=k.obstacle or "shard_map") if k.weight else k for k in map(outside, plan.outputs)]
        return Step(site.eqn, "shard_map", None, (plan,)), outs

    def cond(self, site: Site) -> Found:
        kinds = [outside(k)._replace(varying=k.varying) for k in site.kinds]
        plans = tuple(self.plan(branch, kinds[1:], site.lengths) for branch in site.eqn.params["branches"])
        outs = either(plans)
        if kinds[0].data:
            outs = [k._replace(data=True, unmirrored="cond") if k.weight else k for k in outs]
        for plan in plans:
            self.note_joined(plan.outputs, outs)
        for i, out in enumerate(outs):  # an activation may scale a weight in one branch, as in a spectral norm
            scaled = [plan.outputs[i] for plan in plans if plan.outputs[i].scaled]
            if out.weight and len(scaled) == 1:
                outs[i] = out._replace(scaled=scaled[0].scaled)
            else:
                settle(scaled)
        return Step(site.eqn, "cond", None, plans), outs

    def scan(self, site: Site) -> Found:
        params, lengths = site.eqn.params, (*site.lengths, site.eqn.params["length"])
        jaxpr, _ = compat.open_jaxpr(params["jaxpr"])
        consts, carries = compat.scan_sizes(params)
        carried = slice(consts, consts + carries)
        avals = [v.aval for v in site.eqn.invars]
        start = [_sliced(k, avals[i]) if i >= carried.stop else outside(k) for i, k in enumerate(site.kinds)]
        changed = [c for c in range(carries) if jaxpr.outvars[c] is not jaxpr.invars[consts + c]]
        inner, shared, first = list(start), set(self.shared), None
        while True:
            plan = self.plan(params["jaxpr"], inner, lengths)
            outs = [outside(k) for k in plan.outputs]
            # A state that starts as a constant (zeros) and becomes an activity counts as one from the start, so that the
            # first turn already multiplies an activity.
            late = [consts + c for c in changed if start[consts + c] == CONSTANT and outs[c].data]
            if late:
                for i in late:
                    start[i] = Kind(data=True)
                inner, self.shared, first = list(start), set(shared), None
                continue
            first, before = first or plan, list(inner)
            for c in changed:
                kind = join(inner[consts + c], outs[c], "scan")
                inner[consts + c] = kind._replace(unmirrored="scan") if kind.static else kind
            if inner == before:
                break
        if any(a.static and not b.static for a, b in zip(site.kinds[carried], inner[carried], strict=True)):
            # The first turn uses the weight itself, whatever the carry becomes later.
            plan.refused.extend(p for p in first.products() if p.obstacle)
        self.note_joined(site.kinds[carried], inner[carried])
        results = inner[carried]
        for kind, within in zip(outs[carries:], plan.outputs[carries:], strict=True):
            gain = within.scaled  # its outputs may be summed after the loop
            scaled = Scaled(gain.product, (False, *gain.axes), None) if gain and gain.copies is None else None
            kind = kind._replace(stack=kind.stack[: len(site.lengths)], scaled=scaled)
            if kind.gained:  # a gain for each turn may be one for each synapse of what they make together
                kind = kind._replace(obstacle=kind.obstacle or "scan of a weight with gains")
            results.append(kind)
        return Step(site.eqn, "scan", None, (plan,)), results
