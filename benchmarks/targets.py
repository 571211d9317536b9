"""Devices that need not be here: XLA compiles for their description. TPUs need ``libtpu``, GPUs JAX's CUDA plugin."""

import functools
import os
from typing import Any, NamedTuple

# libtpu looks for the machine that it is on, unless it is told; and without a GPU there is nothing to time kernels on.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is touched
if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

import benchmarks
import wmkp

# An H100 (SXM5, 80 GB) as its data sheet and CUDA's occupancy tables have it.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
"""


# Of a v5e's 16 GiB what libtpu leaves to a program.
USABLE = 63 * 2**28


class Target(NamedTuple):
    """Where a step is to run.

    Attributes:
      platform: "tpu" or "cuda".
      devices: which topology, and how many of its devices.
      fsdp: whether the state is divided among them.
      memory: bytes of one.
    """

    platform: str
    topology: str
    count: int
    fsdp: bool
    memory: int

    def devices(self) -> list[Any]:
        """The described devices."""
        return described(self.platform, self.topology)[: self.count]

    def mesh(self) -> Mesh | None:
        """All of them, if they are more than one."""
        return Mesh(np.array(self.devices()), ("data",)) if self.count > 1 else None

    def missing(self) -> str:
        """What must be installed first, or ""."""
        needed = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}[self.platform]
        return "" if benchmarks.installed(needed) else f"{needed} is not installed"


TARGETS = {
    "v5e": Target("tpu", "v5e:4x4", 1, False, USABLE),
    "v5e 4x4": Target("tpu", "v5e:4x4", 16, False, USABLE),
    "v5e 4x4, fsdp": Target("tpu", "v5e:4x4", 16, True, USABLE),
    "H100": Target("cuda", "1x1x1", 1, False, 80 * 10**9),
    "8 H100": Target("cuda", "1x1x8", 8, False, 80 * 10**9),
}


@functools.cache
def described(platform: str, topology: str) -> list[Any]:
    """All devices of a topology, made once: those of two descriptions are not the same."""
    if platform == "tpu":
        return topologies.get_topology_desc(topology, platform="tpu").devices
    return topologies.get_topology_desc("", platform="cuda", target_config=H100, topology=topology).devices


def placed(tree: Any, target: Target, batch: bool = False) -> Any:
    """Shapes as arrays on a target's devices: a state's, or a batch's, which is divided among them."""
    mesh = target.mesh()
    if mesh is None:
        where = jax.tree.map(lambda _: SingleDeviceSharding(target.devices()[0]), tree)
    elif batch:
        where = jax.tree.map(lambda _: wmkp.batch_sharding(mesh), tree)
    else:
        where = wmkp.training.state_sharding(tree, mesh, target.fsdp)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)
