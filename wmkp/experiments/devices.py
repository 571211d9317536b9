"""The devices of a run: one mesh over all of them, in one process or several."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wmkp.experiments.config import InputError, Train
from wmkp.training import batch_sharding

HEARTBEAT_SECONDS = 30  # a silent process counts as lost after this time


def start(config: Train) -> None:
    """Joins the other processes of the run, if there are any. Call it before anything else uses JAX.

    Raises:
      InputError: they cannot be reached.
    """
    if not config.distributed or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--distributed: the processes cannot meet ({str(error).splitlines()[0]}); without a cluster that JAX "
            "detects, give each process --coordinator HOST:PORT, --processes N and its own --process number"
        ) from None


def make_mesh(batch_size: int) -> Mesh:
    """A mesh of all devices, among which each batch is divided.

    Raises:
      InputError: the batch does not divide evenly.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise InputError(f"--batch-size must be a multiple of the {len(devices)} devices; got {batch_size}")
    return Mesh(np.array(devices), ("data",))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch on its devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays, which every process holds whole, on every device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0
