"""Eight virtual CPU devices for every test, set before JAX starts; and compiling quickly where tests compile much."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """For tests of many small programs, which take longer to compile than to run: XLA's optimizations left out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
