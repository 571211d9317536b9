"""An NNX model as a pure function of its parameters and its other state."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from wmkp import checks

__all__ = ["pure"]


def pure(model: nnx.Module) -> tuple[Callable[..., Any], Any, Any]:
    """Splits an NNX model into a pure function, its parameters and the rest of its state.

    Dropout and BatchNorm work in the mode that the model has when you call ``pure`` (``model.train()`` or
    ``model.eval()``). BatchNorm's statistics and the random streams' counters are in the state that goes in and comes
    out.

    Args:
      model: the model. It is not changed.

    Returns:
      ``(apply, params, state)``. ``params`` is a nested dict of arrays, the values of ``nnx.Param``. ``state`` is
      everything else that the model holds. ``apply(params, state, *args, method=None, **kwargs) -> (output,
      new_state)`` calls the model, or ``method(model, *args, **kwargs)``. It is pure: call it inside your loss.

    Raises:
      TypeError, ValueError: ``model`` is no nnx.Module; from ``apply``, params or state of another structure.

    Example:
      >>> from flax import nnx
      >>> import wmkp.nnx
      >>> apply, params, state = wmkp.nnx.pure(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
      >>> def loss_fn(params, state, x, key):
      ...     y, state = apply(params, state, x)
      ...     return jnp.mean(y**2), (state, {})
      >>> loss, (state, metrics) = loss_fn(params, state, jnp.ones((16, 4)), None)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, such as Net(rngs=nnx.Rngs(0)) (a Flax Linen model needs no conversion: use model.apply); "
            f"got {checks.shown(model)}"
        )
    graphdef, variables, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    structure, params = jax.tree.structure(variables), nnx.to_pure_dict(variables)
    shapes = checks.avals((params, rest))

    def apply(
        params: Any, state: Any, *args: Any, method: Callable[..., Any] | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        checks.alike("params", params, shapes[0], "the params that pure returned")
        checks.alike("state", state, shapes[1], "the state that pure returned", dtypes=False, shapes=False)
        if method is not None:
            checks.function("method", method, "method(model, *args)")
        # Without copy=True BatchNorm could not update its statistics inside a trace.
        merged = nnx.merge(graphdef, jax.tree.unflatten(structure, jax.tree.leaves(params)), state, copy=True)
        output = (method or type(merged).__call__)(merged, *args, **kwargs)
        _, _, state = nnx.split(merged, nnx.Param, ...)  # type: ignore[misc]
        return output, state

    return apply, params, rest
