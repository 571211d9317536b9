"""An NNX model as a pure function of its parameters and its other state."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def pure(model: nnx.Module) -> tuple[Callable[..., Any], Any, Any]:
    """Splits an NNX model into a pure function, its parameters and the rest of its state.

    Dropout and BatchNorm work as the model is set (``model.train()`` or ``model.eval()``) at the time of the call:
    BatchNorm's statistics and the random streams' counters are in the state that goes in and comes out.

    Args:
      model: the model; it is not changed.

    Returns:
      ``(apply, params, state)``. ``params`` is a nested dict of arrays, the values of ``nnx.Param``; ``state`` all else
      that the model holds. ``apply(params, state, *args, method=None, **kwargs) -> (output, new_state)`` calls the
      model (or ``method(model, *args, **kwargs)``). It is pure: to be called inside the loss that wmkp trains.

    Example::

      apply, params, state = wmkp.nnx.pure(model)
      def loss_fn(params, state, batch, key):
          logits, state = apply(params, state, batch["image"])
          return cross_entropy(logits, batch["label"]), (state, {})
    """
    graphdef, variables, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    structure = jax.tree.structure(variables)

    def apply(
        params: Any, state: Any, *args: Any, method: Callable[..., Any] | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        # A copy, or BatchNorm could not update its statistics inside a trace.
        merged = nnx.merge(graphdef, jax.tree.unflatten(structure, jax.tree.leaves(params)), state, copy=True)
        output = (method or type(merged).__call__)(merged, *args, **kwargs)
        _, _, state = nnx.split(merged, nnx.Param, ...)  # type: ignore[misc]
        return output, state

    return apply, nnx.to_pure_dict(variables), rest
