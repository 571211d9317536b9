"""Describes devices so that XLA can compile for them without the hardware.

TPUs need ``libtpu``. GPUs need JAX's CUDA plugin.
"""

import functools
import os
from typing import Any, NamedTuple

# Without these settings libtpu queries its host machine, and XLA tries to time kernels on a GPU. Without timings it cannot
# tile some of Triton's matrix products, so cuBLAS takes them all.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is touched
if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
    flags = " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

import benchmarks
import wmkp

# An H100 (SXM5, 80 GB), from its data sheet and CUDA's occupancy tables.
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


# The part of a v5e's 16 GiB that libtpu leaves to a program.
USABLE = 63 * 2**28


class Target(NamedTuple):
    """The devices that a step is compiled for.

    Attributes:
      platform: "tpu" or "cuda".
      devices: the topology, and the number of its devices.
      fsdp: whether the state is divided among the devices.
      memory: the bytes of one device.
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
        """A mesh of all devices, or None for a single device."""
        return Mesh(np.array(self.devices()), ("data",)) if self.count > 1 else None

    def missing(self) -> str:
        """The package that must be installed first, or ""."""
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
    """All devices of a topology. The cache is needed because devices of two descriptions are not equal."""
    if platform == "tpu":
        return topologies.get_topology_desc(topology, platform="tpu").devices
    return topologies.get_topology_desc("", platform="cuda", target_config=H100, topology=topology).devices


def placed(tree: Any, target: Target, batch: bool = False) -> Any:
    """Places the shapes of a state or a batch on a target's devices. A batch is divided among them."""
    mesh = target.mesh()
    if mesh is None:
        where = jax.tree.map(lambda _: SingleDeviceSharding(target.devices()[0]), tree)
    elif batch:
        where = jax.tree.map(lambda _: wmkp.training.batch_sharding(mesh), tree)
    else:
        where = wmkp.training.state_sharding(tree, mesh, target.fsdp)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)
