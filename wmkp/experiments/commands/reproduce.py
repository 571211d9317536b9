"""wmkp reproduce: reproduces published figures and compares them with the published numbers."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from wmkp import checks
from wmkp.experiments import devices
from wmkp.experiments.commands import published, recipes, train, verdicts
from wmkp.experiments.commands.verdicts import COMPARED, QUARTERED, caption, cell, quarters, table, verdict
from wmkp.experiments.config import MACHINES, RULES, InputError, Reproduce, Train, flag
from wmkp.experiments.runs import figures, logs, outputs
from wmkp.experiments.runs.build import build, like
from wmkp.experiments.runs.provenance import provenance
from wmkp.experiments.runs.settings import FREE
from wmkp.training import batch_sharding

IMAGENET_EXAMPLES = 1_281_167

# Top-1 test error in percent of LeNet on MNIST in BioTorch's README, which has neither KP nor WM.
BIOTORCH = {"bp": 0.91, "fa": 1.7, "dfa": 1.61, "ss": 0.94, "brsf": 0.91, "frsf": 0.97}

# Test error in percent of a pre-norm residual perceptron on CIFAR-10 after 100 epochs (arXiv 2606.21126).
RESIDUAL = {"bp": 38.3, "fa": 59.8, "dfa": 69.4, "frozen": 65.1}


class Battery(NamedTuple):
    """Runs of ``wmkp train`` that make one figure.

    Attributes:
      runs: recipes, by name.
      changes: settings that differ from the recipes.
      published: the published test error in percent, by rule.
      seeds: the number of runs of each rule.
    """

    runs: tuple[str, ...]
    changes: dict[str, Any]
    published: dict[str, float] = {}  # noqa: RUF012
    seeds: int = 1


def _runs(base: str, rules: str) -> tuple[str, ...]:
    return tuple(f"{base}-{rule}" for rule in rules.split())


# Long enough for Kolen-Pollack's clock, with a schedule that does not stop it early. WM stays below 6 degrees.
_ALIGNING = {
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "drop_epochs": (),
    "epochs": verdicts.EPOCHS,
    "mirror_every": 1,
    "mirror_noise": "gaussian",
    "mirror_angle": 5.0,
    "mirror_rate": 0.1,
    "mirror_steps": 100,
}
# Runs for an hour on two CPU cores: a fraction of the published length.
_SMALL_TEXT = {"width": 64, "depth": 2, "batch_size": 8, "epochs": 1.0, "eval_every": 0.2, "learning_rate": 2e-3}
_SMALL_RESIDUAL = {"batch_size": 256, "epochs": 3.0, "eval_every": 0.5, "save_every": 3.0}
_SMALL_CLASSES = {"width": 16, "image_size": 16, "epochs": 8.0}

BATTERIES = {
    "akrout-resnet20": Battery(_runs("resnet20-cifar10", "bp wm kp kpm ss fa"), _ALIGNING),
    "akrout-tiny": Battery(_runs("resnet18-tiny", "bp wm kp kpm ss fa"), _ALIGNING),
    "akrout-imagenet": Battery(
        _runs("resnet18-imagenet", "bp wm kp ss fa") + _runs("resnet50-imagenet", "bp wm kp ss fa"), {}
    ),
    "biotorch-lenet": Battery(_runs("lenet-mnist", "bp fa dfa ss brsf frsf kp kpm wm"), {}, BIOTORCH),
    "language": Battery(_runs("decoder-characters", "bp fa dfa ss kp mkp kpm wm frozen"), _SMALL_TEXT, seeds=3),
    "residual": Battery(
        _runs("residual-cifar10", "bp fa dfa ss kp mkp wm pfa frozen"), _SMALL_RESIDUAL, RESIDUAL, seeds=3
    ),
    "hundred-classes": Battery(_runs("resnet18-tiny", "bp wm mkp kp ss fa"), _SMALL_CLASSES),
}
ORDERS, ORDERS_EPOCHS = 8, 3  # the number of fixed data orders compared, and the epochs of each
CURVES = {  # dataset, variants
    "akrout-mnist": ("mnist", published.PUBLISHED),
    "akrout-cifar10": ("cifar10", published.PUBLISHED),
    "akrout-mended": ("mnist", published.MENDED),
    "akrout-jpeg": ("cifar10", published.JPEG),
}


def reproduce(config: Reproduce) -> None:
    """Runs ``wmkp reproduce``.

    Writes to the output directory ``run.json`` (command, settings, commit, machine, date), each run's own CSV files,
    ``summary.csv`` (the table that is printed) and pictures.

    Raises:
      InputError: the command cannot run this config.
    """
    config.check()
    figure = config.figure
    names, make = _parts(figure)
    if unknown := [name for name in config.only if name not in names]:
        raise InputError(f"--only: {config.figure} has no {unknown[0]!r}; choose from {', '.join(names)}")
    config = dataclasses.replace(
        config, only=config.only or tuple(names), out=config.out or Path("runs") / config.figure
    )
    assert config.out is not None
    if config.distributed:
        devices.start(settings(config, config.only[0]))
    with outputs.claim(config.out) if devices.is_first() else contextlib.nullcontext():
        _check_out(config.out, figure)
        summary = make(config, config.out)
        if devices.is_first():
            write(config.out / "summary.csv", summary)
            _print(config, summary)


def _check_out(out: Path, figure: str) -> None:
    """Raises InputError if the directory holds another figure, or its run.json cannot be read."""
    path = out / "run.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text())["figure"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({checks.first_line(error)}); move it away, or use another --out"
        ) from None
    if there != figure:
        raise InputError(f"{out} has {there} in it; use another --out")


def _parts(figure: str) -> tuple[Sequence[str], Callable[[Reproduce, Path], list[dict[str, Any]]]]:
    """The names of a figure's runs, and the function that makes it."""
    if figure in CURVES:
        return list(CURVES[figure][1]), _curves
    if figure in BATTERIES:
        return BATTERIES[figure].runs, _battery
    return list(published.HIDDEN), _orders


