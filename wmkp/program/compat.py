"""What depends on a release of JAX or XLA: opening and making jaxprs, splitting scans, binding equations, dividing arrays, waiting."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

Var = core.Var

# Primitives that hold one jaxpr which is simply evaluated in place: {name: key of the jaxpr in the parameters}.
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
REMAT = frozenset({"checkpoint", "remat", "remat2"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"})

# A weight multiplies an activation in these two, and both are bilinear.
BILINEAR = frozenset({"dot_general", "conv_general_dilated"})

# Inside a shard_map: what says that devices may differ, and what exchanges parts between them.
VARIED = frozenset({"pvary", "pcast", "pbroadcast"})
EXCHANGED = frozenset({"all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "ppermute"})

# Linear in their first operand, which they only lay out anew: one element out is one element in.
LAYOUT = (
    frozenset(
        "convert_element_type reshape transpose squeeze expand_dims broadcast_in_dim tile slice split unstack rev copy copy_p "
        "reduce_precision stop_gradient optimization_barrier sharding_constraint reshard mesh_cast layout_constraint name".split()
    )
    | VARIED
    | EXCHANGED
)
# Of these, what leaves elements in their order.
ORDERED = frozenset({"convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "copy_p"})
# What takes a part of its operand.
TAKES = frozenset({"slice", "split", "unstack", "dynamic_slice", "gather"})
# Multi-operand primitives that only lay out, select or index; elementwise ones that are linear or affine in a weight.
INDEXED = frozenset({"gather", "dynamic_slice"})
JOINED = frozenset({"concatenate", "stack", "pad", "select_n"})
# Write their updates over a part of their first operand.
WRITTEN = frozenset({"scatter", "dynamic_update_slice"})
GROWN = WRITTEN | frozenset({"concatenate", "stack", "pad"})  # their result may be larger than an operand
ADDED = frozenset({"scatter-add", "scatter_add", "scatter-sub", "scatter_sub"})
AFFINE = ADDED | frozenset({"add", "sub", "add_any"})
SUMMED = frozenset({"psum", "psum_invariant", "psum2"})  # over devices; under vmap, along axes of the array
# One result for each operand.
APART = SUMMED | VARIED | {"optimization_barrier"}
# Elementwise, with a derivative that holds the other operand.
MULTIPLIED = frozenset({"mul", "div", "pow", "atan2", "rem", "igamma", "igammac", "scatter-mul", "scatter_mul"})
# A parameter beside an activation is added, joined, selected or a threshold: no derivative holds another operand.
BESIDE = (
    AFFINE
    | JOINED
    | WRITTEN
    | frozenset("max min clamp nextafter scatter-min scatter_min scatter-max scatter_max pmax pmin".split())
)
ELEMENTWISE = MULTIPLIED | frozenset(
    "add sub add_any neg max min clamp select_n eq ne lt le gt ge and or xor not sign abs floor ceil round is_finite exp exp2 "
    "expm1 log log1p tanh logistic sin cos tan asin acos atan sinh cosh asinh acosh atanh sqrt rsqrt cbrt square integer_pow "
    "erf erfc erf_inv nextafter real imag conj complex shift_left shift_right_logical shift_right_arithmetic".split()
)
# From 0.11 on primitives of the class of those that hold jaxprs, which hold none that matters.
SIMPLE = frozenset({"Frexp", "Ldexp", "Nonzero", "SearchSorted"})
# How the names of primitives begin that make random numbers and keys.
RANDOM = ("random_", "threefry", "rng_")


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The equations' jaxpr and the values of its constants, of a closed jaxpr or of an open one without constants."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in params:  # until 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


class Sharding(NamedTuple):
    """How a shard_map divides its operands and results among devices.

    Attributes:
      in_specs, out_specs: a PartitionSpec for each.
      axes: the mesh's axes that are manual inside.
      devices: over how many devices these axes go.
    """

    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    axes: tuple[str, ...]
    devices: int
    mesh: Any
    check_vma: bool

    def map(self, fun: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """``fun`` on each device of the same mesh."""
        return jax.shard_map(
            fun,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.axes),
            check_vma=self.check_vma,
        )

    def alike(self, x: jax.Array, y: Any) -> jax.Array:
        """``x``, each device's own, as its sum over those axes along which ``y`` (an aval) is the same everywhere."""
        same = tuple(a for a in self.axes if self.check_vma and a not in y.manual_axis_type.varying)
        return jax.lax.psum(x, same) if same else x


def sharding(params: dict[str, Any]) -> Sharding:
    """Of the parameters of a ``shard_map`` equation."""
    mesh = params["mesh"]
    manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    axes = tuple(a for a in mesh.axis_names if a in manual)
    devices = math.prod(mesh.shape[a] for a in axes)
    return Sharding(params["in_specs"], params["out_specs"], axes, devices, mesh, params["check_vma"])


