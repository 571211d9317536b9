"""Measures wmkp's speed relative to backprop, to other libraries and to the hardware's limit, and prints a table.

Each group of rows runs in its own process and writes benchmarks/results/GROUP.json. Rows that this machine cannot
measure are marked as not run.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import benchmarks

# For how many seconds each group may start new parts. After a fifth more it is killed.
GROUPS = {
    "engaged": 900,
    "mirror_cost": 1300,
    "peers": 260,
    "scaling": 90,
    "devices": 60,
    "accuracy": 60,
    "gpu": 600,
    "compiled": 3600,
}
# Groups whose files have other names.
FILES = {"compiled": ("tpu", "gpu_compiled")}


def main() -> int:
    """Runs the groups. Returns 1 if one was cut off or failed, whatever the numbers say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run (default: all)")
    parser.add_argument(
        "--data-dir", type=Path, help="directory of the prepared TFDS datasets mnist and cifar10, or of NAME.npz files"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try out the scripts; does not keep results"
    )
    parser.add_argument(
        "--here", action="store_true", help="run one group in this process (used by the command itself)"
    )
    args = parser.parse_args()
    where = Path(tempfile.gettempdir()) / "wmkp-benchmarks" if args.quick else benchmarks.RESULTS
    if args.here:
        (group,) = args.only
        settings = benchmarks.Settings(args.quick, args.data_dir)
        module = importlib.import_module(f"benchmarks.{group}")
        if hasattr(module, "run"):  # finished rows are kept
            return int(module.run(settings, where, GROUPS[group]))
        parts = module.parts(settings)
        benchmarks.run_parts(group, parts, settings, GROUPS[group], where)
        return 0
    failed = 0
    options = [*(["--data-dir", str(args.data_dir)] if args.data_dir else []), *(["--quick"] if args.quick else [])]
    # NumPy chooses its own threads and kernels: these settings would slow the reference.
    environment = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    for group in args.only:
        print(f"\n## {group}", flush=True)
        command = [sys.executable, "-m", "benchmarks", "--here", "--only", group, *options]
        try:
            failed |= subprocess.run(command, env=environment, timeout=1.2 * GROUPS[group] + 30, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"# {group} was cut off", flush=True)
            failed = 1
    print(f"\n{'':58} {'value':>9} {'quartiles':15} {'target':8}")
    for name in (name for group in args.only for name in FILES.get(group, (group,))):
        path = where / f"{name}.json"
        for row in benchmarks.read(path) if path.exists() else [benchmarks.Row(name, note="no result")]:
            print(row.line())
    print(f"\nWritten: {where}")
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
