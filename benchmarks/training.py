"""Measures test error and the angles of every projection in short CPU runs under BP, KP and WM.

``python -m benchmarks.training --data-dir DIR`` runs ``wmkp train`` with each of the settings below. It prints one line
per run, and writes ``benchmarks/results/training.json``. DIR holds TFDS's cifar10, mnist and imagenet2012.
"""

import dataclasses
import math
import time
from pathlib import Path

import tyro

import benchmarks
from wmkp.experiments.commands import train
from wmkp.experiments.commands.recipes import RECIPES
from wmkp.experiments.runs import logs

# The changes to each recipe, and the rules. BP comes last where it is slowest.
RUNS = {
    "decoder-characters": (("bp", "kpm", "wm"), {"steps": 400, "eval_every": 100.0}),
    "resnet20-cifar10": (
        ("kp", "wm", "bp"),
        {"epochs": 2.0, "schedule": "cosine", "drop_epochs": (), "weight_decay": 5e-4, "log_every": 30},
    ),
    "vit-mnist": (("bp", "kpm", "wm"), {"steps": 400, "batch_size": 64, "eval_every": 100.0}),
    "resnet18-imagenet": (
        ("bp", "kp", "wm"),
        {
            "steps": 3,
            "batch_size": 64,
            "workers": 0,
            "dtype": "float32",
            "mirror_every": 1,
            "mirror_steps": 1,
            "log_every": 1,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Trains real models at a size for CPUs."""

    data_dir: Path
    """Where TFDS has the datasets."""
    out: Path = Path("runs")
    """The runs' directories go here."""
    only: tuple[str, ...] = tuple(RUNS)
    """Which of the settings to run."""
    save: bool = True
    """Whether to write the results, after each run."""


def main(args: Args) -> None:
    """Runs all settings."""
    rows = []
    for base in args.only:
        rules, changes = RUNS[base]
        for rule in rules:
            name = f"{base}-{rule}"
            config = dataclasses.replace(
                RECIPES[name], out=args.out / name, data_dir=args.data_dir, save_every=100.0, **changes
            )
            start = time.perf_counter()
            train.train(config)
            last = logs.read(config.out / "test.csv")[-1]
            speed = logs.read(config.out / "train.csv")[-1]["examples_per_second"]
            rows.append(
                {
                    "run": name,
                    "changes": changes,
                    "seconds": time.perf_counter() - start,
                    "examples_per_second": speed,
                    **{name: None if math.isnan(x) else x for name, x in last.items()},
                }
            )
            shown = {k: round(last[k], 4) for k in last if "/" not in k}
            print(name, shown, f"{speed:.1f} examples/s", flush=True)
            if args.save:
                benchmarks.save("training", {"rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
