"""Sets eight virtual CPU devices before JAX starts, and makes compilation fast."""

import gc
import os
import tempfile
from importlib.metadata import version

# XLA's older way of emitting code, and a program as one module: small programs compile in half the time. A flag that an
# XLA does not know ends the process, and later ones have only the new way.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else "")
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_force_host_platform_device_count=8"
)
# XLA has no more threads than devices or cores, and eight devices in an all-reduce hold eight: with one held up elsewhere
# they wait until XLA ends the process (seen in three runs). This is how many threads it is to have.
os.environ["NPROC"] = "32"

# What one process of this run has compiled, the others (pytest's workers, and what tests start) read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """For tests of many small programs, which take longer to compile than to run: XLA's optimizations left out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_compiled():
    """What a module compiled goes with it: thousands of programs kept are gigabytes, and tens of thousands of mappings."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def child_environment():
    """The environment of a process with one device that compiles as the tests under ``quick_compile`` do."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
