"""Everything that depends on the release of JAX or XLA: jaxprs, scans, equations, divided arrays, order of execution."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

Var = core.Var

# Primitives whose one jaxpr is evaluated in place: {name: key of the jaxpr in the parameters}.
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
REMAT = frozenset({"checkpoint", "remat", "remat2"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"})

# The two primitives in which a weight multiplies an activation. Both are bilinear.
BILINEAR = frozenset({"dot_general", "conv_general_dilated"})

# Inside a shard_map: primitives that declare that devices may differ, and that exchange parts between devices.
VARIED = frozenset({"pvary", "pcast", "pbroadcast"})
EXCHANGED = frozenset({"all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "ppermute"})

# They only rearrange their first operand: each element of the result is one element of it.
LAYOUT = (
    frozenset(
        "convert_element_type reshape transpose squeeze expand_dims broadcast_in_dim tile slice split unstack rev copy copy_p "
        "reduce_precision stop_gradient optimization_barrier sharding_constraint reshard mesh_cast layout_constraint name".split()
    )
    | VARIED
    | EXCHANGED
)
# Those that keep the order of elements.
ORDERED = frozenset({"convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "copy_p"})
# They take a part of their operand.
TAKES = frozenset({"slice", "split", "unstack", "dynamic_slice", "gather"})
# Primitives of several operands that only arrange, select or index, and elementwise ones that are affine in a weight.
INDEXED = frozenset({"gather", "dynamic_slice"})
JOINED = frozenset({"concatenate", "stack", "pad", "select_n"})
# They overwrite a part of their first operand.
WRITTEN = frozenset({"scatter", "dynamic_update_slice"})
GROWN = WRITTEN | frozenset({"concatenate", "stack", "pad"})  # the result may be larger than an operand
ADDED = frozenset({"scatter-add", "scatter_add", "scatter-sub", "scatter_sub"})
AFFINE = ADDED | frozenset({"add", "sub", "add_any"})
SUMMED = frozenset({"psum", "psum_invariant", "psum2"})  # over devices; under vmap, along axes of the array
# They give one result for each operand.
APART = SUMMED | VARIED | {"optimization_barrier"}
# Elementwise; the derivative reads the other operand.
MULTIPLIED = frozenset({"mul", "div", "pow", "atan2", "rem", "igamma", "igammac", "scatter-mul", "scatter_mul"})
# They add, join or select a parameter, or use it as a threshold: the derivative reads no other operand.
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
# From 0.11 on these are of the class of primitives that hold jaxprs, but hold none that matters.
SIMPLE = frozenset({"Frexp", "Ldexp", "Nonzero", "SearchSorted"})
# The names of primitives that make random numbers and keys begin like this.
RANDOM = ("random_", "threefry", "rng_")


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and the values of its constants. An open jaxpr has no constants."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of a scan's constant and carried operands."""
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
        """``x``, each device's own, summed over the axes along which ``y`` (an aval) is the same on all devices."""
        same = tuple(a for a in self.axes if self.check_vma and a not in y.manual_axis_type.varying)
        return jax.lax.psum(x, same) if same else x


def sharding(params: dict[str, Any]) -> Sharding:
    """The sharding in the parameters of a ``shard_map`` equation."""
    mesh = params["mesh"]
    manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    axes = tuple(a for a in mesh.axis_names if a in manual)
    devices = math.prod(mesh.shape[a] for a in axes)
    return Sharding(params["in_specs"], params["out_specs"], axes, devices, mesh, params["check_vma"])


def primitive_name(eqn: Any) -> str:
    """The name of an equation's primitive. From 0.11 on some share a primitive, and their class names them (``CustomRoot``)."""
    name = eqn.primitive.name
    return type(eqn.params["_prim"]).__name__ if name == "call_hi_primitive" else name


def inner_jaxpr(eqn: Any) -> Any:
    """The one jaxpr inside an inlined, remat or custom-derivative equation."""
    key = INLINED.get(eqn.primitive.name) or ("jaxpr" if "jaxpr" in eqn.params else "call_jaxpr")
    return eqn.params[key]


