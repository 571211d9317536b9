"""Where, when and with what a result was made."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import jax

import wmkp

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "torch", "biotorch")


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    """Date, commit (None outside a checkout), machine, devices, and versions of the packages that matter."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    root, commit = Path(wmkp.__file__).parents[1], ""
    if (root / ".git").exists():  # a checkout of wmkp, not a package installed inside another repository
        git = partial(subprocess.run, cwd=root, capture_output=True, text=True, check=False)
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        # Results that were just written do not count as changes.
        changed = git(["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results", ":!RESULTS.md"]).returncode
        commit += "-dirty" if commit and changed else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := installed(name))},
        },
    }