def _check_unchanged(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InputError if the directory holds runs with other settings, or longer ones. Call it before writing."""
    now = json.loads(json.dumps(now, default=str))
    pairs = [("seed", before.get("seed", now.get("seed")), now.get("seed"))]
    if now.get("epochs", math.inf) < before.get("epochs", 0):
        pairs.append(("epochs", before["epochs"], now["epochs"]))
    for name, run in now.get("runs", {}).items():
        there = before.get("runs", {}).get(name, run)
        pairs += [(key, there.get(key), x) for key, x in run.items()]
    changed = dict.fromkeys(f"{flag(key)} was {old} and is {new}" for key, old, new in pairs if old != new)
    if changed:
        raise InputError(f"{out} was started with other settings: {'; '.join(changed)}; use another --out")


def _started(config: Reproduce, out: Path, **settings: Any) -> None:
    """Writes to ``run.json`` what was run, now and earlier in the same directory."""
    written = {"command": shlex.join(["wmkp", *sys.argv[1:]]), **provenance(), "figure": config.figure, **settings}
    path = out / "run.json"
    there = written
    if path.exists():
        there = json.loads(path.read_text())
        _check_unchanged(out, there, settings)
    before = [*there.get("before", []), {name: there.get(name) for name in ("commit", "date")}]
    if before := [record for record in before if record["commit"] != written["commit"]]:
        written["before"] = before
    if devices.is_first():
        outputs.write_atomically({path: (json.dumps(written, indent=1, default=str) + "\n").encode()})


def _curves(config: Reproduce, out: Path) -> list[dict[str, Any]]:
    """The published NumPy experiments. On CPUs two train at a time, because their matrix products are small.

    Existing curves resume from their last checkpoint.
    """
    name, variants = CURVES[config.figure]
    dataset = published.load(name, config.data_dir)
    epochs = published.EPOCHS if config.epochs is None else round(config.epochs)
    theirs = {key: _reference(config.reference, name, key, epochs) for key in config.only} if config.reference else {}
    fresh = not any((out / key).exists() for key in config.only)
    about = {"epochs": epochs, "seed": config.seed, "variants": {k: variants[k]._asdict() for k in config.only}}
    _started(config, out, **about)
    console, begin, stopped = Console(soft_wrap=True), time.perf_counter(), threading.Event()

    def one(key: str) -> list[dict[str, float]]:
        def report(rows: list[published.Epoch]) -> None:
            write(out / f"{key}.csv", [row._asdict() for row in rows])
            if len(rows) % 20 == 0:
                last, seconds = rows[-1], time.perf_counter() - begin
                console.print(f"{key}: epoch {last.epoch}, {last.test_accuracy_percent:.2f} %, {seconds:.0f} s")

        hidden = published.HIDDEN[name]
        rows = published.run(variants[key], dataset, hidden, epochs, config.seed, report, out / key, stopped.is_set)
        report(rows)
        return [row._asdict() for row in rows]

    at_a_time = min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(at_a_time) as pool:
        made = [pool.submit(one, key) for key in config.only]
        try:
            wait(made, return_when=FIRST_EXCEPTION)
        finally:  # after an error or Ctrl-C the others end too; the pool waits for them
            stopped.set()
            for curve in made:
                curve.cancel()
        curves = {key: curve.result() for key, curve in zip(config.only, made, strict=True)}
    if fresh:  # only if nothing was there before
        seconds = round(time.perf_counter() - begin)
        console.print(f"All trained in {seconds} s.")
        _started(config, out, **about, seconds=seconds)
    title = f"{name}, {epochs} epochs" + (": ours, and pale the published" if theirs else "")
    outputs.write_atomically({out / "curves.png": figures.published(curves, theirs, title)})
    return [
        {
            **_compared(key, variants[key].title, curves[key], theirs.get(key)),
            **_pixels(variants[key], dataset),
            "dataset": name,
        }
        for key in config.only
    ]


def _pixels(variant: published.Variant, dataset: published.Dataset) -> dict[str, float]:
    """The root mean square by which JPEG moves a pixel of the test images, of 255; empty without JPEG."""
    if variant.jpeg is None:
        return {}
    images = dataset.test["image"]
    moved = published.through_jpeg(images, variant.jpeg).astype(np.float32) - images
    return {"pixels_moved": float(np.sqrt(np.mean(np.square(moved))))}


def _orders(config: Reproduce, out: Path) -> list[dict[str, Any]]:
    """BP's first epochs in the dataset's own order (0) and in others (1, 2, ...), each the same in all epochs."""
    epochs = ORDERS_EPOCHS if config.epochs is None else round(config.epochs)
    _started(config, out, epochs=epochs, orders=ORDERS, seed=config.seed)
    variant, summary = published.PUBLISHED["bp"], []
    for name in config.only:
        dataset = published.load(name, config.data_dir)
        theirs = _reference(config.reference, name, "bp", epochs) if config.reference else None
        curves = []
        for order in range(1 + ORDERS):
            places = np.arange(len(dataset.train["label"]))
            if order:
                places = np.random.default_rng((config.seed, order)).permutation(places)
            ordered = dataset._replace(train={key: x[places] for key, x in dataset.train.items()})
            curves.append(published.run(variant, ordered, published.HIDDEN[name], epochs, config.seed))
            rows = [{"order": i, **row._asdict()} for i, curve in enumerate(curves) for row in curve]
            write(out / f"{name}.csv", rows)
        for own, *others in zip(*curves, strict=True):
            found = [row.test_accuracy_percent for row in others]
            line = {
                "run": name,
                "what": f"BP, {ORDERS} orders",
                "epoch": own.epoch + 1,
                "train_loss": sum(row.train_loss for row in others) / ORDERS,
                "accuracy_least": min(found),
                "accuracy_mean": sum(found) / ORDERS,
                "accuracy_most": max(found),
                "accuracy_own": own.test_accuracy_percent,
            }
            if theirs:
                line["train_loss_published"] = theirs[own.epoch]["train_loss"]
                line["accuracy_published"] = theirs[own.epoch]["test_accuracy_percent"]
            summary.append(line)
    return summary


def _compared(key: str, title: str, ours: list[dict[str, float]], theirs: dict[int, dict[str, float]] | None) -> Any:
    """A variant's line: each quantity at the last epoch, its published value, and the largest difference over epochs."""
    last = ours[-1]
    line: dict[str, Any] = {"run": key, "what": title, "epoch": int(last["epoch"]) + 1}
    line |= {f"delta_angle_{what}": last[f"delta_angle_hidden_{what}_deg"] for what in ("mean", "sd")}
    for name, column in COMPARED.items():
        line[name] = last[column]
        if theirs:
            line[f"{name}_published"] = theirs[int(last["epoch"])][column]
            far = [abs(row[column] - theirs[int(row["epoch"])][column]) for row in ours if int(row["epoch"]) in theirs]
            line[f"{name}_largest_difference"] = max(far, default=math.nan)
            if name in QUARTERED:
                for i, (mean, error) in enumerate(quarters(ours, list(theirs.values()), column), 1):
                    line |= {f"{name}_quarter_{i}": mean, f"{name}_quarter_{i}_error": error}
    return line


def _reference(directory: Path, dataset: str, rule: str, epochs: int) -> dict[int, dict[str, float]] | None:
    """A published curve, by epoch, or None where none was published. Raises InputError if it lacks an epoch or a column."""
    path = directory / f"akrout2019_{dataset}_{rule}.csv"
    if not path.exists():
        if rule in published.PUBLISHED:
            raise InputError(f"--reference: {path} does not exist; fix the path, or leave --reference out")
        return None
    try:
        curve = {row["epoch"]: row for row in logs.read(path, ("epoch", *COMPARED.values()))}
    except InputError as error:
        raise InputError(f"--reference: {error}") from None
    if lacking := [epoch for epoch in range(epochs) if epoch not in curve]:
        raise InputError(
            f"--reference: {path} has no epoch {lacking[0]}; leave --reference out, or train fewer --epochs"
        )
    return {epoch: curve[epoch] for epoch in range(epochs)}


def settings(config: Reproduce, name: str) -> Train:
    """The config of one run of a battery: its recipe, with the schedule shortened by ``--epochs``."""
    recipe = dataclasses.replace(recipes.RECIPES[name], **BATTERIES[config.figure].changes)
    epochs = config.epochs or recipe.epochs
    share = epochs / recipe.epochs
    assert config.out is not None
    seeds = config.seeds or BATTERIES[config.figure].seeds
    if config.steps:  # to measure throughput, step by step
        mirror_steps = None if recipe.mirror_steps is None else min(recipe.mirror_steps, config.steps)
        recipe = dataclasses.replace(recipe, log_every=1, mirror_steps=mirror_steps)
    return dataclasses.replace(
        recipe,
        out=config.out / name,
        resume=True,
        data_dir=config.data_dir,
        image_size=config.image_size or recipe.image_size,
        batch_size=config.batch_size or recipe.batch_size,
        dtype=config.dtype or recipe.dtype,
        steps=config.steps,
        epochs=epochs,
        drop_epochs=tuple(share * epoch for epoch in recipe.drop_epochs),
        warmup_epochs=share * recipe.warmup_epochs,
        seed=config.seed,
        seeds=seeds,
        **{name: getattr(config, name) for name in MACHINES},
    )


def _battery(config: Reproduce, out: Path) -> list[dict[str, Any]]:
    """Runs of ``wmkp train``, one after another. Existing runs resume."""
    battery = BATTERIES[config.figure]
    runs = {name: settings(config, name) for name in config.only}
    kept = {name: {k: v for k, v in dataclasses.asdict(run).items() if k not in FREE} for name, run in runs.items()}
    _started(config, out, runs=kept)
    lines, tests = [], {}
    for name, run in runs.items():
        found = []
        each = each_seed(run)
        for one in each:
            begin = time.perf_counter()
            if not train.train(one):  # SIGTERM or Ctrl-C end all runs
                raise KeyboardInterrupt
            if devices.is_first():
                found.append(_measured(one) | {"seconds": time.perf_counter() - begin})
        # For the recipe's batch, even if the runs used a smaller one, rounded so that devices divide it.
        whole = run.batch_size * math.ceil(recipes.RECIPES[name].batch_size / run.batch_size)
        needed = memory(each[0], whole) if "imagenet" in config.figure else {}  # compiled by all processes together
        if not devices.is_first():
            continue
        line: dict[str, Any] = {"run": name, "what": RULES[run.rule], **_over_seeds(found)}
        if battery.published:
            line["test_error_published"] = battery.published.get(run.rule, math.nan)
        if "imagenet" in config.figure:
            line["hours_for_90_epochs"] = 90 * IMAGENET_EXAMPLES / line["examples_per_second"] / 3600
            line |= {f"{part}_GB": size / 1e9 for part, size in needed.items()} | {"memory_batch": whole}
        lines.append(line)
        tests[name] = [logs.read(one.out / "test.csv") for one in each]
        for one, rows in zip(each, tests[name], strict=True):
            write(out / (f"{name}.csv" if len(each) == 1 else f"{name}-seed{one.seed}.csv"), rows)
    if devices.is_first():
        draw(out, tests, {name: run.rule for name, run in runs.items()}, _measure(next(iter(runs.values()))))
    return lines


def each_seed(run: Train) -> list[Train]:
    """A battery's runs of one recipe, one for each seed."""
    return [run] if run.seeds == 1 else train.each_seed(run)


def _measure(run: Train) -> str:
    """The measures of a run."""
    return "test_loss" if run.dataset == "characters" else "test_error_percent"


def _measured(run: Train) -> dict[str, float]:
    """The numbers of a finished run: its last evaluation, and its throughput."""
    last = _rows(run.out / "test.csv", "epoch", "test_error_percent", *figures.ANGLES)[-1]
    rates = [row["examples_per_second"] for row in _rows(run.out / "train.csv", "examples_per_second")]
    rates = rates[run.mirror_every * run.accumulate :] or rates  # the first steps of either kind include compilation
    line = {"epoch": last["epoch"], "test_error": last["test_error_percent"]}
    if _measure(run) == "test_loss":
        line["test_loss"] = last["test_loss"]
    for kind in ("matrix", "delta"):
        line |= {f"{kind}_{which}": last[f"{kind}_angle_{which}_deg"] for which in ("mean", "worst")}
    ratios = [
        x for name, x in last.items() if name.startswith("delta_norm_ratio/") and not name.endswith(figures.OUTPUT)
    ]
    if "rounding_layers" in last:
        line |= {"ratio_least": min(ratios, default=math.nan), "ratio_most": max(ratios, default=math.nan)}
        line["rounding_layers"] = last["rounding_layers"]
    if "stream_growth" in last:
        line["stream_growth"] = last["stream_growth"]
    return line | {"examples_per_second": len(rates) / sum(1 / rate for rate in rates)}


def _over_seeds(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over seeds. With several seeds also the standard errors of test error and loss."""
    line = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    if len(found) > 1:
        line["seeds"] = len(found)
        for name in ("test_error", "test_loss"):
            if name in line:
                line[f"{name}_se"] = float(np.std([one[name] for one in found], ddof=1)) / math.sqrt(len(found))
    return line


def draw(out: Path, tests: Mapping[str, Sequence[figures.Curve]], rules: Mapping[str, str], measure: str) -> None:
    """A battery's pictures of its runs' evaluations, with a curve for each seed."""
    first = {name: curves[0] for name, curves in tests.items()}
    pictures = {"curves": figures.curves(tests, rules, measure), "layers": figures.layers(first, rules)}
    outputs.write_atomically({out / f"{name}.png": png for name, png in pictures.items() if png is not None})


def _rows(path: Path, *columns: str) -> list[dict[str, float]]:
    """The rows of a finished run's CSV file. Raises InputError if there are none."""
    if rows := logs.read(path, columns):
        return rows
    raise InputError(f"{path} is empty; move {path.parent} away, and the command trains it again")


def memory(config: Train, batch_size: int) -> dict[str, int]:
    """Bytes on each device in an engaged step of a batch of any size, by the compiler's count.

    First the state (W, B, the optimizer's) and the batch, then the temporaries.
    """
    run = build(config)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype, sharding=batch_sharding(run.mesh)),
        run.feed.probe,
    )
    advance: Any = run.advance  # jitted
    found = advance.lower(like(config, run), run.tally, batch).compile().memory_analysis()
    return {"state": found.argument_size_in_bytes, "step": found.temp_size_in_bytes}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows to a CSV file, with the union of their columns. NaN is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: cell(v, "{:.6g}") for k, v in row.items()})
    outputs.write_atomically({path: text.getvalue().encode()})


def _print(config: Reproduce, summary: list[dict[str, Any]]) -> None:
    headings, *lines = table(summary)
    shown = Table(title=config.figure, caption=caption(summary), box=box.SIMPLE_HEAD)
    for heading in headings:
        shown.add_column(heading.replace(", ", ",\n"), justify="left" if heading == "run" else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    console = Console()
    if not console.is_terminal:  # a log or a notebook: cut off nothing
        console = Console(width=max(console.width, 160))
    console.print(shown)
    assert config.out is not None
    if said := verdict(config.figure, summary, config.out):
        print(said)
    print(f"Written: {config.out}")
