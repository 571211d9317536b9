"""``python -m benchmarks``: how fast wmkp is, against backprop, against peers and against the limit; prints a table.

Runs what the machine allows, each group of rows in a process of its own, and writes ``benchmarks/results/<group>.json``.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import benchmarks

# How many seconds each group may begin new parts for; a fifth more, and it is killed.
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
# A group that writes files of another name.
FILES = {"compiled": ("tpu", "gpu_compiled")}


def main() -> int:
    """Runs the groups asked for; 1 if one of them was cut off or failed, whatever the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run; all by default")
    parser.add_argument("--data-dir", type=Path, help="where TFDS keeps mnist and cifar10 (or <name>.npz of each)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the scripts out: results are not kept")
    parser.add_argument("--here", action="store_true", help="run one group in this process, as the command itself does")
    args = parser.parse_args()
    where = Path(tempfile.gettempdir()) / "wmkp-benchmarks" if args.quick else benchmarks.RESULTS
    if args.here:
        (group,) = args.only
        settings = benchmarks.Settings(args.quick, args.data_dir)
        module = importlib.import_module(f"benchmarks.{group}")
        if hasattr(module, "run"):  # it keeps what it has
            return int(module.run(settings, where, GROUPS[group]))
        parts = module.parts(settings)
        benchmarks.run_parts(group, parts, settings, GROUPS[group], where)
        return 0
    failed = 0
    options = [*(["--data-dir", str(args.data_dir)] if args.data_dir else []), *(["--quick"] if args.quick else [])]
    # NumPy's threads and kernel are left to itself: these would slow the yardstick.
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
