"""Sets eight virtual CPU devices before JAX starts, and makes compilation fast."""

import gc
import os
import tempfile
from importlib.metadata import version

# Small programs compile in half the time without fusion emitters and as one module. An unknown flag ends the process,
# and later versions of XLA have only the fusion emitters.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else "")
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_force_host_platform_device_count=8"
)
# Sets the number of XLA's threads, by default the number of devices or cores. An all-reduce over eight devices holds
# eight threads. If one is busy elsewhere, the others wait until XLA ends the process (seen in three runs).
os.environ["NPROC"] = "32"

# All processes of this run (pytest's workers and the processes that tests start) share one compilation cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

LONGEST = ["test_processes", "test_docs", "test_reproduce", "test_train", "test_guards"]


def pytest_collection_modifyitems(items):
    """Puts the files with the longest tests first, so that workers end together."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("integration")


def pytest_collection_finish():
    """Leaves the objects of imports out of garbage collection, and collects less often. Traces make many objects."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module")
def quick_compile():
    """Turns XLA's optimizations off, for tests of many small programs that take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_compiled():
    """Clears JAX's caches after each module: thousands of compiled programs take gigabytes of memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def child_environment():
    """The environment of a process with one CPU device and the compiler options of ``quick_compile``."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
