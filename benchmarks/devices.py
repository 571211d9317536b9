"""How the time of a Kolen-Pollack step relative to backprop grows with the number of devices.

The devices are virtual and share the CPU's cores. So the benchmark measures the cost of dividing the work, not the gain.
"""

import os

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import statistics
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

import benchmarks
from benchmarks import Part, Row, Settings
from benchmarks.scaling import BASE, both, chain

DEVICES = (1, 2, 4, 8)


def parts(settings: Settings) -> dict[str, Part]:
    """The only part of this group."""
    return {"devices": partial(divided, settings)}


def divided(settings: Settings) -> Iterator[Row]:
    """Times KP relative to BP, both divided over 1, 2, 4 and 8 virtual devices."""
    for count in DEVICES[:2] if settings.quick else DEVICES:
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        taken = benchmarks.in_turns(both(chain(**BASE), mesh), 0 if settings.quick else 3)
        step = 1e3 * statistics.median(taken["KP"])
        yield benchmarks.ratio(
            f"KP over BP, dense layers, {count} devices", taken, "KP", "BP", f"a KP step: {step:.1f} ms"
        )
