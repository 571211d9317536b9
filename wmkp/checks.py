"""Checks of arguments: a wrong call raises one error, which names the argument and the fix."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def number(name: str, value: Any, must: str, holds: Callable[[Any], bool], kind: Any = numbers.Real) -> None:
    """ValueError unless ``value`` is a finite number (of this kind) for which ``holds``; ``must`` says it in words."""
    try:
        finite = isinstance(value, kind) and math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        finite = False
    if isinstance(value, bool | np.bool) or not finite or not holds(value):
        raise ValueError(f"{name} must {must}; got {shown(value)}")


def positive(name: str, value: Any, meaning: str = "") -> None:
    """ValueError unless ``value`` is a positive number that float32 can hold, and the square of it."""
    number(name, value, f"be a positive number{meaning}, from 1e-15 to 1e15", lambda x: 1e-15 <= x <= 1e15)


def coefficient(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a number, zero or positive, whose products float32 can hold."""
    number(name, value, "be a number from 0 to 1e15", lambda x: 0 <= x <= 1e15)


def count(name: str, value: Any) -> None:
    """ValueError unless ``value`` is an integer of at least 1."""
    number(name, value, "be an integer of at least 1", lambda x: x >= 1, numbers.Integral)


def scalar(name: str, value: Any) -> None:
    """ValueError or TypeError unless ``value`` is a number or scalar array, and not negative (if its value is known)."""
    if isinstance(value, jax.Array | np.ndarray) and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
        if isinstance(value, jax.core.Tracer):
            return
        value = float(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number or a scalar array; got {shown(value)}")
    coefficient(name, value)


def stable(name: str, share: Any) -> None:
    """ValueError if this share, by which B decays at each step, is known and makes B grow."""
    if not isinstance(share, jax.core.Tracer):
        number(name, float(share), "be below 2, or B grows at every step", lambda x: x < 2)


def one_of(name: str, value: Any, names: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of these words."""
    if not isinstance(value, str) or value not in names:
        words = [f'"{n}"' for n in names]
        raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}; got {shown(value)}")


def flag(name: str, value: Any) -> None:
    """TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{name} must be True or False; got {shown(value)}")


def function(name: str, value: Any, signature: str) -> None:
    """TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}; got {shown(value)}")


def transformation(name: str, value: Any) -> None:
    """TypeError unless ``value`` has an optax transformation's two functions."""
    if isinstance(value, type) or not all(callable(getattr(value, f, None)) for f in ("init", "update")):
        call = f" (call it: {getattr(value, '__name__', 'it')}(...))" if callable(value) else ""
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, such as optax.sgd(0.1); got {shown(value)}{call}"
        )


def key(value: Any, name: str = "key") -> None:
    """TypeError unless ``value`` is one random key, typed (``jax.random.key``) or old; ValueError if it is deleted."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        one = shape == ()
    else:
        one = dtype == jnp.uint32 and shape == jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
    if not one:
        raise TypeError(f"{name} must be one JAX random key, such as jax.random.key(0); got {shown(value)}")
    alive(name, value)


def alike(name: str, value: Any, expected: Any, of: str, *, dtypes: bool = True, shapes: bool = True) -> None:
    """ValueError unless two pytrees agree in structure, dtypes and shapes (else in numbers of axes)."""
    tree: Any
    flat, tree = jax.tree_util.tree_flatten_with_path(value)
    wanted, wanted_tree = jax.tree_util.tree_flatten_with_path(expected)
    if tree != wanted_tree:
        found, want = ({path_name(p): None for p, _ in leaves} for leaves in (flat, wanted))
        missing, extra = [p for p in want if p not in found], [p for p in found if p not in want]
        what = lacks(missing, extra) or f" is {short(tree)} where {short(wanted_tree)} is expected"
        raise ValueError(f"{name} must have the structure of {of}, but it{what}")
    for (where, given), (_, y) in zip(places(name, value), wanted, strict=True):
        x, y = aval(given), aval(y)
        if y is None:
            continue
        fits = x is not None and (x.shape == y.shape if shapes else x.ndim == y.ndim)
        if x is not None and fits and (x.dtype == y.dtype or not dtypes):
            continue
        raise ValueError(
            f"{where} is {shape(given if x is None else x)} where {of} has {y.dtype}{list(y.shape)}; "
            f"make {'them' if shapes else 'dtypes and numbers of axes'} agree"
        )


def lacks(missing: Iterable[str], extra: Iterable[str]) -> str:
    """What a tree lacks and what it has besides, by path; "" if neither."""
    few = lambda paths: ", ".join([repr(p) for p in paths if p][:3])
    parts = (few(missing) and f" lacks {few(missing)}", few(extra) and f" also has {few(extra)}")
    return " and".join(filter(None, parts))


def places(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """A tree's leaves, each with its place as messages print it: ``params['w']``."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        yield (f"{name}[{path_name(path)!r}]" if path else name), x


def alive(name: str, tree: Any) -> None:
    """ValueError if an array of the tree is deleted."""
    for where, x in places(name, tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
            raise ValueError(
                f"{where} is deleted: a step takes over the memory of the state that it is given (JAX donates it). "
                "Continue with the state that the step returned, or pass a copy: jax.tree.map(jnp.copy, state)."
            )


def values(name: str, tree: Any) -> None:
    """TypeError if the tree holds shapes instead of arrays, ValueError if an array is deleted."""
    for where, x in places(name, tree):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(f"{where} is a ShapeDtypeStruct where its values are needed; pass the array itself")
    alive(name, tree)


def traceable(name: str, tree: Any) -> None:
    """TypeError if the tree holds a value that JAX does not accept as an array. Tracers are not checked."""
    for where, x in places(name, tree):
        try:
            if not isinstance(x, jax.core.Tracer):
                jax.eval_shape(lambda x: x, x)
        except Exception:
            raise TypeError(
                f"{where} is {type(x).__name__} {getattr(x, 'dtype', '')}".rstrip()
                + ", which JAX cannot trace. Pass and return only arrays of numbers; let fun read strings and other objects "
                "from a closure."
            ) from None


def named_leaves(params: Any, *, shapes_will_do: bool = False) -> dict[str, Any]:
    """params' leaves by path.

    Raises ValueError for one that is deleted (unless ``shapes_will_do``), TypeError for one that is not a floating-point
    array of at least 16 bits (nor, with ``shapes_will_do``, the shape of one), and ValueError for two of one path.
    """
    try:
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
    except ValueError as error:
        raise ValueError(f"JAX cannot flatten params ({first_line(error)}); use dict keys of one type") from error
    leaves: dict[str, Any] = {}
    for keys, leaf in flat:
        path = path_name(keys)
        if path in leaves:
            raise ValueError(f"params has two leaves whose path is {path!r}; rename one")
        leaves[path] = leaf
        fits = is_array(leaf) and (shapes_will_do or not isinstance(leaf, jax.ShapeDtypeStruct))
        if not fits or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"params[{path!r}] is {leaf.dtype if fits else type(leaf).__name__}; parameters must be floating-point "
                "arrays. Pass anything else as a later argument of fun (of an NNX model: wmkp.nnx.pure)."
            )
        if jnp.finfo(leaf.dtype).bits < 16:
            raise TypeError(
                f"params[{path!r}] is {leaf.dtype}, whose sums with wider numbers JAX does not define; keep params in float32 "
                "or bfloat16, and cast them inside fun."
            )
    if not shapes_will_do:
        alive("params", params)
    return leaves


def is_array(leaf: Any) -> bool:
    """Whether an argument's leaf is traced: an array, a NumPy array or scalar, or a ShapeDtypeStruct."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def aval(x: Any) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of an array or a Python number as JAX reads them, None for anything else."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        dtype = (
            x.dtype if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(x.dtype)
        )
        return jax.ShapeDtypeStruct(x.shape, dtype)
    if isinstance(x, bool | int | float | complex):
        return jax.ShapeDtypeStruct((), jnp.result_type(x))
    return None


def avals(tree: Any) -> Any:
    """The shapes and dtypes of a pytree, without its arrays."""
    return jax.tree.map(lambda x: x if aval(x) is None else aval(x), tree)


def path_name(path: Any) -> str:
    """A leaf's path, as all messages print it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def short(text: Any, length: int = 120) -> str:
    """A text, cut off at ``length`` characters."""
    text = str(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def shape(x: Any) -> str:
    """An array as its dtype and shape, another value as its type."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__


def shapes(tree: Any) -> Any:
    """A pytree, each leaf as ``shape`` prints it."""
    return str(jax.tree.map(shape, tree)).replace("'", "")


def shown(x: Any) -> str:
    """A value as an error prints it."""
    if getattr(x, "shape", ()) != () and hasattr(x, "dtype"):
        return f"an array {shape(x)}"
    try:
        return short(repr(x))
    except RuntimeError:  # it holds arrays that are deleted
        return short(shapes(x))
