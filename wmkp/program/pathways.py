"""The products of a weight with an activation whose backward pass goes through feedback weights.

Forward, y = W x. Backward, the error is B delta (eq. 3), and W's own gradient stays delta x^T (eq. 4), the outer product
of what a synapse sees on its two sides. Both are transposes of one bilinear product, so the same few lines serve every
dense, grouped, strided or dilated variant.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmkp import checks
from wmkp.program import compat
from wmkp.program.products import Product
from wmkp.program.projections import WeightTransportError, direct_sizes


class Synapses(NamedTuple):
    """What the synapses of a projection see in one use of it: everything that a signal may use.

    Attributes:
      x: the presynaptic activity that enters the projection, with the rule's noise.
      u: the response, W x, before any bias.
      delta: the loss's gradient at u, under direct feedback too; None in mirror mode.
      error: what travels back through B: delta or the output's error, as ``Rule.error`` made it; None in mirror mode.
      b: what carries the error back, in W's layout at this use. A B that is no array comes as it is.
      w: W under a rule that transports "weights", else None.
      noise: the noise added to x, or None. In mirror mode it is x.
      key: a random key of this use, or None if none was given.
      outer: ``(x, delta) -> array``: the sum of outer products over samples, in W's layout (or direct feedback's).
      multiply: ``(x, b) -> array``: the projection of x by an array in W's layout.
      samples: how many samples ``outer`` sums over.
      uses: how often a step uses the parameter. Divide a signal by it for the mean over its uses.
      fan_in: how many presynaptic values one value of u sums over.
      product: the equation itself, for everything else; None in mirror mode.
    """

    x: jax.Array
    u: jax.Array
    delta: Any
    error: Any
    b: Any
    w: Any
    noise: Any
    key: Any
    outer: Callable[[Any, Any], jax.Array]
    multiply: Callable[[Any, Any], jax.Array]
    samples: Any
    uses: float
    fan_in: int
    product: Product | None


Signal = Callable[[Synapses], Any]


def hebbian(synapses: Synapses) -> jax.Array:
    """Kolen-Pollack's signal ``x error^T``, from what each synapse of B sees on its two sides.

    See eq. 15. If nothing changes the error on its way, it is W's own gradient and costs nothing.

    Args:
      synapses: what the projection's synapses see.
    """
    return synapses.outer(synapses.x, synapses.error)


class Circuit(NamedTuple):
    """How a rule runs one projection: what it does with the error and with what the synapses see (as in ``wmkp.Rule``).

    Attributes:
      signal, error: as in ``wmkp.Rule``.
      made: whether each step makes B from W.
      reads: whether the signal may read W.
      uses: see ``Synapses``.
    """

    signal: Signal | None = None
    error: Callable[[Any, Any], Any] | None = None
    made: bool = False
    reads: bool = False
    uses: float = 1.0

    @property
    def own(self) -> bool:
        """Whether the signal differs from Kolen-Pollack's."""
        return self.signal is not None and self.signal is not hebbian

    def carried(self, delta: jax.Array, key: Any) -> jax.Array:
        """What travels back instead of ``delta``."""
        return delta if self.error is None else self.error(delta, _draw(key, 0)).astype(delta.dtype)


class Channel(NamedTuple):
    """What passes from each product to the next, through every loop and branch.

    Attributes:
      error: zeros, whose cotangent is the error at the network's output; None without direct feedback.
      key: a random key, from which each product draws its own; None if no rule needs one.
    """

    error: Any
    key: Any


def next_key(channel: Channel | None) -> tuple[Channel | None, Any]:
    """The channel after a product, and the product's key."""
    if channel is None or channel.key is None:
        return channel, None
    key, own = jax.random.split(channel.key)
    return channel._replace(key=key), own


def _draw(key: Any, which: int) -> Any:
    """A product's key for the error (0), the noise (1) or the signal (2)."""
    return None if key is None else jax.random.fold_in(key, which)


def noisy(x: jax.Array, std: float, key: Any) -> tuple[jax.Array, Any]:
    """``x`` with Gaussian noise, and the noise: zeros without a key, None if the rule has no noise."""
    if not std:
        return x, None
    if key is None:
        return x, jnp.zeros_like(x)
    draw = std * jax.random.normal(_draw(key, 1), x.shape, jnp.promote_types(x.dtype, jnp.float32))
    noise = compat.divided_as(draw.astype(x.dtype), jax.typeof(x))
    return x + noise, noise