def has_jaxpr(eqn: Any) -> bool:
    """Whether an equation holds jaxprs of its own (a loop, a call, a kernel)."""
    if eqn.primitive.name == "call_hi_primitive":  # it does not show its jaxprs
        return primitive_name(eqn) not in SIMPLE
    return not eqn.primitive.name.startswith("scatter") and any(True for _ in core.jaxprs_in_params(eqn.params))


def binder(eqn: Any, parent: Any) -> Callable[..., list[Any]]:
    """A function of an equation's operands that evaluates it as in ``parent``, with its custom derivative."""
    # jaxpr_as_fun keeps custom rules, named scopes and tracebacks. The arguments of primitive.bind change between
    # releases.
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
    """Whether this runs inside a pmap or shard_map over the axis (True if ``axis_name`` is None)."""
    try:
        return axis_name is None or jax.lax.axis_index(axis_name) is not None
    except NameError:
        return False


def vary(x: jax.Array, axis_name: str) -> jax.Array:
    """Turns a value that is the same on all devices of a manual axis into each device's own."""
    try:
        return jax.lax.pcast(x, axis_name, to="varying")
    except ValueError:  # it already is each device's own
        return x


def divided(x: Any) -> bool:
    """Whether an array is divided over a mesh of explicit axes, by its type."""
    return isinstance(x, jax.Array) and any(axis is not None for axis in jax.typeof(x).sharding.spec)


def gathered(x: Any) -> Any:
    """An array that is divided over explicit axes, gathered on every device; other values unchanged."""
    if not divided(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def divided_as(x: jax.Array, like: Any) -> jax.Array:
    """``x``, divided over explicit axes like an array with the type ``like``."""
    here, there = jax.typeof(x).sharding, like.sharding
    if here.spec == there.spec:
        return x
    return gathered(x) if all(axis is None for axis in there.spec) else jax.sharding.reshard(x, there)


def zeros_of(x: jax.Array) -> jax.Array:
    """Integer zeros in the shape of ``x``, by operations that XLA does not fold: whatever subtracts them waits for ``x``.

    ``jax.lax.optimization_barrier`` is not enough. On CPUs XLA drops it before it decides on copies and their order.
    """
    return jax.lax.min((x != 0).astype(np.int32), np.int32(0))


@jax.jit  # so that it is traced once for a thousand layers
def after(x: jax.Array, earlier: jax.Array) -> jax.Array:
    """``x`` bit-for-bit. On CPUs it is computed after ``earlier``, which has then read the array that ``x`` overwrites.

    Otherwise a compiled step that overwrites a donated array copies it first. Other devices skip this: one kernel may
    compute ``earlier`` and what follows, and a separate read would split it. Arrays divided over explicit axes skip it
    too, because reading one of their numbers would need communication.
    """
    if 0 in earlier.shape or any(axis is not None for axis in jax.typeof(earlier).sharding.spec):
        return x

    def waiting(x: jax.Array, earlier: jax.Array) -> jax.Array:
        first = jax.lax.slice(earlier, (0,) * earlier.ndim, (1,) * earlier.ndim).reshape(())
        return x - zeros_of(first).astype(x.dtype)

    return jax.lax.platform_dependent(x, earlier, cpu=waiting, default=lambda x, _: x)


@jax.jit
def laid_out(x: jax.Array) -> jax.Array:
    """``x`` bit-for-bit. On GPUs it is first written in the layout of a step's arguments.

    cuDNN has its own layout for a convolution's weight and gradient. A kernel that changes the layout and also updates W,
    B or an optimizer's moments cannot write in place, so XLA would copy each of these arrays at every step.
    """

    def written(x: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))

    return jax.lax.platform_dependent(x, cuda=written, rocm=written, default=lambda x: x)


def compiled_sooner() -> dict[str, bool]:
    """Compiler options that halve the time in which a CPU's small programs compile. Later versions of XLA do not know them."""
    known = jax.__version__.startswith("0.10.") and jax.default_backend() == "cpu"
    return {"xla_cpu_use_fusion_emitters": False} if known else {}