def primitive_name(eqn: Any) -> str:
    """An equation's primitive; from 0.11 on some share one, and have a class of their own (``CustomRoot``)."""
    name = eqn.primitive.name
    return type(eqn.params["_prim"]).__name__ if name == "call_hi_primitive" else name


def inner_jaxpr(eqn: Any) -> Any:
    """The one jaxpr inside an inlined, remat or custom-derivative equation."""
    key = INLINED.get(eqn.primitive.name) or ("jaxpr" if "jaxpr" in eqn.params else "call_jaxpr")
    return eqn.params[key]


def has_jaxpr(eqn: Any) -> bool:
    """Whether an equation holds jaxprs of its own (a loop, a call, a kernel)."""
    if eqn.primitive.name == "call_hi_primitive":  # which does not show them
        return primitive_name(eqn) not in SIMPLE
    return not eqn.primitive.name.startswith("scatter") and any(True for _ in core.jaxprs_in_params(eqn.params))


def binder(eqn: Any, parent: Any) -> Callable[..., list[Any]]:
    """A function of an equation's operands that evaluates it as it stands in ``parent``, custom derivative and all."""
    # The whole equation goes through jaxpr_as_fun: that keeps custom rules, named scopes and tracebacks, where
    # primitive.bind wants arguments that move between releases.
    inputs = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)))
    kept = [not isinstance(v, core.DropVar) for v in eqn.outvars]
    outputs = [v for v, k in zip(eqn.outvars, kept, strict=True) if k]
    jaxpr = parent.replace(constvars=[], invars=inputs, outvars=outputs, eqns=[eqn], effects=eqn.effects)
    evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))

    def bind(*operands: Any) -> list[Any]:
        values = {v: x for v, x in zip(eqn.invars, operands, strict=True) if isinstance(v, Var)}
        outs = iter(evaluate(*[values[v] for v in inputs]))
        return [next(outs) if k else None for k in kept]

    return bind


def is_bound(axis_name: Any) -> bool:
    """Whether this is inside a pmap or shard_map over the axis (or there is none to be inside of)."""
    try:
        return axis_name is None or jax.lax.axis_index(axis_name) is not None
    except NameError:
        return False


def vary(x: jax.Array, axis_name: str) -> jax.Array:
    """A value that is the same on all devices of a manual axis, as each device's own."""
    try:
        return jax.lax.pcast(x, axis_name, to="varying")
    except ValueError:  # it is each device's own already
        return x


def divided(x: Any) -> bool:
    """Whether an array's type says that it is divided over a mesh of explicit axes."""
    return isinstance(x, jax.Array) and any(axis is not None for axis in jax.typeof(x).sharding.spec)


def gathered(x: Any) -> Any:
    """An array whose type says how it is divided over a mesh (of explicit axes), whole on every device; others as they are."""
    if not divided(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def divided_as(x: jax.Array, like: Any) -> jax.Array:
    """``x`` divided over explicit axes as the type of an array of its shape says."""
    here, there = jax.typeof(x).sharding, like.sharding
    if here.spec == there.spec:
        return x
    return gathered(x) if all(axis is None for axis in there.spec) else jax.sharding.reshard(x, there)


def zeros_of(x: jax.Array) -> jax.Array:
    """Integer zeros in the shape of ``x``, made of it by operations that XLA does not fold: what they are taken from waits for ``x``.

    ``jax.lax.optimization_barrier`` does not do: on CPUs XLA drops it before it decides what is copied and in which order.
    """
    return jax.lax.min((x != 0).astype(np.int32), np.int32(0))


@jax.jit  # so that a thousand layers have it traced once
def after(x: jax.Array, earlier: jax.Array) -> jax.Array:
    """``x`` to the bit; on CPUs made after ``earlier``, so that what ``x`` overwrites has been read for ``earlier`` by then.

    Without that a compiled step that overwrites an array (one that is donated) copies it first. Where one kernel makes
    ``earlier`` and what follows, as on other devices, reading it apart would undo that. Arrays that are divided over explicit
    axes are left alone: reading one number of them would be communication.
    """
    if 0 in earlier.shape or any(axis is not None for axis in jax.typeof(earlier).sharding.spec):
        return x

    def waiting(x: jax.Array, earlier: jax.Array) -> jax.Array:
        first = jax.lax.slice(earlier, (0,) * earlier.ndim, (1,) * earlier.ndim).reshape(())
        return x - zeros_of(first).astype(x.dtype)

    return jax.lax.platform_dependent(x, earlier, cpu=waiting, default=lambda x, _: x)


@jax.jit
def laid_out(x: jax.Array) -> jax.Array:
    """``x`` to the bit; on GPUs written down in the layout of a step's arguments before anything else is made of it.

    cuDNN has a layout of its own for a convolution's weight and its gradient. A kernel that lays one out anew and also
    updates W, B or an optimizer's moments cannot write in place: XLA copied each of these arrays at every step.
    """

    def written(x: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))

    return jax.lax.platform_dependent(x, cuda=written, rocm=written, default=lambda x: x)