def through_feedback(
    product: Product,
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    circuit: Circuit = Circuit(),  # noqa: B008 (a tuple)
    entry: Any = None,
    noise: Any = None,
    key: Any = None,
) -> jax.Array:
    """``product.multiply(x, w)``, with the error sent back through ``b``. The backward pass does not keep W.

    The cotangent of ``b`` is the circuit's signal: by default that of ``w`` (eq. 15: y delta^T in the paper's layout,
    delta y^T in W's). If B is no array, a signal in the structure of ``entry`` (the whole B) is the cotangent of ``entry``
    instead. If each step makes ``b`` from W, it does so when the error arrives, and keeps nothing from the forward pass.
    """

    @jax.custom_vjp
    def multiply(x: jax.Array, w: jax.Array, b: jax.Array, entry: Any, noise: Any, key: Any) -> jax.Array:
        return product.multiply(x, w)

    def forward(*inputs: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        x, w, b, entry, noise, key = inputs
        u = product.multiply(x, w)
        if not circuit.own:
            return u, (x, b, key)
        return u, (x, b, key, u, w if circuit.reads else None, entry, noise)

    def backward(kept: tuple[Any, ...], delta: jax.Array) -> tuple[Any, ...]:
        x, b, key = kept[:3]
        if circuit.made:
            b = compat.after(b, delta)
        if circuit.signal is not None:
            b = product.laid_out(b)
        error = circuit.carried(delta, key)
        (dx,) = jax.linear_transpose(lambda x: product.multiply(x, b), x)(error)
        # dx reads B before B (or W, from which B is made) is overwritten.
        dw = compat.after(product.weight_gradient(x, delta), dx)
        if circuit.own:
            return dx, dw, *_own_signal(product, circuit, x, b, error, delta, dx, *kept[2:]), None, None
        if circuit.signal is not None and circuit.error is not None:
            return dx, dw, compat.after(product.weight_gradient(x, error), dx), None, None, None
        return dx, dw, None if circuit.signal is None else dw, None, None, None

    multiply.defvjp(forward, backward)
    return multiply(x, w, b, entry, noise, key)


def _own_signal(
    product: Product, circuit: Circuit, x: Any, b: Any, error: Any, delta: Any, dx: Any, key: Any, u: Any, w: Any,
    entry: Any, noise: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The cotangents of ``b`` and ``entry``, of which a rule's own signal makes one."""
    outer, multiply = _of_whole_arrays(product, jax.typeof(x), jax.typeof(u))
    x, u, delta, error, w, noise = (a if a is None else compat.gathered(a) for a in (x, u, delta, error, w, noise))
    seen = Synapses(
        x, u, delta, error, compat.gathered(b) if entry is None else entry, w, noise, _draw(key, 2),
        outer, multiply, product.samples(), circuit.uses, product.fans()[0], product,
    )  # fmt: skip
    assert circuit.signal is not None
    signal = circuit.signal(seen)
    if entry is not None and not isinstance(signal, jax.Array):
        return None, _in_structure(signal, entry)
    check_signal(signal, b.shape, "its weight's at this use")
    return compat.after(compat.divided_as(signal.astype(b.dtype), jax.typeof(b)), dx), None


def _of_whole_arrays(product: Product, x_type: Any, u_type: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The product's ``weight_gradient`` and ``multiply``, of arrays that every device of an explicit mesh has whole."""

    def outer(x: Any, delta: Any) -> jax.Array:
        return compat.gathered(product.weight_gradient(compat.divided_as(x, x_type), compat.divided_as(delta, u_type)))

    def multiply(x: Any, w: Any) -> jax.Array:
        return compat.gathered(
            product.multiply(compat.divided_as(x, x_type), compat.divided_as(w, product.weight_aval))
        )

    return outer, multiply


def _in_structure(signal: Any, entry: Any) -> Any:
    """A signal in the structure of the whole B: zeros instead of None, and None for leaves that are not floats."""

    def part(s: Any, e: Any) -> Any:
        parts = jax.tree.map(lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else None, e)
        return parts if s is None or parts is None else s.astype(e.dtype)

    try:
        return jax.tree.map(part, signal, entry, is_leaf=lambda s: s is None)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"rule.signal returned {checks.short(checks.shapes(signal))}, where B is {checks.short(checks.shapes(entry))}; return "
            "B's own structure (None for what does not learn), or one array in W's layout: synapses.outer(synapses.x, synapses.delta)"
        ) from error


def check_signal(signal: Any, shape: tuple[int, ...], whose: str) -> None:
    """ValueError unless a rule's signal is an array of this shape."""
    if getattr(signal, "shape", None) != shape:
        raise ValueError(
            f"rule.signal returned {checks.shapes(signal)}, where an array of shape {list(shape)} ({whose}) is expected; "
            "return synapses.outer(synapses.x, synapses.delta), or another array of that shape"
        )


def directly(
    product: Product,
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    channel: jax.Array,
    circuit: Circuit = Circuit(),  # noqa: B008 (a tuple)
    noise: Any = None,
    key: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """``product.multiply(x, w)`` and ``channel`` unchanged. Its cotangent times ``b`` is the error at ``x`` (Nokland 2016).

    ``b`` has the shape (size of one input, size of one error). The channel's cotangent is the error at the network's
    output. The cotangent of ``b`` is the circuit's signal: by default x e^T, summed over samples (direct Kolen-Pollack).
    """
    _, inputs, errors = direct_sizes(x.shape, channel.shape)

    def outer(x: jax.Array, e: jax.Array) -> jax.Array:
        return compat.gathered(x).reshape(-1, inputs).astype(b.dtype).T @ e.reshape(-1, errors).astype(b.dtype)

    @jax.custom_vjp
    def multiply(x: Any, w: Any, b: Any, channel: Any, noise: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        return product.multiply(x, w), channel

    def forward(*inputs: Any) -> tuple[Any, Any]:
        x, w, b, channel, noise, key = inputs
        u = product.multiply(x, w)
        return (u, channel), (x, b, key, *((u, w if circuit.reads else None, noise) if circuit.own else ()))

    def backward(kept: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
        (x, b, key), (delta, output) = kept[:3], cotangents
        e = circuit.carried(compat.gathered(output), key)
        back = (e.reshape(-1, errors).astype(b.dtype) @ b.T).reshape(x.shape).astype(x.dtype)
        if circuit.own:
            _, respond = _of_whole_arrays(product, jax.typeof(x), jax.typeof(kept[3]))
            whole: list[Any] = [a if a is None else compat.gathered(a) for a in (x, kept[3], delta, *kept[4:])]
            samples = e.size // errors
            seen = Synapses(
                whole[0], whole[1], whole[2], e, b, whole[3], whole[4], _draw(key, 2),
                outer, respond, samples, circuit.uses, inputs, product,
            )  # fmt: skip
            assert circuit.signal is not None
            db = circuit.signal(seen)
            check_signal(db, b.shape, "B's")
        else:
            db = outer(x, e)
        dx = compat.divided_as(back, jax.typeof(x))
        return dx, product.weight_gradient(x, delta), db.astype(b.dtype), output, None, None

    multiply.defvjp(forward, backward)
    return multiply(x, w, b, channel, noise, key)


def emit_error(y: jax.Array, channel: jax.Array) -> jax.Array:
    """``y`` unchanged; the error that comes back to it also enters the channel."""

    @jax.custom_vjp
    def emit(y: jax.Array, channel: jax.Array) -> jax.Array:
        return y

    emit.defvjp(lambda y, channel: (y, None), lambda _, error: (error, error))
    return emit(y, channel)


def without_feedback(product: Product, x: jax.Array, w: jax.Array, path: str) -> jax.Array:
    """``product.multiply(x, w)`` without an error back to ``x``. A gradient at ``x`` raises WeightTransportError."""

    @jax.custom_vjp
    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return product.multiply(x, w)

    def forward(x: Any, w: Any) -> tuple[jax.Array, jax.Array]:
        if x.perturbed:
            raise WeightTransportError(
                f"a gradient was asked for at the input of projection {path!r}, which has no feedback weights "
                "(its entry in feedback is None), so the error would travel back through W. Differentiate with "
                "respect to params and feedback only, or let the input depend on params, so that init_feedback gives "
                "this projection a B."
            )
        return product.multiply(x.value, w.value), x.value

    def backward(x: jax.Array, delta: Any) -> tuple[None, Any]:
        if isinstance(delta, jax.custom_derivatives.SymbolicZero):
            return None, None
        return None, product.weight_gradient(x, delta)

    multiply.defvjp(forward, backward, symbolic_zeros=True)
    return multiply(x, w)
