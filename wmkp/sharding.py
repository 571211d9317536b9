"""Where batches and the training state lie on a mesh of devices."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wmkp import checks


def check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh) or not mesh.size:
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, such as Mesh(jax.devices(), ('d',)); got {checks.shown(mesh)}"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has axes of other types than Auto ({checks.shown(mesh)}), but JAX divides the steps over mesh by itself. "
            "Use jax.sharding.Mesh(jax.devices(), ('d',)), or jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,)). Or "
            "leave mesh out, and put params and batches on the explicit mesh under jax.set_mesh."
        )


def check_devices(axis_name: Any, mesh: Any, fsdp: Any) -> None:
    """The options of ``make_steps`` that say how devices share its steps."""
    if axis_name is not None and not isinstance(axis_name, str | tuple):
        raise TypeError(f"axis_name must be the name of an axis of pmap or shard_map; got {checks.shown(axis_name)}")
    if mesh is not None:
        check_mesh(mesh)
    checks.flag("fsdp", fsdp)
    if mesh is not None and axis_name is not None:
        raise ValueError("give axis_name (inside a pmap or shard_map of your own) or mesh, not both")
    if fsdp and mesh is None:
        raise ValueError("fsdp divides the state over a mesh: pass mesh=mesh too")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch belongs on ``mesh``: its first axis, of examples, divided among all devices."""
    check_mesh(mesh)
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_sharding(state: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """Where each array of a ``TrainState`` belongs when ``make_steps`` trains over ``mesh``.

    Args:
      state: the state, or its shapes.
      mesh, fsdp: as in ``make_steps``.

    Returns:
      A pytree of NamedSharding, in state's structure.
    """

    check_mesh(mesh)
    checks.flag("fsdp", fsdp)

    def sharding(x: Any) -> NamedSharding:
        if (aval := checks.aval(x)) is None:
            raise TypeError(f"state must hold only arrays (or their shapes); got {checks.shape(x)}")
        # The rule reads only shapes, so W, B and their moments are divided alike.
        fits = [size if size % mesh.size == 0 else 0 for size in aval.shape]
        if not fsdp or not any(fits):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * fits.index(max(fits)), mesh.axis_names))

    return jax.tree.map(sharding, state)
