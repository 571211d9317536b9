"""Runs the test suite under the oldest or the newest versions that pyproject.toml allows.

    python -m benchmarks.versions oldest
    python -m benchmarks.versions newest --python python3.13

Each command makes a fresh virtual environment and runs the tests there. ``oldest`` installs every requirement of the
library and of its command line at its lower bound. The counts and the versions go to ``results/versions.json``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Literal

import tyro

import benchmarks
from wmkp.experiments.runs.provenance import provenance

ROOT = Path(__file__).parent.parent
NAMED = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain")


def oldest() -> list[str]:
    """``name==lower bound`` for each requirement with a lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["experiments"]]
    found = [re.match(r"([\w.-]+)>=([\d.]+)", line) for line in wanted]
    return sorted({f"{m[1]}=={m[2]}" for m in found if m})


def versions(
    which: tyro.conf.Positional[Literal["oldest", "newest"]],
    python: str = sys.executable,
    tests: tuple[str, ...] = ("tests",),
) -> None:
    """Runs the tests and stores the counts. The exit code is 1 if a test failed.

    Args:
      which: the oldest or the newest versions that pyproject.toml allows.
      python: the interpreter of the new environment.
      tests: files or directories, relative to the repository.
    """
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / "venv" / "bin" / "python"
        held, report = Path(scratch) / "held.txt", Path(scratch) / "report.xml"
        held.write_text("\n".join(oldest() if which == "oldest" else []))
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        run = lambda *command, **more: subprocess.run(command, cwd=ROOT, env=environment, **more)
        run(python, "-m", "venv", str(own.parent.parent), check=True)
        run(str(own), "-m", "pip", "install", "-q", "-e", ".[dev]", "-c", str(held), check=True)
        run(str(own), "-m", "pytest", "-q", "-m", "", *tests, f"--junitxml={report}", check=False)
        listing = run(str(own), "-m", "pip", "list", "--format=json", check=True, capture_output=True).stdout
        version = run(str(own), "-V", check=True, capture_output=True, text=True).stdout.split()[1]
        suites = ElementTree.parse(report).getroot()
        cases = suites.iter("testcase")
        ended = [
            next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
            for case in cases
        ]
    found = {package["name"]: package["version"] for package in json.loads(listing)}
    row = {
        **{key: made for key, made in provenance().items() if key in ("date", "commit")},
        "python": version,
        "versions": {name: found[name] for name in NAMED},
        "tests": list(tests),
        "counts": {outcome: ended.count(outcome) for outcome in ("passed", "skipped", "failure", "error")},
    }
    print(json.dumps(row, indent=1))
    path = benchmarks.RESULTS / "versions.json"
    kept = json.loads(path.read_text())["runs"] if path.exists() else {}
    benchmarks.save("versions", {"runs": {**kept, which: row}})
    sys.exit(int(row["counts"]["failure"] + row["counts"]["error"] > 0 or not ended))


if __name__ == "__main__":
    tyro.cli(versions)
